"""RecBole's trainer with checkpoints from which a run goes on as if it had never stopped."""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

from recbole.trainer import Trainer

from recbole_mllm import ranks
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.loading import dtype_of
from recbole_mllm.randomness import random_state, restore_random_state
from recbole_mllm.training.checkpoint import (
    Place,
    best_of,
    difference,
    last_of,
    newest,
    on_disk,
    read_checkpoint,
    whole_folder,
    write_checkpoint,
)
from recbole_mllm.training.gradients import copy_from_main
from recbole_mllm.training.precision import Precision


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Writes and reads what `MLLMMSR` needs to go on.

    ``FILE.pth`` is RecBole's checkpoint of the best epoch, with a PEFT folder beside it; ``FILE.last.pth``, under
    `checkpoint_every_steps`, is the newest state. A run goes on from either, in the middle of an epoch too.
    """

    def __init__(self, config: Any, model: Any) -> None:
        folder = Path(config["checkpoint_dir"])
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)  # RecBole's own way fails in a race
        super().__init__(config, model)
        self.saved_model_file: str = ranks.broadcast_object(self.saved_model_file)
        self.train_settings = model.settings.train
        dtype = dtype_of(model.settings.mllm.dtype, self.device)
        self.precision = Precision(dtype, self.device, amp=self.enable_amp)
        self.start_epoch: int = 0
        self.best_valid_score: float = self.best_valid_score
        self.best_valid_result: Any = None
        self.every: int | None = None
        self.place, self._resumed = Place(), False
        self._valid_result: Any = None
        self._random: dict[str, Any] | None = None
        self.train_s = 0.0  # in batches alone, those before a resumed run was killed included
        self._counted = time.perf_counter()

    def begin_epoch(self, epoch: int) -> None:
        """Stand at the epoch's start, or where in it a resumed run stood, with the random numbers it had."""
        self.place = self.place if self.place.epoch == epoch else Place(epoch)
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None
        if self.model.is_trained:
            copy_from_main(p for p in self.model.parameters() if p.requires_grad)
        self._counted = time.perf_counter()

    def count_seconds(self) -> None:
        """Add to `train_s` what has passed since it was last added to, or since the epoch began."""
        now = time.perf_counter()
        self.train_s, self._counted = self.train_s + now - self._counted, now

    def note_step(self, steps: int) -> None:
        """Save the newest state where `steps` of the optimizer make it due."""
        if self.every and steps % self.every == 0:
            self.count_seconds()
            self.save_last()
            self._counted = time.perf_counter()

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        found = super()._valid_epoch(valid_data, show_progress)
        score, self._valid_result = ranks.broadcast_object(found)  # all must stop at the same epoch
        return score, self._valid_result

    def load(self, file: Path) -> dict[str, Any]:
        """Load the model's part of a checkpoint; one of another base model is refused."""
        ranks.meet()  # the main process may still be writing it
        checkpoint = read_checkpoint(file, self.device)
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        self.model.load_state_dict(checkpoint["state_dict"])
        self.logger.info(f"Loading model structure and parameters from {file}")
        return checkpoint

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint with where training stands, and what is trained as a PEFT folder beside it."""
        if not ranks.is_main():
            return
        path = Path(str(kwargs.get("saved_model_file", self.saved_model_file)))
        self._write(path, epoch, Place(epoch + 1), self._valid_result)
        with whole_folder(path.with_suffix("")) as folder:
            self.model.save_adapter(folder)
        if verbose:
            self.logger.info(f"Saving current: {path}")

    def save_last(self) -> None:
        """Write the newest state."""
        if not ranks.is_main():
            return
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
                "train_s": self.train_s,
                "stopped": self.cur_step > self.stopping_step,  # early (utils/utils.py:113-154)
            },
        }
        write_checkpoint(state, path)

    def resume(self) -> None:
        """Go on from the checkpoint that `resume` names or finds, unless `resume_checkpoint` was called before."""
        wanted = self.train_settings.resume
        if wanted is None or not self.model.is_trained or self._resumed:
            return
        if wanted != "auto":
            self.resume_checkpoint(wanted)
            return
        base = self.model.other_parameter()["base"]
        found = ranks.on_main(lambda: newest(Path(self.checkpoint_dir), base, self.config, self.device))
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
        self.train_s = float(training.get("train_s", 0.0))
        if scaler := training.get("scaler"):
            self.precision.scaler.load_state_dict(scaler)
        self.place, self._random, self._resumed = place, training.get("random"), True
        self.start_epoch = self.epochs if training.get("stopped") else place.epoch
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {place.epoch}, batch {place.batch}")
