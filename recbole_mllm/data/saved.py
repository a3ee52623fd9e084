"""Datasets that RecBole keeps (``save_dataset``) and takes up again (data/utils.py:62-76)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_mllm.data.facts import wants_exact_order
from recbole_mllm.errors import UserError

_ATOMIC = (".inter", ".item", ".user", ".kg", ".link", ".net")


def use_now(dataset: Any, config: Any) -> None:
    """Let a `dataset` that was taken up again be split as `config` says; its own configuration is the one it had then.

    Raises:
        UserError: The dataset's files have changed since it was saved, which RecBole does not see, or what candidates
            and order are worked out from was not saved with it.
    """
    if dataset.config is config:
        return
    name = config["dataset"]
    default = Path(config["checkpoint_dir"]) / f"{name}-{type(dataset).__name__}.pth"
    file = Path(config["dataset_save_path"] or default)
    for path in sorted(Path(config["data_path"]).glob(f"{name}.*")):
        if path.suffix in _ATOMIC and path.stat().st_mtime > file.stat().st_mtime:
            raise UserError(f"{path} is newer than {file}, the dataset as RecBole saved it; delete that file")
    dataset.config = config
    if dataset.facts is None and wants_exact_order(dataset):
        raise UserError(f"{file}, the dataset as RecBole saved it, was saved by an older version; delete that file")
