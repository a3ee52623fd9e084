"""RecBole's trainer for MLLMMSR: only what is fine-tuned is optimised, in micro-batches, and a killed run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NoReturn

import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from torch import nn
from torch.nn.utils import clip_grad_norm_

from recbole_mllm.data.schema import TIE
from recbole_mllm.data.training import SeededTrainDataLoader
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.loading import dtype_of
from recbole_mllm.progress import Progress
from recbole_mllm.training.checkpoint import (
    Place,
    best_of,
    difference,
    last_of,
    newest,
    random_state,
    read_checkpoint,
    restore_random_state,
    whole_folder,
    write_checkpoint,
)
from recbole_mllm.training.failure import write_rows
from recbole_mllm.training.precision import Precision
from recbole_mllm.training.schedule import rate_at


class MLLMMSRTrainer(Trainer):  # type: ignore[misc]
    """Trains what `MLLMMSR` fine-tunes, scores splits item by item, writes a PEFT folder beside the checkpoint.

    ``FILE.pth`` is RecBole's checkpoint of the best epoch; ``FILE.last.pth``, under `checkpoint_every_steps`, is the
    newest state. A run goes on from either, in the middle of an epoch too, as if it had never stopped.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.train_settings = model.settings.train
        self.max_epochs: int = config["epochs"]
        if not model.is_trained:
            self.epochs = 0  # zero-shot: RecBole's fit then saves, and trains nothing
        dtype = dtype_of(model.settings.mllm.dtype, self.device)
        self.precision = Precision(dtype, self.device, amp=self.enable_amp)
        self.start_epoch: int = 0
        self.best_valid_score: float = self.best_valid_score
        self.best_valid_result: Any = None
        self.place, self._resumed = Place(), False
        self._valid_result: Any = None
        self._random: dict[str, Any] | None = None

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """Optimise what is trained alone (RecBole passes every parameter, trainer.py:161)."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return super()._build_optimizer(params=trained or [nn.Parameter(torch.zeros(1))], **kwargs)

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
        self._resume()
        every = self.train_settings.checkpoint_every_steps if saved else None

        def at_end_of_epoch(epoch: int, score: float) -> None:
            self.place = Place(epoch + 1)
            if every:
                self._save_last()
            if callback_fn:
                callback_fn(epoch, score)

        if self.model.is_trained and self.start_epoch >= self.epochs:  # finished before; RecBole would save once more
            self.eval_collector.data_collect(loader)
            return self.best_valid_score, self.best_valid_result
        best = super().fit(loader, valid_data, verbose, saved, show_progress, at_end_of_epoch)
        if every and self.model.is_trained:
            self.place = Place(max(self.train_loss_dict) + 1)
            self._save_last()
        if self.model.is_trained or not valid_data:
            return best
        self.best_valid_score, self.best_valid_result = self._valid_epoch(valid_data)
        return self.best_valid_score, self.best_valid_result

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """Train one epoch, or what a resumed run left of it; the sum of batch losses, as RecBole's own."""
        self.model.train()
        self.model.forget()
        self.place = self.place if self.place.epoch == epoch_idx else Place(epoch_idx)
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None
        group = self.train_settings.gradient_accumulation_steps
        batches = len(train_data)
        train_data.set_epoch(epoch_idx, self.place.batch)
        total = self.place.loss
        with Progress(batches, f"training epoch {epoch_idx}", "batch") as progress:
            progress.update(self.place.batch)
            for number, interaction in enumerate(train_data, self.place.batch):
                first = number // group * group
                if number == first:
                    self.optimizer.zero_grad()
                rows = sum(train_data.rows_in(n) for n in range(first, min(first + group, batches)))
                total += self._backward(interaction, rows)
                if number + 1 in (first + group, batches):
                    per_epoch = math.ceil(batches / group)
                    step = epoch_idx * per_epoch + number // group
                    self._step(step, per_epoch * self.max_epochs, interaction)
                    self._note(Place(epoch_idx, number + 1, total), step + 1)
                progress.update(1)
        return total

    def _note(self, place: Place, steps: int) -> None:
        self.place = place
        every = self.train_settings.checkpoint_every_steps
        if every and steps % every == 0:
            self._save_last()

    def _backward(self, interaction: Interaction, rows: int) -> float:
        """Add the batch's gradients, a micro-batch at a time, as its part of `rows` rows; return its mean loss."""
        examples = self.model.examples_of(interaction)
        total = 0.0
        for part in self.model.micro_batches(examples):
            with self.precision.autocast():
                loss = self.model.loss_of([examples[i] for i in part])
            value = float(loss.detach())
            if not math.isfinite(value):
                self._stop(f"the training loss is {value}", interaction, part)
            self.precision.scaler.scale(loss * (len(part) / rows)).backward()
            total += value * len(part) / len(examples)
        return total

    def _step(self, step: int, steps: int, interaction: Interaction) -> None:
        """Clip the gradients and take `step` of the run's `steps`."""
        settings = self.train_settings
        rate = rate_at(step, steps, round(settings.warmup_ratio * steps), settings.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        scaler = self.precision.scaler
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)
            norm = clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], **self.clip_grad_norm)
            if not scaler.is_enabled() and not math.isfinite(norm):  # a scaler passes over such a step itself
                self._stop(f"the gradient's norm is {float(norm)}", interaction, range(len(interaction)))
        scaler.step(self.optimizer)
        scaler.update()

    def _stop(self, what: str, interaction: Interaction, suspects: Sequence[int]) -> NoReturn:
        """Save which rows the batch holds and end the run before the step spoils what has been learnt."""
        path = Path(self.saved_model_file).with_suffix(".nonfinite.tsv")
        write_rows(path, self.model.raw_rows(interaction), set(suspects))
        raise UserError(
            f"{what} in epoch {self.place.epoch}; the batch's rows are in {path}; lower learning_rate, or set dtype to "
            "bfloat16 or float32"
        )

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        score, self._valid_result = super()._valid_epoch(valid_data, show_progress)
        return score, self._valid_result

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """Score the split item by item first, then let RecBole rank and measure."""
        if not eval_data:
            return None
        if load_best_model:
            self._load(Path(model_file or self.saved_model_file))
        self.model.eval()
        self.model.forget()
        try:
            # only a fully tuned model is kept in more precision than it computes in
            with self.precision.autocast(enabled=self.model.settings.lora.finetune == "full"):
                self._score_ahead(eval_data)
                return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        finally:
            self.model.forget()

    @torch.no_grad()
    def _score_ahead(self, eval_data: Any) -> None:
        """Collect the split's pairs and score them; only with frozen candidates, as others change at every pass."""
        rows: list[tuple[int, int, int]] = []
        for interaction, *_ in eval_data:
            if TIE not in interaction:
                return
            rows += self.model.rows_of(interaction)
        self.model.score_ahead(rows)

    def _load(self, file: Path) -> dict[str, Any]:
        """Load the model's part of a checkpoint; one of another base model is refused."""
        checkpoint = read_checkpoint(file, self.device)
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        self.model.load_state_dict(checkpoint["state_dict"])
        self.logger.info(f"Loading model structure and parameters from {file}")
        return checkpoint

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint with where training stands, and what is trained as a PEFT folder beside it."""
        path = Path(str(kwargs.get("saved_model_file", self.saved_model_file)))
        self._write(path, epoch, Place(epoch + 1), self._valid_result)
        with whole_folder(path.with_suffix("")) as folder:
            self.model.save_adapter(folder)
        if verbose:
            self.logger.info(f"Saving current: {path}")

    def _save_last(self) -> None:
        path = last_of(Path(self.saved_model_file))
        self._write(path, self.place.epoch - 1, self.place, self.best_valid_result)

    def _write(self, path: Path, epoch: int, place: Place, valid_result: Any) -> None:
        """Write RecBole's entries (trainer.py:289-308) and, under ``training``, what an exact resume needs beside."""
        state = {
            "config": self.config,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": self.best_valid_score,
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
            "training": {
                "place": astuple(place),
                "random": random_state(),
                "scaler": self.precision.scaler.state_dict(),
                "best_valid_result": valid_result,
                "stopped": self.cur_step > self.stopping_step,  # early (utils/utils.py:113-154)
            },
        }
        write_checkpoint(state, path)

    def _resume(self) -> None:
        """Go on from the checkpoint that `resume` names or finds, unless `resume_checkpoint` was called before."""
        wanted = self.train_settings.resume
        if wanted is None or not self.model.is_trained or self._resumed:
            return
        if wanted != "auto":
            self.resume_checkpoint(wanted)
            return
        base = self.model.other_parameter()["base"]
        found = newest(Path(self.checkpoint_dir), base, self.config, self.device)
        if found:
            self.resume_checkpoint(found)
        else:
            self.logger.info(f"resume: auto found no checkpoint of such a run in {self.checkpoint_dir}; training anew")

    def resume_checkpoint(self, resume_file: Any) -> None:
        """Load a checkpoint to go on from (RecBole's trainer.py:310-343); the next loss is what it would have been.

        Raises:
            UserError: It belongs to another model, or stands within an epoch that other settings would change.
        """
        path = Path(str(resume_file))
        checkpoint = read_checkpoint(path, self.device)
        training = checkpoint.get("training", {})
        place = Place(*training.get("place", (checkpoint["epoch"] + 1,)))
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        if found := difference(checkpoint, self.config, course=place.batch > 0):
            raise UserError(f"{path} was trained with {found}; give the same settings to go on from it")
        if training.get("best_valid_result") is not None and not best_of(path).is_file():
            raise UserError(f"{best_of(path)}, the best epoch so far, is missing beside {path}; put it back")
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.saved_model_file = str(best_of(path))
        self.cur_step, self.best_valid_score = checkpoint["cur_step"], checkpoint["best_valid_score"]
        self.best_valid_result = training.get("best_valid_result")
        if scaler := training.get("scaler"):
            self.precision.scaler.load_state_dict(scaler)
        self.place, self._random, self._resumed = place, training.get("random"), True
        self.start_epoch = self.epochs if training.get("stopped") else place.epoch
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {place.epoch}, batch {place.batch}")
