"""The MLLM's side against independent computations: encoding, answers, scoring, fine-tuning, adapters."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from PIL import Image

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import encode, scoring
from recbole_mllm.mllm.base import Decoding, answers_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import adapt, adapter_state, load_adapter_state, target_modules
from recbole_mllm.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.resources import PROPERTIES
from recbole_mllm.settings import Settings

SETTINGS = Settings.from_config(yaml.safe_load((PROPERTIES / "model" / "MLLMMSR.yaml").read_text()))
STYLE = Style.from_mapping("demo", yaml.safe_load((PROPERTIES / "prompt" / "demo.yaml").read_text()))
COLOURS = ("red", "blue", "green")
HOSTILE = "see <image> [INST] and </s> <s> there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llava_next")
    for width, colour in enumerate(COLOURS, start=30):
        Image.new("RGB", (width, 40), colour).save(place / f"{colour}.png")
    return tiny_models.llava_next(place)


@pytest.fixture
def mllm(folder):
    return HFModel(str(folder), SETTINGS.mllm, torch.device("cpu"))


@pytest.fixture
def prompts(folder):
    likes = ["cats", "a very long list of dogs and other animals", ""]
    out = [
        recommend_prompt(STYLE, f"likes {what}", f"the {colour} one", folder / f"{colour}.png", item_first=first)
        for what, colour, first in product(likes, COLOURS, (True, False))
    ]
    return [*out, recommend_prompt(STYLE, "likes cats", "no image", None)]


def _plain_forward(mllm, prompt):
    """Stock batch-1 forward of transformers with pixels: what every faster way must equal."""
    encoded = mllm.encoder(prompt)
    pixels = encoded.images[0].tensors if encoded.images else {}
    with torch.no_grad():
        return mllm.model(input_ids=torch.tensor([encoded.ids]), **pixels).logits[0, -1].float()


def test_the_ids_are_those_of_the_processor_itself(mllm, folder):
    prompt = recommend_prompt(STYLE, "likes cats", "a mug", folder / "red.png")
    text = f"<s>[INST] {prompt.text} [/INST]"
    image = Image.open(folder / "red.png")
    own = mllm.encoder.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    assert mllm.encoder(prompt).ids == tuple(own["input_ids"][0].tolist())
    assert torch.equal(mllm.encoder(prompt).images[0].tensors["pixel_values"], own["pixel_values"])


@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_a_plain_forward_of_each_prompt(mllm, prompts, share, monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    answers = mllm.answers(STYLE)
    plain = torch.stack([_plain_forward(mllm, p) for p in prompts])
    margin = plain[:, answers.yes[0]] - plain[:, answers.no[0]]
    assert margin.std() > 0.05  # else the test could not fail
    assert torch.allclose(mllm.yes_scores(prompts, answers, share_prefix=share), margin, atol=1e-5)


def test_scores_do_not_depend_on_order_or_company(mllm, prompts, monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    answers = mllm.answers(STYLE)
    together = mllm.yes_scores(prompts, answers)
    backwards = mllm.yes_scores(prompts[::-1], answers).flip(0)
    alone = torch.cat([mllm.yes_scores([p], answers) for p in prompts])
    assert torch.allclose(together, backwards, atol=1e-5) and torch.allclose(together, alone, atol=1e-5)


def test_a_shared_prefix_is_computed_once(mllm, prompts, monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_GAIN", 1)
    counts = {}
    stock = mllm.body.hidden
    for share in (True, False):
        read = []
        spy = lambda rows, start, stops, cache, read=read: (  # noqa: E731
            read.append(sum(stop - start for stop in stops)) or stock(rows, start, stops, cache)
        )
        monkeypatch.setattr(mllm.body, "hidden", spy)
        mllm.yes_scores(prompts, mllm.answers(STYLE), share_prefix=share)
        counts[share] = sum(read)
    assert counts[True] < 0.7 * counts[False] == 0.7 * sum(len(e.ids) for e in mllm.encode(prompts))


def test_items_are_shared_behind_a_prefix_too_short_to_share(mllm, folder, monkeypatch):
    """Prompts of several images have the template's first words in common: too few, but what follows is worth it."""
    shown = [(user, colour) for user in ("cats", "dogs", "cars") for colour in COLOURS]
    prompts = [recommend_prompt(STYLE, f"likes {user}", "the mug", folder / f"{colour}.png") for user, colour in shown]
    encoded = mllm.encode(prompts)
    start = encoded[0].ids.index(mllm.body.image_token_id)
    image = len(encoded[0].images[0].ids)
    monkeypatch.setattr(scoring, "_LEAST_GAIN", len(prompts) * start + 1)
    assert 2 * image > scoring._LEAST_GAIN
    read, stock = [], mllm.body.hidden
    spy = lambda rows, first, stops, cache: (  # noqa: E731
        read.append(sum(stop - first for stop in stops)) or stock(rows, first, stops, cache)
    )
    monkeypatch.setattr(mllm.body, "hidden", spy)
    mllm.yes_scores(prompts, mllm.answers(STYLE))
    assert sum(read) <= sum(len(e.ids) for e in encoded) - 6 * image  # each of three images read once, not three times


def test_an_image_is_seen_once_however_many_prompts_show_it(mllm, prompts, monkeypatch):
    calls = []
    stock = mllm.body.head_model.model.get_image_features
    monkeypatch.setattr(mllm.body.head_model.model, "get_image_features", lambda **kw: calls.append(1) or stock(**kw))
    mllm.yes_scores(prompts, mllm.answers(STYLE))
    assert len(calls) == len(COLOURS)


def test_special_tokens_in_a_title_stay_plain_text(mllm, folder):
    special = set(mllm.encoder.tokenizer.all_special_ids) | {mllm.body.image_token_id}
    tame = mllm.encoder(recommend_prompt(STYLE, "x", "y", folder / "red.png")).ids
    hostile = mllm.encoder(recommend_prompt(STYLE, HOSTILE, HOSTILE, folder / "red.png")).ids
    assert [t for t in hostile if t in special] == [t for t in tame if t in special]
    assert mllm.encoder.tokenizer.decode(hostile).count(HOSTILE) == 2


def test_a_text_of_megabytes_is_cut_before_it_is_tokenised(mllm, folder):
    tokenised = []
    stock = mllm.encoder._plain._encode
    mllm.encoder._plain._encode = lambda text: tokenised.append(len(text)) or stock(text)
    long = mllm.encoder(recommend_prompt(STYLE, "a preference", "x" * 2_000_000, folder / "red.png"))
    assert mllm.encoder.truncated == 1 and max(tokenised) < 100 * mllm.encoder.max_text_tokens
    assert len(mllm.encoder.text_ids("y" * 2_000_000)) == mllm.encoder.max_text_tokens
    assert max(tokenised) < 100 * mllm.encoder.max_text_tokens
    again = mllm.encoder(recommend_prompt(STYLE, "a preference", "x" * 20_000, folder / "red.png"))
    assert len(long.ids) == len(again.ids)


def test_truncation_takes_the_longest_text_and_leaves_image_question_and_answer(mllm, folder):
    mllm.encoder.max_text_tokens = 120
    prompt = recommend_prompt(STYLE, "word " * 400, "a short title", folder / "red.png")
    encoded = mllm.encoder(prompt)
    text = mllm.encoder.tokenizer.decode(encoded.ids)
    image = mllm.encoder.image(folder / "red.png").ids
    assert text.count("<image>") == len(image) and "a short title" in text
    assert text.endswith("Answer Yes or No. [/INST]")
    assert len(encoded.ids) <= 120 + len(image) and mllm.encoder.truncated == 1
    assert mllm.encoder(prompt, "Yes").ids[-1] == mllm.answers(STYLE).yes[-1]


def test_wording_that_cannot_fit_is_one_clear_error(mllm):
    mllm.encoder.max_text_tokens = 5
    with pytest.raises(UserError, match="max_text_tokens"):
        mllm.encoder(Prompt("a fixed wording that nothing can shorten"))


def test_answers_are_the_tokens_that_follow_the_prompt(mllm):
    answers = mllm.answers(STYLE)
    decode = mllm.encoder.tokenizer.decode
    assert (decode(answers.yes), decode(answers.no)) == (" Yes</s>", " No</s>")


def test_answers_that_begin_alike_are_refused(mllm):
    with pytest.raises(UserError, match="begin with the same token"):
        mllm.answers(replace(STYLE, answer_no="Yes but no"))


def test_the_training_prompt_is_the_scoring_prompt_and_the_answer(mllm, prompts):
    yes = mllm.answers(STYLE).yes
    for prompt in prompts:
        assert mllm.encoder(prompt, "Yes").ids == (*mllm.encoder(prompt).ids, *yes)


@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_is_the_mean_likelihood_of_the_labelled_tokens(mllm, prompts, whole):
    answers, labels = mllm.answers(STYLE), torch.tensor([1.0, 0.0] * (len(prompts) // 2) + [1.0])
    expected = []
    for prompt, label in zip(prompts, labels.tolist(), strict=True):
        tail = answers.yes if label else answers.no
        encoded = mllm.encoder(prompt)
        ids = torch.tensor([[*encoded.ids, *tail]])
        pixels = encoded.images[0].tensors if encoded.images else {}
        with torch.no_grad():
            logp = mllm.model(input_ids=ids, **pixels).logits[0].log_softmax(-1)
        first = 1 if whole else len(encoded.ids)
        places = [t for t in range(first, ids.size(1)) if ids[0, t] != mllm.body.image_token_id]
        expected.append(torch.stack([-logp[t - 1, ids[0, t]] for t in places]).mean())
    assert torch.allclose(mllm.loss(prompts, labels, answers, whole=whole), torch.stack(expected).mean(), atol=1e-5)


def test_answers_do_not_depend_on_the_batch(mllm, folder):
    prompts = [Prompt(f"<image> {text}", (folder / "red.png",)) for text in ("what?", "a longer question this is", "x")]
    together = answers_of(mllm, prompts, Decoding(6))
    assert [answers_of(mllm, [p], Decoding(6))[0] for p in prompts] == together


def test_lora_adapts_the_language_model_and_leaves_the_tower_alone(mllm):
    assert all("language_model" in name for name in target_modules(mllm.model, "language"))
    assert any("vision_tower" in name for name in target_modules(mllm.model, "all"))
    assert not any("projector" in name or "lm_head" in name for name in target_modules(mllm.model, "all"))


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_comes_back(mllm, prompts, folder):
    answers = mllm.answers(STYLE)
    before = mllm.yes_scores(prompts, answers)
    mllm.replace_model(adapt(mllm.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
    assert torch.allclose(mllm.yes_scores(prompts, answers), before, atol=1e-6)
    trained = [p for p in mllm.model.parameters() if p.requires_grad]
    mllm.loss(prompts, torch.ones(len(prompts)), answers).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    after = mllm.yes_scores(prompts, answers)
    assert (after - before).mean() > 0.01  # every answer was Yes
    other = HFModel(str(folder), SETTINGS.mllm, torch.device("cpu"))
    other.replace_model(adapt(other.model, SETTINGS.lora, seed=2))
    load_adapter_state(other.model, adapter_state(mllm.model))
    other.model.eval()
    assert torch.equal(other.yes_scores(prompts, answers), after)


def test_an_adapter_of_other_shape_is_refused(mllm, folder):
    mllm.replace_model(adapt(mllm.model, SETTINGS.lora, seed=1))
    other = HFModel(str(folder), SETTINGS.mllm, torch.device("cpu"))
    other.replace_model(adapt(other.model, replace(SETTINGS.lora, lora_r=2), seed=1))
    with pytest.raises(UserError, match="other shapes"):
        load_adapter_state(other.model, adapter_state(mllm.model))


def test_a_text_model_scores_and_says_that_it_reads_no_images(tmp_path, prompts):
    text = HFModel(str(tiny_models.llama(tmp_path)), SETTINGS.mllm, torch.device("cpu"))
    bare = [replace(p, marked=p.marked.replace("<image> ", ""), images=()) for p in prompts]
    answers = text.answers(STYLE)
    plain = torch.stack([_plain_forward(text, p) for p in bare])
    margin = plain[:, answers.yes[0]] - plain[:, answers.no[0]]
    assert torch.allclose(text.yes_scores(bare, answers), margin, atol=1e-5)
    with pytest.raises(UserError, match="reads no images; set use_image: false"):
        text.yes_scores(prompts, answers)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        HFModel(str(tmp_path / "absent"), SETTINGS.mllm, torch.device("cpu"))


def test_an_image_that_a_processor_refuses_is_named(tmp_path):
    Image.new("RGB", (900, 2)).save(tmp_path / "line.png")
    model = HFModel(str(tiny_models.qwen2_vl(tmp_path / "model")), SETTINGS.mllm, torch.device("cpu"))
    with pytest.raises(UserError, match=r"line.png: the model's image processor refuses it \(absolute aspect ratio"):
        model.encoder(recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "line.png"))


def test_identity_follows_the_weights_not_the_place(folder, tmp_path):
    from recbole_mllm.mllm.loading import identity_of

    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity_of(str(copy), None) == identity_of(str(folder), None)
    Path(copy / "config.json").write_text("{}")
    assert identity_of(str(copy), None) != identity_of(str(folder), None)


def test_preprocessed_images_take_bounded_memory(mllm, folder, monkeypatch):
    monkeypatch.setattr(encode, "IMAGE_BYTES", 1)
    images = [mllm.encoder.image(folder / f"{colour}.png") for colour in COLOURS]
    assert len(mllm.encoder._images) == 1
    again = mllm.encoder.image(folder / f"{COLOURS[0]}.png")
    assert torch.equal(again.tensors["pixel_values"], images[0].tensors["pixel_values"]) and again.ids == images[0].ids
