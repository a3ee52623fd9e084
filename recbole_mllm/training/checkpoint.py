"""Checkpoints from which a run goes on as if it had never stopped: where it stood, random numbers, whole files."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from recbole_mllm.errors import UserError
from recbole_mllm.files import replace_file, staged, whole_file

LAST = ".last.pth"
# What another value of would make another model of, and what would make the rest of a begun epoch another one
_MODEL = ("model", "dataset", "finetune", "lora_r", "lora_alpha", "lora_target")
_COURSE = (
    "seed", "epochs", "train_batch_size", "gradient_accumulation_steps", "micro_batch_size", "group_by_item", "shuffle",
    "share_prefix", "loss_on", "train_last_k", "limit_users", "train_neg_sample_args", "learner", "learning_rate",
    "lr_scheduler", "warmup_ratio", "weight_decay", "clip_grad_norm", "lora_dropout", "dtype", "enable_amp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where training stands: the epoch, its next batch, and the loss its batches have summed up to."""

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Say in one line that the disk did not take the checkpoint at `path`.

    Raises:
        UserError: It is full or cannot be written to. torch and safetensors say so in errors of their own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SafetensorError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:  # not the disk's doing
            raise
        why = getattr(cause, "strerror", None) or str(cause)
        raise UserError(
            f"checkpoint {path} cannot be written ({why}); make room there, or give another folder with "
            "--checkpoint_dir=DIR; what was saved before is whole"
        ) from error


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` such that `path` is always a whole checkpoint, the old one or the new one."""
    with on_disk(path), whole_file(path, binary=True) as file:
        torch.save(dict(state), file, pickle_protocol=4)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of `folder` one by one, each whole, when all are written."""
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder.parent, folder.name) as stage:
            yield stage
            for path in sorted(stage.iterdir()):
                replace_file(path, folder / path.name)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of RecBole's or ours; it is unpickled, as it holds RecBole's Config.

    Raises:
        UserError: There is none, or it is not whole.
    """
    try:
        found: dict[str, Any] = torch.load(path, map_location=device, weights_only=False)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; give its path, or resume: auto") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not {"config", "state_dict", "optimizer"} <= found.keys():
        raise UserError(f"{path} is no checkpoint of a training run")
    return found


def last_of(best: Path) -> Path:
    """Return the file of the newest state beside the file of the best one."""
    return best.with_name(best.name.removesuffix(".pth") + LAST)


def best_of(path: Path) -> Path:
    """Return the file of the best state, given it or the file of the newest."""
    return path.with_name(path.name.removesuffix(LAST) + ".pth") if path.name.endswith(LAST) else path


def difference(checkpoint: Mapping[str, Any], config: Any, *, course: bool) -> str | None:
    """Say in words which setting of the checkpoint's run differs from this one's; None for no difference.

    Args:
        checkpoint: What `read_checkpoint` returned.
        config: This run's.
        course: Whether settings count that change how training goes on, and not only what is trained.
    """
    for key in (*_MODEL, *(_COURSE if course else ())):
        theirs, ours = checkpoint["config"][key], config[key]
        if theirs != ours:
            return f"{key} {theirs}, not {ours}"
    return None


def newest(folder: Path, base: str, config: Any, device: torch.device) -> Path | None:
    """Return the newest checkpoint in `folder` of a run with the same settings on the same base model."""
    found = sorted(folder.glob(f"{config['model']}-*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        with suppress(UserError):  # a file that cannot be read is none to go on from
            checkpoint = read_checkpoint(path, device)
            same_base = (checkpoint.get("other_parameter") or {}).get("base") == base
            if same_base and difference(checkpoint, config, course=True) is None:
                return path
    return None
