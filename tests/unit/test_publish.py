"""An export and a store go to a hub: what is sent, what is said of it, and what is refused before anything is sent."""

import gzip
import json
import tarfile
from pathlib import Path

import huggingface_hub
import pytest
from hub_double import TOKEN, serving_hub
from huggingface_hub import ModelCard, constants
from stock_forward import STYLE

from recbole_mllm.cli import main
from recbole_mllm.common.hub import license_of
from recbole_mllm.training.model_export import model_card

ARCHIVE = Path(__file__).parents[1] / "earlier_version" / "results.tar.xz"
RUN = "results/runs/MLLMMSR-2024-872bcd12"
ID = "someone/my-recommender"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a benchmark's run, its record and its checkpoint; and a dataset with a store."""
    home = tmp_path_factory.mktemp("home")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(home, filter="data")
    return home


@pytest.fixture
def home(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


@pytest.fixture
def hub(monkeypatch):
    """A hub, and somebody who is logged in there."""
    with serving_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        files = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the older protocol for large files
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield served
    huggingface_hub.close_session()


def test_an_exported_model_is_pushed_with_a_card_of_its_results_and_nothing_else(home, hub, capsys, caplog):
    out = home / "published"
    words = ["export", RUN, "--out", str(out), "--merge", "--push-to-hub", ID]
    assert main(words) == 0
    (out / "notes.txt").write_text("the user's own")
    assert main(words) == 0  # again: the repository is there
    name = f"models/{ID}"
    assert hub.made[name]["visibility"] == "private"
    listed = {one["file"] for one in json.loads((out / "export.json").read_text())["outputs"]}
    assert hub.files[name].keys() == listed | {"export.json"}  # and no notes
    assert all(data == (out / path).read_bytes() for path, data in hub.files[name].items())
    card = ModelCard((out / "README.md").read_text())
    (record,) = (
        one for line in (home / "results" / "runs.jsonl").open() if (one := json.loads(line))["model"] == "MLLMMSR"
    )
    shown = {one.metric_name: one for one in card.data.eval_results}
    assert {key: one.metric_value for key, one in shown.items()} == record["metrics"]
    assert all(one.dataset_args["candidates"] == record["candidates"] for one in shown.values())
    assert card.data.datasets == [record["dataset"]] and card.data.library_name == "transformers"
    assert card.data.base_model is None and card.data.get("license") is None  # the bundled model is on no hub
    assert f"| NDCG@10 | {record['metrics']['NDCG@10']:.4f} |" in card.text and record["candidates"] in card.text
    said = "".join(capsys.readouterr()) + caplog.text
    assert f"pushed: {hub.url}/{name}/commit/abc" in said and TOKEN not in said
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not [data for data in written if TOKEN.encode() in data or str(home).encode() in data]


def test_a_store_is_pushed_as_a_dataset_whose_page_stays(home, hub, capsys):
    words = ["store", "export", "dataset/demo", "--out", "all.jsonl.gz", "--push-to-hub", "someone/summaries"]
    assert main(words) == 0
    files = hub.files["datasets/someone/summaries"]
    assert files.keys() == {"all.jsonl.gz", "README.md"} and files["all.jsonl.gz"] == Path("all.jsonl.gz").read_bytes()
    answers = json.loads(gzip.decompress(files["all.jsonl.gz"]).splitlines()[0])["answers"]
    assert f"{answers:,} texts" in files["README.md"].decode()
    files["README.md"] = b"the user's own page"
    assert main(words) == 0
    assert hub.files["datasets/someone/summaries"]["README.md"] == b"the user's own page"


@pytest.mark.parametrize(
    "command", [["export", RUN, "--out", "new"], ["store", "export", "dataset/demo", "--out", "new"]]
)
@pytest.mark.parametrize(
    ("offline", "token", "name", "said"),
    [
        (True, TOKEN, ID, "HF_HUB_OFFLINE switches it off"),
        (False, "", ID, "needs a login: run `hf auth login`"),
        (False, TOKEN, "just-a-name", "must be OWNER/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written_or_sent(
    home, hub, monkeypatch, capsys, tmp_path, command, offline, token, name, said
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main([*command, "--push-to-hub", name]) == 2
    assert said in capsys.readouterr().err
    assert not Path("new").exists() and not hub.requests


def test_an_adapter_of_a_local_model_is_not_pushed_and_a_refusal_keeps_what_was_written(home, hub, capsys):
    assert main(["export", RUN, "--out", "adapter", "--push-to-hub", ID]) == 2
    assert "an adapter of tiny is of use with that local model alone; push a whole one" in capsys.readouterr().err
    assert not Path("adapter").exists() and not hub.requests
    hub.refuses = 403
    assert main(["export", RUN, "--out", "kept", "--merge", "--push-to-hub", ID]) == 2
    said = capsys.readouterr().err
    assert f"{ID} was not pushed (" in said and "what was written on this machine stays" in said and TOKEN not in said
    assert Path("kept/export.json").is_file()


def test_a_card_names_a_hubs_base_model_and_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    licence = license_of(tmp_path / "README.md")
    about = {
        "written_by": "recbole-mllm", "kind": "adapter", "checkpoint": "x.pth", "base": "org/name",
        "base_identity": "org/name@abc", "base_revision": "abc", "dtype": "bfloat16", "finetune": "lora",
        "prompt_style": "demo", "prompt_order": "item-first", "use_image": True, "decision_template": True,
    }  # fmt: skip
    data = ModelCard(model_card(about, STYLE, licence=licence)).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/name", "adapter", "apache-2.0")
    assert data.library_name == "peft" and data.eval_results is None
    assert license_of(None) == {} == license_of(tmp_path / "none")
