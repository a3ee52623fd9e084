"""Outside the demo nothing says which MLLM is meant but the user: one line, before any work."""

import re

import pytest
import small_world
import yaml
from recbole.config import Config

from recbole_mllm import UserError
from recbole_mllm.cli import main
from recbole_mllm.common.model_names import PRESETS, no_model
from recbole_mllm.common.resources import PROPERTIES, resource

TABLE = (PROPERTIES.parent / "docs" / "backbones.md").read_text()
LINE = f"recbole-mllm: {no_model()}\n"
ONE = "server:a@http://127.0.0.1:9/v1"
COMMANDS = (
    "--model MLLMMSR --dataset steps",
    "summarize --dataset steps",
    "summarize --dataset steps --dry-run --user_summarizer=tiny",
    f"--model MLLMMSR --dataset steps --item_summarizer={ONE} --user_summarizer={ONE}",
    f"plan --dataset steps --item_summarizer={ONE} --user_summarizer={ONE}",
    "plan --dataset steps --config_files microlens",
    "probe-memory steps",
    "benchmark --dataset steps --models Pop,MLLMMSR",
    "benchmark --dataset steps --models MLLMMSR:direct --mllm=null",
    "benchmark --dataset steps --models TALLRec",
    "benchmark --dataset steps --models Pop,SASRecF:text",
    "--model SASRecF --dataset steps --item_features=[text] --train_neg_sample_args=null",
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_world.write(tmp_path / "dataset", images=False)
    return tmp_path / "dataset"


@pytest.mark.parametrize("words", COMMANDS)
def test_no_model_is_one_line_and_exit_code_2_before_any_work(data, words, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err == LINE
    assert {path.name for path in data.parent.iterdir()} == {"dataset"}, "nothing has begun"
    assert {path.name for path in (data / "steps").iterdir()} == {"images", "steps.inter", "steps.item"}


def test_the_line_names_presets_that_set_a_model_and_the_trial():
    assert len(PRESETS) == 3
    for name, size in PRESETS:
        assert f"{name} ({size})" in LINE
        row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{name}` |")).split("|")
        assert re.findall(r"[\d.]+ B|\d+ GB", size) == [row[3].strip(), f"{row[7].strip()} GB"]
        assert yaml.safe_load(resource("quick_start_config", name).read_text())["mllm"]
    assert "--mllm=tiny" in LINE and LINE.count("\n") == 1


def test_stock_recbole_is_told_the_same_by_its_config_and_the_demo_worlds_have_the_bundled_model(data):
    keys = {"data_path": str(data)}
    with pytest.raises(UserError) as found:
        Config("MLLMMSR", "steps", config_dict=keys)
    assert str(found.value) == str(no_model())
    assert Config("MLLMMSR", "steps", config_dict=keys | {"mllm": "tiny"})["mllm"] == "tiny"
    for world in ("demo", "demo-7"):
        small_world.write(data, world, images=False)
        assert Config("MLLMMSR", world, config_dict=keys)["mllm"] == "tiny"
        assert Config("MLLMMSR", world, config_dict=keys | {"mllm": "mine"})["mllm"] == "mine"
    (data / "steps" / "dataset.yaml").write_text("mllm: theirs\n")
    assert Config("MLLMMSR", "steps", config_dict=keys)["mllm"] == "theirs"


def test_what_writes_texts_alone_needs_no_recommender(data, capsys):
    servers = [f"--item_summarizer={ONE}", f"--user_summarizer={ONE}", "--item_summary=text", "--use_image=false"]
    assert main(["summarize", "--dataset", "steps", "--dry-run", *servers]) == 0
    assert "item summaries" in capsys.readouterr().out
