"""Images that a model's processor refuses are found before anything is asked, and count as missing everywhere."""

import logging

import pytest
import small_world
import tiny_models
from PIL import Image

from recbole_mllm.data.item_table import read_items
from recbole_mllm.model.summarizers import REFUSED, without_refused
from recbole_mllm.quick_start import make_config, run

LONG = {"i03": (2, 500), "i05": (700, 3)}


def plant(folder):
    small_world.write(folder)
    for item, size in LONG.items():
        Image.new("RGB", size).save(folder / "steps" / "images" / f"{item}.png")


def test_a_run_counts_what_qwens_processor_refuses_as_missing(tmp_path, monkeypatch, caplog):
    """One line, before a summary is written, a list of all, and every stage continues without those images."""
    plant(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    settings = {
        "data_path": str(tmp_path / "data"), "mllm": str(tiny_models.qwen2_5_vl(tmp_path / "qwen")), "limit_users": 3,
        "prompt_style": "demo", "item_summary": "image", "use_image": True, "item_summary_tokens": 2,
        "user_summary_tokens": 2, "finetune": "none", "show_progress": False, "frozen_candidates": True,
        "checkpoint_dir": str(tmp_path / "saved"), "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20", "group_by": "user"},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        outcome = run(make_config("MLLMMSR", "steps", [], settings))
    (line,) = [message for message in caplog.messages if "count as missing" in message]
    assert line.startswith("2 images count as missing, the first of item i03") and "aspect ratio" in line
    rows = (tmp_path / "data" / "steps" / REFUSED).read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == list(LONG)
    images = outcome.model.items.images
    assert not set(LONG) & set(images) and len(images) == small_world.ITEMS - len(LONG)
    number = outcome.dataset.field2token_id["item_id"]
    (history, position, _), *_ = outcome.model.rows_of(outcome.test_data._dataset.inter_feat)
    prompts = outcome.model.prompts_of([(history, position, number[item]) for item in ("i03", "i04")])
    assert [len(prompt.images) for prompt in prompts] == [0, 1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava"])
def test_only_images_of_odd_sizes_ask_for_a_processor_and_each_models_own_decides(tmp_path, family):
    plant(tmp_path / "data")
    folder = tmp_path / "data" / "steps"
    items = read_items(folder, None)
    assert set(LONG) <= set(items.extreme)
    model = str(getattr(tiny_models, family)(tmp_path / family))
    kept = without_refused(items, folder, [model])
    assert set(items.images) - set(kept.images) == (set(LONG) if "qwen" in family else set())
    assert without_refused(items, folder, ["server:m@http://127.0.0.1:9/v1"]) is items


def test_without_odd_sizes_no_processor_is_loaded(tmp_path):
    (tmp_path / "shop" / "images").mkdir(parents=True)
    Image.new("RGB", (300, 200)).save(tmp_path / "shop" / "images" / "1.png")
    rows = "item_id:token\ttitle:token_seq\timage:token\n1\ta\timages/1.png\n"
    (tmp_path / "shop" / "shop.item").write_text(rows)
    items = read_items(tmp_path / "shop", None)
    assert items.images and without_refused(items, tmp_path / "shop", ["no such model"]) is items
