"""RecBole's trainer for MLLMMSR: only the adapter is optimised, in micro-batches, with warm-up and a schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from torch import nn
from torch.nn.utils import clip_grad_norm_

from recbole_mllm.data.schema import TIE
from recbole_mllm.progress import Progress


def rate_at(step: int, steps: int, warmup: int, kind: str) -> float:
    """Return the share of the learning rate at `step` of `steps`: rising over `warmup`, falling as `kind` says."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, step / max(1, steps))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[kind]
    return rise * fall


class MLLMMSRTrainer(Trainer):  # type: ignore[misc]
    """Trains the adapter of `MLLMMSR`, scores splits item by item, writes a PEFT folder beside the checkpoint."""

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.train_settings = model.settings.train
        self.max_epochs: int = config["epochs"]
        if not model.is_trained:
            self.epochs = 0  # zero-shot: RecBole's fit then saves, and trains nothing

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """Optimise what is trained alone (RecBole passes every parameter, trainer.py:161)."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return super()._build_optimizer(params=trained or [nn.Parameter(torch.zeros(1))], **kwargs)

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """Train one epoch; the sum of batch losses, as RecBole's own."""
        self.model.train()
        self.model.forget()
        group = self.train_settings.gradient_accumulation_steps
        per_epoch = math.ceil(len(train_data) / group)
        total, step = 0.0, epoch_idx * per_epoch
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        progress = Progress(len(train_data), f"training epoch {epoch_idx}", "batch")
        for number, interaction in enumerate(train_data):
            if number % group == 0:
                self.optimizer.zero_grad()
            batches_left = min(group, len(train_data) - number // group * group)
            loss = self._backward(interaction, batches_left, scaler)
            self._check_nan(torch.tensor(loss))
            total += loss
            progress.update(1)
            if (number + 1) % group == 0 or number + 1 == len(train_data):
                self._step(step, per_epoch * self.max_epochs, scaler)
                step += 1
        progress.close()
        return total

    def _backward(self, interaction: Interaction, share: int, scaler: Any) -> float:
        """Add the batch's gradients, a micro-batch at a time; return its mean loss."""
        rows = len(interaction)
        size = self.train_settings.micro_batch_size or rows
        total = 0.0
        for start in range(0, rows, size):
            part = interaction[start : start + size]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.enable_amp):
                loss = self.model.calculate_loss(part.to(self.device)) * (len(part) / rows)
            scaler.scale(loss / share).backward()
            total += float(loss.detach())
        return total

    def _step(self, step: int, steps: int, scaler: Any) -> None:
        rate = rate_at(step, steps, round(self.train_settings.warmup_ratio * steps), self.train_settings.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)
            clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], **self.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()

    def fit(
        self, train_data: Any, valid_data: Any = None, verbose: bool = True, saved: bool = True, **kwargs: Any
    ) -> Any:
        """Train as RecBole does; a zero-shot model is only validated."""
        best = super().fit(train_data, valid_data, verbose, saved, **kwargs)
        if self.model.is_trained or not valid_data:
            return best
        self.best_valid_score, self.best_valid_result = self._valid_epoch(valid_data)
        return self.best_valid_score, self.best_valid_result

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """Score the split item by item first, then let RecBole rank and measure."""
        if not eval_data:
            return None
        if load_best_model:
            self._load(model_file or self.saved_model_file)
        self.model.eval()
        self.model.forget()
        self._score_ahead(eval_data)
        try:
            return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        finally:
            self.model.forget()

    def _load(self, file: Any) -> None:
        checkpoint = torch.load(
            file, map_location=self.device, weights_only=False
        )  # RecBole's own: it pickles its Config
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        self.model.load_state_dict(checkpoint["state_dict"])
        self.logger.info(f"Loading model structure and parameters from {file}")

    @torch.no_grad()
    def _score_ahead(self, eval_data: Any) -> None:
        """Collect the split's pairs and score them; only with frozen candidates, as others change at every pass."""
        rows: list[tuple[int, int, int]] = []
        for interaction, *_ in eval_data:
            if TIE not in interaction:
                return
            rows += self.model.rows_of(interaction)
        self.model.score_ahead(rows)

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint (config, adapter, optimizer) and the adapter as a PEFT folder beside it."""
        super()._save_checkpoint(epoch, verbose=verbose, **kwargs)
        self.model.save_adapter(Path(str(kwargs.get("saved_model_file", self.saved_model_file))).with_suffix(""))
