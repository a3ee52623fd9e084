"""Item summaries: image, text, or the fusion of both (paper, item summarisation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from recbole_mllm.common.prompts import (
    Prompt,
    Style,
    fused_summary_prompt,
    image_summary_prompt,
    text_summary_prompt,
)
from recbole_mllm.data.item_table import Items

AnswerAll = Callable[[Mapping[str, Prompt]], dict[str, str]]  # of `CachedGenerator`, or what the store knows


def summarize_items(answer: AnswerAll, style: Style, items: Items, wanted: Sequence[str], what: str) -> dict[str, str]:
    """Have each `wanted` raw id summarised; return its summary, "" where the item has nothing to summarise.

    Args:
        answer: Answers prompts by item; called up to three times, an item's summary being its last answer.
        style: The wording.
        items: Titles and images.
        wanted: Raw item ids.
        what: ``image`` | ``text`` | ``fused`` | ``none``; without an image a fused summary is the text's alone.
    """
    out = dict.fromkeys(wanted, "")
    if what in ("image", "fused"):
        seen = {item: path for item in wanted if (path := items.image(item)) is not None}
        out |= answer({item: image_summary_prompt(style, path) for item, path in seen.items()})
    if what in ("text", "fused"):
        titled = {item: title for item in wanted if (title := items.title(item))}
        texts = answer({i: text_summary_prompt(style, title, balanced_length(out[i])) for i, title in titled.items()})
        out |= texts | answer({i: fused_summary_prompt(style, out[i], text) for i, text in texts.items() if out[i]})
    return out


def balanced_length(image_summary: str) -> int | None:
    """Return how many words the text's summary should have for the fusion to weigh both alike (paper, item fusion).

    It is as long as the image's summary, in tens; None where there is no such summary.
    """
    words = len(image_summary.split())
    return max(10, round(words / 10) * 10) if words else None
