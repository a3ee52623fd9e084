"""Each row of a leaderboard says in every form what it is, from what records of any version hold."""

import csv
import io
import json
from dataclasses import replace
from html import unescape

import pytest

from recbole_mllm.benchmark.ranking import build
from recbole_mllm.benchmark.records import append
from recbole_mllm.benchmark.report import read_leaderboard, render
from recbole_mllm.benchmark.setups import SETUP, setup_of
from recbole_mllm.benchmark.tables import format_latex, format_table
from recbole_mllm.demo.world import demo_world
from tests.planted_runs import plant_run

COMMIT = "cc594898d8b0aa1122334455667788990011aabb"
KEYS = {
    "mllm": "tiny", "finetune": "lora", "lora_r": 8, "summary_mode": "recurrent", "block_size": 4, "use_image": True,
    "item_summary": "image", "prompt_style": "auto", "item_kind": "movie", "item_summarizer": None,
}  # fmt: skip
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


def weights(**named):
    return {"weights": named, "prompts": {"name": "movie"}}


HUB = KEYS | {
    "mllm": QWEN, "finetune": "none", "summary_mode": "direct", "use_image": False, "item_summary": "text",
    "user_summarizer": "server:Qwen3-32B@http://10.0.0.7:8000/v1",
    "provenance": weights(
        mllm=f"{QWEN}@{COMMIT}", item_summarizer=f"{QWEN}@{COMMIT}", user_summarizer="server:Qwen3-32B@v2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (KEYS, "tiny, LoRA r=8, blocks of 4, prompt style demo"),
        (KEYS | {"mllm": "/home/ann/models/llava", "finetune": "full", "summary_mode": "none"},
         "llava, full fine-tuning, no user summary, prompt style movie"),
        (KEYS | {"mllm": QWEN, "finetune": "qlora", "prompt_style": "/home/ann/shop.yaml"},
         f"{QWEN}, QLoRA r=8, blocks of 4, prompt style shop"),
        (KEYS | {"mllm": "server:m@http://10.0.0.7:8000/v1", "item_summarizer": "tiny"},
         "m (server), LoRA r=8, blocks of 4, prompt style movie, item summaries by tiny"),
        (HUB, f"{QWEN}, zero-shot, one summary of the whole history, text only, prompt style movie, "
              "revision cc594898, user summaries by Qwen3-32B (server)@v2"),
        (KEYS | {"epochs": 0}, "tiny, zero-shot, blocks of 4, prompt style demo"),
        ({"epochs": 3}, None),
    ],
)  # fmt: skip
def test_a_record_says_what_was_run_without_folders_and_hosts(config, told, tmp_path):
    setup = setup_of([plant_run(tmp_path, "MLLMMSR", 1.0, "mllm", config=config)])
    assert (setup and setup.described) == told
    assert setup is None or setup.is_tiny == ("tiny" in told)


def test_every_form_says_what_a_row_is_and_alike_rows_are_told_apart(tmp_path):
    """Two backbones of one label, a variant, a fused row, a feature model, a plain baseline."""
    other = KEYS | {"data_path": str(tmp_path), "mllm": QWEN, "provenance": weights(mllm=f"{QWEN}@{COMMIT}")}
    fused = {"chosen": "mixture", "alpha": 0.5, "rho": 0.1, "parts": {}}
    runs = [
        plant_run(tmp_path, "SASRec", 1.0, config={"mllm": "tiny"}),
        plant_run(tmp_path, "SASRecF:image", 1.2, config={"mllm": "tiny", "item_features": ["image"]}),
        plant_run(tmp_path, "MLLMMSR", 2.0, "mllm", config=KEYS),
        plant_run(tmp_path, "MLLMMSR", 2.4, "mllm", digest="ffffffff", config=other),
        plant_run(tmp_path, "MLLMMSR:block-2", 1.5, "mllm", config=KEYS | {"block_size": 2}),
        replace(
            plant_run(tmp_path, "MLLMMSR+SASRec", 2.2, "fused", config={"seed": 1, "per_model": {"MLLMMSR": KEYS}}),
            model="MLLMMSR", fusion=fused,
        ),
    ]  # fmt: skip
    for run in runs:
        append(tmp_path / "runs.jsonl", run)
    board = render(tmp_path)
    told = {row["model"]: row.get("setup") for row in json.loads((tmp_path / "leaderboard.json").read_text())["rows"]}
    tiny, qwen = (
        "MLLMMSR (tiny, prompt style demo)",
        "MLLMMSR (Qwen2.5-VL-7B-Instruct, prompt style movie, revision cc594898)",
    )
    assert told.keys() == {"SASRec", "SASRecF:image", tiny, qwen, "MLLMMSR:block-2", "MLLMMSR+SASRec"}
    assert told["SASRec"] is None and list(told[qwen]) == list(SETUP)
    assert (told[qwen]["backbone"], told[qwen]["revision"], told[qwen]["lora_r"]) == (QWEN, COMMIT, 8)
    assert told["MLLMMSR:block-2"]["block_size"] == 2
    assert told["SASRecF:image"]["description"] == "image features of tiny"
    assert told["MLLMMSR+SASRec"]["description"] == "tiny, LoRA r=8, blocks of 4, prompt style demo"
    sheet = {line["model"]: line for line in csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))}
    for model, setup in told.items():
        wanted = {name: "" if (value := (setup or {}).get(name)) is None else str(value) for name in SETUP}
        assert {name: sheet[model][name] for name in SETUP} == wanted
    texts = [unescape((tmp_path / f"leaderboard.{end}").read_text()) for end in ("md", "html")]
    for text in (format_table(read_leaderboard(tmp_path)), *texts):
        for setup in filter(None, told.values()):
            assert setup["description"] in text
    tex = format_latex(board)
    assert "\nMLLMMSR (tiny, LoRA r=8, blocks of 4) & " in tex
    long = f"MLLMMSR ({QWEN}, LoRA r=8, blocks of 4)"
    assert f"\n\\parbox[t]{{.35\\linewidth}}{{\\raggedright {long}\\strut}} & " in tex, "it is wrapped"
    assert "MLLMMSR:block-2 (tiny, LoRA r=8, blocks of 2)" in tex and "\nSASRec & " in tex
    assert "MLLMMSR+SASRec (tiny, LoRA r=8, blocks of 4)" in tex and "prompt style demo." in tex


def test_rows_that_their_setup_does_not_tell_apart_keep_their_digest(tmp_path):
    more = {"learning_rate": 1.0}
    runs = [
        plant_run(tmp_path, "MLLMMSR", 2.0, "mllm", digest=digest, config=KEYS | own)
        for digest, own in (("aaaaaaaa", {}), ("bbbbbbbb", more), ("cccccccc", {"lora_r": 4}))
    ]
    board = build(runs, tmp_path)
    assert {row.model for row in board.rows} == {
        "MLLMMSR (LoRA r=8, aaaaaaaa)", "MLLMMSR (LoRA r=8, bbbbbbbb)", "MLLMMSR (LoRA r=4)"
    }  # fmt: skip
    tex = format_latex(board)
    assert "MLLMMSR (LoRA r=8, aaaaaaaa; tiny, LoRA r=8, blocks of 4)" in tex
    assert "MLLMMSR (tiny, LoRA r=4, blocks of 4)" in tex


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Demo worlds under other names, and other items under the demo's."""
    root = tmp_path_factory.mktemp("worlds")
    made = [item.title for item in demo_world(3, items=30, users=2, cold=3).items]
    for name, titles in {"shop": made, "later": made, "demo": [made[0], "Toy Story (1995)"]}.items():
        rows = [f"i{number}\t{title}\n" for number, title in enumerate(titles)]
        (root / name).mkdir()
        (root / name / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "".join(rows))
    return root


@pytest.mark.parametrize("name", ["later", "shop", "demo", "gone/demo-7", "gone/films"])
def test_tiny_on_other_items_than_the_demos_is_said_in_every_form(name, worlds, tmp_path):
    data = {"data_path": str(worlds / name)}
    runs = [
        plant_run(tmp_path, "SASRec", 1.0, config=data | {"mllm": "tiny"}),
        plant_run(tmp_path, "MLLMMSR", 2.0, "mllm", config=KEYS | data | {"mllm": QWEN}),
        plant_run(tmp_path, "MLLMMSR:direct", 2.0, "mllm", config=KEYS | data | {"summary_mode": "direct"}),
        plant_run(
            tmp_path, "MLLMMSR:block-2", 1.0, "mllm", config=KEYS | data | {"mllm": QWEN, "user_summarizer": "tiny"}
        ),
    ]
    for run in runs:
        append(tmp_path / "runs.jsonl", replace(run, dataset=name.rpartition("/")[2]))
    render(tmp_path)
    told = json.loads((tmp_path / "leaderboard.json").read_text())
    sheet = list(csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    pages = [unescape((tmp_path / f"leaderboard.{end}").read_text()) for end in ("md", "html", "tex")]
    pages += [" ".join(format_table(read_leaderboard(tmp_path)).split())]
    if name in ("later", "shop", "gone/demo-7"):
        assert "banner" not in told and "banner" not in sheet[0]
        assert not any("never seen" in page for page in pages)
        return
    assert "2.7 M parameters" in told["banner"] and "say nothing about MLLM-MSR" in told["banner"]
    assert "rows MLLMMSR:direct and MLLMMSR:block-2 say" in told["banner"]
    assert all(told["banner"] in page for page in pages)
    warned = {line["model"] for line in sheet if line["banner"] == told["banner"]}
    assert warned == {"MLLMMSR:direct", "MLLMMSR:block-2"}
