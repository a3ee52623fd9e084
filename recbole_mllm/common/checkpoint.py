"""Checkpoints from which a run resumes as if it had never stopped: whole files, and which of them fit a run."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import is_zipfile

import torch
from recbole.config import Config
from safetensors import SafetensorError

from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.common.files import replace_file, staged, whole_file
from recbole_mllm.common.model_names import is_same
from recbole_mllm.common.resources import MLLM

LAST = ".last.pth"
# What another value of would make another model of, and what would make the rest of a begun epoch another one
_MODEL = ("model", "dataset", "finetune", "lora_r", "lora_alpha", "lora_target")
_COURSE = (
    "seed", "epochs", "train_batch_size", "gradient_accumulation_steps", "micro_batch_size", "group_by_item", "shuffle",
    "share_prefix", "loss_on", "train_last_k", "limit_users", "train_neg_sample_args", "learner", "learning_rate",
    "lr_scheduler", "warmup_ratio", "weight_decay", "clip_grad_norm", "lora_dropout", "dtype", "enable_amp",
    # what the questions hold, and which rows are asked
    "prompt_style", "prompt_order", "item_kind", "use_image", "max_text_tokens", "history_titles", "control",
    "summary_mode", "block_size", "partial_block", "max_history", "item_summary", "item_summarizer", "user_summarizer",
    "item_summary_tokens", "user_summary_tokens", "summary_temperature", "summary_top_p", "summary_seed",
    "summary_repetition_penalty", "benchmark_filename", "user_inter_num_interval", "item_inter_num_interval",
)  # fmt: skip
_CHOICE = ("eval_args", "valid_metric", "stopping_step")  # what the best epoch is chosen by, and when training stops


@dataclass(frozen=True, slots=True)
class TrainingPlace:
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


class _Cautious(pickle.Unpickler):
    """Unpickles what checkpoints of ours hold, and nothing that another file might have called on the way."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that a checkpoint needs.

        Raises:
            UnpicklingError: It is none of those.
        """
        if (module, name) in _FUNCTIONS or (module == "torch._utils" and name.startswith("_rebuild_")):
            return super().find_class(module, name)
        if module in _MODULES or module.partition(".")[0] in ("recbole", "recbole_mllm"):
            found = super().find_class(module, name)
            if isinstance(found, type | torch.dtype):
                return found
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of MLLMMSR does")


def _load(file: Any, **how: Any) -> Any:
    return _Cautious(file, **how).load()


_MODULES = {"collections", "numpy", "numpy.dtypes", "torch", "yaml.loader", "datetime", "pathlib"}
_FUNCTIONS = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
_FUNCTIONS |= {("builtins", name) for name in ("set", "frozenset", "complex", "slice", "range", "bytearray")}
_FUNCTIONS |= {("_codecs", "encode")}


def read_checkpoint(path: Path, device: torch.device, *, cautious: bool = False) -> dict[str, Any]:
    """Read a checkpoint of RecBole's or ours; it is unpickled, as it holds RecBole's Config.

    Args:
        path: A file.
        device: Where its tensors go.
        cautious: Refuse whatever `MLLMMSR` does not write: nobody has named this very file.

    Raises:
        UserError: There is none, or it is not whole.
    """
    with_care = SimpleNamespace(Unpickler=_Cautious, load=_load, __name__=__name__) if cautious else None
    try:
        if cautious and not is_zipfile(path):
            raise UserError(f"{path} is no checkpoint")
        found: dict[str, Any] = torch.load(path, map_location=device, weights_only=False, pickle_module=with_care)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; give a FILE.pth that a run has saved") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever unpickling a file that is none may raise
        raise UserError(
            f"checkpoint {path} cannot be read: {first_line(error)}; give another FILE.pth of that run, or train again"
        ) from error
    whole = isinstance(found, dict) and {"config", "state_dict", "optimizer"} <= found.keys()
    if not whole or not isinstance(found["config"], Config):
        raise UserError(f"{path} is no checkpoint of a training run; give a FILE.pth that a run has saved")
    return found


def find_checkpoint(run: str, model: str | None = MLLM) -> Path:
    """Return the checkpoint that `run` names: a file, the folder of a run, or a run's id below ``results/``.

    Args:
        run: As a user gives it.
        model: RecBole's name of the model it must be of, None for any.

    Raises:
        UserError: There is none.
    """
    given = Path(run)
    if not run.strip():
        raise UserError("a checkpoint (FILE.pth), a run's folder, or its id under results/ is wanted; it got ''")
    if given.is_file():
        return given
    if given.is_dir():
        home = given.parent if given.name else given.resolve().parent  # "." and "/" have no name
        beside = home / f"{given.resolve().name}.pth"
        return beside if beside.is_file() else _best_checkpoint(given, model)
    folders = sorted(Path("results").glob(f"*/runs/{run}")) if given.name == run else []
    if len(folders) == 1:
        return _best_checkpoint(folders[0], model)
    what = "names several runs: " + ", ".join(map(str, folders)) if folders else "is neither a file nor a run's id here"
    raise UserError(f"{run!r} {what}; give a checkpoint (FILE.pth) or a folder such as results/demo/runs/RUN_ID")


def _best_checkpoint(folder: Path, model: str | None) -> Path:
    for place in (folder / "saved", folder):
        found = [path for path in place.glob(f"{model or ''}*.pth") if not path.name.endswith(LAST)]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    if (folder / "adapter_config.json").is_file() or (folder / "trained.safetensors").is_file():
        raise UserError(f"beside {folder} there is no {folder.name}.pth, which says how the prompts are worded")
    of = f" of {model}" if model else ""
    names = [path.name for place in (folder / "saved", folder) for path in place.glob("*.pth")] if model else []
    others = sorted(name.partition("-")[0] for name in names if not name.endswith(LAST))
    hint = f"it holds one of {others[0]}; give a run{of}" if others else "run that model again, or give a FILE.pth"
    raise UserError(f"no checkpoint{of} is in {folder}; {hint}")


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
        course: Whether settings count that change how training continues, and not only what is trained.
    """
    return _differing(checkpoint, config, (*_MODEL, *(_COURSE if course else ())))


def _differing(checkpoint: Mapping[str, Any], config: Any, keys: Sequence[str]) -> str | None:
    for key in keys:
        theirs, ours = checkpoint["config"][key], config[key]
        if theirs != ours:
            return f"{key} {theirs}, not {ours}"
    return None


def newest(folder: Path, base: str, config: Any, device: torch.device) -> Path | None:
    """Return the newest checkpoint in `folder` of a run with the same settings on the same base model.

    A file that cannot be resumed from is skipped, with a line.
    """
    found = [path for path in folder.glob(f"{config['model']}-*.pth") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint = read_checkpoint(path, device, cautious=True)
            about = checkpoint.get("other_parameter") or {}
            other = _differing(checkpoint, config, (*_MODEL, *_COURSE, *_CHOICE))
            if not is_same(str(about.get("base")), base) or other is not None:
                continue
            best = checkpoint.get("training", {}).get("best_valid_result")
        except (UserError, AttributeError, TypeError) as error:
            logging.getLogger().warning(f"resume: auto passes over {path}: {error}")
            continue
        if best is None or best_of(path).is_file():
            return path
        logging.getLogger().warning(
            f"resume: auto passes over {path}: {best_of(path).name}, its best epoch, is missing"
        )
    return None
