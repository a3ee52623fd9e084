"""What an earlier version has written is read by this one: paid summaries, records, checkpoints, exports, reports."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from recbole.utils import get_model, get_trainer, init_seed

from recbole_mllm.cli import main
from recbole_mllm.common.config import config_paths
from recbole_mllm.quick_start import make_config, read_and_split

ARCHIVE = Path(__file__).parents[1] / "earlier_version" / "results.tar.xz"
RUN = "MLLMMSR-2024-872bcd12"
DIGEST = "c6440b0ca5bd4184"
TAG = "tiny-recurrent-b4-image-3e9d094e"
KEYS = {"limit_users": 12, "lora_r": 2, "lora_dropout": 0, "epochs": 1}
RECORD_FIELDS = [
    "candidate_rules", "candidates", "commit", "config", "config_digest", "converged", "dataset", "device",
    "features_s", "kind", "label", "load_s", "metrics", "model", "n_users", "pairs_per_s", "parameters_trained",
    "peak_memory_mb", "per_user", "protocol", "retrieval", "run_id", "score_s", "scores", "scores_reused", "seed",
    "started", "status", "summarize_reused", "summarize_s", "tokens", "train_s", "tuning", "valid", "versions",
    "world_size",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the earlier files at their places, and the demo's world built by today's code."""
    home = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(home, filter="data")
    for path in [home / "results" / "runs.jsonl", *home.glob("results/runs/*/job.json")]:
        path.write_text(path.read_text().replace("/tmp/earlier", str(home)))
    configured(home, "Pop", build=True)
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def configured(home, model="MLLMMSR", build=False):
    own = {"data_path": str(home / "dataset"), "state": "ERROR", "frozen_candidates": True, "use_gpu": False}
    if build:  # beside the earlier summaries, which a new world's folder would not take
        kept = home / "kept"
        (home / "dataset" / "demo").rename(kept)
        read_and_split(make_config(model, "demo", list(config_paths(["demo"])), own))
        for path in kept.iterdir():
            shutil.copy(path, home / "dataset" / "demo")
        return None
    own["checkpoint_dir"] = str(home / "saved")
    return make_config(model, "demo", list(config_paths(["demo"])), own | KEYS)


def test_every_summary_is_found_again(home, capsys):
    files = [home / "dataset" / "demo" / f"demo.{TAG}.{kind}" for kind in ("isum", "usum")]
    before = [path.read_bytes() for path in files]
    keys = [f"--{key}={value}" for key, value in KEYS.items()]
    assert main(["summarize", "--dataset", "demo", "--config_files", "demo", "--dry-run", *keys]) == 0
    said = capsys.readouterr().out
    assert main(["summarize", "--dataset", "demo", "--config_files", "demo", *keys]) == 0
    assert [path.read_bytes() for path in files] == before
    assert said.count("nothing to write") == 2, said


def test_a_store_export_is_read(home, capsys):
    (home / "dataset" / "demo" / "demo.mllm.sqlite").rename(home / "store")
    try:
        assert main(["store", "import", "demo", "summaries.jsonl.gz"]) == 0
        assert main(["store", "export", "demo", "--out", "again.jsonl.gz"]) == 0
    finally:
        (home / "store").replace(home / "dataset" / "demo" / "demo.mllm.sqlite")
    with gzip.open(home / "again.jsonl.gz", "rt") as lines:
        again = sum(1 for _ in lines)
    with gzip.open(home / "summaries.jsonl.gz", "rt") as lines:
        assert sum(1 for _ in lines) == again == 204 + 1  # a line on what they are, and the answers


def test_the_checkpoint_scores_as_it_did(home):
    config = configured(home)
    init_seed(config["seed"], config["reproducibility"])
    _, loaders = read_and_split(config)
    model = get_model("MLLMMSR")(config, loaders.train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "MLLMMSR")(config, model)
    (checkpoint,) = (home / "results" / "runs" / RUN / "saved").glob("*.pth")
    found = trainer.evaluate(loaders.test, load_best_model=True, model_file=str(checkpoint), show_progress=False)
    (record,) = [
        r for r in map(json.loads, (home / "results" / "runs.jsonl").read_text().splitlines()) if r["run_id"] == RUN
    ]
    metrics = {name.lower(): value for name, value in record["metrics"].items()}
    assert {name: round(float(value), 6) for name, value in found.items()} == {
        name: pytest.approx(metrics[name.lower()], abs=2e-6) for name in found
    }


@pytest.mark.slow
def test_a_record_is_rerun_and_agrees(home, capsys):
    before = np.load(home / "results" / "runs" / RUN / "scores.npz")
    assert main(["rerun", RUN, "--output_dir", "results"]) == 0
    assert "14 of 14 metrics agree" in capsys.readouterr().out
    again = np.load(home / "results" / "reruns" / "runs" / RUN / "scores.npz")
    assert set(before.files) == set(again.files) >= {"user", "item", "label", "score", "place"}
    for field in ("user", "item", "label", "place"):
        assert (before[field] == again[field]).all()
    np.testing.assert_allclose(again["score"], before["score"], atol=1e-4)  # another number of threads sums otherwise
    (record,) = map(json.loads, (home / "results" / "reruns" / "runs.jsonl").read_text().splitlines())
    assert sorted(record) == RECORD_FIELDS
    assert record["candidates"] == DIGEST


def test_the_report_is_rendered_from_earlier_records(home):
    path = home / "results" / "leaderboard.json"
    before = json.loads(path.read_text())
    assert main(["report", "results"]) == 0
    now = json.loads(path.read_text())
    (setup,) = (row.pop("setup") for row in now["rows"] if row["model"] == "MLLMMSR")
    assert setup["description"] == "tiny, LoRA r=2, blocks of 4, prompt style demo"
    assert now == before and list(now) == list(before)


def test_the_checkpoint_is_exported_over_the_earlier_export(home):
    before = (home / "exported" / "adapter_model.safetensors").read_bytes()
    assert main(["export", f"results/runs/{RUN}", "--out", "exported"]) == 0
    assert (home / "exported" / "adapter_model.safetensors").read_bytes() == before


def test_earlier_candidates_are_the_same(home):
    args = ["candidates", "export", "--dataset", "demo", "--config_files", "demo", "--limit_users=12"]
    assert main([*args, "--out", "now.jsonl.gz"]) == 0
    with gzip.open(home / "candidates.jsonl.gz") as before, gzip.open(home / "now.jsonl.gz") as now:
        assert before.read() == now.read()
