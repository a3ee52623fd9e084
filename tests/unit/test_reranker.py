"""Shortlists: an order among the best, the rest untouched, exact for scores of any size, ties blind."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_mllm.data.sampling import tie_keys
from recbole_mllm.evaluation.full_ranking import best_items
from recbole_mllm.retrieval.reranker import Shortlist, mixed_scores

KEYS = tie_keys([f"u{n}" for n in range(3000)], [f"i{n}" for n in range(50)], 3)


def shortlist(scores, users, count, depth):
    count = min(count, 49)
    return Shortlist(scores, best_items(scores, users, max(count, depth), KEYS), count)


@st.composite
def _worlds(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale, shift = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e9, 1e30])), draw(st.sampled_from([-1e3, -1.0, 0.0, 1e3]))
    scores = torch.from_numpy(scale * (rng.integers(-4, 5, (4, 50)) + shift)).float()  # with many ties
    scores[:, 0] = -torch.inf
    for row in range(4):
        scores[row, rng.permutation(np.arange(1, 50))[: rng.integers(0, 50)]] = -torch.inf
    return scores, draw(st.integers(1, 60)), draw(st.integers(1, 20)), rng


@given(_worlds())
def test_the_best_stand_first_in_the_new_order_and_nothing_else_moves(world):
    scores, count, depth, rng = world
    short = shortlist(scores, np.arange(4), count, depth)
    logodds = rng.permutation(np.arange(short.asked.size)).reshape(short.asked.shape).astype(float)
    out = short.ranked(logodds, 1.0)
    assert out.dtype == torch.float32 and torch.equal(torch.isneginf(out), torch.isneginf(scores))
    for row in range(4):
        asked = short.asked[row][short.asked[row] > 0]
        allowed = int(torch.isfinite(scores[row]).sum())
        assert len(set(asked.tolist())) == len(asked) == min(count, allowed)
        rest = np.setdiff1d(np.flatnonzero(np.isfinite(scores[row].numpy())), asked)
        if len(rest) and len(asked):
            assert scores[row, asked].min() >= scores[row, rest].max() and out[row, asked].min() > out[row, rest].max()
        wanted = asked[np.argsort(-logodds[row][short.asked[row] > 0])]
        assert (np.diff(out[row, wanted].numpy()) < 0).all()  # strictly: float32 keeps the places apart
        order = rest[np.argsort(-out[row, rest].numpy(), kind="stable")]
        assert (np.diff(scores[row, order].numpy()) <= 0).all()
        top = torch.topk(out[row], min(depth, allowed)).values
        assert len(set(top.tolist())) == len(top)  # no ties where a metric looks


def test_what_ties_with_the_retriever_is_let_in_by_chance():
    scores = torch.zeros(3000, 50)
    scores[:, 0] = -torch.inf
    short = shortlist(scores, np.arange(3000), 10, 10)
    counts = np.bincount(short.asked.ravel(), minlength=50)[1:]
    expected = 3000 * 10 / 49
    assert abs(counts - expected).max() < 5 * np.sqrt(expected) and (short.asked > 0).all()


def test_a_silent_mllm_leaves_the_retrievers_order():
    scores = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    scores[:, 0] = -torch.inf
    for share in (0.0, 0.4, 1.0):
        out = shortlist(scores, np.arange(5), 12, 5).ranked(np.zeros((5, 12)), share)
        assert torch.equal(out.argsort(descending=True), scores.argsort(descending=True))


def test_a_mixture_is_of_probability_and_rescaled_score():
    logodds, before = np.array([[0.0, 2.0, -1.0, 7.0]]), np.array([[5.0, 3.0, 1.0, -np.inf]])
    real = np.array([[True, True, True, False]])
    found = mixed_scores(logodds, before, real, 0.25)[0, :3]
    assert found == pytest.approx([0.25 * 0.5 + 0.75, 0.25 / (1 + np.exp(-2)) + 0.375, 0.25 / (1 + np.e)])
