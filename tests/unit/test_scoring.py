"""Scoring: unknown families are checked once, prefixes are shared, and out of memory lowers the batch."""

import copy
import gc
import logging
import weakref
from dataclasses import replace

import pytest
import tiny_models
import torch
from PIL import Image
from planted_writers import answers_of
from stock_forward import CPU, SETTINGS, STYLE, loss_of, own_inputs, own_logits
from tiny_models.parts import TEXT, write
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt, recommend_prompt
from recbole_mllm.mllm import families, scoring
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.memory import Budget, in_batches

SMALL = {"vocab_size": 389, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"head_dim": 16}
# model, settings, how it is scored, whether its answers are written in flight
UNKNOWN = {
    # its linear layers are no `nn.Linear`
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, **SMALL), "shared", True),
    # two layers of a sliding window, and capped logits
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**TEXT, **SMALL, **HEADS, sliding_window=16), "shared", True),
    # logits are more than the head's rows
    "granite": (GraniteForCausalLM, GraniteConfig(**TEXT, **SMALL, logits_scaling=8.0), "shared", True),
    # no keys and values at all
    "mamba": (MambaForCausalLM, MambaConfig(hidden_size=64, num_hidden_layers=2, **SMALL), "flat", False),
    # a recurrence, and logits capped by a setting of another name
    "recurrent_gemma": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig(
            **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"},
            **SMALL,
            **HEADS,
            lru_width=64,
            attention_window_size=16,
            block_types=["recurrent", "recurrent", "attention"],
        ),
        "flat",
        False,
    ),
}
PROMPTS = [recommend_prompt(STYLE, f"likes {what} cats", "a mug", None) for what in ("big", "very small", "no")]


@pytest.fixture(scope="module", params=UNKNOWN)
def unknown(request, tmp_path_factory):
    """A model of a family without a row in the table, and what is expected of it."""
    place = tmp_path_factory.mktemp(request.param)
    words = tiny_models.llama(place / "words")
    build, config, *expected = UNKNOWN[request.param]
    write(place, build, config, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / name).write_bytes((words / name).read_bytes())
    return HFModel(str(place), SETTINGS.mllm, CPU, slots=3), *expected


def own_of(model, prompt):
    return own_inputs(model.encoder.tokenizer, None, prompt)


def flat(gradients):
    return torch.cat(
        [g.flatten() for g in gradients if g is not None]
    )  # Mamba reads one layer's weight, not its output


def test_an_unknown_family_scores_as_its_plain_forward(unknown, monkeypatch, caplog):
    model, way, _ = unknown
    checks, stock = [], scoring.find_scoring_mode
    monkeypatch.setattr(scoring, "find_scoring_mode", lambda *args: checks.append(1) or stock(*args))
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    answers = model.answers(STYLE)
    with caplog.at_level(logging.WARNING):
        got = model.yes_scores(PROMPTS, answers)
        assert torch.equal(model.yes_scores(PROMPTS, answers), got) and len(checks) == 1
    own = torch.stack([own_logits(model.model, own_of(model, prompt))[-1] for prompt in PROMPTS])
    margin = own[:, answers.yes[0]] - own[:, answers.no[0]]
    assert margin.std() > 1e-3 and torch.allclose(got, margin, atol=1e-5)
    assert model.backbone.scoring_mode == way
    assert ("disagrees with a plain forward pass" in caplog.text) == (way != "shared")


def test_an_unknown_family_writes_as_its_own_generate(unknown, caplog):
    model, _, in_flight = unknown
    ends = ("what is it?", "a dog", "9 TREES;", "no-one:", "x")
    prompts = [Prompt("and so " * n + end) for n, end in zip((1, 9, 4, 30, 2), ends, strict=True)]
    expected = []
    for prompt in prompts:
        inputs = own_of(model, prompt)
        out = model.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        new = out[0, inputs["input_ids"].size(1) :]
        expected.append(model.encoder.tokenizer.decode(new, skip_special_tokens=True).strip())
    with caplog.at_level(logging.WARNING):
        assert [answer.text for answer in answers_of(model, prompts, Decoding(10))] == expected
    assert len(set(expected)) > 1 and model.backbone.in_flight == {False: in_flight}
    assert ("written one by one" in caplog.text) == (not in_flight)
    # sampling depends on the prompt and the seed alone, and a nucleus of next to nothing is the greedy choice
    assert [answer.text for answer in answers_of(model, prompts, Decoding(10, 0.9, 1e-9))] == expected
    sampled = Decoding(10, 0.9, 0.95, seed=3)
    assert answers_of(model, prompts[::-1], sampled)[::-1] == answers_of(model, prompts, sampled)


def test_an_unknown_family_is_trained_by_its_own_likelihood(unknown):
    given, *_ = unknown
    model = copy.deepcopy(given)
    model.replace_model(tune(model.model, replace(SETTINGS.lora, lora_dropout=0.0), seed=1))
    answers, labels = model.answers(STYLE), torch.ones(len(PROMPTS))
    adapted = [p for p in model.model.parameters() if p.requires_grad]
    for whole in (False, True):
        losses = []
        for prompt in PROMPTS:
            start = own_of(model, prompt)["input_ids"][0]
            ids = torch.cat([start, torch.tensor(answers.yes)])
            places = torch.arange(1 if whole else len(start), len(ids))
            logits = model.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[places - 1], ids[places]))
        expected, loss = torch.stack(losses).mean(), loss_of(model, PROMPTS, labels, whole=whole, share=True)
        assert torch.allclose(loss, expected, atol=1e-5)
        own, got = (flat(torch.autograd.grad(one, adapted, allow_unused=True)) for one in (expected, loss))
        assert own.norm() > 0 and (got - own).norm() < 2e-5 * own.norm()
    model.model.train()
    model.backbone.scoring_mode = None  # the check must not leave dropout off
    loss_of(model, PROMPTS, labels)
    assert all(module.training for module in model.model.modules())


def test_logits_that_a_model_never_writes_hide_no_wrong_ones(tmp_path, monkeypatch):
    """As Chameleon masks its image tokens: the mask alone would make any difference look like rounding."""
    monkeypatch.delitem(families._FAMILIES, "llama")
    model = HFModel(str(tiny_models.llama(tmp_path / "model")), SETTINGS.mllm, CPU)
    stock = type(model.backbone.head_model).forward

    def masked(self, *args, **given):
        out = stock(self, *args, **given)
        out.logits[..., :40] = torch.finfo(out.logits.dtype).min
        return out

    monkeypatch.setattr(type(model.backbone.head_model), "forward", masked)
    model.yes_scores(PROMPTS, model.answers(STYLE))
    assert model.backbone.scoring_mode == "plain"  # as of few tokens others are masked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["paligemma", "gemma3", "llava"])
def test_a_family_nobody_told_of_shares_what_it_can_in_any_precision(tmp_path, monkeypatch, caplog, family, dtype):
    """Without its row in the table; the first reads its whole prompt both ways, the second an image."""
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    monkeypatch.delitem(families._FAMILIES, family)
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "red.png")
    config = getattr(tiny_models, family)(tmp_path / "model") / "config.json"
    config.write_text(config.read_text().replace('"final_logit_softcapping": 0.5', '"final_logit_softcapping": null'))
    model = HFModel(str(config.parent), replace(SETTINGS.mllm, dtype=dtype), CPU)
    prompts = [recommend_prompt(STYLE, f"likes {w}", "a mug", tmp_path / "red.png") for w in ("cats", "small dogs")]
    answers = model.answers(STYLE)
    together = model.yes_scores(prompts, answers)
    assert (model.backbone.scoring_mode == "shared") == (family == "llava")
    assert (f"{family}: shared scoring disagrees" in caplog.text) == (family != "llava")
    alone = torch.cat([model.yes_scores([prompt], answers) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "gemma3"])
def test_what_is_tried_out_beforehand_is_found_as_it_is_at_first_use(tmp_path, monkeypatch, family):
    monkeypatch.delitem(families._FAMILIES, family)
    model = HFModel(str(getattr(tiny_models, family)(tmp_path / "model")), SETTINGS.mllm, CPU)
    model.try_out()
    mode, sees = model.backbone.scoring_mode, model.encoder.processor is not None
    assert (mode == "shared") == (family != "gemma3") and model.backbone.mode_sees == sees
    monkeypatch.setattr(scoring, "find_scoring_mode", None)
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "red.png")
    image = tmp_path / "red.png" if sees else None
    model.yes_scores([*PROMPTS, recommend_prompt(STYLE, "likes cats", "a mug", image)], model.answers(STYLE))


def test_a_family_is_checked_in_the_precision_of_its_weights_whatever_autocast_does(tmp_path, monkeypatch):
    monkeypatch.delitem(families._FAMILIES, "llama")
    model = HFModel(str(tiny_models.llama(tmp_path / "model")), SETTINGS.mllm, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, PROMPTS, torch.ones(len(PROMPTS)))
    assert model.backbone.scoring_mode == "shared"


def test_what_holds_without_an_image_is_checked_again_with_one(tmp_path, monkeypatch):
    """Gemma3 without its row in the table: text is read in one direction, an image in both."""
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    monkeypatch.delitem(families._FAMILIES, "gemma3")
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "red.png")
    config = tiny_models.gemma3(tmp_path / "model") / "config.json"
    config.write_text(config.read_text().replace('"final_logit_softcapping": 0.5', '"final_logit_softcapping": null'))
    model = HFModel(str(tmp_path / "model"), SETTINGS.mllm, CPU)
    answers = model.answers(STYLE)
    model.yes_scores(PROMPTS, answers)
    assert model.backbone.scoring_mode == "shared"
    model.yes_scores([recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "red.png")], answers)
    assert model.backbone.scoring_mode != "shared"
    model.backbone.scoring_mode, model.backbone.mode_sees = None, False
    loss_of(model, PROMPTS, torch.ones(len(PROMPTS)))
    assert model.backbone.scoring_mode == "shared"
    shown = [recommend_prompt(STYLE, "likes cats", "a mug", tmp_path / "red.png")]
    loss_of(model, shown, torch.ones(1))
    assert model.backbone.scoring_mode != "shared"


def test_items_are_shared_behind_a_prefix_too_short_to_share(tmp_path, monkeypatch):
    """Prompts of several images have the template's first words in common: too few, but what follows is worth it."""
    folder, colours = tmp_path, ("red", "blue", "green")
    for width, colour in enumerate(colours, start=30):
        Image.new("RGB", (width, 40), colour).save(folder / f"{colour}.png")
    mllm = HFModel(str(tiny_models.llava_next(folder / "model")), SETTINGS.mllm, CPU)
    calls, vision = [], mllm.backbone.head_model.model.get_image_features
    monkeypatch.setattr(
        mllm.backbone.head_model.model, "get_image_features", lambda **kw: calls.append(1) or vision(**kw)
    )
    shown = [(user, colour) for user in ("cats", "dogs", "cars") for colour in colours]
    prompts = [recommend_prompt(STYLE, f"likes {user}", "the mug", folder / f"{colour}.png") for user, colour in shown]
    encoded = mllm.encode(prompts)
    start = encoded[0].ids.index(mllm.backbone.image_token_id)
    image = len(encoded[0].images[0].ids)
    monkeypatch.setattr(scoring, "LEAST_GAIN", len(prompts) * start + 1)
    assert 2 * image > scoring.LEAST_GAIN
    read, stock = [], mllm.backbone.hidden

    def spy(rows, first, stops, cache):
        read.append(sum(stop - first for stop in stops))
        return stock(rows, first, stops, cache)

    monkeypatch.setattr(mllm.backbone, "hidden", spy)
    mllm.yes_scores(prompts, mllm.answers(STYLE))
    assert len(calls) == len(colours)  # an image is seen once, however many prompts show it
    assert sum(read) <= sum(len(e.ids) for e in encoded) - 6 * image  # each of three images read once, not three times


@pytest.fixture
def mllm(tmp_path):
    return HFModel(str(tiny_models.llama(tmp_path)), SETTINGS.mllm, CPU)


@pytest.fixture
def prompts():
    likes = [f"likes {letter} {'very ' * n}big cats" for n, letter in enumerate("abcdefghijkl")]
    return [recommend_prompt(STYLE, preference, "a mug", None) for preference in likes]


@pytest.fixture
def small_memory(mllm, monkeypatch):
    """Let the model itself fail, as an accelerator would, when a call holds more than so many tokens in its cache."""

    def limit(tokens, error=None):
        tried, stock = [], mllm.model.model.forward

        def forward(*args, attention_mask, **kwargs):
            tried.append(attention_mask.numel())
            if attention_mask.numel() > tokens:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return stock(*args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(mllm.model.model, "forward", forward)
        return tried

    return limit


CPU_FULL = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: tried 9 bytes."


@pytest.mark.parametrize(("least_gain", "error"), [(1, None), (10**6, RuntimeError(CPU_FULL))])
def test_scores_are_the_same_in_little_memory(mllm, prompts, small_memory, monkeypatch, least_gain, error):
    monkeypatch.setattr(scoring, "LEAST_GAIN", least_gain)
    answers = mllm.answers(STYLE)
    expected = mllm.yes_scores(prompts, answers)
    tried = small_memory(300, error)
    assert torch.allclose(mllm.yes_scores(prompts, answers), expected, atol=1e-5)
    failed = [size for size in tried if size > 300]
    assert failed and failed == sorted(failed, reverse=True)
    tried.clear()
    assert torch.allclose(mllm.yes_scores(prompts, answers), expected, atol=1e-5)
    assert all(size <= 300 for size in tried)  # what was learnt stays


def test_one_prompt_too_large_is_named_and_another_error_is_not_swallowed(mllm, prompts, small_memory):
    answers = mllm.answers(STYLE)
    small_memory(130)
    long = recommend_prompt(STYLE, "likes one thing " * 40, "a particular mug", None)
    with pytest.raises(UserError, match="out of memory with one prompt alone: .*a particular mug.*tokens"):
        mllm.yes_scores([*prompts, long], answers)
    small_memory(0, RuntimeError("expected scalar type Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        mllm.yes_scores(prompts, answers)


@pytest.mark.parametrize("helps", [True, False])
def test_what_can_be_released_is_released_before_one_row_is_given_up(helps):
    held = [1]

    def run(batch):
        if held:
            raise torch.OutOfMemoryError("out")
        return sum(batch)

    budget = Budget(8, lambda: not (helps and held.clear()))
    if helps:
        assert [out for _, out in in_batches([5], run, len, budget, str)] == [5]
    else:  # what is made again at each try is no way out
        with pytest.raises(UserError, match="out of memory 5"):
            list(in_batches([5], run, len, budget, str))


# What a long run holds does not grow with its length


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llava(tmp_path_factory.mktemp("llava"))


def _pictured(place, items):
    """Three users of each of so many items, each with an image of its own."""
    out = []
    for n in range(items):
        path = place / f"{n}.png"
        Image.new("RGB", (40, 30), (n % 256, n // 256, 90)).save(path)
        out += [recommend_prompt(STYLE, f"likes {word}", f"mug {n}", path) for word in ("cats", "dogs", "red things")]
    return out


def _tensors():
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))


def test_scoring_more_items_holds_no_more_caches_and_leaves_no_more_tensors(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "LEAST_GAIN", 1)
    monkeypatch.setattr("recbole_mllm.mllm.backbone.FEATURE_BYTES", 40_000)
    monkeypatch.setattr("recbole_mllm.mllm.encoder.IMAGE_BYTES", 100_000)
    monkeypatch.setattr("recbole_mllm.mllm.hf.IMAGE_BYTES", 100_000)
    alive, most = weakref.WeakSet(), []

    def seen(make):
        def made(*args):
            cache = make(*args)
            alive.add(cache)
            most.append(len(alive))
            return cache

        return made

    monkeypatch.setattr(Backbone, "new_cache", seen(Backbone.new_cache))
    monkeypatch.setattr(scoring, "fork", seen(scoring.fork))
    mllm = HFModel(str(folder), SETTINGS.mllm, CPU)
    answers, left = mllm.answers(STYLE), {}
    for items in (20, 20, 60):
        mllm.yes_scores(_pictured(tmp_path, items), answers)
        assert len(most) >= items  # one an item at least
        left[items] = _tensors(), max(most), len(alive)
        most.clear()
    assert left[60][1] == left[20][1] <= 6 and left[60][2] == 0
    assert left[60][0] <= 1.02 * left[20][0]
