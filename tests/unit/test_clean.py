"""``clean`` lists, and with ``--yes`` removes, what runs have left behind: nothing a person or a store would miss.

It runs without a privilege in a throwaway folder (`unprivileged`).
"""

import pytest
import unprivileged

STAMP = "Nov-30-2026_15-00-00"
SCRATCH = ".mine.item.recbole-mllm-0123abcd.tmp"
LEFT = {
    "scratch": [f"dataset/mine/{SCRATCH}"],
    "logs": [
        f"saved/log/SASRec/SASRec-mine-{STAMP}-1a2b3c.log",
        f"saved/log_tensorboard/SASRec-mine-{STAMP}-77/events.out.tfevents.1.host.0",
        f"saved/log_tensorboard/SASRec-mine-{STAMP}-77/1796054568.14/events.out.tfevents.2.host.1",
        f"log/BPR/BPR-mine-{STAMP}-1a2b3c.log",
    ],
    "scores": [f"results/mine/runs/A-1/saved/scores-{'0f' * 16}.0"],
    "retrievers": ["saved/retriever-SASRec-0a1b2c3d4e5f.pth"],
}
NAMED = {
    "pairs": ["results/mine/runs/A-1/scores.npz", "results/mine/runs/A-1/valid_scores.npz"],
    "checkpoints": [
        f"saved/SASRec-{STAMP}.pth",
        f"saved/SASRec-{STAMP}.ids",
        f"saved/MLLMMSR-{STAMP}.last.pth",
        f"saved/MLLMMSR-{STAMP}/adapter_model.safetensors",
    ],
}
KEPT = [
    "dataset/mine/mine.inter", "dataset/mine/mine.mllm.sqlite", "dataset/mine/mine.t.isum", "dataset/mine/log/a.log",
    "results/mine/runs.jsonl", "results/mine/leaderboard.json", "results/other/runs/A-1/scores.npz", "saved/best.pth",
    f"saved/BPR-{STAMP}.pth",  # of stock RecBole
    "saved/log/SASRec/my.log", "saved/retriever.pth", "saved/retriever-best-2.pth",
    "results/mine/runs/A-1/scores.tsv", "saved/.x.tmp",
    *(f"dataset/later/.later.recbole-mllm-0123abcd.tmp/{name}" for name in ("locked", "complete", "later/later.inter")),
]  # fmt: skip


def run(script, place):
    """Run a script; the module is loaded first, as what it imports may be closed to others."""
    return unprivileged.run(script, place, "recbole_mllm.cli.clean")


@pytest.fixture
def place():
    with unprivileged.throwaway() as folder:
        here = folder / "work" / "here"
        for name in [path for paths in (*LEFT.values(), *NAMED.values(), KEPT) for path in paths]:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_text('{"run_id": "A-1"}\n')
        (folder / "others").mkdir()
        (folder / "others" / f"scores-{'0f' * 16}.0").write_text("theirs")
        (here / "saved" / "linked").symlink_to(folder / "others")
        (here / "saved" / f"scores-{'1f' * 16}.0").symlink_to(folder / "others" / f"scores-{'0f' * 16}.0")
        yield folder


def files(place):
    here = place / "work" / "here"
    return {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file() and not path.is_symlink()}


def listed(said):
    return {line.strip() for line in said.splitlines() if line.startswith("  ")}


def test_nothing_is_removed_before_yes_and_then_only_what_was_listed(place):
    before = unprivileged.snapshot(place)
    said = run("assert main(['clean']) == 0", place)
    assert listed(said) == {path for kind, paths in LEFT.items() for path in paths if kind != "logs"}  # whose?
    named = "'--kind', 'scratch,logs,scores,retrievers'"
    said = run(f"assert main(['clean', {named}]) == 0", place)
    assert listed(said) == {path for paths in LEFT.values() for path in paths}
    assert (
        "7 would be removed" in said
        and "nothing is removed without --yes" in said
        and unprivileged.snapshot(place) == before
    )
    there = files(place)
    assert "7 removed" in run(f"assert main(['clean', {named}, '--yes']) == 0", place)
    assert files(place) == there - listed(said) and (place / "others" / f"scores-{'0f' * 16}.0").is_file()
    assert not (place / "work/here/log").exists() and (place / "work/here/saved/log/SASRec").is_dir()
    assert not (place / "work/here/saved/log_tensorboard").exists()
    assert "nothing to remove" in run(f"assert main(['clean', {named}, '--yes']) == 0", place)


def test_what_somebody_may_need_goes_when_it_is_named(place):
    said = run("assert main(['clean', 'results', 'saved', '--kind', 'pairs,checkpoints', '--yes']) == 0", place)
    assert listed(said) == {path for paths in NAMED.values() for path in paths}
    assert not listed(said) & files(place) and set(KEPT) <= files(place)


def test_what_is_in_use_stays(place):
    script = f"""
        import fcntl
        log = open("saved/log/SASRec/SASRec-mine-{STAMP}-1a2b3c.log")
        scratch = open("dataset/mine/{SCRATCH}")
        fcntl.flock(scratch, fcntl.LOCK_EX)
        assert main(["clean", "--kind", "scratch,logs,scores,retrievers", "--yes"]) == 0
    """
    said = run(script, place)
    assert "5 removed" in said and {LEFT["logs"][0], LEFT["scratch"][0]} <= files(place)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("clean .", "is the working folder, or above it"),
        ("clean ..", "is the working folder, or above it"),
        ("clean / --yes", "is a root or a mount point"),
        ("clean ../../home --yes", "is the home folder"),
        ("clean nowhere", "there is no such folder"),
        ("clean saved --kind all", "--kind 'all' is unknown; give some of scratch, logs"),
        ("clean saved --epochs=3", "clean takes no '--epochs=3'"),
    ],
)
def test_a_mistake_is_one_line(place, words, message):
    before = unprivileged.snapshot(place)
    script = f"""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main({words.split()!r})
        print(code, said.getvalue())
    """
    said = run(script, place)
    assert said.startswith("2 ") and message in said and unprivileged.snapshot(place) == before
