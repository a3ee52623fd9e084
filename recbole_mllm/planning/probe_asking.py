"""Measure training and scoring on this machine, on weights that are thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from recbole_mllm.data.training import SeededTrainDataLoader
from recbole_mllm.mllm.batching import free_memory
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.sft import example_loss, micro_batches
from recbole_mllm.mllm.tuning import check_finetune, tune
from recbole_mllm.model.questions import deals_by_item, shares_in_training
from recbole_mllm.planning.asking import Asking, Images
from recbole_mllm.planning.hours import Measured
from recbole_mllm.planning.pairs import Pairs, Row
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.probe import Probed
from recbole_mllm.training.precision import Precision

_SECONDS = 30.0
_BATCHES, _PAIRS, _FIRST = 6, 1024, 64
_IMAGES = 16


class Trial:
    """A recommender with fresh trained parts.

    Args:
        p: The run.
        asking: What makes and counts its prompts.
        name: The model's.
    """

    def __init__(self, p: Prepared, asking: Asking, name: str) -> None:
        lora, train = p.settings.lora, p.settings.train
        check_finetune(lora, p.device)
        self.p, self.asking = p, asking
        self.mllm = HFModel(name, p.settings.mllm, p.device, four_bit=lora.finetune == "qlora")
        self.mllm.replace_model(tune(self.mllm.model, lora, p.config["seed"]))
        if p.is_trained and train.gradient_checkpointing:
            self.mllm.checkpoint_gradients()
        self.answers = self.mllm.answers(p.stage.style)
        dtype = next(self.mllm.model.parameters()).dtype
        self.precision = Precision(dtype, p.device, amp=p.config["enable_amp"])
        self.images = Images(asking.images.frozen, asking.images.bytes_each)

    def train(self) -> Measured | None:
        """Time some batches of the first epoch; the first is not timed."""
        loader = SeededTrainDataLoader.of(self.p.loaders["train"])
        loader.grouped = deals_by_item(self.p.settings, self.mllm.body)
        trained = [q for q in self.mllm.model.parameters() if q.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.mllm.model.train()
        seconds = flops = tokens = 0.0
        prompts = 0
        for number, (rows, labels) in enumerate(self.asking.batches(loader)):
            self._warm(rows)
            started = time.perf_counter()
            self._step(rows, labels, optimizer)
            took = time.perf_counter() - started
            count = self.asking.batch(self.asking.prompts(rows), labels)
            count = self.images.counted(count, self.p, [item for *_, item in rows], 1)
            if number:
                seconds, flops, tokens = seconds + took, flops + count.flops, tokens + count.tokens
                prompts += len(rows)
            if number >= _BATCHES or seconds > _SECONDS:
                break
        return Measured(seconds, flops, prompts, tokens) if prompts else None

    def _step(self, rows: Sequence[Row], labels: Sequence[float], optimizer: Any) -> None:
        settings = self.p.settings.train
        share, whole = shares_in_training(self.p.settings, self.mllm.body), settings.loss_on == "all"
        prompts = self.asking.prompts(rows)
        examples = self.mllm.examples(prompts, torch.tensor(labels), self.answers)
        for part in micro_batches(self.mllm.body, examples, settings.micro_batch_size, share=share):
            with self.precision.autocast():
                loss = example_loss(self.mllm.body, [examples[i] for i in part], whole=whole, share=share)
            float(loss.detach())
            scaled: Any = self.precision.scaler.scale(loss)
            scaled.backward()
        self.precision.scaler.step(optimizer)
        self.precision.scaler.update()
        optimizer.zero_grad()
        self._wait()

    def score(self, pairs: Pairs) -> Measured | None:
        """Time some neighbouring pairs from the middle, after a few that warm the model up."""
        if not pairs.total:
            return None
        self.mllm.model.eval()
        start = max(0, pairs.total // 2 - _PAIRS // 2)
        each = self._scored(pairs.span(start, start + _FIRST))[0] / min(_FIRST, pairs.total)
        size = min(_PAIRS, max(_FIRST, int(_SECONDS / max(each, 1e-6))))
        rows = pairs.span(start, start + size)
        seconds, count = self._scored(rows)
        return Measured(seconds, count.flops, len(rows), count.tokens)

    def _scored(self, rows: Sequence[Row]) -> tuple[float, Any]:
        self._warm(rows)
        share = self.p.settings.train.share_prefix == "auto"
        started = time.perf_counter()
        with self.precision.autocast(enabled=self.p.settings.lora.finetune == "full"):
            self.mllm.yes_scores(self.asking.prompts(rows), self.answers, share_prefix=share)
        self._wait()
        seconds = time.perf_counter() - started
        count = self.asking.scored(self.asking.prompts(rows))
        return seconds, self.images.counted(count, self.p, [item for *_, item in rows], 1)

    def seconds_an_image(self) -> float:
        """Return what preprocessing an image takes."""
        paths = list(self.p.stage.items.images.values())[:_IMAGES] if self.p.settings.recommend.use_image else []
        started = time.perf_counter()
        for path in paths:
            self.mllm.encoder.image(path)
        return (time.perf_counter() - started) / max(1, len(paths))

    def _warm(self, rows: Sequence[Row]) -> None:
        """Preprocess the images beforehand: in a run each is once, here each would be in what is timed."""
        for prompt in self.asking.prompts(rows):
            for path in prompt.images:
                self.mllm.encoder.image(path)

    def _wait(self) -> None:
        if self.p.device.type == "cuda":
            torch.cuda.synchronize()


def probe_asking(p: Prepared, asking: Asking, name: str, pairs: Pairs, probed: Probed) -> None:
    """Measure ``sft`` and ``test`` of the recommender called `name`; validation takes what the test takes."""
    started = time.perf_counter()
    trial = Trial(p, asking, name)
    probed.load_s += time.perf_counter() - started
    probed.image_s = trial.seconds_an_image()
    if p.is_trained and (found := trial.train()) is not None:
        probed.measured["sft"] = found
    if (found := trial.score(pairs)) is not None:
        probed.measured["test"] = found
    del trial
    free_memory()
