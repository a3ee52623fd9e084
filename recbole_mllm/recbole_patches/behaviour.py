"""What RecBole does otherwise in our runs: files are checked, rows stand by exact time, odd failures are fixed.

RecBole's own times are float32, and datasets record what candidates are drawn from before anything is cut.
"""

from __future__ import annotations

from glob import escape
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.resources import MLLM
from recbole_mllm.data import checking
from recbole_mllm.data.facts import Facts, facts_of, wants_exact_order
from recbole_mllm.recbole_patches.hooks import replace

_ATOMIC = (".inter", ".item", ".user", ".kg", ".link", ".net")


def ask_for_nccl(quick_start: ModuleType) -> None:
    """Refuse ``run(nproc > 1)`` and ``run_recboles`` where there is no NCCL (config/configurator.py:495-505)."""

    @replace(quick_start)
    def run(stock: Any, *args: Any, **kwargs: Any) -> Any:
        nproc = kwargs.get("nproc", args[5] if len(args) > 5 else 1)
        if nproc != 1 and distributed.is_launched():
            raise distributed.two_launchers("run()")
        if nproc != 1 or kwargs.get("world_size", args[6] if len(args) > 6 else -1) > 0:  # quick_start.py:53
            _require_nccl(nproc)
        return stock(*args, **kwargs)

    @replace(quick_start)
    def run_recboles(stock: Any, rank: int, *args: Any) -> Any:
        options = args[-1] if args and isinstance(args[-1], dict) else {}
        _require_nccl(options.get("config_dict", {}).get("nproc", 1))
        return stock(rank, *args)


def _require_nccl(nproc: int) -> None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()):
        raise UserError(
            "RecBole's run_recboles needs GPUs and a torch with NCCL; on CPU start "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {max(2, int(nproc))} run_recbole_mllm.py …` instead"
        )


def count_no_llm_flops(utils: ModuleType) -> None:
    """Answer 0 for MLLMMSR in ``get_flops`` (utils/utils.py:250), which deep-copies the model and predicts a row.

    quick_start.py:141 calls it for every model; a copy would double what an LLM takes. Other models are counted as
    before.
    """

    @replace(utils)
    def get_flops(stock: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kind.__name__ == MLLM for kind in type(model).__mro__):
            return 0
        return stock(model, *args, **kwargs)


def train_without_detector(sine: ModuleType) -> None:
    """Take back what importing sine.py:25 switches on for the whole process, whatever model is trained.

    The anomaly detector checks every gradient of every operation: on small models it doubles the time of an epoch.
    """
    import torch

    torch.autograd.set_detect_anomaly(False)


def collect_plain_numbers(collector: ModuleType) -> None:
    """Let evaluation/collector.py:226 pass over what is no tensor; ItemCoverage, GiniIndex and others need such.

    It asks everything collected for ``.cpu()``, also the number of items and the counts of interactions.
    """
    import torch

    @replace(collector.Collector)
    def get_data_struct(stock: Any, self: Any) -> Any:
        held = self.data_struct._data_dict
        plain = {key: held.pop(key) for key, value in tuple(held.items()) if not isinstance(value, torch.Tensor)}
        try:
            struct = stock(self)
        finally:
            held.update(plain)
        struct._data_dict.update(plain)
        return struct


def reuse_saved_dataset(dataset: Any, config: Any) -> None:
    """Let a `dataset` that RecBole had saved (data/utils.py:62-76) be split as `config` says, not as it was then.

    Raises:
        UserError: The dataset's files have changed since it was saved, which RecBole does not see, or what candidates
            and order are worked out from was not saved with it.
    """
    if dataset.config is config:
        return
    name = config["dataset"]
    default = Path(config["checkpoint_dir"]) / f"{name}-{type(dataset).__name__}.pth"
    file = Path(config["dataset_save_path"] or default)
    for path in sorted(Path(config["data_path"]).glob(f"{escape(name)}.*")):
        if path.suffix in _ATOMIC and path.stat().st_mtime > file.stat().st_mtime:
            raise UserError(f"{path} is newer than {file}, the dataset as RecBole saved it; delete that file")
    dataset.config = config
    if dataset.facts is None and wants_exact_order(dataset):
        raise UserError(f"{file}, the dataset as RecBole saved it, was saved by an older version; delete that file")


def check_as_read(module: Any) -> None:
    """Check each file before a run of ours, or of MLLMMSR, reads it (data/dataset/dataset.py:427)."""

    @replace(module.Dataset)
    def _load_data(stock: Any, self: Any, token: str, dataset_path: str) -> Any:
        if checking.is_checked(self.config) and Path(dataset_path).is_dir():  # else RecBole may know where to fetch it
            checking.check_files(self, token, Path(dataset_path))
        return stock(self, token, dataset_path)

    @replace(module.Dataset)
    def _load_feat(stock: Any, self: Any, filepath: str, source: Any) -> Any:
        rules = checking.Rules.of(self, source) if checking.is_checked(self.config) else None
        if rules is None:
            return stock(self, filepath, source)
        return checking.read_checked(Path(filepath), rules, lambda: stock(self, filepath, source))


def record_facts(module: Any) -> None:
    """Let RecBole's ``Dataset`` keep its `facts`, and sort by exact time where `wants_exact_order` (dataset.py:1796).

    RecBole's other sorts are stable, and by a time that is rounded but never reversed: they leave that order alone.
    """
    # here, as it imports RecBole's data, which is not there yet when `recbole.utils` is imported first
    from recbole_mllm.recbole_patches.paper_protocol import cut_whole_log

    @replace(module.Dataset)
    def _set_label_by_threshold(stock: Any, self: Any) -> None:  # the first step after missing values are filled in
        self.facts = facts_of(self)
        if self.facts is not None and self.facts.whole is not None:
            cut_whole_log(self)
        stock(self)

    @replace(module.Dataset)
    def sort(stock: Any, self: Any, by: Any, ascending: Any = True) -> None:
        order = _exact_order(self, by) if ascending is True and wants_exact_order(self) else None
        if order is None:
            stock(self, by, ascending)
        else:
            self.inter_feat._reindex(order.astype(np.int64))

    @replace(module.Dataset)
    def _remove_duplication(stock: Any, self: Any) -> None:
        keep, frame = self.config["rm_dup_inter"], self.inter_feat
        if keep is None or self.time_field not in frame or not wants_exact_order(self):
            stock(self)
            return
        # RecBole's sort is not stable (dataset.py:853), and leaves equal times in an order of its own
        ordered = frame.sort_values(by=[self.time_field], kind="stable")
        unique = ordered.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep)
        self.inter_feat = unique.sort_index()

    module.Dataset.exact_order, module.Dataset.facts = False, None


def _exact_order(dataset: Any, by: Any) -> Any:
    """Return the order in which the rows are to stand that are asked for by time, or by user and time; else None.

    They are the rows of `facts`, or those that augmentation has left of them: all but each user's first. These stand by
    user, and RecBole leaves equal times as they stand: so do we, or training batches would not be RecBole's own.
    """
    facts, rows = dataset.facts, dataset.inter_feat
    by_time, by_user = by in (dataset.time_field, [dataset.time_field]), by == [dataset.uid_field, dataset.time_field]
    if facts is None or facts.order is None or not (by_time or by_user):
        return None
    users, items = (rows[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    if np.array_equal(users, facts.users) and np.array_equal(items, facts.items):
        return facts.order if by_time else facts.by_user()
    own = facts.by_user()
    own = own[1:][facts.users[own][1:] == facts.users[own][:-1]]
    if by_user or not np.array_equal(users, facts.users[own]) or not np.array_equal(items, facts.items[own]):
        return None
    return np.argsort(facts.moments[own], kind="stable")


def log_order(dataset: Any) -> None:
    """Say in the log how RecBole alone would have ordered a dataset, and which of its times cannot be."""
    facts: Facts | None = dataset.facts
    if facts is None or not wants_exact_order(dataset):
        return
    log = getLogger()
    if facts.reordered and dataset.config["eval_args"]["order"] == "TO":
        users = len(np.unique(facts.users))
        log.info(
            f"order: by exact time, then place in the file; RecBole alone, whose times are float32, would have put the "
            f"items of {facts.reordered} of {users} users in another order"
        )
    early, late = facts.impossible
    if early or late:
        log.info(
            f"times: {early} of {len(facts.users)} interactions lie at or before 1970, {late} after tomorrow; they "
            "stand where their time says, first or last"
        )
