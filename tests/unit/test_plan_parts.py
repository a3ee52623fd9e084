"""The parts of a plan alone: stand-ins, memory of activations, devices, what fits."""

import weakref
from dataclasses import replace

import pytest
import tiny_models
import torch
from stock_forward import CPU, SETTINGS, STYLE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt, recommend_prompt
from recbole_mllm.common.settings import LoraSettings
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.interface import Answer, Batch, Decoding
from recbole_mllm.mllm.lora import tune
from recbole_mllm.mllm.loss import example_loss, make_examples
from recbole_mllm.plan.cost import Count, Device, ModelSizes, flops, pass_bytes, training_bytes
from recbole_mllm.plan.counting import StandIns, StandInWriter
from recbole_mllm.plan.plan_text import duration, number

MEMORY_BAND = 0.25  # what docs/plan.md says of activations
WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}


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


def deep_llama(folder):
    return tiny_models.llama(folder, **WIDE, num_hidden_layers=8)


def asked():
    return [recommend_prompt(STYLE, f"likes {'red cats and dogs ' * 6}{n}", "a mug", None) for n in range(8)]


@pytest.mark.parametrize(
    ("build", "finetune", "dtype", "dropout", "again"),
    [
        (deep_llama, "lora", "float32", 0.1, False),
        (deep_llama, "lora", "float32", 0.1, True),  # computed again on the way back
        (deep_llama, "full", "float32", 0.0, False),
        (tiny_models.gemma3, "lora", "bfloat16", 0.0, False),  # four norms a layer, and those of heads
    ],
)
def test_activations_are_about_what_the_largest_step_holds_at_its_peak(
    tmp_path, build, finetune, dtype, dropout, again
):
    mllm = HFModel(str(build(tmp_path)), replace(SETTINGS.mllm, dtype=dtype), CPU)
    lora = LoraSettings(finetune, 8, 16, dropout, "language")
    mllm.replace_model(tune(mllm.model, lora, 1))
    mllm.model.train()
    examples = make_examples(mllm.encode(asked()), [mllm.answers(STYLE).yes] * 8)
    if again:
        mllm.checkpoint_gradients()
    known = list(mllm.model.parameters())
    for parameter in [p for p in known if p.requires_grad]:
        parameter.grad = torch.zeros_like(parameter)
        known.append(parameter.grad)
    with Live(known) as live, torch.autocast("cpu", torch.bfloat16, dtype != "float32"):
        example_loss(mllm.backbone, examples).backward()
    tokens, item = 8 * max(len(example.ids) for example in examples), 4 if dtype == "float32" else 2
    planned = training_bytes(ModelSizes.of(mllm.model), item, lora, tokens, 8, checkpointing=again)
    assert live.peak == pytest.approx(planned, rel=MEMORY_BAND)


@pytest.mark.parametrize(("build", "dtype"), [(deep_llama, "float32"), (tiny_models.gemma3, "bfloat16")])
def test_what_scoring_and_writing_hold_in_passing(tmp_path, build, dtype):
    mllm = HFModel(str(build(tmp_path)), replace(SETTINGS.mllm, dtype=dtype), CPU, slots=8)
    sizes, item, prompts = ModelSizes.of(mllm.model), 4 if dtype == "float32" else 2, asked()
    longest = max(len(encoded.ids) for encoded in mllm.encode(prompts))
    with Live(mllm.model.parameters()) as live:
        mllm.yes_scores(prompts, mllm.answers(STYLE), share_prefix=False)
    assert live.peak == pytest.approx(pass_bytes(sizes, item, 8 * longest), rel=MEMORY_BAND)
    work = Batch(prompts, Decoding(40))
    with Live(mllm.model.parameters()) as live:
        mllm.write(work)
    new = max(answer.new_tokens for answer in work.answers.values())
    cache = 8 * (longest + new) * sizes.cache_bytes(item)
    assert live.peak == pytest.approx(cache + pass_bytes(sizes, item, 8 * longest, 8), rel=MEMORY_BAND)


@pytest.mark.parametrize(
    ("total", "split", "processes"), [(50e9, 0.0, None), (100e9, 80e9, 4), (42e9, 80e9, 1), (140e9, 80e9, None)]
)
def test_how_many_processes_hold_a_model_too_large_for_one_device(total, split, processes):
    found = Device.called("L40S").fits(total, split)  # 48 GB, of which 43.2 are counted on
    assert found["processes"] == processes and found["room"] == pytest.approx(43.2e9)
    assert found["bytes"] == pytest.approx(total - split * (1 - 1 / (processes or 1)))


def test_hours_are_operations_by_rate_and_writing_is_bounded_by_memory():
    sizes = ModelSizes("llama", 0, 0, 7 * 10**9, 10**8, 0, 32_000, 32, 4096, 14_336, 4096, 1024, 2, 3)
    card, read = Device.called("rtx 3090"), Count(prompts=1, computed=100)
    operations = flops(sizes, read)
    assert sum(operations.values()) == 2 * 7e9 * 100
    assert card.seconds(sizes, read, operations, 2, 64) == pytest.approx(14e11 / 71e12 / 0.4)
    assert card.seconds(sizes, read, operations, 4, 64) == pytest.approx(14e11 / 35.6e12 / 0.4)
    # one answer of 101 tokens reads all weights a hundred times, however fast the arithmetic
    written = Count(prompts=1, new_tokens=101)
    moved = 100 * (7.1e9 * 2 + 50.5 * sizes.cache_bytes(2))
    assert Device.called("A10").seconds(sizes, written, flops(sizes, written), 2, 64) == pytest.approx(moved / 300e9)


def test_stand_ins_differ_and_are_as_long_as_the_samples():
    texts = StandIns.like([("likes red cups and hats", 6), ("likes blue lamps", 4)])
    found = {texts["user", n] for n in range(200)}
    assert len(found) > 100 and {len(text.split()) for text in found} == {4} and texts.tokens == 5
    texts["a"] = "written"
    assert texts.get("a") == texts["a"] == "written" and texts.get("b") == texts["b"]


class Writing:
    """A model that answers all prompts, or none."""

    def __init__(self, works):
        self.works, self.asked = works, 0

    def write(self, work):
        while asks := work.take(8):
            self.asked += len(asks)
            for ask in asks:
                if self.works:
                    work.give([(ask.place, Answer("a red cup", 9, 4))])
                else:
                    work.fail(ask.place, "no room")


def test_a_model_answers_the_first_prompts_and_stand_ins_like_its_answers_the_rest():
    model, work = Writing(works=True), Batch([Prompt(f"text {n}") for n in range(40)], Decoding(8))
    writer = StandInWriter(None, StandIns(["word"], 1, 1), Decoding(8), lambda: model)
    writer.write(work)
    assert model.asked == len(writer.tried) == 16 and len(work.answers) == 40
    assert (work.answers[39].text.count(" "), work.answers[39].new_tokens) == (2, 4)
    assert writer.count.prompts == 40 and writer.count.new_tokens == 160
    writer = StandInWriter(None, StandIns(["word"], 1, 1), Decoding(8), lambda: Writing(works=False), "failing")
    with pytest.raises(UserError, match=r"failing answered none of the first 16 prompts \(no room\)"):
        writer.write(Batch([Prompt(f"text {n}") for n in range(40)], Decoding(8)))


def test_numbers_for_people():
    assert [number(n) for n in (0, 999, 1234, 5.6e12)] == ["0", "999", "1.23k", "5.6T"]
    assert [duration(n) for n in (None, 5, 240, 9000, 864000)] == ["–", "5 s", "4.0 min", "2.5 h", "10.0 days"]
