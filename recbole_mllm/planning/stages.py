"""All stages of a run, counted in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from recbole_mllm.planning.asking import Asking, Images
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.models import Models
from recbole_mllm.planning.pairs import pairs_of
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import Reader
from recbole_mllm.planning.standins import Sample, StandIns
from recbole_mllm.planning.writers import Written, count_items, count_users
from recbole_mllm.summaries.known import KnownTexts
from recbole_mllm.summaries.prepare import Preferences

_WORDS = 2000


@dataclass(slots=True)
class Summaries:
    """The counted item and user summaries, and the kinds whose length is only known from its limit."""

    items: Written
    users: Written
    assumed: set[str]


@dataclass(slots=True)
class Counted:
    """The counts by stage, and what they rest on.

    Args:
        counts: Of ``items``, ``users``, ``sft`` (all epochs), ``valid`` (all validations) and ``test``.
        summaries: What the first two come from.
        validations: How many there are.
        sampled: Stages that a sample stands for.
    """

    counts: dict[str, Count]
    summaries: Summaries
    validations: int
    sampled: set[str] = field(default_factory=set)


def count_summaries(p: Prepared, models: Models, samples: Mapping[str, Sequence[Sample]], limit: int) -> Summaries:
    """Count the summaries.

    Args:
        p: The run.
        models: Its models.
        samples: Texts of kinds ``item`` and ``user`` that a probe has written; what the store has comes before them.
        limit: Prompts of a stage above which a sample stands for them.
    """
    with closing(KnownTexts(p.stage.folder)) as known:
        who, s = p.stage.who, p.settings.summary
        texts = {
            "item": known.samples("item", who.item_identity) or samples.get("item", []),
            "user": known.samples("user", who.user_identity) or samples.get("user", []),
        }
        items, users = models.reader("items"), models.reader("users")
        for_items = _stand_ins(p, items, texts["item"], s.item_summary_tokens)
        written = count_items(p, known, items, for_items, limit)
        for_users = _stand_ins(p, users, texts["user"], s.user_summary_tokens)
        preferred = count_users(p, known, users, for_users, written.texts, limit)
    return Summaries(written, preferred, {kind for kind, found in texts.items() if not found})


def asking_of(p: Prepared, models: Models, summaries: Summaries, limit: int) -> Asking:
    """Return what makes and counts the recommender's prompts."""
    stage = p.stage
    preferences = Preferences(summaries.users.texts, p.plan, stage.items, stage.style, p.settings.summary)
    return Asking(p, models.reader("sft"), preferences, models.trained, limit, _images(p, models))


def count(p: Prepared, summaries: Summaries, asking: Asking) -> Counted:
    """Count the recommender's stages beside the `summaries`."""
    counts = {"items": summaries.items.count, "users": summaries.users.count}
    epochs, validations = rounds(p)
    counts["sft"] = asking.train(epochs) if p.is_trained and epochs else Count()
    for phase, times in (("valid", validations), ("test", 1)):
        counts[phase] = asking.score(phase, pairs_of(p, phase), times) if times else Count()
    written = (("items", summaries.items), ("users", summaries.users))
    sampled = {name for name, one in written if one.sampled} | asking.sampled
    return Counted(counts, summaries, validations, sampled)


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
