"""Answers written side by side equal those written alone, whatever leaves or joins the batch, or runs out of memory."""

import pytest
import tiny_models
import torch
from PIL import Image

from recbole_mllm.data.sampling import hash64
from recbole_mllm.mllm.base import Ask, Batch, Decoding, answers_of
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import MLLMSettings

COLORS = ("red", "green", "blue")
LONG = Decoding(24)


@pytest.fixture(scope="module", params=["llama", "llava", "llava_next"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for n, color in enumerate(COLORS):
        Image.new("RGB", (40 + 30 * n, 60), color).save(folder / f"{color}.png")
    made = getattr(tiny_models, request.param)(folder)
    settings = MLLMSettings("tiny", None, None, False, "float32", 2048)
    return HFModel(str(made), settings, torch.device("cpu")), folder


@pytest.fixture
def prompts(model):
    mllm, folder = model
    words = ["a", "dog", "saw", "9", "TREES;", "who?", "no-one:", "x"]
    out = [Prompt(f"{'and more ' * (n % 5)}{word}") for n, word in enumerate(words)]
    if mllm.encoder.processor is not None:
        out += [Prompt(f"<image> what is {'very ' * n}this?", (folder / f"{COLORS[n % 3]}.png",)) for n in range(6)]
    return out


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


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_greedy_answers_equal_transformers_own_generate(model, prompts, slots):
    mllm, _ = model
    mllm.slots = slots
    expected = [stock(mllm, prompt, 12) for prompt in prompts]
    answers = answers_of(mllm, prompts, Decoding(12))
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > len(prompts) // 3  # they depend on the prompt
    assert [a.prompt_tokens for a in answers] == [len(mllm.encoder(p).ids) for p in prompts]


class Lengths(Batch):
    """Asks for answers of different lengths, so that rows leave and join at every step."""

    def __init__(self, prompts):
        super().__init__(prompts, LONG)
        self.waiting = [Ask(a.place, a.prompt, Decoding(1 + 5 * a.place % 13)) for a in self.waiting]


def test_rows_that_leave_and_join_change_nothing(model, prompts):
    mllm, _ = model
    mllm.slots = 4
    work = Lengths(prompts)
    asks = list(work.waiting)
    mllm.write(work)
    mllm.slots = 1
    for ask in asks:
        assert work.answers[ask.place] == answers_of(mllm, [ask.prompt], ask.decoding)[0]


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
    lengths = [7, 1, 2, 1, 1, 3, 1, 1]
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
        self.body, self.room, self.refused = body, room, 0

    def __getattr__(self, name):
        return getattr(self.body, name)

    def hidden(self, rows, start, stops, cache):
        if len(rows) * max(stops) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.body.hidden(rows, start, stops, cache)

    def step(self, ids, positions, mask, cache):
        if mask.numel() > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.body.step(ids, positions, mask, cache)


def test_out_of_memory_lowers_the_batch_and_loses_nothing(model, prompts, monkeypatch, caplog):
    mllm, _ = model
    mllm.slots = 64
    expected = answers_of(mllm, prompts, LONG)
    longest = max(len(mllm.encoder(p).ids) for p in prompts) + LONG.max_new_tokens
    small = Memory(mllm.body, 3 * longest)
    monkeypatch.setattr(mllm, "body", small)
    assert answers_of(mllm, prompts, LONG) == expected
    assert small.refused and "prompts at a time" in caplog.text


def test_a_prompt_too_large_on_its_own_fails_alone(model, prompts, monkeypatch):
    mllm, _ = model
    mllm.slots = 8
    giant = Prompt("giant " * 100)
    monkeypatch.setattr(mllm, "body", Memory(mllm.body, len(mllm.encoder(giant).ids) - 1))
    work = Batch([*prompts[:5], giant, *prompts[5:8]], LONG)
    mllm.write(work)
    assert set(work.failures) == {5} and "giant giant" in work.failures[5] and "max_text_tokens" in work.failures[5]
    assert sorted(work.answers) == [0, 1, 2, 3, 4, *range(6, 6 + len(prompts[5:8]))]


def test_an_image_that_vanished_fails_alone(model, prompts, tmp_path):
    mllm, folder = model
    if mllm.encoder.processor is None:
        return
    gone = tmp_path / "gone.png"
    Image.new("RGB", (9, 9), "white").save(gone)
    work = Batch([*prompts[:3], Prompt("<image> what?", (gone,))], Decoding(4))
    gone.unlink()
    mllm.write(work)
    assert set(work.failures) == {3} and "gone.png" in work.failures[3] and len(work.answers) == 3


def test_hashes_name_streams_apart():
    assert len({hash64("write", 0, *ids) for ids in ((1, 2), (12,), (2, 1), (1, 2, 3))}) == 4
