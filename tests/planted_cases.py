"""Case studies whose truth is known: what a run of the planted MLLM kept of its users, with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from recbole_mllm.benchmark.records import RunRecord
from tests.planted_runs import N_CANDIDATES

TEXTS = ("The user likes red lamps and old maps.", "The user likes green lamps and old maps.")


def plant_cases(
    results: Path,
    record: RunRecord,
    n_users: int = 10,
    titles: Mapping[str, str] | None = None,
    texts: tuple[str, ...] = TEXTS,
) -> dict[str, Any]:
    """Write ``cases.json`` beside the run's arrays: six items of history, a text after every third."""
    users = [f"u{index}" for index in range(n_users)]
    candidates = [f"i{index}" for index in range(n_users * N_CANDIDATES)]
    history = [f"h{index}" for index in range(6)]
    names = {item: f"Title of {item}" for item in (*history, *candidates)} | dict(titles or {})
    steps = [{"since": 3 * n, "seen": 3 * n + 3, "text": text} for n, text in enumerate(texts)]
    kept = {
        "version": 1,
        "seed": 2024,
        "users": [
            {"user": user, "target": f"i{n * N_CANDIDATES}", "start": 0, "position": 6, "history": history,
             "steps": steps, "read": texts[-1]}
            for n, user in enumerate(users)
        ],
        "items": {item: {"title": title, "image": f"images/{item}.png"} for item, title in names.items()},
    }  # fmt: skip
    path = results / str(record.per_user)
    path.with_name("cases.json").write_text(json.dumps(kept))
    return kept


def plant_images(folder: Path, items: list[str], side: int = 300) -> None:
    """Write one picture an item, of a colour of its own."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(items):
        colour = (37 * number % 256, 91 * number % 256, 173 * number % 256)
        Image.new("RGB", (side, side // 2), colour).save(folder / "images" / f"{item}.png")
