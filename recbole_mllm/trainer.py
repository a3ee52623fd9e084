"""RecBole's trainer for MLLMMSR: only what is fine-tuned is optimised, in micro-batches, and a killed run resumes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import calculate_valid_score
from torch import nn
from torch.nn.utils import clip_grad_norm_

from recbole_mllm.common import distributed
from recbole_mllm.common.checkpoint import (
    TrainingPlace,
    best_of,
    difference,
    last_of,
    newest,
    on_disk,
    read_checkpoint,
    whole_folder,
    write_checkpoint,
)
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.progress import Progress
from recbole_mllm.common.seeding import random_state, restore_random_state, seed_step
from recbole_mllm.data.dataloader import SeededTrainDataLoader
from recbole_mllm.evaluation.full_ranking import ranked_batch
from recbole_mllm.evaluation.loader import FrozenEvalDataLoader
from recbole_mllm.evaluation.metrics import record_scores, recording
from recbole_mllm.mllm.loading import dtype_of
from recbole_mllm.mllm.memory import Budget, in_batches
from recbole_mllm.model.row_scoring import Row, item_major
from recbole_mllm.training.optimization import (
    MixedPrecision,
    add_gradients,
    copy_from_main,
    rate_at,
    sum_gradients,
    write_nonfinite,
)

SHARES = tuple(n / 10 for n in range(10, -1, -1))  # of equal ones the first is taken, so the MLLM's larger share
_PROBE = 64  # pairs scored to tell how long all will take


class MLLMMSRTrainer(Trainer):  # type: ignore[misc]
    """Trains what `MLLMMSR` fine-tunes, scores splits item by item, and writes what a killed run resumes from.

    ``FILE.pth`` is RecBole's checkpoint of the best epoch, with a PEFT folder beside it; ``FILE.last.pth``, under
    `checkpoint_every_steps`, is the newest state. A run resumes from either, in the middle of an epoch too.
    """

    def __init__(self, config: Any, model: Any) -> None:
        folder = Path(config["checkpoint_dir"])
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)  # RecBole's own way fails in a race
        super().__init__(config, model)
        self.saved_model_file: str = distributed.broadcast_object(self.saved_model_file)
        self.train_settings = model.settings.train
        dtype = dtype_of(model.settings.mllm.dtype, self.device)
        self.precision = MixedPrecision(dtype, self.device, amp=self.enable_amp)
        self.budget = Budget(sys.maxsize, model.release_memory)  # rows that fit into memory at once
        self.max_epochs: int = config["epochs"]
        if not model.is_trained:
            self.epochs = 0  # zero-shot: RecBole's fit then saves, and trains nothing
        self.start_epoch: int = 0
        self.best_valid_score: float = self.best_valid_score
        self.best_valid_result: Any = None
        self.place = TrainingPlace()
        self.train_s = 0.0  # in batches alone, those before a resumed run was killed included
        self._every: int | None = None  # steps between two saved states
        self._resumed = False
        self._random: dict[str, Any] | None = None  # of the checkpoint, until the next epoch begins
        self._valid_result: Any = None
        self._validates, self._saves = False, True
        self._unsummed = 0.0  # this process's part of the losses since the last step
        self._counted = time.perf_counter()

    # -- training ------------------------------------------------------------------------------------------------------

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
        """Train as RecBole does, from where `resume` says; with nothing to train, or no epoch, only validate."""
        loader = SeededTrainDataLoader.of(train_data, self.model.groups_by_item)
        self.resume()
        self._saves = saved
        self._every = self.train_settings.checkpoint_every_steps if saved else None

        def at_end_of_epoch(epoch: int, score: float) -> None:
            self.place = TrainingPlace(epoch + 1)
            if self._every:
                self.save_last()
            if callback_fn:
                callback_fn(epoch, score)

        trains = self.model.is_trained and self.epochs > 0
        if self.model.is_trained and self.start_epoch >= max(1, self.epochs):  # finished; RecBole would save once more
            self.eval_collector.data_collect(loader)
            return self.best_valid_score, self.best_valid_result
        best = super().fit(loader, valid_data, verbose, saved, show_progress, at_end_of_epoch)
        if self._every and trains:
            self.place = TrainingPlace(max(self.train_loss_dict) + 1)
            self.save_last()
        if trains or not valid_data:
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
        self.place = self.place if self.place.epoch == epoch_idx else TrainingPlace(epoch_idx)
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None
        copy_from_main(self._trained())
        self._counted = time.perf_counter()
        train_data.set_epoch(epoch_idx, self.place.batch)
        # RecBole's SINE, imported with any sequential model, has every operation's stack trace recorded from then on
        # (sine.py:25): several times the time of a small model, and non-finite gradients raise there
        what = f"training epoch {epoch_idx}"
        with torch.autograd.set_detect_anomaly(False), Progress(len(train_data), what, "batch") as progress:
            progress.update(self.place.batch)
            for number, interaction in enumerate(train_data, self.place.batch):
                self._train_batch(train_data, number, interaction)
                progress.update(1)
        self._count_seconds()
        return self.place.loss

    def _train_batch(self, train_data: Any, number: int, interaction: Interaction) -> None:
        """Train on batch `number` of the epoch, and take a step where a group of accumulated batches ends."""
        group, batches = self.train_settings.gradient_accumulation_steps, len(train_data)
        first = number // group * group
        if number == first:
            self.optimizer.zero_grad()
            self._unsummed = 0.0
            seed_step(self.config["seed"], self.place.epoch, number)
        rows = sum(train_data.rows_in(n) for n in range(first, min(first + group, batches)))
        self._unsummed += self._backward(interaction, rows)
        if number + 1 in (first + group, batches):
            (loss,) = sum_gradients(self._trained(), self._unsummed)
            self.place = TrainingPlace(self.place.epoch, number + 1, self.place.loss + loss)
            per_epoch = math.ceil(batches / group)
            step = self.place.epoch * per_epoch + number // group
            self._step(step, per_epoch * self.max_epochs, interaction)
            self._log_step(step, loss / (number + 1 - first))
            if self._every and (step + 1) % self._every == 0:
                self._count_seconds()
                self.save_last()
                self._counted = time.perf_counter()

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
        for places in parts:
            batches = in_batches(places, lambda part: self._add(share[list(part)], rows), len, self.budget, _too_large)
            for part, value in batches:
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

    def _log_step(self, step: int, loss: float) -> None:
        """Show an optimizer step where RecBole shows epochs: an epoch of an MLLM may take a day."""
        values = {"loss": loss, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}
        for name, value in values.items():
            self.tensorboard.add_scalar(f"Step/{name}", value, step)
        self.wandblogger.log_metrics({**values, "optimizer_step": step}, head="step")

    def _stop(self, what: str, interaction: Interaction, suspects: Sequence[int]) -> NoReturn:
        """Save which rows the batch holds and end the run before the step spoils what has been learnt."""
        path = Path(self.saved_model_file).with_suffix(".nonfinite.tsv")
        write_nonfinite(path, self.model.raw_rows(interaction), set(suspects))
        raise UserError(
            f"{what} in epoch {self.place.epoch}; the batch's rows are in {path}; lower learning_rate, or set dtype to "
            "bfloat16 or float32"
        )

    def _count_seconds(self) -> None:
        """Add to `train_s` what has passed since it was last added to, or since the epoch began."""
        now = time.perf_counter()
        self.train_s, self._counted = self.train_s + now - self._counted, now

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def load(self, file: Path) -> dict[str, Any]:
        """Load the model's part of a checkpoint; one of another base model is refused."""
        distributed.barrier()  # the main process may still be writing it
        checkpoint = read_checkpoint(file, self.device)
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        self.model.load_state_dict(checkpoint["state_dict"])
        self.logger.info(f"Loading model structure and parameters from {file}")
        return checkpoint

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint with where training stands, and what is trained as a PEFT folder beside it."""
        if not distributed.is_main():
            return
        path = Path(str(kwargs.get("saved_model_file", self.saved_model_file)))
        self._write(path, epoch, TrainingPlace(epoch + 1), self._valid_result)
        with whole_folder(path.with_suffix("")) as folder:
            self.model.save_adapter(folder)
        if verbose:
            self.logger.info(f"Saving current: {path}")

    def save_last(self) -> None:
        """Write the newest state."""
        if distributed.is_main():
            path = last_of(Path(self.saved_model_file))
            self._write(path, self.place.epoch - 1, self.place, self.best_valid_result)

    def _write(self, path: Path, epoch: int, place: TrainingPlace, valid_result: Any) -> None:
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
                "train_s": self.train_s,
                "stopped": self.cur_step > self.stopping_step,  # early (utils/utils.py:113-154)
            },
        }
        write_checkpoint(state, path)

    def resume(self) -> None:
        """Resume from the checkpoint that `resume` names or finds, unless `resume_checkpoint` was called before."""
        wanted = self.train_settings.resume
        if wanted is None or not self.model.is_trained or self._resumed:
            return
        if wanted != "auto":
            self.resume_checkpoint(wanted)
            return
        base = self.model.other_parameter()["base"]
        found = distributed.on_main(lambda: newest(Path(self.checkpoint_dir), base, self.config, self.device))
        if found:
            self.resume_checkpoint(found)
        else:
            self.logger.info(f"resume: auto found no checkpoint of such a run in {self.checkpoint_dir}; starting over")

    def resume_checkpoint(self, resume_file: Any) -> None:
        """Load a checkpoint to resume from (RecBole's trainer.py:310-343); the next loss is what it would have been.

        Raises:
            UserError: It belongs to another model, or stands within an epoch that other settings would change.
        """
        path = Path(str(resume_file))
        checkpoint = read_checkpoint(path, self.device)
        training = checkpoint.get("training", {})
        place = TrainingPlace(*training.get("place", (checkpoint["epoch"] + 1,)))
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        if found := difference(checkpoint, self.config, course=place.batch > 0):
            raise UserError(f"{path} was trained with {found}; give the same settings to resume from it")
        if training.get("best_valid_result") is not None and not best_of(path).is_file():
            raise UserError(f"{best_of(path)}, the best epoch so far, is missing beside {path}; put it back")
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.saved_model_file = str(best_of(path))
        self.cur_step, self.best_valid_score = checkpoint["cur_step"], checkpoint["best_valid_score"]
        self.best_valid_result = training.get("best_valid_result")
        self.train_s = float(training.get("train_s", 0.0))
        if scaler := training.get("scaler"):
            self.precision.scaler.load_state_dict(scaler)
        self.place, self._random, self._resumed = place, training.get("random"), True
        self.start_epoch = self.epochs if training.get("stopped") else place.epoch
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {place.epoch}, batch {place.batch}")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        self._validates = True
        try:
            found = super()._valid_epoch(valid_data, show_progress)
        finally:
            self._validates = False
        score, self._valid_result = distributed.broadcast_object(found)  # all must stop at the same epoch
        return score, self._valid_result

    def validate_best(self, valid_data: Any, show_progress: bool = False) -> None:
        """Validate the best state once more, the test's cached scores staying where they are."""
        self.load(Path(self.saved_model_file))
        self._valid_epoch(valid_data, show_progress)

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """Score the split item by item first, then let RecBole rank and measure.

        Scores of a model that is trained no further are cached until the test is done: a killed evaluation resumes.
        """
        if not eval_data:
            return None
        if load_best_model:
            self.load(Path(model_file or self.saved_model_file))
        self.model.eval()
        finished = not self._validates or (self._saves and not self.model.is_trained)  # not an epoch's state
        with (
            self.model.evaluating(cached=finished),
            # only a fully tuned model is kept in more precision than it computes in
            self.precision.autocast(enabled=self.model.settings.lora.finetune == "full"),
        ):
            self._score_ahead(eval_data)
            rank = partial(super().evaluate, eval_data, load_best_model=False, show_progress=show_progress)
            ranks_all = isinstance(eval_data, FullSortEvalDataLoader)
            if self._validates and ranks_all and self.model.settings.ranking.mllm_share == "auto":
                return best_share(self.model.reranker, rank, self.valid_metric, self.valid_metric_bigger)
            result = rank()
            if not self._validates:
                self.model.remove_cached_scores()
            return result

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        """Rank all items as every trainer does, and record the MLLM's log-odds beside (trainer.py:463-486)."""
        interaction, _, owner, targets, *ranking = batched_data  # of a sequential model no history is left out
        scores, answers = self.model.ranking(interaction.to(self.device))
        scores[:, 0] = -torch.inf
        if not ranking:
            return interaction, scores, owner, targets
        return ranked_batch(self.config, ranking[0], interaction, scores, owner, targets, answers)

    @torch.no_grad()
    def _score_ahead(self, eval_data: Any) -> None:
        """Score the split's pairs, or those retrieved; nothing where candidates change at every pass, or are all."""
        if isinstance(eval_data, FrozenEvalDataLoader):
            self.model.score_ahead(self.model.rows_of(eval_data.every_pair()))
        elif isinstance(eval_data, FullSortEvalDataLoader):
            (_log_price if self.model.reranker.is_brute else _score_shortlists)(self.model, eval_data)


def _score_shortlists(model: Any, eval_data: Any) -> None:
    """Score what the retriever puts first, and log the share of targets in it: a ceiling to re-ranking.

    RecBole's loop then walks the split again: the retriever's scores of all rows and items would fill the memory.
    """
    rows: list[Row] = []
    found = total = 0
    for batch, _, owner, targets, *_ in eval_data:
        short = model.reranker.shortlist(batch)
        rows += model.rows_asked(batch, short)
        found += int((short.asked[owner.numpy()] == targets.numpy()[:, None]).any(1).sum())
        total += len(targets)
    logging.getLogger().info(
        f"the retriever {model.reranker.identity} puts {found / max(1, total):.4f} of the targets among its best "
        f"{model.reranker.count}: no re-ranking can do better"
    )
    model.score_ahead(rows)


def _log_price(model: Any, eval_data: Any) -> None:
    """Log how many pairs brute force asks about and, from a few of them, how long that takes."""
    log = logging.getLogger()
    batch = next(iter(eval_data))[0]
    short = model.reranker.shortlist(batch)
    total = len(eval_data._dataset) * short.count
    pairs = sorted(model.rows_asked(batch, short), key=item_major)[: _PROBE + 2]
    if not pairs:
        return
    log.info(f"full_sort: brute asks about {total:,} pairs ({len(eval_data._dataset):,} rows x {short.count:,} items)")
    model.ask(pairs[:2])  # the first call of a model is slower
    started = time.perf_counter()
    model.ask(pairs[2:])
    seconds = total * (time.perf_counter() - started) / max(1, len(pairs) - 2)
    duration = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    log.info(
        f"at {total / seconds:.1f} pairs a second, about {duration}; full_sort: rerank asks about top_k a row; "
        "`recbole-mllm plan` prices both before anything runs"
    )


def best_share(reranker: Any, evaluate: Callable[[], Mapping[str, float]], metric: str, bigger: bool) -> Any:
    """Set the MLLM's share that does best by `metric`; return, and record, what `evaluate` gave with it alone."""
    results, recorded = [], []
    for share in SHARES:
        reranker.share = share
        with recording() as batches:
            results.append(evaluate())
        recorded.append(batches)
    scores = np.array([calculate_valid_score(result, metric) for result in results])
    best = int(np.argmax(scores if bigger else -scores))
    reranker.share = SHARES[best]
    for batch in recorded[best]:
        record_scores(batch)
    tried = ", ".join(f"{share:.1f}: {score:.4f}" for share, score in zip(SHARES, scores, strict=True))
    logging.getLogger().info(f"fusion: {SHARES[best]:.1f} is the MLLM's best share on validation ({tried})")
    return results[best]


def _too_large(row: int) -> str:
    return "training on one row alone; set gradient_checkpointing: true, or lower max_text_tokens"
