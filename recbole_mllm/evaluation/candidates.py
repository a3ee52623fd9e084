"""Frozen candidates: drawn by raw id, the same for every model, epoch and process, and laid into RecBole's loaders.

RecBole's own sampler draws from numpy's global generator, which training consumes, and excludes only the target
(sampler.py:235,396,426). Here a user's proposals are a stream of numbers that depends on the raw user id, the seed and
the phase alone; the candidates are the first distinct ones the user has not met, by the dataset's `facts`, which no
model has cut or thinned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType

from recbole_mllm.common.errors import UserError, as_user_error
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import EvaluationSettings
from recbole_mllm.data import checking
from recbole_mllm.data.dataloader import SeededTrainDataLoader
from recbole_mllm.data.histories import places_within
from recbole_mllm.data.sampling import Pairs, hashes64, limited_users, mix64, tie_keys
from recbole_mllm.evaluation.candidates_file import in_drawn_order, read_candidates
from recbole_mllm.evaluation.full_ranking import DENSE, AllItems, with_ranking
from recbole_mllm.evaluation.loader import FrozenEvalDataLoader, UserRows
from recbole_mllm.evaluation.protocol import training_counts

_PHASES = ("valid", "test")
# Settings of the dataset that come after `facts` are taken, or add to it
_NO_MATTER = ("MAX_ITEM_LIST_LENGTH", "additional_feat_suffix", "preload_weight", "unused_col")
_MODE = re.compile(r"(uni|pop)(\d+)")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 20  # proposals held at a time


class Loaders(NamedTuple):
    """RecBole's, of a split dataset; `candidates` is the digest of those frozen for evaluation, "" where none are."""

    train: Any
    valid: Any
    test: Any
    candidates: str


def prepare_loaders(config: Any, dataset: Any) -> Loaders:
    """Split `dataset` as RecBole's ``data_preparation`` does (data/utils.py:140), with frozen candidates if asked for.

    MLLMMSR's training rows come with seeded negatives. What RecBole has under that name calls this function, for a
    stock run to ask the same (`registration.prepare_data`).

    Raises:
        UserError: A part is empty, the mode is ``labeled``, a user leaves too few items, or ``candidates_file`` does
            not fit the split.
    """
    with checking.explain_what_is_left(config, dataset):
        train, valid, test = unwrap(data_preparation)(config, dataset)
    if config["model"] == MLLM:
        train = SeededTrainDataLoader.of(train)
    digest = ""
    if config["frozen_candidates"] is True:
        candidates = Candidates(config, dataset, [loader._dataset for loader in (train, valid, test)])
        valid, test = (
            _frozen(config, candidates, phase, loader) for phase, loader in zip(_PHASES, (valid, test), strict=True)
        )
        digest = candidates.digest()
    checking.check_parts(config, dataset, train, valid, test)
    return Loaders(train, valid, test, digest)


def _frozen(config: Any, candidates: Candidates, phase: str, loader: Any) -> Any:
    """Return RecBole's `loader` of a phase with its candidates; for a full ranking its batches say what is ranked."""
    whole, mode, ranking = loader._dataset, candidates.modes[phase], candidates.ranking(phase)
    part = whole.copy(whole.inter_feat[candidates.evaluated[phase][whole.inter_feat[whole.uid_field].numpy()]])
    candidates.refuse_other_rows(phase, part)
    if mode == "full":
        loader = _fitting(config, loader, part)
        loader.collate_fn = partial(with_ranking, loader.collate_fn, ranking)
        return loader
    part.sort(by=part.uid_field, ascending=True)
    rows, negatives = UserRows.of(candidates.targets(phase)[0]), candidates.negatives(phase)
    return FrozenEvalDataLoader(config, part, loader._sampler, rows, _count(mode), negatives, ranking)


def digest_of(config: Any) -> str:
    """Return the digest that a run of `config` will have; the dataset is read for it, and nothing trained.

    Raises:
        UserError: As `prepare_loaders`, or RecBole cannot read or split the dataset.
    """
    with as_user_error("read and split the dataset"):
        dataset = create_dataset(config)
        if dataset.facts is not None and dataset.facts.split(config) is not None:
            return Candidates(config, dataset).digest()
        return prepare_loaders(config, dataset).candidates


def decisive_keys(config: Any) -> tuple[str, bool]:
    """Return what decides the candidates besides the dataset's files, as one text, and whether `seed` does as well."""
    from recbole.utils.argument_list import dataset_arguments

    settings, arguments = EvaluationSettings.from_config(config), config["eval_args"]
    by_data = bool(config["benchmark_filename"]) or ("LS" in (arguments["split"] or {}) and arguments["order"] == "TO")
    by_rule = "full" in arguments["mode"].values() and not settings.exclude_seen  # RecBole's, which differs by model
    kind = None if by_data and not by_rule else config["MODEL_TYPE"]
    keys = {key: config[key] for key in dataset_arguments if key not in _NO_MATTER}
    return repr((config["data_path"], keys, arguments, settings, kind)), not by_data


class Candidates:
    """What every model of a protocol is asked about: which users, with which targets, among which items.

    A function of the dataset's `facts` and the settings. Where a split is random or by shares, the rows that are held
    out are those that RecBole's split has made.

    Args:
        config: RecBole's.
        dataset: RecBole's whole dataset, split or not.
        parts: Its training, validation and test part; None where `facts` know what is held out.

    Attributes:
        evaluated: For each phase ``[users]``, whether a user is evaluated.
        modes: For each phase ``eval_args.mode``.
        keys: ``tie_keys`` of RecBole's users and items.
    """

    def __init__(self, config: Any, dataset: Any, parts: Sequence[Any] | None = None) -> None:
        facts = dataset.facts
        if facts is None:
            raise UserError(
                f"frozen candidates need interactions as RecBole reads them, which {type(dataset).__name__} does not "
                "keep (it passes over Dataset._set_label_by_threshold); set frozen_candidates: false"
            )
        self.settings = settings = EvaluationSettings.from_config(config)
        self.modes = {phase: str(config["eval_args"]["mode"][phase]) for phase in _PHASES}
        self._users, self._items = (
            np.asarray(dataset.field2id_token[f]).astype(str) for f in (dataset.uid_field, dataset.iid_field)
        )
        self._config, self._parts = config, parts
        self._hashes = hashes64(self._items, "item")
        self.keys = tie_keys(self._users, self._items, settings.candidate_seed)
        self._split = facts.split(config) or RandomSplit.of(config, dataset, parts)
        owners, items = self._split.met()
        self._met = Pairs(owners, items, len(self._items))
        self._every = {phase: self._split.targets(phase) for phase in _PHASES}
        held_out = [users for users, _ in self._every.values()]
        limited = limited_users(self._users, held_out, settings.limit_users, settings.candidate_seed)
        # whom only a general model could be validated on is nobody's, though tested
        held = [np.bincount(users, minlength=len(self._users)) > 0 for users in held_out]
        self.evaluated = {phase: own & there for phase, own, there in zip(_PHASES, limited, held, strict=True)}
        self._drawn: dict[str, Any] = {}
        if settings.candidates_file:
            self._read(Path(settings.candidates_file), dataset.dataset_name)

    def targets(self, phase: str, chosen: Any = None) -> tuple[Any, Any]:
        """Return (users, items) of the held-out rows of `chosen` ``[users]``, those evaluated; sorted by user."""
        users, items = self._every[phase]
        rows = np.flatnonzero((self.evaluated[phase] if chosen is None else chosen)[users])
        rows = rows[np.argsort(users[rows], kind="stable")]
        return users[rows], items[rows]

    def refuse_other_rows(self, phase: str, part: Any) -> None:
        """Refuse a `part` that RecBole has split in another way.

        Raises:
            UserError: Its rows are not those that are held out.
        """
        owner, item = (part.inter_feat[field].numpy() for field in (part.uid_field, part.iid_field))
        order = np.argsort(owner, kind="stable")
        users, targets = self.targets(phase)
        if not (np.array_equal(owner[order], users) and np.array_equal(item[order], targets)):
            raise UserError(
                f"the {phase} rows are not those that the exact order of this dataset holds out; if RecBole has loaded "
                f"saved dataloaders, delete them (in {self._config['checkpoint_dir']})"
            )

    def ranking(self, phase: str) -> AllItems:
        """Return what a full ranking ranks."""
        pool = np.bincount(self._met.keys % self._met.width, minlength=self._met.width) > 0
        met = self._met if self.settings.exclude_seen else None
        return AllItems(pool, met, self.keys, len(self.targets(phase)[0]))

    def negatives(self, phase: str) -> Any:
        """Return ``[rows * count]`` internal item ids, one user after the other."""
        if phase not in self._drawn:
            self._drawn[phase] = self._draw(phase, self.targets(phase)[0], self.settings.candidate_seed)
        return self._drawn[phase]

    def _draw(self, phase: str, owners: Any, seed: int) -> Any:
        mode, rows = self.modes[phase], UserRows.of(owners)
        if mode.startswith("pop"):
            pool = Pool.popular(self._split.popularity(len(self._items)), self._items)
        else:
            pool = Pool.uniform(self._met.keys % self._met.width, self._items)
        return draw_negatives(pool, self._met, rows.users, rows.counts * _count(mode), self._users, phase, seed)

    def digest(self) -> str:
        """Return the digest of everything that is asked.

        Raises:
            UserError: As `prepare_loaders`.
        """
        return candidates_digest(dict(self._asked(phase) for phase in _PHASES))

    def _asked(self, phase: str, chosen: Any = None, negatives: Any = None) -> tuple[str, Any]:
        """Return a phase's name in the digest, and what the digest reads of it."""
        users, targets = self.targets(phase, chosen)
        if self.modes[phase] == "full":
            ranking = self.ranking(phase)
            name = f"{phase} {ranking.name(self._hashes, self._config['MODEL_TYPE'] == ModelType.SEQUENTIAL)}"
            return name, ranking.digested(self._users, users, targets, self._hashes)
        drawn = self.negatives(phase) if negatives is None else negatives
        return phase, UserRows.of(users).digested(self._users, self._hashes[targets], self._hashes[drawn])

    def _read(self, path: Path, dataset: str) -> None:
        """Take the candidates of a file, each user's in the order in which they would be drawn, whatever the file's.

        Raises:
            UserError: It is of another dataset, does not fit the split, or was edited.
        """
        given = read_candidates(path)
        if given.dataset not in ("", dataset):
            raise UserError(
                f"{path}:1: these are candidates of dataset {given.dataset!r}, and this is {dataset!r}; export those "
                "of this dataset, or drop the header's dataset if it is the same under another name"
            )
        ordered, listed = {}, {}
        for phase in _PHASES:
            if self.modes[phase] == "full":
                if given.phases[phase]:
                    raise UserError("candidates_file has candidates for a phase whose eval_args.mode is full; use uniN")
                continue
            count = _count(self.modes[phase])
            given.check_users(phase, self._users, self._every[phase][0], np.unique(self.targets(phase)[0]))
            listed[phase] = np.isin(self._users, list(given.phases[phase]))
            users, targets = self.targets(phase, listed[phase])
            rows = UserRows.of(users)
            written = given.negatives(phase, rows, targets, count, self._users, self._items, self._met)
            try:
                drawn = self._draw(phase, users, given.seed if given.seed is not None else self.settings.candidate_seed)
            except UserError:  # other rules drew them: with fewer items to choose from there is no order to follow
                drawn = None
            owner = np.repeat(np.arange(len(rows.users)), rows.counts * count)
            ordered[phase] = in_drawn_order(owner, written, drawn, np.argsort(np.argsort(self._items)))
            self._drawn[phase] = ordered[phase][np.repeat(self.evaluated[phase][users], count)]
        whole = [self._every[phase][0] for phase in _PHASES]
        everybody = dict(zip(_PHASES, limited_users(self._users, whole, None, 0), strict=True))
        # a full ranking beside it was of all users or of a sample
        digests = [
            candidates_digest(dict(self._asked(p, listed.get(p, full[p]), ordered.get(p)) for p in _PHASES))
            for full in (everybody, self.evaluated)
        ]
        if given.digest not in ("", *digests):
            raise UserError(
                f"{path}:1: the header's digest is {given.digest}, but the lines make {digests[0]}; "
                "they were edited (then drop the digest), or the file is damaged"
            )


@dataclass(frozen=True, slots=True)
class RandomSplit:
    """A split that the data alone does not decide, from the parts that RecBole has made; see `facts.Split`.

    Args:
        facts: The dataset's.
        train: The training part.
        known: ``[rows]`` which interactions every model knows.
        held: For ``valid`` and ``test`` (users, items) of the rows that every model has.
        one_out: Whether one interaction of each user is held out for each phase.
    """

    facts: Any
    train: Any
    known: Any
    held: Mapping[str, tuple[Any, Any]]
    one_out: bool

    @classmethod
    def of(cls, config: Any, dataset: Any, parts: Sequence[Any] | None) -> RandomSplit:
        """Read the split off its `parts`.

        Leaving one out at random, only what a sequential model could be asked about is asked, as in order of time.
        """
        assert parts is not None, "a split that facts do not know has been made"
        facts, split = dataset.facts, config["eval_args"]["split"] or {}
        one_out = "LS" in split and facts.sizes is None
        counts = np.bincount(facts.users, minlength=dataset.user_num)
        least = (4 if split.get("LS") == "valid_and_test" else 3, 3) if one_out else (0, 0)
        held = {}
        for phase, part, length in zip(_PHASES, parts[1:], least, strict=True):
            users, items = (part.inter_feat[field].numpy() for field in (part.uid_field, part.iid_field))
            held[phase] = users[counts[users] >= length], items[counts[users] >= length]
        return cls(facts, parts[0], counts[facts.users] >= (2 if one_out else 0), held, one_out)

    def targets(self, phase: str) -> tuple[Any, Any]:
        """Return (users, items) of the held-out rows."""
        return self.held[phase]

    def met(self) -> tuple[Any, Any]:
        """Return (users, items) of all that the known users have met."""
        users, items = self.facts.pairs()
        return (users[self.known], items[self.known]) if self.one_out else (users, items)

    def popularity(self, width: int) -> Any:
        """Return ``[items]`` how often each item is trained on."""
        if not self.one_out:
            return training_counts(self.train, 0, width)[0]
        held = (np.bincount(items, minlength=width) for _, items in self.held.values())
        return np.bincount(self.facts.items[self.known], minlength=width) - sum(held)


def _count(mode: str) -> int:
    match = _MODE.fullmatch(mode)
    if match is None:
        raise UserError(
            f"eval_args.mode {mode!r} has no candidates to freeze; use uniN or popN, e.g. uni20, or full (a model by "
            "itself is also evaluated on labels, with frozen_candidates: false)"
        )
    return int(match.group(2))


def _fitting(config: Any, loader: Any, part: Any) -> Any:
    """Return a loader of `part`, rows of `loader`'s, which is `loader` where those are all of its rows.

    A sequential model's batch counts rows (general_dataloader.py:246-249), and each becomes as many scores as there are
    items; it is lowered to what a memory holds.
    """
    size = config["eval_batch_size"]
    fitting = max(1, DENSE // part.item_num) if loader.is_sequential else size
    if len(part) == len(loader._dataset) and size <= fitting:
        return loader
    config["eval_batch_size"] = min(size, fitting)
    try:
        return type(loader)(config, part, loader._sampler, shuffle=False)
    finally:
        config["eval_batch_size"] = size


@dataclass(frozen=True, slots=True)
class Pool:
    """The items candidates are drawn from.

    Args:
        items: ``[P]`` internal ids in the order of their raw ids.
        weights: ``[P]`` what each item's chance is proportional to.
        cumulative: Their cumulative shares; None where all are alike.
    """

    items: Any
    weights: Any
    cumulative: Any = None

    @classmethod
    def uniform(cls, items: Any, raw: Any) -> Pool:
        """The distinct internal ids `items`, all alike; `raw` holds the raw id of every internal id."""
        present = np.flatnonzero(np.bincount(items, minlength=1))
        present = present[np.argsort(raw[present], kind="stable")]
        return cls(present, np.ones(len(present)))

    @classmethod
    def popular(cls, counts: Any, raw: Any) -> Pool:
        """Items in proportion to their training interactions; one without any is never drawn (RecBole's ``popN``)."""
        even = cls.uniform(np.flatnonzero(counts), raw)
        weights = counts[even.items].astype(float)
        share = np.cumsum(weights)
        return cls(even.items, weights, share / share[-1:])

    def proposals(self, keys: Any, count: int) -> Any:
        """Return the first `count` proposals ``[U, count]``, internal ids, of the users with stream `keys` ``[U]``."""
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        chance = _unit(mix64(keys[:, None] + steps))
        if self.cumulative is None:
            return self.items[(chance * len(self.items)).astype(np.int64)]
        return self.items[np.searchsorted(self.cumulative, chance, side="right")]


def _unit(bits: Any) -> Any:
    """Return 64 random bits as numbers in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def draw_negatives(pool: Pool, met: Pairs, users: Any, wanted: Any, raw: Any, phase: str, seed: int) -> Any:
    """Return ``wanted[i]`` distinct items for each of `users` ``[U]``, one user after the other, none the user has met.

    Args:
        pool: What to draw from.
        met: Every (user, item) of any split.
        users: ``[U]`` distinct internal ids.
        wanted: ``[U]`` how many each user needs.
        raw: The raw id of every internal user id.
        phase: ``valid`` or ``test``.
        seed: Of the candidates.

    Raises:
        UserError: A user has met so many items that fewer are left.
    """
    _enough_left(pool, met, users, wanted, raw, phase)
    keys = hashes64(raw[users], "candidates", seed, phase)
    out = np.empty(int(wanted.sum()), np.int64)
    ends = np.cumsum(wanted)
    for count in np.unique(wanted).tolist():
        for chosen in _chunks(np.flatnonzero(wanted == count), _first_look(count)):
            places = (ends[chosen] - count)[:, None] + np.arange(count)
            out[places] = _draw(pool, met, users[chosen], keys[chosen], count)
    return out


def _enough_left(pool: Pool, met: Pairs, users: Any, wanted: Any, raw: Any, phase: str) -> None:
    inside = np.zeros(met.width, bool)
    inside[pool.items] = True
    owner, item = np.divmod(met.keys, met.width)
    used = np.bincount(owner[inside[item]], minlength=len(raw))[users]
    short = np.flatnonzero(len(pool.items) - used < wanted)
    if len(short):
        user, count = raw[users[short[0]]], int(wanted[short[0]])
        raise UserError(
            f"user {user} leaves fewer than {count} items as {phase} candidates; "
            "lower the N of eval_args.mode uniN, or leave such users out (user_inter_num_interval; of a split's files "
            "they are left out before the split)"
        )


def _first_look(count: int) -> int:
    """Return how many proposals are looked at first; a matter of speed alone."""
    return count + count // 4 + 4


def _last_look(count: int) -> int:
    """Return after how many proposals a stream ends, and what it lacks is raced for."""
    return 16 * count + 256


def _chunks(places: Any, width: int) -> Iterator[Any]:
    step = max(1, _CHUNK // width)
    return (places[low : low + step] for low in range(0, len(places), step))


def _draw(pool: Pool, met: Pairs, users: Any, keys: Any, count: int) -> Any:
    """Return ``[U, count]``: the first distinct unseen proposals of each user, and what a race adds to too few."""
    out = np.empty((len(users), count), np.int64)
    due = np.arange(len(users))
    for look in (_first_look(count), _last_look(count)):
        short = []
        for chosen in _chunks(due, look):
            proposals = pool.proposals(keys[chosen], look)
            good = _first_of_each(proposals) & ~met.contain(users[chosen][:, None], proposals)
            number = good.cumsum(1)
            done = number[:, -1] >= count
            out[chosen[done]] = proposals[done][(good & (number <= count))[done]].reshape(-1, count)
            short.append(chosen[~done])
        due = np.concatenate(short) if short else due[:0]
    for i in due:
        proposals = pool.proposals(keys[i : i + 1], _last_look(count))
        found = proposals[_first_of_each(proposals) & ~met.contain(users[i], proposals)]
        out[i] = np.r_[found, _race(pool, met, users[i], keys[i], found, count)]
    return out


def _first_of_each(rows: Any) -> Any:
    """Return, for ``[U, T]`` ids, which stand in their row for the first time."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    new = np.ones(rows.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    out = np.empty(rows.shape, bool)
    np.put_along_axis(out, order, new, 1)
    return out


def _race(pool: Pool, met: Pairs, user: Any, key: Any, found: Any, count: int) -> Any:
    """Return what a user still lacks: the first to arrive of the items left, each at its own rate.

    Exponential arrivals have the law of drawing on and on and leaving out what was drawn before, in one pass.
    """
    left = ~met.contain(user, pool.items) & ~np.isin(pool.items, found)
    steps = (_last_look(count) + 1 + np.arange(len(pool.items))).astype(np.uint64) * _GOLDEN
    arrival = -np.log1p(-_unit(mix64(key + steps[left]))) / pool.weights[left]
    return pool.items[left][np.argsort(arrival, kind="stable")[: count - len(found)]]


def candidates_digest(drawn: dict[str, tuple[Any, Any, Any]]) -> str:
    """Return the digest (16 hex digits) of what was drawn, whatever the order of users and the numbering of ids.

    Args:
        drawn: For each phase raw user ids ``[U]``, and each user's targets and negatives as one row of item hashes:
            lengths ``[U]`` and the hashes ``[sum]``, one user after the other.
    """
    digest = hashlib.sha256()
    for phase in sorted(drawn):
        users, lengths, hashes = drawn[phase]
        own = hashes64(users, "digest", phase)
        parts = mix64(
            hashes ^ mix64(np.repeat(own, lengths) + (places_within(lengths) + 1).astype(np.uint64) * _GOLDEN)
        )
        whole = np.add.reduceat(parts, np.cumsum(lengths) - lengths) if len(users) else parts
        digest.update(phase.encode() + np.sort(mix64(whole ^ own)).astype(">u8").tobytes())
    return digest.hexdigest()[:16]
