"""Answers written side by side equal those written alone, whatever leaves or joins the batch, or runs out of memory."""

import json

import pytest
import tiny_models
import torch
from PIL import Image
from planted_writers import answers_of
from stock_forward import KEYS
from transformers import GenerationConfig

from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import MLLMSettings, Settings
from recbole_mllm.mllm.generation import generate_plainly, ignored_rules, own_rules, with_penalty
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Ask, Batch, Decoding
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.summaries.generator import item_generator, user_generator

COLORS = ("red", "green", "blue")
LONG = Decoding(16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    for n, color in enumerate(COLORS):
        Image.new("RGB", (40 + 30 * n, 60), color).save(folder / f"{color}.png")
    settings = MLLMSettings("tiny", None, None, False, "float32", 2048)
    return HFModel(str(tiny_models.llava_next(folder)), settings, torch.device("cpu")), folder


@pytest.fixture
def prompts(model):
    """Texts of several lengths, and images of three sizes."""
    words = ["a", "dog", "saw", "9", "TREES;", "who?"]
    out = [Prompt(f"{'and more ' * (n % 5)}{word}") for n, word in enumerate(words)]
    return out + [Prompt(f"<image> what is {'very ' * n}this?", (model[1] / f"{COLORS[n % 3]}.png",)) for n in range(4)]


def stock(mllm, prompt, length):
    """Return what transformers' own `generate` writes for one prompt."""
    encoded = mllm.encoder(prompt)
    pixels = dict(encoded.images[0].tensors) if encoded.images else {}
    ids = torch.tensor([encoded.ids])
    out = mllm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        **pixels,
    )
    return mllm.encoder.tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True).strip()


class Chain(Batch):
    """Each answer is part of the next prompt; the chains have different lengths."""

    def __init__(self, lengths):
        super().__init__([Prompt(f"start {n}") for n in range(len(lengths))], Decoding(5))
        self.left, self.texts, self.under_way = list(lengths), {}, []

    def take(self, count):
        out = super().take(count)
        self.under_way.append(len(out))
        return out

    def give(self, arrived):
        for place, answer in arrived:
            self.texts.setdefault(place, []).append(answer.text)
            self.left[place] -= 1
            if self.left[place]:
                self.waiting.append(Ask(place, Prompt(f"{answer.text} then {place}"), Decoding(5)))


def test_a_chain_goes_on_while_others_are_still_at_their_start(model):
    mllm, _ = model
    mllm.slots = 4
    lengths = [5, 1, 2, 1, 1, 3]
    work = Chain(lengths)
    mllm.write(work)
    assert [len(work.texts[n]) for n in range(len(lengths))] == lengths
    for place, length in enumerate(lengths):
        text = None
        for step in range(length):
            prompt = Prompt(f"start {place}" if text is None else f"{text} then {place}")
            text = answers_of(mllm, [prompt], Decoding(5))[0].text
            assert work.texts[place][step] == text
    assert max(work.under_way) <= 4


def test_sampling_depends_on_prompt_and_seed_alone(model, prompts):
    mllm, _ = model
    sampled = Decoding(10, 0.9, 0.95, seed=3)
    mllm.slots = 64
    together = answers_of(mllm, prompts, sampled)
    mllm.slots = 2
    assert answers_of(mllm, prompts[::-1], sampled)[::-1] == together
    other = answers_of(mllm, prompts, Decoding(10, 0.9, 0.95, seed=4))
    assert sum(a.text != b.text for a, b in zip(together, other, strict=True)) > len(prompts) // 2
    # a nucleus of next to nothing is the greedy choice
    greedy = answers_of(mllm, prompts, Decoding(10))
    assert answers_of(mllm, prompts, Decoding(10, 0.9, 1e-9, seed=3)) == greedy


class Memory:
    """A body with room for so many tokens a pass; beyond, it fails as a GPU does."""

    def __init__(self, body, room):
        self.backbone, self.room, self.refused = body, room, 0

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def hidden(self, rows, start, stops, cache):
        if len(rows) * max(stops) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.backbone.hidden(rows, start, stops, cache)

    def step(self, ids, positions, mask, cache):
        if mask.numel() > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.backbone.step(ids, positions, mask, cache)


def test_out_of_memory_lowers_the_batch_and_loses_nothing(model, prompts, monkeypatch, caplog):
    mllm, _ = model
    mllm.slots = 64
    expected = answers_of(mllm, prompts, LONG)
    longest = max(len(mllm.encoder(p).ids) for p in prompts) + LONG.max_new_tokens
    small = Memory(mllm.backbone, 3 * longest)
    monkeypatch.setattr(mllm, "backbone", small)
    assert answers_of(mllm, prompts, LONG) == expected
    assert small.refused and "prompts at a time" in caplog.text


def test_a_prompt_too_large_on_its_own_fails_alone(model, prompts, monkeypatch):
    mllm, _ = model
    mllm.slots = 8
    giant = Prompt("giant " * 100)
    monkeypatch.setattr(mllm, "backbone", Memory(mllm.backbone, len(mllm.encoder(giant).ids) - 1))
    work = Batch([*prompts[:5], giant, *prompts[5:8]], LONG)
    mllm.write(work)
    assert set(work.failures) == {5} and "giant giant" in work.failures[5] and "max_text_tokens" in work.failures[5]
    assert sorted(work.answers) == [0, 1, 2, 3, 4, *range(6, 6 + len(prompts[5:8]))]


def test_an_image_that_vanished_fails_alone(model, prompts, tmp_path):
    mllm, _ = model
    gone = tmp_path / "gone.png"
    Image.new("RGB", (9, 9), "white").save(gone)
    work = Batch([*prompts[:3], Prompt("<image> what?", (gone,))], Decoding(4))
    gone.unlink()
    mllm.write(work)
    assert set(work.failures) == {3} and "gone.png" in work.failures[3] and len(work.answers) == 3


RULES = [
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"suppress_tokens": [*range(60, 300)], "begin_suppress_tokens": [*range(300, 340)], "min_new_tokens": 9},
    {"bad_words_ids": [[50], [51, 52]], "forced_eos_token_id": 2, "encoder_repetition_penalty": 1.2}
    | {"sequence_bias": [[[70], 4.0]], "exponential_decay_length_penalty": [3, 1.5], "encoder_no_repeat_ngram_size": 3},
]


@pytest.fixture
def ruled(model, monkeypatch, request):
    """The model with a `generation_config` on disk, as its folder would have one, and what is read off that."""
    mllm, folder = model
    path = folder / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | request.param))
    monkeypatch.setattr(mllm.model, "generation_config", GenerationConfig.from_pretrained(folder))
    yield mllm, own_rules(str(folder))
    path.write_text(before)


@pytest.mark.parametrize("ruled", RULES, indirect=True)
def test_a_generation_config_is_followed_as_transformers_own_generate_follows_it(ruled, prompts, model):
    mllm, rules = ruled
    mllm.slots = 4
    expected = [stock(mllm, prompt, 12) for prompt in prompts]
    assert [answer.text for answer in answers_of(mllm, prompts, Decoding(12, rules=rules))] == expected
    assert expected != [answer.text for answer in answers_of(mllm, prompts, Decoding(12))]
    work = Batch(prompts, Decoding(12, rules=rules))
    generate_plainly(mllm.backbone, mllm.encoder, frozenset({2}), work)  # as a family that cannot be written in flight
    assert [work.answers[place].text for place in range(len(prompts))] == expected
    # a nucleus of next to nothing is the greedy choice, of the same logits
    assert [a.text for a in answers_of(mllm, prompts, Decoding(12, 0.9, 1e-9, rules=rules))] == expected


@pytest.mark.parametrize("ruled", [{"repetition_penalty": 1.3, "num_beams": 4, "top_k": 1}], indirect=True)
def test_an_own_penalty_wins_and_another_way_of_decoding_is_named(ruled, prompts):
    mllm, rules = ruled
    assert json.loads(rules) == {"repetition_penalty": 1.3} and with_penalty(rules, 1.0) == ""
    assert json.loads(with_penalty(rules, 1.5)) == {"repetition_penalty": 1.5}
    assert ignored_rules(mllm.model.generation_config) == "num_beams: 4"
    mllm.model.generation_config.num_beams, mllm.model.generation_config.repetition_penalty = 1, 1.5
    expected = [stock(mllm, prompt, 12) for prompt in prompts]
    texts = [a.text for a in answers_of(mllm, prompts, Decoding(12, rules=with_penalty(rules, 1.5)))]
    assert texts == expected
    mllm.model.generation_config.repetition_penalty = 1.0
    expected = [stock(mllm, prompt, 12) for prompt in prompts]
    assert [a.text for a in answers_of(mllm, prompts, Decoding(12))] == expected != texts


def test_a_key_knows_of_rules_only_where_there_are_any():
    assert str(Decoding(9)) == "greedy:9" and str(Decoding(9, rules="x")) == "greedy:9:x"
    assert with_penalty("", None) == with_penalty("", 1.0) == "" != with_penalty("", 1.0, served=True)


def test_the_summaries_of_a_run_take_a_models_own_rules_into_their_key_and_tag(tmp_path):
    models = {name: tmp_path / name for name in ("plain", "penalised")}
    for name, folder in models.items():
        folder.mkdir()
        own = {"repetition_penalty": 1.05 if name == "penalised" else 1.0, "eos_token_id": 2, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(own))
        (folder / "config.json").write_text("{}")
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.item").write_text("item_id:token\ttitle:token_seq\n1\ta\n")

    def made(name, **keys):
        own = {"mllm": str(models[name]), "use_image": False, "item_summary": "text"}
        config = {"data_path": str(data), "ITEM_ID_FIELD": "item_id"}
        stage = make_summary_setup(config, Settings.from_config(KEYS | own | keys), torch.device("cpu"))
        return str(item_generator(stage, None).decoding), str(user_generator(stage, None).decoding), stage.tag

    penalty = '{"repetition_penalty": 1.05}'
    assert made("plain")[:2] == ("greedy:200", "greedy:256") == made("penalised", summary_repetition_penalty=1)[:2]
    assert made("penalised")[:2] == (f"greedy:200:{penalty}", f"greedy:256:{penalty}")
    assert made("plain")[2] == made("plain", summary_repetition_penalty=1)[2]
    assert len({made("penalised", summary_repetition_penalty=p)[2] for p in (None, 1, 1.3)}) == 3
