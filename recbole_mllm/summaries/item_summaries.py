"""Item summaries: image, text, or the fusion of both (paper, item summarisation)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recbole_mllm.common.prompts import Style, fused_summary_prompt, image_summary_prompt, text_summary_prompt
from recbole_mllm.data.item_table import Items
from recbole_mllm.summaries.generator import CachedGenerator


def summarize_items(
    generator: CachedGenerator, style: Style, items: Items, wanted: Sequence[str], what: str
) -> dict[str, str]:
    """Have `generator` summarise each `wanted` raw id; return its summary, "" where the item has nothing to summarise.

    Args:
        generator: Answers the prompts.
        style: The wording.
        items: Titles and images.
        wanted: Raw item ids.
        what: ``image`` | ``text`` | ``fused`` | ``none``; without an image a fused summary is the text's alone.
    """
    out = dict.fromkeys(wanted, "")
    if what in ("image", "fused"):
        seen = {item: path for item in wanted if (path := items.image(item)) is not None}
        out |= _zip(seen, generator.answer([image_summary_prompt(style, path) for path in seen.values()]))
    if what in ("text", "fused"):
        titled = {item: title for item in wanted if (title := items.title(item))}
        asked = [text_summary_prompt(style, title, balanced_length(out[item])) for item, title in titled.items()]
        texts = _zip(titled, generator.answer(asked))
        both = {item: text for item, text in texts.items() if out[item]}
        prompts = [fused_summary_prompt(style, out[item], text) for item, text in both.items()]
        out |= texts | _zip(both, generator.answer(prompts))
    return out


def balanced_length(image_summary: str) -> int | None:
    """Return how many words the text's summary should have for the fusion to weigh both alike (paper, item fusion).

    It is as long as the image's summary, in tens; None where there is no such summary.
    """
    words = len(image_summary.split())
    return max(10, round(words / 10) * 10) if words else None


def _zip(keys: Iterable[str], answers: Sequence[str]) -> dict[str, str]:
    return dict(zip(keys, answers, strict=True))
