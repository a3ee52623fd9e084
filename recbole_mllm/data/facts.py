"""A dataset's interactions as every model has them, and the exact order in which they happened.

RecBole cuts lists at ``MAX_ITEM_LIST_LENGTH``, gives sequential models a row less for each user, and keeps time as
float32. What candidates, popularity and order are worked out from is taken before all that: once rows are filtered and
ids are numbered (data/dataset/dataset.py:159-178), which is the same for every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.data.atomic import impossible_times
from recbole_mllm.data.schema import PLACE

_DATES = 1e8  # times that all lie between 0 and this are places or steps, not moments

_PLACES = "The source has no times: `timestamp` is the place"  # as `convert` words it


@dataclass(frozen=True, slots=True)
class Facts:
    """The interactions of every part of a dataset, in the order of its files.

    Args:
        users: ``[rows]`` int32 internal ids.
        items: ``[rows]`` int32 internal ids.
        order: ``[rows]`` int32 row numbers by exact time (float64), then place in the file; None without times, and for
            benchmark files, whose rows say themselves what precedes them.
        moments: ``[rows]`` int32 exact times as ranks, equal times alike; None without times.
        lists: ``[entries]`` int32 items of the rows' own histories, one row after the other; None where rows have none.
        lengths: ``[rows]`` int32 how many of `lists` are a row's.
        sizes: Rows of each benchmark file: training, validation, test; None without benchmark files.
        reordered: Users whose items RecBole's float32 times would put in another order.
        impossible: Times not after 1970, and after tomorrow.
        whole: The facts of all interactions in ``X.inter``, in its order, where benchmark files of a temporal split
            stand beside it.
        positions: ``[rows]`` int64 how many interactions of its user in `whole` precede the row's; None elsewhere.
        trained: How many interactions of `whole`, the first ones, are trained on.
    """

    users: Any
    items: Any
    order: Any = None
    moments: Any = None
    lists: Any = None
    lengths: Any = None
    sizes: tuple[int, ...] | None = None
    reordered: int = 0
    impossible: tuple[int, int] = (0, 0)
    whole: Facts | None = None
    positions: Any = None
    trained: int = 0

    @property
    def n_items(self) -> int:
        """How many items occur, in rows or in their histories."""
        if self.whole is not None:
            return self.whole.n_items
        parts = [self.items] if self.lists is None else [self.items, self.lists]
        return int(np.count_nonzero(sum(np.bincount(part, minlength=self._width) for part in parts)))

    @property
    def _width(self) -> int:
        return 1 + max(int(part.max(initial=0)) for part in (self.items, self.lists) if part is not None)

    def pairs(self) -> tuple[Any, Any]:
        """Return (users, items) of everything anybody has met in any part; a pair may occur several times."""
        if self.whole is not None:
            return self.whole.pairs()
        if self.lists is None:
            return self.users, self.items
        return np.r_[self.users, np.repeat(self.users, self.lengths)], np.r_[self.items, self.lists]

    def by_user(self) -> Any:
        """Return ``[rows]`` row numbers, each user's together and in exact order."""
        return self.order[np.argsort(self.users[self.order], kind="stable")]

    def split(self, config: Any) -> Split | None:
        """Return what is held out; None where the split, and not the data alone, decides that."""
        if self.sizes is not None:
            parts = np.split(np.arange(len(self.users)), np.cumsum(self.sizes)[:-1])
            return Split(self, np.ones(len(self.users), bool), *parts) if len(parts) == 3 else None
        arguments = config["eval_args"]
        how = (arguments["split"] or {}).get("LS")
        if how is None or arguments["order"] != "TO" or self.order is None:
            return None
        return self._leave_one_out(how)

    def _leave_one_out(self, how: str) -> Split:
        """Hold out what RecBole holds out for sequential models, of which every other model can be asked too.

        They have a row less for each user, as nothing precedes the first item (sequential_dataset.py:77-152): a user of
        one interaction is unknown there, one of two never tested, one of three never validated.
        """
        rows = self.by_user()
        counts = np.bincount(self.users)
        many = counts[self.users[rows]]
        from_end = np.cumsum(counts)[self.users[rows]] - 1 - np.arange(len(rows))
        last, last_but_one = (from_end == 0) & (many >= 3), (from_end == 1) & (many >= 4)
        nothing = np.zeros(len(rows), bool)
        valid = {"valid_and_test": last_but_one, "valid_only": last}.get(how, nothing)
        test = nothing if how == "valid_only" else last
        known = many >= 2
        return Split(self, (counts >= 2)[self.users], *(rows[part] for part in (known & ~valid & ~test, valid, test)))


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows of `facts` are trained on and held out, for every model alike.

    Args:
        facts: The dataset's.
        known: ``[rows]`` whether the row's user is known to every model.
        train: Row numbers; so are `valid` and `test`.
    """

    facts: Facts
    known: Any
    train: Any
    valid: Any
    test: Any

    def targets(self, phase: str) -> tuple[Any, Any]:
        """Return (users, items) of the rows that are held out for ``valid`` or ``test``."""
        rows = getattr(self, phase)
        return self.facts.users[rows], self.facts.items[rows]

    def met(self) -> tuple[Any, Any]:
        """Return (users, items) of all that the known users have met in any part."""
        if self.facts.lists is not None or self.facts.whole is not None:
            return self.facts.pairs()
        return self.facts.users[self.known], self.facts.items[self.known]

    def trained(self) -> tuple[Any, Any, Any]:
        """Return (users, items, times): how often each user takes each item in training.

        With benchmark files that is what any row's history says, and the targets of training rows; rows of one user
        overlap, so an item counts as often as the row that has it most often says. A held-out row's history may also
        list what another row holds out, as a test row lists the validation target: that is no training. A temporal
        split trains on every interaction before its first moment.
        """
        facts = self.facts
        if facts.whole is not None:
            users, items = facts.whole.users[: facts.trained], facts.whole.items[: facts.trained]
            return users, items, np.ones(len(users), np.int64)
        if facts.lists is None:
            users, items = facts.users[self.train], facts.items[self.train]
            return users, items, np.ones(len(users), np.int64)
        rows = np.r_[np.repeat(np.arange(len(facts.users)), facts.lengths), self.train]
        width = facts._width
        items = np.r_[facts.lists, facts.items[self.train]]
        keys, times = np.unique(rows * np.int64(width) + items, return_counts=True)
        row, items = np.divmod(keys, width)
        keys = facts.users[row] * np.int64(width) + items
        rows = np.r_[self.valid, self.test]
        held, many = np.unique(facts.users[rows] * np.int64(width) + facts.items[rows], return_counts=True)
        if len(held):
            place = np.minimum(np.searchsorted(held, keys), len(held) - 1)
            others = np.where(held[place] == keys, many[place], 0) - (facts.items[row] == items)
            times = np.where(np.isin(row, rows), times - np.maximum(others, 0), times)
            keys, times = keys[times > 0], times[times > 0]
        order = np.argsort(keys, kind="stable")
        first = np.flatnonzero(np.r_[True, np.diff(keys[order]) > 0]) if len(keys) else order
        most = np.maximum.reduceat(times[order], first) if len(keys) else times
        return *np.divmod(keys[order][first], width), most

    def future_share(self) -> float | None:
        """Return the share of test targets with a later training interaction; None without times to compare."""
        facts, whole = self.facts, self.facts.whole
        if whole is not None:  # which stands in exact order
            by_user = whole.by_user()
            starts = np.searchsorted(whole.users[by_user], facts.users[self.test])
            held, learnt = by_user[starts + facts.positions[self.test]], np.arange(facts.trained)
        elif facts.moments is not None:
            held, learnt = facts.moments[self.test], facts.moments[self.train]
        else:
            return None
        return float((held < learnt.max()).mean()) if len(held) and len(learnt) else None

    def popularity(self, width: int) -> Any:
        """Return ``[width]`` how often each item is trained on."""
        _, items, times = self.trained()
        return np.bincount(items, times, width).astype(np.int64)


def wants_exact_order(dataset: Any) -> bool:
    """Return whether the rows of RecBole's `dataset` are to stand by exact time, as they do in every run of ours."""
    return bool(dataset.exact_order or dataset.config["frozen_candidates"] is True)


def facts_of(dataset: Any) -> Facts | None:
    """Return the facts of RecBole's `dataset`, whose rows are filtered and numbered; None without users or items."""
    frame, listed = dataset.inter_feat, f"{dataset.iid_field}{dataset.config['LIST_SUFFIX']}"
    if dataset.uid_field not in frame or dataset.iid_field not in frame:
        return None
    users, items = (frame[field].to_numpy().astype(np.int32) for field in (dataset.uid_field, dataset.iid_field))
    times = frame[dataset.time_field].to_numpy() if dataset.time_field in frame else None
    times = times if times is not None and times.dtype.kind in "iuf" else None
    impossible = (0, 0)
    if times is not None and len(times) and (times.max() >= _DATES or times.min() < 0):
        impossible = impossible_times(times)
    if times is None:
        order = moments = None
    else:
        order = np.argsort(times, kind="stable").astype(np.int32)
        moments = np.empty(len(times), np.int32)
        moments[order] = np.cumsum(np.r_[False, times[order[1:]] != times[order[:-1]]][: len(times)])
    if dataset.config["benchmark_filename"] is not None:
        sizes = tuple(dataset.file_size_list)
        if temporal_split(dataset.config) is not None:
            return _temporal_facts(dataset, users, items, moments, sizes, impossible)
        rest: dict[str, Any] = {"moments": moments, "sizes": sizes, "impossible": impossible}
        one_numbering = any({dataset.iid_field, listed} <= set(group) for group in dataset.alias.values())
        if listed not in frame or not one_numbering:
            return Facts(users, items, **rest)
        rows = frame[listed].tolist()
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        lists = np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32)
        return Facts(users, items, lists=lists, lengths=lengths, **rest)
    if times is None:
        return Facts(users, items)
    reordered = _reordered(users, items, times, order)
    return Facts(users, items, order, moments, reordered=reordered, impossible=impossible)


def has_global_times(folder: Path, said: Any) -> bool:
    """Return whether the times of a dataset's column compare across users, by what the dataset says.

    Args:
        folder: The dataset's, in whose ``dataset.yaml`` `convert` has said it in a comment before there was the key.
        said: The key ``global_times``.
    """
    path = folder / "dataset.yaml"
    return said is not False and not (path.is_file() and _PLACES in path.read_text(encoding="utf-8", errors="replace"))


def temporal_split(config: Any) -> dict[str, Any] | None:
    """Return what ``temporal_split`` says of the benchmark files that `config` reads; None without such a split.

    Raises:
        UserError: It says nothing that `convert` or `split` writes.
    """
    known = config["temporal_split"] if config["benchmark_filename"] else None
    if known is None:
        return None
    if isinstance(known, dict):
        moments, count = known.get("moments"), known.get("train_interactions")
        if isinstance(moments, list) and len(moments) == 2 and type(count) is int and count > 0:
            return known
    raise UserError(
        f"temporal_split: {known} is not what `split --protocol temporal` writes into dataset.yaml; split the dataset "
        "again, or set benchmark_filename: null for its X.inter alone"
    )


def _temporal_facts(
    dataset: Any, users: Any, items: Any, moments: Any, sizes: tuple[int, ...], impossible: tuple[int, int]
) -> Facts:
    """Return the facts of benchmark rows behind which, in RecBole's frame, stand all interactions of ``X.inter``.

    Raises:
        UserError: A row's place in its user's history holds another item there.
    """
    rows = sum(sizes)
    order = np.arange(len(users) - rows, dtype=np.int32)
    whole = Facts(users[rows:], items[rows:], order, None if moments is None else moments[rows:])
    positions = dataset.inter_feat[PLACE].to_numpy()[:rows].astype(np.int64)
    by_user = whole.by_user()
    places = np.searchsorted(whole.users[by_user], users[:rows]) + positions
    there = by_user[np.minimum(places, len(by_user) - 1)]
    wrong = (positions < 1) | (places >= len(by_user)) | (whole.users[there] != users[:rows])
    wrong |= whole.items[there] != items[:rows]
    trained = int(dataset.config["temporal_split"]["train_interactions"])
    wrong[: sizes[0]] |= there[: sizes[0]] >= trained
    if wrong.any():
        part = int(np.searchsorted(np.cumsum(sizes), np.argmax(wrong), side="right"))
        raise UserError(
            f"{dataset.dataset_name}.{dataset.benchmark_filename_list[part]}.inter does not fit "
            f"{dataset.dataset_name}.inter: the item at the place of a row in its user's history is another there; "
            "write both again with `split --protocol temporal`"
        )
    return Facts(users[:rows], items[:rows], moments=None if moments is None else moments[:rows], sizes=sizes,
                 impossible=impossible, whole=whole, positions=positions, trained=trained)  # fmt: skip


def _reordered(users: Any, items: Any, times: Any, order: Any) -> int:
    """Return how many users' items stand in another order by float32 times than in exact `order`."""
    rounded = times.astype(np.float32)
    same, back = rounded[order[1:]] == rounded[order[:-1]], order[1:] < order[:-1]
    if not (same & back).any():
        return 0
    theirs = np.argsort(rounded, kind="stable")
    one, two = (rows[np.argsort(users[rows], kind="stable")] for rows in (order, theirs))
    return len(np.unique(users[one][items[one] != items[two]]))
