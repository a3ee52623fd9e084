"""How several processes share a model's work: each takes rows that cost as much as another's, and all get all scores.

What a row costs, in tokens, is told from lengths: nothing is tokenised, and few images are preprocessed for it. These
numbers decide who does what, never what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from recbole_mllm import ranks
from recbole_mllm.progress import Progress
from recbole_mllm.prompts import Prompt
from recbole_mllm.shares import cut

_AHEAD = 1024  # prompts encoded at a time when a whole split is scored
_PER_TOKEN = 4  # characters, about, in the languages that tokenisers were made for
_MOST_SIZES = 32  # image sizes whose tokens are counted; the rest take the mean
_IMAGE = 512  # tokens of an image where one number must do for all

Row = tuple[int, int, int]


class Team:
    """Shares the work of one model out among the processes of a run.

    Attributes:
        together: Whether all processes now ask for the same scores at the same time, so that each may ask for its
            share; else a process that asks is served by its own model alone.
        tokens_elsewhere: How many tokens other processes have read for scores asked for together.
        reused_elsewhere: How many such scores they had kept.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokens: dict[tuple[int, int], int] = {}
        self._size = lru_cache(maxsize=None)(_size_of)
        self.together = False
        self.tokens_elsewhere = self.reused_elsewhere = 0

    def training_share(self, rows: Sequence[Row]) -> list[int]:
        """Return the places of a batch's `rows` that this process trains on; an item's stay together if they can.

        Every process cuts for itself, from the batch's texts alone, and so all agree.
        """
        if not ranks.is_launched():
            return list(range(len(rows)))
        first: dict[int, int] = {}
        for place, row in enumerate(rows):
            first.setdefault(row[2], place)
        order = sorted(range(len(rows)), key=lambda place: first[rows[place][2]])
        parts = self.cut([rows[place] for place in order], ranks.world_size(), exact_images=False)
        return sorted(order[n] for n in parts[ranks.rank()])

    def scores(self, ordered: Sequence[Row], progress: Progress | None = None) -> dict[Row, float]:
        """Return the log-odds of `ordered` rows; `together`, each process asks about its share and gets them all."""
        if not self.together or not ranks.is_launched():
            return self._asked(ordered, progress, len(ordered))
        parts = ranks.on_main(lambda: self.cut(ordered, ranks.world_size()))
        tokens, reused = self._model.tokens_read, self._model.scores_reused
        part = [ordered[n] for n in parts[ranks.rank()] if n < len(ordered)]
        mine = self._asked(part, progress, len(ordered))
        said = (mine, self._model.tokens_read - tokens, self._model.scores_reused - reused)
        others = dict[Row, float]()
        for number, (found, read, kept) in enumerate(ranks.gather_objects(said)):
            if number != ranks.rank():
                others |= found
                self.tokens_elsewhere += read
                self.reused_elsewhere += kept
        # all ask for the same rows, unless a sampler of RecBole's drew others here than in the main process
        left = [row for row in ordered if row not in mine and row not in others]
        return mine | others | self._asked(left, None, 0)

    def _asked(self, rows: Sequence[Row], progress: Progress | None, told: int) -> dict[Row, float]:
        """Return the log-odds of `rows`; by its end `progress` has heard of `told`."""
        found: dict[Row, float] = {}
        for start in range(0, len(rows), _AHEAD):
            part = rows[start : start + _AHEAD]
            found |= self._model.scores_of(part)
            if progress:
                progress.update(len(part) * told / len(rows))
        return found

    def cut(self, rows: Sequence[Row], parts: int, *, exact_images: bool = True) -> list[range]:
        """Cut `rows`, in item-major order, by the tokens each part reads; an item's prefix counts once a part.

        Args:
            rows: (history, position, item), by number.
            parts: How many shares.
            exact_images: Look at the images; not where each process cuts for itself and all must agree.
        """
        recommend = self._model.settings.recommend
        keys, shared, own = [], [], []
        for place, row in enumerate(rows):
            (prompt,) = self._model.prompts_of([row])
            head, rest = _lengths(prompt)
            head += sum(self._image(path) if exact_images else _IMAGE for path in prompt.images)
            first = recommend.prompt_order == "item-first"
            keys.append(row[2] if first else place)
            shared.append(head if first else 0)
            own.append(1 + (rest if first else rest + head))
        return cut(keys, shared, own, parts)

    def _image(self, path: Path) -> int:
        encoder = getattr(self._model.mllm, "encoder", None)
        size = self._size(path)
        if encoder is None or size is None:
            return _IMAGE
        if size not in self._tokens and len(self._tokens) < _MOST_SIZES:
            self._tokens[size] = len(encoder.image(path).ids)
        return self._tokens.get(size) or sum(self._tokens.values()) // len(self._tokens)


def _lengths(prompt: Prompt) -> tuple[int, int]:
    """Return the tokens up to the first of the two filled-in texts, title or preference, with it, and of the rest."""
    pieces = prompt.pieces()
    head = sum(map(len, pieces[:2]))
    return head // _PER_TOKEN, sum(map(len, pieces[2:])) // _PER_TOKEN


def _size_of(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:  # reads the header alone
            return int(image.width), int(image.height)
    except OSError:
        return None
