"""What a run of MLLMMSR keeps of single users, so that a report can show them later without the model.

Users are drawn by a fixed seed, never by how well they came out, and in one order: a report shows the first few of them
and may pick others from the rest by a rule it states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mllm.data.atomic import whole_file
from recbole_mllm.data.peruser import user_of
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION

CASES = "cases.json"
TITLES = "titles.json"
KEPT = 200
"""How many users are kept: enough for a rule to choose from, a megabyte or two on the disk."""

CASE_SEED = 2024
LAST_ITEMS = 60
"""Items of a history that are kept, the newest; what the preference texts had read before is only counted."""


def write_cases(outcome: Any, folder: Path, kept: int = KEPT) -> Path | None:
    """Write ``cases.json`` of a finished `Outcome` into `folder`; None for a model that reads no preferences."""
    preferences = getattr(outcome.model, "preferences", None)
    if preferences is None:
        return None
    data, pairs = outcome.dataset, outcome.pairs
    users, tokens = (np.asarray(data.field2id_token[f]).astype(str) for f in (data.uid_field, data.iid_field))
    rows = outcome.test_data._dataset.inter_feat
    owners, answers = users[rows[data.uid_field].numpy()], tokens[rows[data.iid_field].numpy()]
    read = (rows[HISTORY_NUMBER].tolist(), rows[POSITION].tolist(), answers.tolist())
    asked = dict(zip(owners.tolist(), zip(*read, strict=True), strict=True))
    chosen = drawn(asked, kept)
    told = [case_of(preferences, data.history_names.name(asked[user][0]), *asked[user][1:]) for user in chosen]
    candidates = tokens[pairs["item_id"][np.isin(pairs["user_id"], np.flatnonzero(np.isin(users, chosen)))]]
    wanted = {item for case in told for item in case["history"]} | set(candidates.tolist())
    folders = [Path(str(p)) for p in (outcome.config["data_path"], outcome.config["image_dir"]) if p]
    known = {item: _item(preferences.items, item, folders) for item in sorted(wanted)}
    with whole_file(folder / CASES) as file:
        json.dump({"version": 1, "seed": CASE_SEED, "users": told, "items": known}, file, ensure_ascii=False)
    return folder / CASES


def write_titles(outcome: Any, folder: Path, titles: Mapping[str, str], kept: int = KEPT) -> Path:
    """Write ``titles.json``: the titles of the items a model without texts ranked best for the users that are kept.

    Where all items are ranked, they need not be among those that MLLMMSR's cases name.
    """
    data, pairs = outcome.dataset, outcome.pairs
    users, tokens = (np.asarray(data.field2id_token[f]).astype(str) for f in (data.uid_field, data.iid_field))
    chosen = drawn(dict.fromkeys(users[np.unique(pairs["user_id"])].tolist()), kept)
    items = tokens[np.unique(pairs["item_id"][np.isin(users[pairs["user_id"]], chosen)])].tolist()
    with whole_file(folder / TITLES) as file:
        json.dump({item: titles.get(item, item) for item in items}, file, ensure_ascii=False)
    return folder / TITLES


def drawn(users: Mapping[str, Any], kept: int) -> list[str]:
    """Return up to `kept` users in an order that knows their names and a fixed seed, nothing else."""
    names = sorted(users)
    return [names[index] for index in np.random.default_rng(CASE_SEED).permutation(len(names))[:kept]]


def case_of(preferences: Any, history: str, position: int, target: str) -> dict[str, Any]:
    """Return what the recommender knew when it was asked for `target` at `position` of the `history` of this name.

    ``history`` holds items ``[start, position)`` of the whole history; each step has read items ``[since, seen)`` of it
    on top of the step before; ``read`` is the text that stood in the question.
    """
    start = max(0, position - LAST_ITEMS)
    return {
        "user": user_of(history),
        "target": target,
        "start": start,
        "position": position,
        "history": list(preferences.plan.histories[history][start:position]),
        "steps": [{"since": s.since, "seen": s.seen, "text": text} for s, text in preferences.chain(history, position)],
        "read": preferences.of(history, position),
    }


def _item(items: Any, item: str, folders: list[Path]) -> dict[str, str]:
    """Return title and image; the image's path is relative to the first of `folders` that holds it."""
    image = items.image(item)
    told = ""
    if image is not None:
        roots = (folder.resolve() for folder in folders)
        told = next((str(image.resolve().relative_to(r)) for r in roots if image.resolve().is_relative_to(r)), "")
    return {"title": items.title(item), "image": told}
