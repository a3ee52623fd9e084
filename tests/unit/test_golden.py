"""Names that users' paid work is found again by: tags, answer keys, digests. They change only with a note of migration.

These are the only golden values: a renamed settings field or label must not orphan summaries, candidates or records.
"""

from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from recbole.utils import init_seed

from recbole_mllm.benchmark.jobs import BenchmarkPlan, jobs_of, run_id
from recbole_mllm.benchmark.records import config_digest
from recbole_mllm.benchmark.variants import resolve
from recbole_mllm.common.config import benchmark_defaults, config_paths
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.sampling import hash64, hashes64, tie_keys
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.quick_start import make_config, read_and_split
from recbole_mllm.summaries.chains import history_digest
from recbole_mllm.summaries.store import answer_key

SERVED = {"mllm": "server:Qwen/Qwen2.5-VL-7B-Instruct@http://127.0.0.1:8000/v1", "finetune": "none"}
KEYS = [
    "839b941f827e2bb9f241147989a7907229e3de993b9c96312a3260d89950b122",
    "c49591ed58a4f1164e4e9de44db17a54e40953c470c81cb2b5bcb29558bf2fed",
]
HASH = 3478875734941408580
HASHES = [18324990846983751329, 13709337986934891695]
TIES = [3646065456416007886, 1098657949066830774]
HISTORY = "be2a79a6fc0c9479"
CONFIG = "3f6df1f32eab99b4"
RUN = "MLLMMSR-no-image-2024-7038c836"
BY_BYTES = "MLLMMSR-2024-c332fa22"


@pytest.fixture(scope="module")
def demo_config(demo_data):
    """Return a function that configures a model on the demo world."""

    def configured(model="MLLMMSR", **keys):
        own = {"data_path": str(demo_data), "state": "ERROR", "frozen_candidates": True, "use_gpu": False}
        return make_config(model, "demo", list(config_paths(["demo"])), own | keys)

    return configured


@pytest.mark.parametrize(
    ("keys", "tag"),
    [
        ({}, "tiny-recurrent-b4-image-3e9d094e"),
        (
            {**SERVED, "summary_temperature": 0.7, "prompt_style": "product"},
            "qwen2-5-vl-7b-instruct-recurrent-b4-image-0709abb8",
        ),
    ],
    ids=["tiny", "server"],
)
def test_the_tag_of_a_run_of_yesterday(demo_config, keys, tag):
    config = demo_config(**keys)
    assert make_summary_setup(config, Settings.from_config(config), torch.device("cpu")).tag == tag


def test_the_key_of_an_answer(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"bytes")
    asked = Prompt("<image>\nWhat is it?", (image,))
    found = [answer_key("m", Prompt("A text"), Decoding(24)), answer_key("m", asked, Decoding(8, 0.5, 0.9, 7))]
    assert found == KEYS


def test_hashes_that_seed_draws():
    assert hash64("user", 2024, "u1") == HASH
    assert hashes64(np.array(["a", "b"]), "candidates", 2024, "test").tolist() == HASHES
    assert tie_keys(np.array(["u"]), np.array(["i", "j"]), 2024)(np.array([0, 0]), np.array([0, 1])).tolist() == TIES
    assert history_digest(["i1", "i2"]) == HISTORY


@pytest.mark.parametrize("model", ["MLLMMSR", "Pop"])
def test_the_candidates_of_the_demo(demo_config, model):
    config = demo_config(model, **benchmark_defaults())
    init_seed(config["seed"], config["reproducibility"])
    assert read_and_split(config)[1].candidates == "0a57ba62ee57cf48"


@pytest.mark.parametrize(("mode", "digest"), [("uni20", "d4131c41783e493a"), ("pop20", "0cec035c7930ba74")])
def test_the_candidates_of_ml_100k(mode, digest, tmp_path):
    """RecBole's wheel holds the dataset."""
    keys = {"data_path": str(Path(recbole.__file__).parent / "dataset_example"), "state": "ERROR", "use_gpu": False}
    keys |= benchmark_defaults() | {"frozen_candidates": True, "checkpoint_dir": str(tmp_path)}
    keys["eval_args"] = benchmark_defaults()["eval_args"] | {"mode": mode}
    config = make_config("Pop", "ml-100k", [], keys)
    init_seed(config["seed"], config["reproducibility"])
    assert read_and_split(config)[1].candidates == digest


def test_the_digest_of_a_configuration_and_the_name_of_a_run(tmp_path):
    assert config_digest({"model": "SASRec", "epochs": 3, "data_path": "anywhere", "topk": [5, 10]}) == CONFIG
    plan = BenchmarkPlan("demo", ("SASRec",), (2024,), tmp_path, overrides={"epochs": 3})
    assert run_id(resolve("MLLMMSR:no-image"), 2024, plan) == RUN


def test_runs_of_the_mllm_named_by_the_bytes_of_config_files_are_found_again(tmp_path):
    (config := tmp_path / "given.yaml").write_text("# a comment\nepochs: 3\nper_model:\n  SASRec: {n_layers: 1}\n")
    plan = BenchmarkPlan("demo", ("MLLMMSR", "SASRec", "MLLMMSR+SASRec"), (2024,), tmp_path, (str(config), "demo"))
    mllm, sasrec, fused = (job.run_id for job in jobs_of(plan))
    assert mllm != BY_BYTES
    (tmp_path / "runs" / BY_BYTES.replace("2024", "7")).mkdir(parents=True)
    found = [job.run_id for job in jobs_of(plan)]
    assert found[:2] == [BY_BYTES, sasrec] and found[2] != fused, "the seeds of a row share a name"
    config.write_text("per_model: {MLLMMSR: {epochs: 3}}")  # such a section won over later files too
    (tmp_path / "runs" / "MLLMMSR-2024-3c8ede0b").mkdir()
    assert jobs_of(plan)[0].run_id not in ("MLLMMSR-2024-3c8ede0b", BY_BYTES)
