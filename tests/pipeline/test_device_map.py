"""A run whose model lies partly on disk (device_map) is the run of a model in one place; what cannot be is one line."""

import json
import os
from pathlib import Path

import launched_runs
import numpy as np
import pytest
import small_world
import torch
from launching import one_of_two
from stock_forward import KEYS

from recbole_mllm.cli import main
from recbole_mllm.common.settings import Settings
from recbole_mllm.mllm.placement import placement
from recbole_mllm.quick_start import make_config, run

SMALL = {
    "mllm": "llava", "use_image": True, "summary_mode": "recurrent", "item_summary": "image", "finetune": "none",
    "item_summary_tokens": 5, "user_summary_tokens": 6, "limit_users": 6, "train_last_k": 1, "lora_dropout": 0.0,
}  # fmt: skip


@pytest.fixture
def keys(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = (place / "llava" / "model.safetensors").stat().st_size
    small_world.write(tmp_path / "data")
    made = launched_runs.settings(place, tmp_path, SMALL) | {"data_path": str(tmp_path / "data")}
    return made, {"device_map": "auto", "max_memory": {"cpu": int(size * 0.6)}}


def words_of(keys):
    return ["--dataset=steps", *(f"--{key}={json.dumps(value)}" for key, value in keys.items())]


def texts(folder):
    return {path.name: path.read_bytes() for path in (folder / "data" / "steps").glob("*.?sum")}


def test_summaries_scores_and_metrics_are_those_of_a_model_in_one_place(keys, tmp_path):
    plain, spread = keys
    whole = run(make_config("MLLMMSR", "steps", [], plain))
    written = texts(tmp_path)
    for path in (tmp_path / "data" / "steps").glob("steps.*s*[mq]*"):
        if path.suffix not in (".inter", ".item"):
            path.unlink()  # the store and what was exported, so that all is written again
    parted = run(make_config("MLLMMSR", "steps", [], plain | spread))
    assert len(set(parted.model.backbone.hf_device_map.values())) == 2
    assert any(p.device.type == "meta" for p in parted.model.parameters())
    assert len(written) == 2 and texts(tmp_path) == written
    np.testing.assert_allclose(parted.pairs["score"], whole.pairs["score"], atol=1e-5)
    assert np.std(whole.pairs["score"]) > 0.01 and parted.test == whole.test
    # an export is made of the model in one place, whatever the run's was
    assert main(["export", str(parted.checkpoint), "--out", "exported"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size > 0.9 * spread["max_memory"]["cpu"] / 0.6


def test_numbers_of_gpus_may_come_as_text():
    given = KEYS | {"device_map": "balanced", "max_memory": {"0": "20GiB", "1": 5, "cpu": "60 GiB"}}
    found = placement(Settings.from_config(given).mllm, torch.device("cuda"))
    assert found == {"device_map": "balanced", "max_memory": {0: "20GiB", 1: 5, "cpu": "60 GiB"}}
    on_cpu = placement(Settings.from_config(given).mllm, torch.device("cpu"))
    assert on_cpu["max_memory"] == {"cpu": "60 GiB"}


def test_training_goes_on_where_nothing_is_offloaded_and_else_is_refused(keys, capsys):
    plain, spread = keys
    trained = {**plain, "finetune": "lora", "summary_mode": "none", "item_summary": "none", "epochs": 1}
    whole = run(make_config("MLLMMSR", "steps", [], trained))
    placed = run(make_config("MLLMMSR", "steps", [], trained | {"device_map": "balanced"}))
    np.testing.assert_allclose(placed.pairs["score"], whole.pairs["score"], atol=1e-5)
    capsys.readouterr()
    assert main(["--model=MLLMMSR", *words_of(trained | spread)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "device_map has put layers into memory or on disk, where they can be scored and not trained" in line


def test_a_plan_is_made(keys, capsys):
    plain, spread = keys
    assert main(["plan", *words_of(plain | spread)]) == 0
    assert "test" in capsys.readouterr().out


SERVER = "server:m@http://localhost:9/v1"
REFUSED = {
    "room": ({"device_map": "auto", "max_memory": {"cpu": 100}}, "no room in memory for the model's first layers"),
    "server": ({"device_map": "auto", "mllm": SERVER}, "all models are behind servers, which place their own"),
    "word": ({"device_map": "cuda:1"}, "device_map is 'cuda:1'; it must be one of auto, balanced"),
    "alone": ({"max_memory": {"cpu": "1GiB"}}, "max_memory is only read under device_map"),
    "size": ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "max_memory says 'cpu': 'lots'"),
    "place": ({"device_map": "auto", "max_memory": {"gpu": "1GiB"}}, "max_memory says 'gpu': '1GiB'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_placed_is_one_clear_line(keys, capsys, case):
    more, wanted = REFUSED[case]
    assert main(["--model=MLLMMSR", *words_of(keys[0] | more)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("recbole-mllm: ") and wanted in line


@pytest.mark.parametrize("command", [["--model=MLLMMSR"], ["summarize"]])
@pytest.mark.parametrize("fsdp", ["", "true"])
def test_several_processes_do_not_place_a_model_each(keys, capsys, monkeypatch, command, fsdp):
    with one_of_two(monkeypatch, ACCELERATE_USE_FSDP=fsdp):
        assert main([*command, *words_of(keys[0] | {"device_map": "auto"})]) == 2
    assert "and a launcher has started 2; set device_map: null" in capsys.readouterr().err.splitlines()[-1]
    assert Path(os.getcwd(), "data").is_dir()
