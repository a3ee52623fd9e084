"""A model is the commit it was: names, summaries, checkpoints, records and exports say which, and are held to it."""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import huggingface_hub.constants
import pytest
import small_world
from hub_cache import HubCache
from stock_forward import SETTINGS

from recbole_mllm.cli import main
from recbole_mllm.common import model_names, progress
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import identity_of, pinned, source_of
from recbole_mllm.common.settings import MODELS

NAME = "org/reader"
SHIFT = 0.01
WORDS = [
    "--dataset=steps", "--limit_users=4", "--item_summary_tokens=3", "--user_summary_tokens=3", "--prompt_style=demo",
    "--max_history=3", "--use_gpu=false",
]  # fmt: skip
TRAINED = ["--lora_dropout=0", "--lora_r=2", "--train_last_k=1", "--checkpoint_every_steps=2"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub that holds one commit of a model, and a folder to work in with a dataset."""
    found = HubCache(tmp_path / "hub", NAME)
    found.first = found.plant(Path(source_of("tiny")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(found.folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(found.folder))
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset")
    started_anew()
    yield found
    started_anew()


def started_anew():
    """Forget what a process knows of revisions."""
    model_names._commit.cache_clear()
    progress.warn_once.cache_clear()


def called(*words, mllm=NAME):
    started_anew()
    return main([*words, f"--mllm={mllm}", *WORDS])


def summarized_earlier(*words):
    """Summarise as an earlier version did, which knew of no commits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_names, "_commit", cache(lambda *_: None))
        assert main(["summarize", f"--mllm={NAME}", *WORDS, *words]) == 0


def answers():
    with closing(sqlite3.connect("dataset/steps/steps.mllm.sqlite")) as db:
        return dict(db.execute("SELECT model, COUNT(*) FROM answers GROUP BY model").fetchall())


def records(folder="results"):
    return [json.loads(line) for line in Path(folder, "runs.jsonl").read_text().splitlines()]


def test_a_revision_is_a_commit_where_the_cache_knows_it_and_stays_as_it_is_elsewhere(hub, caplog):
    second = hub.plant(Path(source_of("tiny")), SHIFT)
    hub.move("v1", hub.first)
    assert pinned(NAME) == f"{NAME}@{second}" == identity_of(pinned(NAME))
    assert pinned(NAME, "v1") == pinned(NAME, hub.first) == f"{NAME}@{hub.first}"
    assert pinned("tiny") == "tiny" and pinned(str(hub.folder)) == str(hub.folder)
    assert not caplog.records
    hub.forget()
    started_anew()
    assert pinned(NAME) == NAME and pinned(NAME, "v2") == f"{NAME}@v2"
    assert identity_of(pinned(NAME)) == f"{NAME}@main", "as before there were revisions"
    assert [r.message.partition(":")[0] for r in caplog.records] == [f"{NAME}@main", f"{NAME}@v2"]
    with pytest.raises(UserError, match="a local model, which has no revision"):
        pinned("tiny", "v1")


def test_a_hub_out_of_reach_is_asked_once(hub, monkeypatch, caplog):
    asked, stock = [], huggingface_hub.HfApi.resolve_revision

    def resolve(self, name, *, revision, local_files_only):
        asked.append(local_files_only)
        return stock(self, name, revision=revision, local_files_only=local_files_only)

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", resolve)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert pinned("org/elsewhere") == "org/elsewhere" and asked == [True, False]
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"  # also in processes it starts
    assert "the hub cannot be reached" in caplog.text


def test_a_servers_revision_is_what_its_user_says():
    served = replace(SETTINGS.mllm, mllm="server:m@http://a/v1", mllm_revision="r1")
    assert [served.identity(key) for key in MODELS] == ["server:m@r1"] * 3
    assert replace(served, user_summarizer="server:m@http://a/v1").identity("user_summarizer") == "server:m"


def test_summaries_belong_to_a_commit_and_those_of_before_are_taken_over_once(hub, capsys, caplog):
    summarized_earlier()
    before = answers()
    assert set(before) == {f"{NAME}@main:float32"}
    (old_tag,) = {path.name.split(".")[1] for path in Path("dataset/steps").glob("*.usum")}
    old = Path(f"dataset/steps/steps.{old_tag}.usum").read_bytes()
    capsys.readouterr()
    assert called("summarize", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert planned.count("nothing to write") == 2 and answers() == before
    caplog.clear()
    assert called("summarize") == 0
    assert answers() == {f"{NAME}@{hub.first}:float32": sum(before.values())}
    told = [r.message for r in caplog.records if "are used as those of" in r.message]
    assert len(told) == 2 and " 0 written" in caplog.text
    (tag,) = {path.name.split(".")[1] for path in Path("dataset/steps").glob("*.usum")} - {old_tag}
    assert planned.splitlines()[-1] == f"tag: {tag}"
    assert Path(f"dataset/steps/steps.{tag}.usum").read_bytes() == old
    # another commit under the same name writes its own, and takes over nothing where it is not the main branch
    second = hub.plant(Path(source_of("tiny")), SHIFT)
    hub.move("main", hub.first)
    assert called("summarize", "--stage=items", f"--mllm_revision={second}") == 0
    assert set(answers()) == {f"{NAME}@{hub.first}:float32", f"{NAME}@{second}:float32"}
    hub.move("main", second)
    capsys.readouterr()
    assert called("summarize", "--dry-run", f"--mllm_revision={hub.first}") == 0
    assert capsys.readouterr().out.count("nothing to write") == 2


@pytest.mark.slow
def test_a_run_is_repeated_exported_and_scored_with_the_commit_it_had(hub, capsys):
    assert called("benchmark", *TRAINED, "--models=MLLMMSR", "--output_dir=results") == 0
    (record,) = records()
    assert record["status"] == "ok", record
    assert record["config"]["mllm_revision"] == record["config"]["user_summarizer_revision"] == hub.first
    kept = record["config"]["provenance"]
    assert set(kept["weights"].values()) == {f"{NAME}@{hub.first}"} and kept["dtype"] == "float32"
    assert "<image>" in kept["prompts"]["recommend_item_first"] and kept["decoding"]["user"]["max_new_tokens"] == 3
    second = hub.plant(Path(source_of("tiny")), SHIFT)
    started_anew()
    assert main(["rerun", record["run_id"], "--output_dir", "results"]) == 0
    assert "the run is reproduced" in capsys.readouterr().out
    assert records("results/reruns")[0]["metrics"] == record["metrics"]
    (path,) = Path("results/runs").glob("*/saved/*.last.pth")
    assert called(*TRAINED, "--model=MLLMMSR", f"--resume={path}") == 2
    assert f"belongs to {NAME}@{hub.first}" in capsys.readouterr().err
    started_anew()
    assert main(["export", f"results/runs/{record['run_id']}", "--out", "out"]) == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["revision"] == hub.first
    page = Path("out/README.md").read_text()
    assert f"--revision {hub.first}" in page and second not in page


@pytest.mark.parametrize(
    ("key", "words"),
    [
        pytest.param("mllm", ["--models=MLLMMSR", "--finetune=none"], marks=pytest.mark.slow),
        ("feature_encoder", ["--models=SASRecF:text", "--epochs=1", "--mllm=tiny"]),
    ],
)
def test_a_run_of_a_local_model_is_not_repeated_with_other_weights(hub, capsys, key, words):
    shutil.copytree(source_of("tiny"), "mine")
    words = ["benchmark", f"--{key}=mine", *words, "--output_dir=results", *WORDS]
    assert main(words) == 0
    (record,) = records()
    was = record["config"]["provenance"]["weights"][key]
    assert record["status"] == "ok" and was.startswith("mine#")
    with Path("mine/generation_config.json").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    for again in (["rerun", record["run_id"], "--output_dir", "results"], words):
        assert main(again) == 2
        told = capsys.readouterr().err
        assert was in told and ("other weights" in told or "is finished with" in told)
    assert not Path("results/reruns").exists()
