"""Item features: what an MLLM says of an item reaches RecBole's feature models, is made once, and matters."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_world
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.utils import get_model

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import MLLMSettings
from recbole_mllm.data.atomic import read_atomic
from recbole_mllm.data.schema import isum_file, tags_of
from recbole_mllm.features import item_vectors
from recbole_mllm.features.item_vectors import scaled_vectors
from recbole_mllm.mllm.embedding import image_vectors, sentence_vectors, text_vectors
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.quick_start import make_config, run

KINDS = ("red car", "blue mug", "green hat", "black shoe", "white lamp", "brown chair")
FULL = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


@pytest.fixture
def keys(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(place)
    return {
        "data_path": str(place / "data"), "checkpoint_dir": str(place / "saved"), "mllm": str(place / "llava"),
        "item_summary": "none", "show_progress": False, "state": "ERROR", "load_col": {"inter": "*"}, "eval_args": FULL,
    }  # fmt: skip


def model_at(folder: Path) -> HFModel:
    return HFModel(str(folder), MLLMSettings(str(folder), None, None, False, "float32", 256), torch.device("cpu"))


def write_clues(data: Path) -> None:
    """Write a world in which the kind of an item met by nobody else says which of two popular items comes next.

    A user meets three clues of three kinds, each followed by an item of that kind; the test item is the last of them.
    """
    rng, rows, titles = random.Random(3), [], {}
    for user in range(240):
        for step, kind in enumerate(rng.sample(range(len(KINDS)), 3)):
            clue, answer = f"c{user}-{step}", f"t{kind}{rng.randrange(2)}"
            titles |= {clue: KINDS[kind], answer: "thing"}
            rows += [f"u{user}\t{clue}\t{2 * step}", f"u{user}\t{answer}\t{2 * step + 1}"]
    folder = data / "clues"
    folder.mkdir(parents=True)
    (folder / "clues.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    lines = "".join(f"{item}\t{title}\n" for item, title in titles.items())
    (folder / "clues.item").write_text("item_id:token\ttitle:token_seq\n" + lines)


def test_where_features_alone_predict_a_feature_model_that_reads_them_wins(place: Path, keys: dict[str, Any]) -> None:
    write_clues(place / "data")
    train = {
        "epochs": 15, "train_batch_size": 128, "learning_rate": 0.005, "hidden_size": 32, "inner_size": 32,
        "n_layers": 1, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1, "frozen_candidates": True, "topk": [2],
        "exclude_seen": True, "metrics": ["Hit"], "valid_metric": "Hit@2", "eval_step": 20, "MAX_ITEM_LIST_LENGTH": 6,
    }  # fmt: skip
    found = {}
    for model, item_features in (("SASRec", None), ("SASRecF", ["text"])):
        config = make_config(model, "clues", [], keys | train | {"item_features": item_features})
        outcome = run(config)
        assert len(outcome.users["user"]) == 240
        found[model] = outcome.test["Hit@2"]
    # twelve answers, of which a user has met two: two in ten by chance, one or two more by the kinds not yet met
    assert found["SASRec"] < 0.5 < 0.8 < found["SASRecF"], found


def test_vectors_are_means_of_the_models_own_states_whatever_the_batch(place: Path) -> None:
    texts = ["a red car", "", "a blue car", "Summarize the preference. Update it <image>", "a red car"]
    model = model_at(place / "llama")
    found = text_vectors(model, texts)
    for text, vector in zip(texts, found, strict=True):
        if not text:
            assert not vector.any()
            continue
        (alone,) = text_vectors(model, [text])
        assert np.abs(alone - vector).max() < 1e-5
    ids = torch.tensor([model.encoder.text_ids(texts[0])])
    theirs = model.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert np.abs(theirs.numpy() - found[0]).max() < 1e-4
    assert np.abs(found[0] - found[2]).max() > 1e-3
    encoder = sentence_vectors(str(place / "llama"), texts, torch.device("cpu"))
    assert encoder.shape == found.shape and not encoder[1].any() and np.abs(encoder[0] - encoder[2]).max() > 1e-3


def test_an_image_is_what_the_vision_tower_makes_of_it_and_none_is_zeros(place: Path) -> None:
    model, images = model_at(place / "llava"), sorted((place / "data" / "steps" / "images").glob("*.png"))[:3]
    found = image_vectors(model, [images[0], None, images[1], images[2]])
    assert not found[1].any() and np.abs(found[0] - found[2]).max() > 1e-4
    pixels = model.encoder.image(images[1]).tensors["pixel_values"]
    theirs = model.backbone.inner.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert np.abs(torch.as_tensor(theirs[0]).mean(0).numpy() - found[2]).max() < 1e-4
    with pytest.raises(UserError, match="reads images"):
        image_vectors(model_at(place / "llama"), [images[0]])


def test_vectors_are_centred_cut_and_of_one_scale() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 9)) + 100.0
    known = np.arange(50) != 7
    made = scaled_vectors(np.where(known[:, None], plane, 0), known, 2)
    assert made.shape == (50, 2) and not made[7].any()
    assert np.abs(made[known].mean(0)).max() < 1e-9 and (made[known] ** 2).mean() == pytest.approx(1)

    def between(rows: Any) -> Any:
        return np.linalg.norm(rows[:, None] - rows[None], axis=-1)

    ratio = between(made[known]) / np.maximum(between(plane[known]), 1e-12)
    assert np.ptp(ratio[~np.eye(49, dtype=bool)]) < 1e-9  # two directions hold all there is, so no distance changed
    assert not scaled_vectors(np.ones((3, 4)), np.ones(3, bool), None).any()


def test_features_are_made_once_and_again_where_what_they_are_made_of_changes(
    place: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_world.write(place / "once")
    (data / "images" / "i05.png").unlink()

    def offered(**more: Any) -> tuple[list[Path], Any, Any]:
        given = keys | {"data_path": str(place / "once"), "item_features": ["text", "image"]} | more
        config = Config("SASRecF", "steps", config_dict=given | {"train_neg_sample_args": None})
        dataset = create_dataset(config)
        files = [data / f"steps.{tag}" for tag in config["additional_feat_suffix"]]
        return files, dataset, item_vectors.seconds_of(config)

    with caplog.at_level("INFO"):
        files, dataset, spent = offered()
    assert "1 items have no image, zeros stand for it" in caplog.text and spent > 0
    rows = {row["image_id"]: row["image_vector"] for row in read_atomic(files[1])}
    assert len(rows) == small_world.ITEMS and set(rows["i05"].split()) == {"0"}
    vectors = dataset.get_preload_weight("image_id")
    for item in ("i00", "i33"):
        assert np.allclose(vectors[dataset.token2id("item_id", item)], np.array(rows[item].split(), float))
    times = [path.stat().st_mtime_ns for path in files]
    with monkeypatch.context() as patch:
        patch.setattr("recbole_mllm.mllm.hf.HFModel", None)
        again, _, told = offered()
        assert (again, told) == (files, spent), "whoever finds them is told what they took"
        image_alone, _, told = offered(seed=5, item_features=["image"])
        assert image_alone == files[1:] and 0 < told < spent
    assert [path.stat().st_mtime_ns for path in files] == times
    for change in ({"feature_size": 4}, {"feature_encoder": str(place / "llama"), "item_features": ["text"]}):
        assert not set(offered(**change)[0]) & set(files)


@pytest.mark.parametrize("name", ["games[5-core]", "*"])
def test_a_datasets_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = small_world.write(tmp_path, name, images=False)
    config = {"ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list"}
    assert len(item_vectors._items_of(folder, config)) == small_world.ITEMS
    isum_file(folder, "tag").touch()
    assert tags_of(folder, isum_file) == ("tag",)


def test_what_the_dataset_and_the_user_say_of_the_mllm_holds_for_features_too(keys: dict[str, Any]) -> None:
    told = Path(keys["data_path"]) / "steps" / "dataset.yaml"
    told.write_text("item_kind: movie\n")
    try:
        config = Config("SASRecF", "steps", config_dict=keys | {"block_size": 2, "train_neg_sample_args": None})
    finally:
        told.unlink()
    found = item_vectors.settings_of(config)
    assert (found.recommend.item_kind, found.summary.block_size, found.summary.item_summary) == ("movie", 2, "none")
    assert found.mllm.mllm == keys["mllm"] and found.summary.user_summary_tokens == 256


def test_the_model_reads_the_projected_vectors_of_the_items_in_the_list(place: Path, keys: dict[str, Any]) -> None:
    config = Config("SASRecF", "steps", config_dict=keys | {"item_features": "image", "train_neg_sample_args": None})
    dataset = create_dataset(config)
    dataset.build()
    model = get_model("SASRecF")(config, dataset)
    items = torch.tensor([[3, 1, 0]])
    _, dense = model.feature_embed_layer(None, items)
    weight = next(p for name, p in model.named_parameters() if "projected" in name)
    vectors = torch.tensor(dataset.get_preload_weight("image_id"), dtype=torch.float32)
    assert torch.allclose(dense["item"][0, :, 0], vectors[items[0]] @ weight.T, atol=1e-6)
    assert not dense["item"][0, 2].any()  # the padding
    assert "feature_embed_layer.projected.0.vectors" not in model.state_dict()


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("SASRec", {"item_features": ["text"]}, "SASRec reads no item features"),
        ("SASRecF", {"item_features": ["sound"]}, "item_features names 'sound'"),
        ("SASRecF", {"item_features": 3}, "item_features is 3; it must be"),
        ("SASRecF", {"item_features": ["text"], "feature_encoder": "no/such"}, "feature_encoder 'no/such' cannot be"),
    ],
)
def test_what_cannot_be_made_is_one_line(keys: dict[str, Any], model: str, more: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_dataset(Config(model, "steps", config_dict=keys | more | {"train_neg_sample_args": None}))
