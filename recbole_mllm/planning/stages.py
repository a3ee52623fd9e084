"""All stages of a run, counted in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from recbole_mllm.data.schema import store_file
from recbole_mllm.planning.asking import Asking, Images
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.known import KnownTexts
from recbole_mllm.planning.models import Models
from recbole_mllm.planning.pairs import pairs_of
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import Reader
from recbole_mllm.planning.standins import Sample, StandIns
from recbole_mllm.planning.writers import Written, count_items, count_users
from recbole_mllm.summaries.prepare import Preferences

LIMIT = 20_000  # prompts of a stage that are all counted; beyond, a sample stands for them
_WORDS = 2000


@dataclass(slots=True)
class Counted:
    """The counts by stage, and what they rest on.

    Args:
        counts: Of ``items``, ``users``, ``sft`` (all epochs), ``valid`` (all validations) and ``test``.
        items: The item summaries; `users` the user summaries.
        validations: How many there are.
        asking: What counted the recommender's stages.
        sampled: Stages that a sample stands for.
        assumed: Kinds of summary whose length is only known from its limit.
    """

    counts: dict[str, Count]
    items: Written
    users: Written
    validations: int
    asking: Asking
    sampled: set[str] = field(default_factory=set)
    assumed: set[str] = field(default_factory=set)


def count(p: Prepared, models: Models, samples: Mapping[str, Sequence[Sample]], limit: int = LIMIT) -> Counted:
    """Count every stage.

    Args:
        p: The run.
        models: Its models.
        samples: Texts of kinds ``item`` and ``user`` that a probe has written; what the store has comes before them.
        limit: Prompts of a stage above which a sample stands for them.
    """
    with closing(KnownTexts(store_file(p.stage.folder))) as known:
        who, s = p.stage.who, p.settings.summary
        texts = {
            "item": known.samples("item", who.item_identity) or samples.get("item", []),
            "user": known.samples("user", who.user_identity) or samples.get("user", []),
        }
        made = {
            "item": _stand_ins(p, models.reader("items"), texts["item"], s.item_summary_tokens),
            "user": _stand_ins(p, models.reader("users"), texts["user"], s.user_summary_tokens),
        }
        items = count_items(p, known, models.reader("items"), made["item"], limit)
        users = count_users(p, known, models.reader("users"), made["user"], items.texts, limit)
    preferences = Preferences(users.texts, p.plan, p.stage.items, p.stage.style, s)
    asking = Asking(p, models.reader("sft"), preferences, models.trained, limit, _images(p, models))
    counts = {"items": items.count, "users": users.count}
    epochs, validations = rounds(p)
    counts["sft"] = asking.train(epochs) if p.is_trained and epochs else Count()
    for phase, times in (("valid", validations), ("test", 1)):
        counts[phase] = asking.score(phase, pairs_of(p, phase), times) if times else Count()
    sampled = {name for name, written in (("items", items), ("users", users)) if written.sampled} | asking.sampled
    assumed = {kind for kind, found in texts.items() if not found}
    return Counted(counts, items, users, validations, asking, sampled, assumed)


def rounds(p: Prepared) -> tuple[int, int]:
    """Return the epochs and the validations, early stopping aside; a zero-shot model is validated once."""
    if not p.is_trained:
        return 0, 1
    epochs = int(p.config["epochs"])
    step = min(int(p.config["eval_step"]), epochs)
    return epochs, epochs // step if step > 0 else 0


def _images(p: Prepared, models: Models) -> Images:
    """Return how images are read, and what one's features take."""
    found = models.blueprint("sft")
    if found is None or found.encoder.processor is None or not p.stage.items.images:
        return Images(frozen=True)
    path = next(iter(p.stage.items.images.values()))
    tokens = len(found.encoder.image(path).ids)
    return Images(models.vision_frozen, tokens * found.anatomy.width * models.item_bytes)


def _stand_ins(p: Prepared, reader: Reader, samples: Sequence[Sample], most: int) -> StandIns:
    """Return stand-ins like `samples`, or of the titles' words as long as the limit allows."""
    titles = " ".join(list(p.stage.items.titles.values())[:_WORDS]).split()
    words = titles or ["word"]
    each = max(1.0, reader.tokens(" ".join(words)) / len(words))
    return StandIns(samples, words, max(1, round((most - 1) / each)), most)
