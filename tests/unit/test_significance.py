"""Statistics against independent computations and planted truths."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from recbole_mllm.benchmark import significance as sig


def brute_auc(label: np.ndarray, score: np.ndarray) -> float:
    """Compare every positive with every negative."""
    positive, negative = score[label > 0], score[label == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return float(wins / (positive.size * negative.size))


def some_pairs(n_users: int = 12, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(n_users), 6)
    label = np.tile([1.0, 0, 0, 0, 0, 0], n_users)
    score = rng.normal(size=user.size) + label
    return user, label, np.round(score, 0 if ties else 9)


def test_intervals_agree_with_a_bootstrap_written_out():
    rng = np.random.default_rng(3)
    values = np.stack([rng.random(150), (rng.random(150) < 0.3).astype(float)])
    means = np.array([[row[rng.integers(0, 150, 150)].mean() for _ in range(4000)] for row in values])
    assert sig.estimate_means(values, seed=1) == sig.estimate_means(values, seed=1)
    for row, drawn, estimate in zip(values, means, sig.estimate_means(values, seed=1), strict=True):
        assert estimate.mean == pytest.approx(row.mean())
        width = estimate.high - estimate.low
        assert np.percentile(drawn, 2.5) == pytest.approx(estimate.low, abs=0.08 * width)
        assert np.percentile(drawn, 97.5) == pytest.approx(estimate.high, abs=0.08 * width)


def test_many_users_get_the_normal_interval_and_it_agrees(monkeypatch):
    values = (np.random.default_rng(0).random((1, 5000)) < 0.4).astype(float)
    (drawn,) = sig.estimate_means(values, seed=1)
    monkeypatch.setattr(sig, "BOOTSTRAP_BUDGET", 0)
    (normal,) = sig.estimate_means(values, seed=1)
    assert normal.low == pytest.approx(drawn.low, abs=0.001)
    assert normal.high == pytest.approx(drawn.high, abs=0.001)


def test_one_user_and_constant_values_have_an_interval_of_no_width():
    assert sig.estimate_means(np.array([[0.5]]), seed=1) == [sig.Estimate(0.5, 0.5, 0.5)]
    assert sig.estimate_means(np.zeros((1, 40)), seed=1) == [sig.Estimate(0.0, 0.0, 0.0)]


def test_the_paired_test_is_students_on_the_differences():
    rng = np.random.default_rng(2)
    a, b = rng.random(60) + 0.1, rng.random(60)
    told, expected = sig.compare_paired(a, b), stats.ttest_rel(a, b)
    assert told.difference == pytest.approx((a - b).mean()) and told.p == pytest.approx(expected.pvalue)
    assert told.effect == pytest.approx(expected.statistic / np.sqrt(60))
    assert told.ci95 == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert sig.compare_paired(a, a) == sig.Comparison(0.0, (0.0, 0.0), 1.0, 0.0)
    constant = sig.compare_paired(np.full(30, 1.0), np.zeros(30))
    assert constant.p < 1e-6 and constant.effect is None


def test_holm_as_in_the_textbook():
    p = [0.01, 0.04, 0.03, 0.005]
    assert sig.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert sig.holm([]) == []
    many = np.random.default_rng(6).random(200) ** 4
    assert sig.holm(many.tolist()) == pytest.approx(multipletests(many, method="holm")[1].tolist())


def test_pooled_auc_counts_every_pair_and_half_of_each_tie():
    user, label, score = some_pairs()
    pairs = sig.sort_pairs(user, label, score)
    assert sig.pooled_auc(pairs, np.ones(12)) == pytest.approx(brute_auc(label, score))
    constant = sig.sort_pairs(user, label, np.zeros(user.size))
    assert sig.pooled_auc(constant, np.ones(12)) == 0.5
    assert np.isnan(sig.pooled_auc(pairs, np.zeros(12)))


def test_a_replicate_is_the_auc_of_the_users_really_drawn_again():
    user, label, score = some_pairs()
    draws = sig.draw_users(12, user.size, seed=4)
    replicates = sig.auc_replicates([sig.sort_pairs(user, label, score)], draws)
    for draw, replicate in zip(draws[:20], replicates, strict=False):
        times = draw[user]
        assert replicate == pytest.approx(brute_auc(np.repeat(label, times), np.repeat(score, times)))


def test_a_planted_gain_in_auc_is_found_and_none_is_invented():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 21)
    label = np.tile([1.0] + [0.0] * 20, 200)
    draws = sig.draw_users(200, user.size, seed=1)

    def run(power: float) -> tuple[sig.SortedPairs, np.ndarray]:
        pairs = sig.sort_pairs(user, label, rng.normal(size=user.size) + power * label)
        return pairs, sig.auc_replicates([pairs], draws)

    (weak, weak_drawn), (strong, strong_drawn), (twin, twin_drawn) = run(0.3), run(1.3), run(0.3)
    everyone = np.ones(200)
    gain = sig.pooled_auc(strong, everyone) - sig.pooled_auc(weak, everyone)
    assert sig.compare_auc(gain, strong_drawn, weak_drawn, 200).p < 1e-6
    luck = sig.pooled_auc(twin, everyone) - sig.pooled_auc(weak, everyone)
    assert sig.compare_auc(luck, twin_drawn, weak_drawn, 200).p > 0.01
    assert sig.compare_auc(0.0, weak_drawn, weak_drawn, 200).p == 1.0


@pytest.mark.parametrize(
    ("n_users", "repetitions"),
    [(20, 60), pytest.param(20, 3000, marks=pytest.mark.slow), pytest.param(100, 1500, marks=pytest.mark.slow)],
)
def test_the_bootstrap_of_few_users_invents_no_difference_in_auc(n_users, repetitions):
    """Equal scorers, whose users differ in how high they score everything."""
    rng = np.random.default_rng(8)
    user, label = np.repeat(np.arange(n_users), 6), np.tile([1.0] + [0.0] * 5, n_users)
    draws = sig.draw_users(n_users, 10**6, seed=3)
    found = []
    for _ in range(repetitions):
        runs = [
            sig.sort_pairs(user, label, (rng.normal(size=(n_users, 6)) + rng.normal(size=(n_users, 1))).ravel() + label)
            for _ in range(2)
        ]
        one, two = (sig.auc_replicates([run], draws) for run in runs)
        difference = np.subtract(*(sig.pooled_auc(run, np.ones(n_users)) for run in runs))
        found.append(sig.compare_auc(float(difference), one, two, n_users).p)
    p = np.array(found)
    for level in (0.05, 0.01):
        hits = int((p < level).sum())
        assert stats.binomtest(hits, p.size, level, alternative="greater").pvalue > 0.01
    assert (p < 0.2).any()
