"""Who may enter a benchmark: every RecBole model by its own name, and the named variants of MLLMMSR.

This is the one place that knows what a label such as ``MLLMMSR:direct`` stands for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.resources import MLLM, PROPERTIES
from recbole_mllm.common.yaml_files import read_mapping

Kind = Literal["baseline", "mllm", "fused"]


class Variant(NamedTuple):
    """The keys of MLLMMSR that a variant changes, and what it takes away, or spoils: a sentence's subject."""

    keys: Mapping[str, Any]
    part: str


_ZERO_SHOT = Variant({"finetune": "none"}, "Fine-tuning")
_TITLES = Variant({"summary_mode": "none"}, "The user summary in place of titles")
_NO_ITEM_SUMMARY = Variant({"item_summary": "none"}, "The item summary beside the title")

VARIANTS: Mapping[str, Variant] = {
    "zero-shot": _ZERO_SHOT,
    "no-sft": _ZERO_SHOT,
    "direct": Variant({"summary_mode": "direct"}, "Summarising block by block"),
    "no-user-summary": _TITLES,
    "no-summary": _TITLES,
    "no-image-summary": _NO_ITEM_SUMMARY,
    "no-item-summary": _NO_ITEM_SUMMARY,
    "no-image": Variant({"use_image": False}, "The candidate's image"),
    "text": Variant({"use_image": False, "item_summary": "text"}, "Any image"),
    "shuffled-history": Variant({"control": "shuffled-history"}, "The order of the history"),
    "wrong-image": Variant({"control": "wrong-image"}, "Which image an item has"),
    "wrong-summary": Variant({"control": "wrong-summary"}, "Whose summary is read"),
    "title-only": Variant({"use_image": False, "item_summary": "none"}, "What the MLLM reads beside titles"),
    "no-history": Variant({"summary_mode": "none", "item_summary": "none", "history_titles": 0}, "The user's history"),
}
"""The variants of MLLMMSR; ``block-N`` (``block_size: N``) is read by pattern.

``no-image-summary`` leaves the titles of the items read (the paper's MLLM-MSR_I), ``no-image`` leaves the candidate's
image out of the question, ``text`` every image out of everything, ``title-only`` the item summaries too; ``no-history``
asks of every user what is asked of a new one. The controls that put something wrong in the place of what is read
(``control``) are explained in docs/baselines.md.
"""

ALONE: Mapping[str, Mapping[str, Any]] = {
    "TALLRec": {"summary_mode": "none", "item_summary": "none", "use_image": False},
}
"""Methods with a name of their own that are settings of MLLMMSR.

TALLRec (Bao et al., RecSys 2023) tunes an LLM to answer Yes or No from the titles of the history and of the item; which
LLM is `mllm`, as for MLLMMSR.
"""

FEATURES: Mapping[str, Mapping[str, Any]] = {
    "text": {"item_features": ["text"]},
    "image": {"item_features": ["image"]},
    "both": {"item_features": ["text", "image"]},
}
"""What each variant of RecBole's feature models reads of an item; without a variant, both."""

FEATURE_MODELS = ("SASRecF", "GRU4RecF", "FDSA")

SETS: Mapping[str, tuple[str, ...]] = {
    "quick": ("Pop", "ItemKNN", "SASRec", "GRU4Rec", MLLM),
    "baselines": (
        *("Random", "Pop", "ItemKNN", "BPR", "LightGCN", "FPMC"),
        *("GRU4Rec", "NARM", "SASRec", "BERT4Rec", "LightSANs"),
    ),
    "features": tuple(f"{model}:{kind}" for model in ("SASRecF", "GRU4RecF") for kind in FEATURES),
    "ablations": (
        *(f"{MLLM}:{name}" for name in ("zero-shot", "direct", "no-image-summary", "no-user-summary", "no-image")),
        *(f"{MLLM}:block-{size}" for size in range(1, 6)),
    ),
    "controls": (
        *(MLLM, f"{MLLM}:shuffled-history", f"{MLLM}:wrong-image", f"{MLLM}:wrong-summary"),
        *(f"{MLLM}:title-only", f"{MLLM}:no-history"),
    ),
}
"""Names for many labels, for ``--models quick,features``."""

UNTRAINED = frozenset({"Pop", "ItemKNN", "Random", "EASE", "SLIMElastic", "ADMMSLIM", "NCEPLRec"})
"""Baselines solved in one pass, which need no training budget."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a benchmark, before it has run.

    Args:
        label: What the user asked for and what the table shows.
        model: RecBole's name of the model.
        kind: A baseline may be the best one, which an MLLM is held against; what is fused is held against its baseline.
        defaults: Settings that any of the user's own, in files or on the command line, replace.
        overrides: Settings that make the label true; they win over the user's.
    """

    label: str
    model: str
    kind: Kind
    defaults: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Entry, ...]:
        """The MLLM and the baseline whose scores a row ``A+B`` is made of; none of any other row."""
        return tuple(resolve(label) for label in self.label.split("+")) if self.kind == "fused" else ()


def expand(models: str) -> tuple[str, ...]:
    """Return the labels that a list such as ``quick,TALLRec`` stands for, each once, in its order.

    The parts of a fused row ``A+B`` are rows of their own and stand before it.
    """
    words = [word.strip() for word in models.split(",") if word.strip()]
    labels = (label for word in words for label in SETS.get(word, (word,)))
    return tuple(dict.fromkeys(one for label in labels for one in (*label.split("+"), label)))


def resolve(label: str) -> Entry:
    """Return what `label` stands for; any name without a colon is taken for a RecBole model.

    Raises:
        UserError: It has no such variant; names the nearest, or those there are.
    """
    label = label.strip()
    if "+" in label:
        return _resolve_fused(label)
    model, colon, variant = label.partition(":")
    if model in FEATURE_MODELS:
        if variant and variant not in FEATURES:
            raise UserError(f"unknown variant {label!r}; known: {', '.join(f'{model}:{name}' for name in FEATURES)}")
        defaults = {**baseline_defaults(model), **FEATURES["both"]}
        return Entry(label, model, "baseline", defaults, FEATURES[variant] if variant else {})
    if model == MLLM:
        if block := re.fullmatch(r"block-([1-9][0-9]*)", variant):
            return Entry(label, MLLM, "mllm", overrides={"block_size": int(block[1])})
        if colon and variant not in VARIANTS:
            hint = did_you_mean(variant, [*VARIANTS, *(f"block-{n}" for n in range(1, 6))], "see docs/baselines.md")
            raise UserError(f"unknown variant {label!r}, none of {known_variants()}; {hint}")
        return Entry(label, MLLM, "mllm", overrides=VARIANTS[variant].keys if colon else {})
    if colon:
        raise UserError(f"{label!r}: only these have named variants: {known_variants()}")
    if model in ALONE:
        return Entry(model, MLLM, "baseline", overrides=ALONE[model])
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", model):
        raise UserError(f"{label!r} is no model's name; give RecBole's, such as SASRec, or one of {known_variants()}")
    return Entry(model, model, "baseline", defaults=baseline_defaults(model))


def _resolve_fused(label: str) -> Entry:
    words = label.split("+")
    parts = [resolve(word) for word in words] if all(words) else []
    if [part.kind for part in parts] != ["mllm", "baseline"]:
        raise UserError(f"{label!r}: fused are {MLLM}, or a variant of it, and one baseline: {MLLM}+SASRec")
    return Entry("+".join(part.label for part in parts), MLLM, "fused")


def part_of(label: str) -> str:
    """Return what a variant of MLLMMSR takes from the full model, to begin a sentence with."""
    variant = label.partition(":")[2]
    block = re.fullmatch(r"block-([1-9][0-9]*)", variant)
    if block:
        return f"The size of a block, against {block[1]},"
    known = VARIANTS.get(variant)
    return known.part if known else f"What {variant} changes"  # a record may be of another version


def baseline_defaults(model: str, section: str | None = None) -> dict[str, Any]:
    """Return what properties/baselines.yaml says of the model, or its `section` ``quick``: few epochs, a first look."""
    found = read_mapping(PROPERTIES / "baselines.yaml")
    found = found[section] if section else found
    if model in UNTRAINED:
        return {} if section else dict(found.get(model, {}))
    return {**found["every"], **found.get(model, {})}


def known_variants() -> str:
    """Return every named variant, for help and error messages."""
    ours = [f"{MLLM}:{name}" for name in (*VARIANTS, "block-N")]
    features = [f"{model}:{'|'.join(FEATURES)}" for model in FEATURE_MODELS]
    return ", ".join([*ours, *features, *ALONE])
