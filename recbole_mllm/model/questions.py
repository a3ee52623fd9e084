"""The one question about a (user, item) pair, and when questions share their computation in training."""

from __future__ import annotations

from recbole_mllm.data.texts import Items
from recbole_mllm.mllm.forward import Body
from recbole_mllm.mllm.sharing import can_share
from recbole_mllm.prompts import Prompt, Style, recommend_prompt
from recbole_mllm.settings import RecommendSettings, Settings


def question(style: Style, settings: RecommendSettings, items: Items, preference: str, item: str) -> Prompt:
    """Return what is asked about raw id `item`; training, scoring and planning all ask it."""
    image = items.image(item) if settings.use_image else None
    first = settings.prompt_order == "item-first"
    return recommend_prompt(style, preference, items.title(item), image, item_first=first)


def shares_in_training(settings: Settings, body: Body) -> bool:
    """Return whether rows of a micro-batch share the computation of a common prefix: asked for, and possible."""
    return settings.train.share_prefix == "auto" and settings.lora.finetune != "none" and can_share(body)


def deals_by_item(settings: Settings, body: Body) -> bool:
    """Return whether rows of one item should meet in a batch: they share a prefix, and a pass may hold several rows."""
    train, first = settings.train, settings.recommend.prompt_order == "item-first"
    return (
        train.group_by_item == "auto" and first and shares_in_training(settings, body) and train.micro_batch_size != 1
    )
