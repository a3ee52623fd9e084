"""RecBole's trainer for MLLMMSR: only what is fine-tuned is optimised, in micro-batches, and a killed run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn.utils import clip_grad_norm_

from recbole_mllm.data.schema import TIE
from recbole_mllm.data.training import SeededTrainDataLoader
from recbole_mllm.errors import UserError
from recbole_mllm.progress import Progress
from recbole_mllm.randomness import seed_this_process
from recbole_mllm.training.checkpoint import Place
from recbole_mllm.training.failure import write_rows
from recbole_mllm.training.fullrank import best_share, rows_ahead, tell_price
from recbole_mllm.training.gradients import sum_gradients
from recbole_mllm.training.halving import Halving, add_gradients
from recbole_mllm.training.resuming import ResumableTrainer
from recbole_mllm.training.schedule import rate_at


class MLLMMSRTrainer(ResumableTrainer):
    """Trains what `MLLMMSR` fine-tunes, and scores splits item by item."""

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.max_epochs: int = config["epochs"]
        self.retrieval: dict[str, Any] | None = None  # of the last evaluation that ranked all items
        self._validates = False
        self._unsummed = 0.0  # this process's part of the losses since the last step
        self.halving = Halving(model.release_memory)
        if not model.is_trained:
            self.epochs = 0  # zero-shot: RecBole's fit then saves, and trains nothing

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """Optimise what is trained alone (RecBole passes every parameter, trainer.py:161)."""
        return super()._build_optimizer(params=self._trained() or [nn.Parameter(torch.zeros(1))], **kwargs)

    def _trained(self) -> list[Any]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Callable[[int, float], None] | None = None,
    ) -> Any:
        """Train as RecBole does, from where `resume` says; a zero-shot model is only validated."""
        loader = SeededTrainDataLoader.of(train_data)
        loader.grouped = self.model.groups_by_item
        self.resume()
        self.every = self.train_settings.checkpoint_every_steps if saved else None

        def at_end_of_epoch(epoch: int, score: float) -> None:
            self.place = Place(epoch + 1)
            if self.every:
                self.save_last()
            if callback_fn:
                callback_fn(epoch, score)

        if self.model.is_trained and self.start_epoch >= self.epochs:  # finished before; RecBole would save once more
            self.eval_collector.data_collect(loader)
            return self.best_valid_score, self.best_valid_result
        best = super().fit(loader, valid_data, verbose, saved, show_progress, at_end_of_epoch)
        if self.every and self.model.is_trained:
            self.place = Place(max(self.train_loss_dict) + 1)
            self.save_last()
        if self.model.is_trained or not valid_data:
            return best
        self.best_valid_score, self.best_valid_result = self._valid_epoch(valid_data)
        self.tensorboard.add_scalar("Vaild_score", self.best_valid_score, 0)  # RecBole's spelling (trainer.py:496)
        self.wandblogger.log_metrics({**self.best_valid_result, "valid_step": 0}, head="valid")
        if saved and self.model.reranker:
            self._save_checkpoint(-1, verbose=False)  # with what validation has chosen
        return self.best_valid_score, self.best_valid_result

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """Train one epoch, or what a resumed run left of it; the sum of batch losses, as RecBole's own."""
        self.model.train()
        self.model.forget()
        self.begin_epoch(epoch_idx)
        train_data.set_epoch(epoch_idx, self.place.batch)
        # RecBole's SINE, imported with any sequential model, has every operation's stack trace recorded from then on
        # (sine.py:25): several times the time of a small model, and non-finite gradients raise there
        what = f"training epoch {epoch_idx}"
        with torch.autograd.set_detect_anomaly(False), Progress(len(train_data), what, "batch") as told:
            told.update(self.place.batch)
            for number, interaction in enumerate(train_data, self.place.batch):
                self._train_batch(train_data, number, interaction)
                told.update(1)
        self.count_seconds()
        return self.place.loss

    def _train_batch(self, train_data: Any, number: int, interaction: Interaction) -> None:
        """Train on batch `number` of the epoch, and take a step where a group of accumulated batches ends."""
        group, batches = self.train_settings.gradient_accumulation_steps, len(train_data)
        first = number // group * group
        if number == first:
            self.optimizer.zero_grad()
            self._unsummed = 0.0
            seed_this_process(self.config["seed"], self.place.epoch, number)
        rows = sum(train_data.rows_in(n) for n in range(first, min(first + group, batches)))
        self._unsummed += self._backward(interaction, rows)
        if number + 1 in (first + group, batches):
            (loss,) = sum_gradients(self._trained(), self._unsummed)
            self.place = Place(self.place.epoch, number + 1, self.place.loss + loss)
            per_epoch = math.ceil(batches / group)
            step = self.place.epoch * per_epoch + number // group
            self._step(step, per_epoch * self.max_epochs, interaction)
            self._tell_step(step, loss / (number + 1 - first))
            self.note_step(step + 1)

    def _backward(self, interaction: Interaction, rows: int) -> float:
        """Add the gradients of this process's share of the batch, a micro-batch at a time, as its part of `rows` rows.

        Returns:
            The share's part of the batch's mean loss.
        """
        mine = self.model.training_share(interaction)
        share = interaction if len(mine) == len(interaction) else interaction[mine]
        self.precision.scaler.scale(torch.zeros((), device=self.device))  # it must know its scale at every step
        total = 0.0
        parts = self.model.micro_batches(share) if mine else []
        for part, value in self.halving(parts, lambda part: self._add(share[list(part)], rows)):
            if not math.isfinite(value):
                self._stop(f"the training loss is {value}", interaction, [mine[i] for i in part])
            total += value * len(part) / len(interaction)
        return total

    def _add(self, part: Interaction, rows: int) -> float:
        """Add the gradients of one micro-batch as its part of `rows` rows; return its mean loss."""
        with self.precision.autocast():
            loss = self.model.calculate_loss(part)
        if math.isfinite(value := float(loss.detach())):
            add_gradients(self.precision.scaler.scale(loss * (len(part) / rows)), self._trained())
        return value

    def _step(self, step: int, steps: int, interaction: Interaction) -> None:
        """Clip the gradients and take `step` of the run's `steps`."""
        settings = self.train_settings
        rate = rate_at(step, steps, round(settings.warmup_ratio * steps), settings.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        scaler = self.precision.scaler
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)
            norm = clip_grad_norm_(self._trained(), **self.clip_grad_norm)
            if not scaler.is_enabled() and not math.isfinite(norm):  # a scaler passes over such a step itself
                self._stop(f"the gradient's norm is {float(norm)}", interaction, range(len(interaction)))
        scaler.step(self.optimizer)
        scaler.update()

    def _tell_step(self, step: int, loss: float) -> None:
        """Show an optimizer step where RecBole shows epochs: an epoch of an MLLM may take a day."""
        told = {"loss": loss, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}
        for name, value in told.items():
            self.tensorboard.add_scalar(f"Step/{name}", value, step)
        self.wandblogger.log_metrics({**told, "optimizer_step": step}, head="step")

    def _stop(self, what: str, interaction: Interaction, suspects: Sequence[int]) -> NoReturn:
        """Save which rows the batch holds and end the run before the step spoils what has been learnt."""
        path = Path(self.saved_model_file).with_suffix(".nonfinite.tsv")
        write_rows(path, self.model.raw_rows(interaction), set(suspects))
        raise UserError(
            f"{what} in epoch {self.place.epoch}; the batch's rows are in {path}; lower learning_rate, or set dtype to "
            "bfloat16 or float32"
        )

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        self._validates = True
        try:
            return super()._valid_epoch(valid_data, show_progress)
        finally:
            self._validates = False

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """Score the split item by item first, then let RecBole rank and measure."""
        if not eval_data:
            return None
        if load_best_model:
            self.load(Path(model_file or self.saved_model_file))
        self.model.eval()
        finished = not (self._validates and self.model.is_trained)  # not an epoch's state
        with (
            self.model.evaluating(cached=finished),
            # only a fully tuned model is kept in more precision than it computes in
            self.precision.autocast(enabled=self.model.settings.lora.finetune == "full"),
        ):
            self._score_ahead(eval_data)
            rank = partial(super().evaluate, eval_data, load_best_model=False, show_progress=show_progress)
            if self._validates and self.retrieval and self.model.settings.ranking.fusion == "auto":
                return best_share(self.model.reranker, rank, self.valid_metric, self.valid_metric_bigger)
            return rank()

    @torch.no_grad()
    def _score_ahead(self, eval_data: Any) -> None:
        """Collect the split's pairs and score them; only with frozen candidates, as others change at every pass."""
        if isinstance(eval_data, FullSortEvalDataLoader):
            self._shortlist_ahead(eval_data)
            return
        rows: list[tuple[int, int, int]] = []
        for interaction, *_ in eval_data:
            if TIE not in interaction:
                return
            rows += self.model.rows_of(interaction)
        self.model.score_ahead(rows)

    def _shortlist_ahead(self, eval_data: Any) -> None:
        """Score what the retriever puts first, and say how good that can get; brute force goes batch by batch."""
        reranker = self.model.reranker
        if reranker.is_brute:
            self.retrieval = {"retriever": reranker.identity, "top_k": reranker.count, "recall": 1.0}
            tell_price(self.model, eval_data)
            return
        rows, recall = rows_ahead(self.model, eval_data)
        self.retrieval = {"retriever": reranker.identity, "top_k": reranker.count, "recall": recall}
        self.logger.info(
            f"the retriever {reranker.identity} puts {recall:.4f} of the targets among its best {reranker.count}: no "
            "re-ranking can do better"
        )
        self.model.score_ahead(rows)
