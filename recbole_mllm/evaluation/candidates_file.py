"""Frozen candidates as a file, so that others run on the same ones: JSON lines by raw ids.

The first line is a header with the dataset, protocol, seed and digest; each further one is
``{"phase", "user", "targets", "negatives"}``, sorted by phase and user, N negatives for each target. Neither the order
of lines nor that within a line matters: negatives are taken in the order in which the header's seed draws them.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import open_text, whole_text

FORMAT = "recbole-mllm candidates 1"


def is_export(head: bytes) -> bool:
    """Return whether a file that begins so is one that `write_candidates` has written, in whatever version."""
    return head.startswith(b'{"format": "recbole-mllm candidates ')


@dataclass(frozen=True, slots=True)
class CandidatesLine:
    """One user's line: where it stands, and the raw ids of targets and negatives."""

    where: str
    targets: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CandidatesFile:
    """What a file gives: for each phase and raw user id a line."""

    path: Path
    digest: str
    phases: Mapping[str, Mapping[str, CandidatesLine]]
    dataset: str = ""
    seed: int | None = None

    def negatives(self, phase: str, rows: Any, targets: Any, count: int, users: Any, items: Any, met: Any) -> Any:
        """Return ``[rows * count]`` internal ids of the negatives, one user after the other, as the lines give them.

        Args:
            phase: ``valid`` or ``test``.
            rows: The `UserRows` of users who have a line.
            targets: ``[rows]`` internal ids of the split's targets, in the order of `rows`.
            count: Negatives for each target, as ``eval_args.mode`` says.
            users: Raw id of each internal user id.
            items: Raw id of each internal item id.
            met: `Pairs` of all that users have met in any part.

        Raises:
            UserError: The file does not fit the split; names file and line.
        """
        number = {name: place for place, name in enumerate(items.tolist())}
        out = [np.zeros(0, np.int64)]
        for user, start, many in zip(rows.users.tolist(), rows.starts, rows.counts, strict=True):
            line, own = self.phases[phase][users[user]], items[targets[start : start + many]].tolist()
            if complaint := _complaint(line, own, int(many) * count, phase, number):
                raise UserError(f"{line.where}: {complaint}")
            found = np.array([number[item] for item in line.negatives], np.int64)
            if (seen := met.contain(np.full(len(found), user), found)).any():
                raise UserError(
                    f"{line.where}: {_few(items[found[seen]].tolist())} is in the history of user {users[user]} and "
                    "cannot be a negative; export the candidates of this dataset again"
                )
            out.append(found)
        return np.concatenate(out)

    def check_users(self, phase: str, users: Any, held_out: Any, evaluated: Any) -> None:
        """Refuse a `phase` without a line for each of the `evaluated` users, or with one of a user not `held_out`.

        Both are internal ids of `users`, the raw ids.

        Raises:
            UserError: Names the user, and the line where there is one.
        """
        lines, split, known = self.phases[phase], set(users[held_out].tolist()), set(users.tolist())
        for user, line in lines.items():
            if user not in split:
                why = "is not evaluated in this phase" if user in known else "is not in the dataset"
                raise UserError(f"{line.where}: user {user} {why} ({phase})")
        for user in users[evaluated].tolist():
            if user not in lines:
                raise UserError(f"{self.path}: no {phase} line for user {user}; export the candidates of this dataset")


def _complaint(line: CandidatesLine, own: Sequence[str], wanted: int, phase: str, known: Mapping[str, int]) -> str:
    """Return what is wrong with a line for a user whose targets are `own`; "" for nothing."""
    if Counter(line.targets) != Counter(own):
        return f"the targets are {_few(line.targets)}, the {phase} split's {_few(own)}"
    if len(line.negatives) != wanted:
        return f"{len(line.negatives)} negatives where eval_args.mode asks for {wanted}"
    if twice := [item for item, many in Counter(line.negatives).items() if many > 1]:
        return f"{_few(twice)} stands twice among the negatives"
    if wrong := sorted(set(line.negatives) & set(own)):
        return f"{_few(wrong)} is a target of the user and cannot be a negative"
    if strange := [item for item in line.negatives if item not in known]:
        return f"{_few(strange)} is no item of the dataset after filtering"
    return ""


def in_drawn_order(owner: Any, given: Any, drawn: Any, place: Any) -> Any:
    """Return `given` in the order of `drawn`, each owner's items that were not drawn behind, by `place`.

    Args:
        owner: ``[N]`` whose item it is, non-decreasing.
        given: ``[N]`` internal ids, distinct for an owner.
        drawn: ``[N]`` internal ids, distinct for an owner; None where nothing could be drawn.
        place: Of each internal id, in an order of raw ids.
    """
    turn = np.full(len(given), len(given))
    if drawn is not None and len(given):
        keys = owner * np.int64(len(place)) + drawn
        order, asked = np.argsort(keys), owner * np.int64(len(place)) + given
        found = order[np.minimum(np.searchsorted(keys[order], asked), len(keys) - 1)]
        turn = np.where(keys[found] == asked, found, turn)
    return given[np.lexsort((place[given], turn, owner))]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def read_candidates(path: Path) -> CandidatesFile:
    """Read a file that `write_candidates` has written, or another of its kind.

    Raises:
        UserError: There is none, or a line is not what it should be; names file and line.
    """
    phases: dict[str, dict[str, CandidatesLine]] = {"valid": {}, "test": {}}
    header: dict[str, Any] = {}
    for number, values in _lines(path):
        where = f"{path}:{number}"
        if number == 1:
            header = values
            if values.get("format") != FORMAT:
                raise UserError(f"{where}: no header with format {FORMAT!r}; write one with `candidates export`")
            continue
        phase, user = values.get("phase"), values.get("user")
        if phase not in phases or not isinstance(user, str):
            raise UserError(f"{where}: phase must be valid or test, and user a text; found {phase!r} and {user!r}")
        if user in phases[phase]:
            raise UserError(f"{where}: user {user} has a second {phase} line")
        phases[phase][user] = CandidatesLine(where, _ids(values, "targets", where), _ids(values, "negatives", where))
    if not header:
        raise UserError(f"{path} is empty; write one with `candidates export`")
    seed = header.get("seed")
    seed = seed if isinstance(seed, int) else None
    return CandidatesFile(path, str(header.get("digest") or ""), phases, str(header.get("dataset") or ""), seed)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"candidates_file {str(path)!r} does not exist")
    number = 0
    try:
        with open_text(path) as file:
            for number, text in enumerate(file, start=1):
                values = json.loads(text)
                if not isinstance(values, dict):
                    raise UserError(f"{path}:{number}: not a JSON object")
                yield number, values
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path}:{number + isinstance(error, OSError)}: cannot be read ({error})") from error


def _ids(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    ids = values.get(key)
    if not isinstance(ids, list) or not all(isinstance(entry, str) for entry in ids):
        raise UserError(f"{where}: {key} must be a list of raw item ids in quotes")
    return tuple(ids)


def write_candidates(path: Path, header: Mapping[str, Any], loaders: Mapping[str, Any], users: Any, items: Any) -> int:
    """Write the candidates of frozen evaluation loaders, whole or not at all; return the number of lines of users.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``; the same candidates give the same bytes.
        header: Dataset, protocol, seed and digest.
        loaders: The `FrozenEvalDataLoader` of each phase.
        users: Raw id of each internal user id.
        items: Raw id of each internal item id.
    """
    with whole_text(path) as file:
        file.write(_text({"format": FORMAT, **header}))
        for phase in sorted(loaders):
            file.writelines(_text(line) for line in _of_loader(phase, loaders[phase], users, items))
    return sum(len(loader.rows.users) for loader in loaders.values())


def _of_loader(phase: str, loader: Any, users: Any, items: Any) -> Iterator[dict[str, Any]]:
    rows, count = loader.rows, loader.count
    targets = loader._dataset.inter_feat[loader.iid_field].numpy()
    for place in np.argsort(users[rows.users], kind="stable"):
        low, high = rows.starts[place], rows.starts[place] + rows.counts[place]
        yield {
            "phase": phase,
            "user": str(users[rows.users[place]]),
            "targets": items[targets[low:high]].tolist(),
            "negatives": items[loader.negatives[low * count : high * count]].tolist(),
        }


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
