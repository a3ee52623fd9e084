"""Rows of a recommender, (history, position, item) by number: the question each asks, its cost, who scores it.

Several processes share the rows such that each reads about as many tokens as another. What a row costs follows from
lengths, nothing is tokenised for it: these numbers decide who does what, never the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from recbole_mllm.common import distributed
from recbole_mllm.common.distributed import cut
from recbole_mllm.common.progress import Progress
from recbole_mllm.common.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.common.settings import RecommendSettings, Settings
from recbole_mllm.data.item_table import Items
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.loss import can_share

AHEAD = 1024  # prompts encoded at a time when a whole split is scored
_PER_TOKEN = 4  # characters, about, in the languages that tokenisers were made for
IMAGE_TOKENS = 512  # of an image that a server's model reads

Row = tuple[int, int, int]
Scores = dict[Row, float]
Costs = tuple[list[int], list[int], list[int]]


def question(style: Style, settings: RecommendSettings, items: Items, preference: str, item: str) -> Prompt:
    """Return what is asked about raw id `item`; training, scoring and planning all ask it."""
    image = items.image(item) if settings.use_image else None
    first = settings.prompt_order == "item-first"
    return recommend_prompt(style, preference, items.title(item), image, item_first=first)


def shares_in_training(settings: Settings, body: Backbone) -> bool:
    """Return whether rows of a micro-batch share the computation of a common prefix: asked for, and possible."""
    return settings.train.share_prefix == "auto" and settings.lora.finetune != "none" and can_share(body)


def deals_by_item(settings: Settings, body: Backbone) -> bool:
    """Return whether rows of one item should meet in a batch: they share a prefix, and a pass may hold several rows."""
    train, first = settings.train, settings.recommend.prompt_order == "item-first"
    wanted = train.group_by_item == "auto" and first and train.micro_batch_size != 1
    return wanted and shares_in_training(settings, body)


def item_major(row: Row) -> Row:
    """Return the key that sorts rows by item, so that users of one item share its computation."""
    return row[2], row[0], row[1]


def row_costs(rows: Sequence[Row], prompts: Iterable[Prompt], image_tokens: int, *, item_first: bool) -> Costs:
    """Return each row's key, the tokens that rows of its key share, and its own, as `distributed.cut` takes them.

    Where `item_first` is true, rows of an item share what its question says first; an image takes `image_tokens`.
    """
    keys, shared, own = list[int](), list[int](), list[int]()
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        pieces = prompt.pieces()
        lengths = [sum(map(len, part)) // _PER_TOKEN for part in (pieces[:2], pieces[2:])]
        head, tail = lengths[0] + image_tokens * len(prompt.images), lengths[1]
        keys.append(row[2] if item_first else place)
        shared.append(head if item_first else 0)
        own.append(1 + tail if item_first else 1 + tail + head)
    return keys, shared, own


def training_share(rows: Sequence[Row], costs: Callable[[Sequence[Row]], Costs]) -> list[int]:
    """Return the places of a batch's `rows` that this process trains on; an item's stay together if they can.

    Every process cuts for itself, by costs on which all agree.
    """
    if not distributed.is_launched():
        return list(range(len(rows)))
    first: dict[int, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(row[2], place)
    order = sorted(range(len(rows)), key=lambda place: first[rows[place][2]])
    parts = cut(*costs([rows[place] for place in order]), distributed.world_size())
    return sorted(order[n] for n in parts[distributed.process_index()])


def score_in_chunks(
    rows: Sequence[Row], score: Callable[[Sequence[Row]], Scores], progress: Progress | None, shown: int
) -> Scores:
    """Return the scores of `rows`, some prompts at a time; by its end `progress` has advanced by `shown`."""
    found: Scores = {}
    for start in range(0, len(rows), AHEAD):
        part = rows[start : start + AHEAD]
        found |= score(part)
        if progress:
            progress.update(len(part) * shown / len(rows))
    return found


def score_in_shares(
    rows: Sequence[Row],
    costs: Callable[[Sequence[Row]], Costs],
    score: Callable[[Sequence[Row]], Scores],
    spent: Callable[[], tuple[int, int]],
    progress: Progress | None,
) -> tuple[Scores, tuple[int, int]]:
    """Score this process's share of `rows`, and get all scores; all processes do so at the same time.

    Args:
        rows: In item-major order, the same in every process.
        costs: As `row_costs` gives them; the main process's count.
        score: Scores a few rows here.
        spent: The tokens read and the cached scores found here so far.
        progress: Shows all rows, as this process's share is scored.

    Returns:
        The scores, and what the other processes have spent.
    """
    parts = distributed.on_main(lambda: cut(*costs(rows), distributed.world_size()))
    before = spent()
    share = [rows[n] for n in parts[distributed.process_index()] if n < len(rows)]
    mine = score_in_chunks(share, score, progress, len(rows))
    now = spent()
    others = list(distributed.gather_objects((mine, now[0] - before[0], now[1] - before[1])))
    del others[distributed.process_index()]
    scores = {row: value for found, _, _ in others for row, value in found.items()} | mine
    # all ask for the same rows, unless a sampler of RecBole's drew others here than in the main process
    scores |= score_in_chunks([row for row in rows if row not in scores], score, None, 0)
    return scores, (sum(read for _, read, _ in others), sum(known for _, _, known in others))
