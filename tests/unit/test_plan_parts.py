"""The parts of a plan alone: counts that add up, stand-ins, activations, devices, fits."""

import weakref
from dataclasses import replace

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_forward import CPU, SETTINGS, STYLE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_mllm.errors import UserError
from recbole_mllm.mllm import passes
from recbole_mllm.mllm.anatomy import anatomy_of
from recbole_mllm.mllm.base import Batch, Decoding
from recbole_mllm.mllm.blueprint import blueprint
from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.sft import example_loss, make_examples
from recbole_mllm.mllm.tuning import tune
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.devices import device
from recbole_mllm.planning.fitting import fits, frozen_layers, what_helps
from recbole_mllm.planning.hours import ByDevice, ByProbe, Measured, all_reduce_seconds, chain_seconds
from recbole_mllm.planning.memory import Precision, activations, generation_cache, in_passing, training_state
from recbole_mllm.planning.pairs import Crossed
from recbole_mllm.planning.request import Request
from recbole_mllm.planning.standins import StandIns, Texts
from recbole_mllm.planning.text import duration, number
from recbole_mllm.prompts import recommend_prompt
from recbole_mllm.settings import LoraSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plan(folder):
    return blueprint(str(folder), SETTINGS.mllm)


def _independent(rows):
    """Tokens to compute when every shared prefix is computed once: distinct prefixes, by a set and no trie."""
    return len({row[: n + 1] for row in rows for n in range(len(row))})


def test_shared_tokens_are_the_distinct_prefixes(plan, monkeypatch):
    monkeypatch.setattr(passes, "_LEAST_GAIN", 1)

    @settings(deadline=None)
    @given(st.lists(st.lists(st.integers(10, 12), min_size=1, max_size=12), min_size=1, max_size=25))
    def check(drawn):
        # the last token is a prompt's own, as each must keep one
        rows = [(*ids, 100 + n) for n, ids in enumerate(drawn)]
        found = passes.scoring_passes(plan.body, [Encoded(row) for row in rows], share=True)
        assert sum(one.tokens for one in found) == _independent(rows)
        flat = passes.scoring_passes(plan.body, [Encoded(row) for row in rows], share=False)
        assert sum(one.tokens for one in flat) == sum(map(len, rows))

    check()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they live."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.now, self.peak = {p.untyped_storage()._cdata for p in known}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}


def deep_llama(folder):
    return tiny_models.llama(folder, **WIDE, num_hidden_layers=8)


@pytest.mark.parametrize(
    ("build", "how", "dtype", "dropout", "again"),
    [(deep_llama, "lora", dtype, dropout, False) for dtype in ("float32", "bfloat16") for dropout in (0.0, 0.1)]
    + [(deep_llama, "lora", dtype, 0.1, True) for dtype in ("float32", "bfloat16")]  # computed again on the way back
    # four norms a layer, and those of heads; trained whole: in float32, without an adapter to drop from
    + [(tiny_models.gemma3, "lora", "bfloat16", 0.1, False), (tiny_models.qwen3_vl, "lora", "float32", 0.1, False)]
    + [(deep_llama, "full", "float32", 0.0, False)],
)
def test_activations_are_about_what_the_largest_step_holds_at_its_peak(tmp_path, build, how, dtype, dropout, again):
    lora = LoraSettings(how, 8, 16, dropout, "language")
    mllm = HFModel(str(build(tmp_path)), replace(SETTINGS.mllm, dtype=dtype), CPU)
    mllm.replace_model(tune(mllm.model, lora, 1))
    mllm.model.train()
    prompts = [recommend_prompt(STYLE, f"likes {'red cats and dogs ' * 6}{n}", "a mug", None) for n in range(8)]
    examples = make_examples(mllm.encode(prompts), [mllm.answers(STYLE).yes] * 8)
    if again:
        mllm.checkpoint_gradients()
    known = list(mllm.model.parameters())
    for parameter in [p for p in known if p.requires_grad]:
        parameter.grad = torch.zeros_like(parameter)
        known.append(parameter.grad)
    with Live(known) as live, torch.autocast("cpu", torch.bfloat16, dtype != "float32"):
        example_loss(mllm.body, examples).backward()
    tokens = 8 * max(len(example.ids) for example in examples)
    precision = Precision(4 if dtype == "float32" else 2)
    train = replace(SETTINGS.train, gradient_checkpointing=again)
    planned = activations(anatomy_of(mllm.model), precision, lora, train, tokens, 8)
    assert live.peak == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [deep_llama, tiny_models.gemma3])
def test_what_scoring_and_writing_hold_in_passing(tmp_path, build, dtype):
    mllm = HFModel(str(build(tmp_path)), replace(SETTINGS.mllm, dtype=dtype), CPU, slots=8)
    anatomy, precision = anatomy_of(mllm.model), Precision(4 if dtype == "float32" else 2)
    prompts = [recommend_prompt(STYLE, f"likes {'red cats and dogs ' * 6}{n}", "a mug", None) for n in range(8)]
    longest = max(len(encoded.ids) for encoded in mllm.encode(prompts))
    with Live(mllm.model.parameters()) as live:
        mllm.yes_scores(prompts, mllm.answers(STYLE), share_prefix=False)
    assert live.peak == pytest.approx(in_passing(anatomy, precision, 8 * longest), rel=0.25)
    work = Batch(prompts, Decoding(40))
    with Live(mllm.model.parameters()) as live:
        mllm.write(work)
    new = max(answer.new_tokens for answer in work.answers.values())
    kept = generation_cache(anatomy, precision, 8, longest + new)
    assert live.peak == pytest.approx(kept + in_passing(anatomy, precision, 8 * longest, 8), rel=0.15)


def test_an_optimizers_state_is_what_adamw_holds(folder, plan):
    lora = LoraSettings("lora", 8, 16, 0.0, "language")
    model = tune(HFModel(str(folder), SETTINGS.mllm, CPU).model, lora, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in trained)
    held += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert training_state(plan.anatomy, Precision(4), lora, sum(p.numel() for p in trained)) == held


def test_how_many_processes_hold_a_model_too_large_for_one_device():
    frozen = {"items": 0.0, "sft": 80e9, "valid": 80e9, "test": 80e9}
    memory = {stage: {"total": total} for stage, total in zip(frozen, (50e9, 100e9, 42e9, 140e9), strict=True)}
    found = fits(memory, frozen, device("L40S"))  # 48 GB, of which 43.2 are counted on
    assert {stage: one["processes"] for stage, one in found.items()} == {
        "items": None, "sft": 4, "valid": 1, "test": None,
    }  # fmt: skip
    assert found["sft"]["bytes"] == pytest.approx(20e9 + 80e9 / 4) and found["sft"]["room"] == pytest.approx(43.2e9)
    assert found["items"]["bytes"] == 50e9 and "summarize_batch_size" in what_helps("items", None)


def test_what_can_be_split_is_all_layers_but_the_one_at_work(folder, plan):
    lora, layers = LoraSettings("lora", 8, 16, 0.0, "language"), 3
    model = HFModel(str(folder), SETTINGS.mllm, CPU).model.model
    of_one = sum(p.nbytes for p in model.layers[0].parameters())
    found = frozen_layers("sft", plan.anatomy, Precision(4), lora)
    assert len(model.layers) == layers and found == pytest.approx(2 * of_one, rel=0.01)
    for stage, how in (("sft", "full"), ("test", "qlora")):
        assert frozen_layers(stage, plan.anatomy, Precision(4), replace(lora, finetune=how)) == 0
        assert frozen_layers("items", plan.anatomy, Precision(4), replace(lora, finetune=how)) == found


def test_counts_add_and_scale():
    one = Count(prompts=2, text_tokens=10, prompt_flops=5, longest=7)
    one.add(Count(prompts=1, text_tokens=4, backward_flops=3, longest=9))
    assert (one.prompts, one.tokens, one.flops, one.longest) == (3, 14, 8, 9)
    double = one.times(2)
    assert (double.prompts, double.tokens, double.flops, double.longest) == (6, 28, 16, 9)


def test_hours_are_operations_by_rate(plan):
    card = device("rtx 3090")
    clock = ByDevice(card, {"test": plan.anatomy}, 2, 64)
    assert clock.seconds("test", Count(prompts=1, prompt_flops=71e12)) == pytest.approx(1 / 0.4)
    assert clock.seconds("users", Count(prompts=1, prompt_flops=1)) is None
    assert ByDevice(card, {"test": plan.anatomy}, 4, 64).seconds("test", Count(prompt_flops=35.6e12)) == pytest.approx(
        2.5
    )
    measured = ByProbe({"test": Measured(3.0, 100.0, 1, 1)}, image_s=0.5)
    assert measured.seconds("valid", Count(prompts=1, prompt_flops=200, images=2)) == 7.0


def test_writing_is_bounded_by_memory(plan):
    """One answer of 101 tokens reads all weights a hundred times, however fast the arithmetic."""
    card = device("A10")
    count = Count(prompts=1, new_tokens=101, decode_flops=1.0)
    seconds = ByDevice(card, {"users": plan.anatomy}, 2, 64).seconds("users", count)
    assert seconds == pytest.approx(100 * plan.anatomy.weight_bytes(2) / (600e9 * 0.5))
    chain = chain_seconds(card, plan.anatomy, 2, count, 5)
    assert chain == pytest.approx(5 * seconds)


def test_gradients_travel_once_a_step():
    card = device("H100")
    assert all_reduce_seconds(card, 1_000_000, 10, 1) == 0
    assert all_reduce_seconds(card, 1_000_000, 10, 8) == pytest.approx(10 * 2 * 7 / 8 * 4e6 / 25e9)


@pytest.mark.parametrize("asked", [{"nodes": 0}, {"price_per_hour": -1.0}, {"device": "H100", "probe": True}])
def test_a_request_that_cannot_be_is_refused(asked):
    with pytest.raises(UserError, match="--"):
        Request(**asked)


def test_stand_ins_begin_alike_and_differ():
    made = StandIns([("likes red cups and hats", 6), ("likes blue lamps or rugs", 5)], [], 0, 0)
    texts = {made.of("user", n) for n in range(200)}
    assert all(text.startswith("likes ") for text, _ in texts) and len(texts) > 20
    assert {tuple(sorted(text.split())) for text, _ in texts} == {
        tuple(sorted(text.split())) for text, _ in made.samples
    }
    assert made.of("user", 3) == made.of("user", 3)
    known = Texts({"a": "written"}, made)
    assert known.get("a") == known["a"] == "written" and known["b"] == made.of("b")[0]


def test_every_row_meets_every_item_in_batches_scored_item_by_item():
    pairs = Crossed([5, 6, 7], [1, 2, 3], 4, 2)
    found = pairs.span(0, 100)
    assert len(found) == len(set(found)) == pairs.total == 12
    assert found == [(5, 1, 1), (6, 2, 1), (5, 1, 2), (6, 2, 2), (5, 1, 3), (6, 2, 3), (5, 1, 4), (6, 2, 4),
                     (7, 3, 1), (7, 3, 2), (7, 3, 3), (7, 3, 4)]  # fmt: skip


def test_numbers_for_people():
    assert (number(0), number(999), number(1234), number(5.6e12)) == ("0", "999", "1.23k", "5.6T")
    assert (duration(None), duration(5), duration(240), duration(9000), duration(864000)) == (
        "–",
        "5 s",
        "4.0 min",
        "2.5 h",
        "10.0 days",
    )
