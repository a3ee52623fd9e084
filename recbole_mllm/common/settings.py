"""Every key of properties/model/MLLMMSR.yaml and overall.yaml, parsed once into values that cannot be wrong."""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from operator import index
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, SupportsIndex, Union, cast, get_args, get_origin, get_type_hints

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import (
    Endpoint,
    identity_of,
    is_server,
    no_model,
    parse_endpoint,
    pinned,
    revision_of,
)
from recbole_mllm.common.resources import MLLM

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMG]i?B")
_SHOWN = 80  # characters of a value that an error repeats


class WrongValue(UserError):
    """A setting's value is none it takes."""

    def __init__(self, key: str, value: object, wanted: object) -> None:
        shown = repr(value)[:_SHOWN] + "…" * (len(repr(value)) > _SHOWN)
        super().__init__(f"{key} is {shown}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers of a setting: of a `kind`, finite, from `least` (or more than `above`) to `most` (or under `below`).

    A truth value is no number, and a whole float is an integer.
    """

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def described(self) -> str:
        """Return the range in words."""
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
        return ("a whole number" if self.kind is int else "a number") + (f", {words}" if words else "")

    def read(self, value: Any) -> int | float | None:
        """Return `value` as a number of this kind, or None where it is none of them."""
        if isinstance(value, bool) or not isinstance(value, int | float | SupportsIndex):  # the last: numpy's integers
            return None
        number = value if isinstance(value, int | float) else index(value)
        if not (self.least <= number <= self.most and self.above < number < self.below):
            return None
        return self.kind(number) if self.kind is float or number == int(number) else None


@dataclass(frozen=True, slots=True)
class Rule:
    """The values of a setting that a function accepts, and what they must be in words."""

    accepts: Callable[[Any], bool]
    words: str

    def described(self) -> str:
        """Return the rule in words."""
        return self.words

    def read(self, value: Any) -> Any:
        """Return `value`, or None where it is not accepted."""
        return value if value is not None and self.accepts(value) else None


Count = Annotated[int, Range(int, least=1)]
Whole = Annotated[int, Range(int, least=0)]
Seed = Annotated[int, Range(int, least=0, most=2**32 - 1)]  # what numpy takes
Positive = Annotated[float, Range(float, above=0)]
Share = Annotated[float, Range(float, least=0, most=1)]


class _FromConfig:
    """Reads each field of a dataclass from the key of the same name; its type says which values it takes."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read and check every field.

        Raises:
            WrongValue: A key's value has the wrong type, is out of its range, or is none of the allowed words.
        """
        hints = get_type_hints(cls, include_extras=True)
        return cls(**{f.name: checked(f.name, config[f.name], hints[f.name]) for f in fields(cls)})  # type: ignore[arg-type]


def several(key: str, value: Any, hint: Any) -> list[Any]:
    """Return one value, or those of any iterable, as a list in which each is `checked`; a path is its text.

    Raises:
        WrongValue: One is not of the type `hint`.
    """
    single = isinstance(value, str | Mapping) or not isinstance(value, Iterable)
    found = [value] if single else list(value)
    return [checked(key, str(one) if isinstance(one, PurePath) else one, hint) for one in found]


_WORDS = {NoneType: "null", bool: "true or false", str: "a text", dict: "{key: value} pairs"}


def checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as one of the alternatives of the type `hint` has it.

    Integers pass as floats, whole floats as integers; a list is not empty.

    Raises:
        WrongValue: It is none of them.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Any or (kind is NoneType and value is None) or (kind is bool and isinstance(value, bool)):
            return value
        if origin is Literal and (word := "off" if value is False else value) in inner:  # YAML 1.1 reads off as False
            return word
        if origin is Annotated and (number := inner[1].read(value)) is not None:
            return number
        if kind is str and isinstance(value, str) and value.strip():
            return value
        if origin is dict and isinstance(value, dict):
            return value
        if origin is list and isinstance(value, list) and value:
            with suppress(WrongValue):
                return [checked(key, one, inner[0]) for one in value]
    raise WrongValue(key, value, ", or ".join(map(_described, kinds)))


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(inner)}" if len(inner) > 1 else str(inner[0])
    if origin is list:
        return f"a list, each of it {_described(inner[0])}"
    return str(inner[1].described()) if origin is Annotated else _WORDS[origin or kind]


MODELS = ("mllm", "item_summarizer", "user_summarizer")
"""Keys that name a model; each has a revision beside it."""


@dataclass(frozen=True, slots=True)
class MLLMSettings(_FromConfig):
    """Which models are loaded and how."""

    mllm: str
    item_summarizer: str | None
    user_summarizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    max_text_tokens: Count
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None
    mllm_revision: str | None = None
    item_summarizer_revision: str | None = None
    user_summarizer_revision: str | None = None

    def __post_init__(self) -> None:
        for key in MODELS:
            if is_server(self.name(key)):
                self.endpoint(key)
        if self.device_map and all(is_server(self.name(key)) for key in MODELS):
            raise UserError(
                f"device_map is {self.device_map}, but all models are behind servers, which place their own; leave it "
                "out"
            )
        for key, value in {"max_memory": self.max_memory, "offload_folder": self.offload_folder}.items():
            if value is not None and not self.device_map:
                raise UserError(f"{key} is only read under device_map; set device_map: auto, or leave {key} out")
        for place, size in (self.max_memory or {}).items():
            # a GPU's number may come as text: JSON, which run records are written in, knows no other keys
            known = not isinstance(place, bool) and (place == "cpu" or str(place).isdecimal())
            readable = _SIZE.fullmatch(size) if isinstance(size, str) else not isinstance(size, bool) and size >= 0
            if not (known and readable):
                raise UserError(
                    f"max_memory says {place!r}: {size!r}; give each GPU's number, or cpu, its room, for example "
                    "{0: 20GiB, cpu: 60GiB}"
                )

    def name(self, key: str) -> str:
        """Return what `key`, one of `MODELS`, says; a summariser without a name is the recommender."""
        return getattr(self, key) or self.mllm

    def _revision(self, key: str) -> str | None:
        own: str | None = getattr(self, f"{key}_revision")
        return own if own or getattr(self, key) else self.mllm_revision

    def source(self, key: str) -> str:
        """Return what loads the model of `key`: its name, a hub's with the commit behind it (`pinned`)."""
        name = self.name(key)
        return name if is_server(name) else pinned(name, self._revision(key))

    def endpoint(self, key: str) -> Endpoint:
        """Return the servers that `key` names."""
        return replace(parse_endpoint(self.name(key), key), revision=self._revision(key))

    def revisions(self) -> dict[str, str | None]:
        """Return the revision of each of `MODELS` by its key, as far as it is known."""
        return {
            f"{key}_revision": self._revision(key) if is_server(self.name(key)) else revision_of(self.source(key))
            for key in MODELS
        }

    def identity(self, key: str) -> str:
        """Return what names the weights of the model of `key`."""
        return self.endpoint(key).identity if is_server(self.name(key)) else identity_of(self.source(key))


@dataclass(frozen=True, slots=True)
class ServerSettings(_FromConfig):
    """How servers are asked; nothing here but `server_thinking` changes a text, and none but the last two a score."""

    server_concurrency: Annotated[int, Range(int, least=1, most=4096)]  # each is a thread
    server_timeout: Annotated[float, Range(float, above=0, most=10**6)]  # longer ones overflow the socket's clock
    server_patience: Annotated[float, Range(float, above=0, most=10**6)]
    server_key_env: str | None
    server_thinking: Literal["auto", "off"] = "auto"
    server_scoring: Literal["chat", "score", "rerank"] | None = None
    server_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.server_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.server_key_env):
            # not repeated, as it may be the key itself
            raise UserError("server_key_env must name an environment variable in capitals, such as OPENAI_API_KEY")


@dataclass(frozen=True, slots=True)
class SummarySettings(_FromConfig):
    """What the summaries are made of, and what of them a row reads.

    Their text depends on all of it but `summarize`, the batch size, `history_titles` and ``control: wrong-summary``.
    """

    summary_mode: Literal["recurrent", "direct", "none"]
    block_size: Count
    partial_block: bool
    max_history: Count | None
    history_titles: Annotated[int, Range(int, least=0)]
    item_summary: Literal["image", "text", "fused", "none"]
    summarize: Literal["auto", "off"]
    summarize_batch_size: Count | None
    item_summary_tokens: Count
    user_summary_tokens: Count
    summary_temperature: Annotated[float, Range(float, least=0)]
    summary_top_p: Annotated[float, Range(float, above=0, most=1)]
    summary_seed: Seed
    summary_repetition_penalty: Positive | None = None
    control: Literal["shuffled-history", "wrong-image", "wrong-summary"] | None = None


@dataclass(frozen=True, slots=True)
class RecommendSettings(_FromConfig):
    """What the recommender's question holds."""

    prompt_style: str
    item_kind: str
    prompt_order: Literal["item-first", "user-first"]
    use_image: bool
    image_dir: str | None


@dataclass(frozen=True, slots=True)
class LoraSettings(_FromConfig):
    """How the backbone is adapted."""

    finetune: Literal["lora", "qlora", "full", "none"]
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Annotated[float, Range(float, least=0, below=1)]
    lora_target: Literal["language", "all"]


@dataclass(frozen=True, slots=True)
class TrainSettings(_FromConfig):
    """How the adapter is trained, beside RecBole's own keys."""

    loss_on: Literal["answer", "all"]
    train_last_k: Count | None
    gradient_accumulation_steps: Count
    warmup_ratio: Share
    lr_scheduler: Literal["cosine", "linear", "constant"]
    micro_batch_size: Count | None
    share_prefix: Literal["auto", "off"]
    group_by_item: Literal["auto", "off"]
    gradient_checkpointing: bool
    checkpoint_every_steps: Count | None
    resume: str | None


@dataclass(frozen=True, slots=True)
class RankingSettings(_FromConfig):
    """How all items are ranked (``eval_args.mode: full``)."""

    retriever: str | None
    retriever_checkpoint: str | None
    retriever_dir: str | None
    top_k: Count
    fusion: Literal["auto"] | Share | None
    full_sort: Literal["rerank", "brute"]

    def __post_init__(self) -> None:
        if self.retriever and self.retriever_checkpoint:
            raise UserError("retriever and retriever_checkpoint are both set; the checkpoint names its model, drop one")
        if self.retriever == MLLM:
            raise UserError("retriever is MLLMMSR itself; name a model that ranks all items cheaply, e.g. SASRec")

    @property
    def mllm_share(self) -> float | Literal["auto"]:
        """The MLLM's share of a re-ranked item's score (key `fusion`; a row ``A+B`` is another matter)."""
        return 1.0 if self.fusion is None else self.fusion

    @property
    def retrieves(self) -> bool:
        """Whether another model ranks the items first."""
        return bool(self.retriever or self.retriever_checkpoint)

    def check_modes(self, modes: Mapping[str, str]) -> None:
        """Refuse a full ranking that lacks what it needs, before anything is loaded.

        Args:
            modes: ``eval_args.mode``, by phase.
        """
        if "full" not in modes.values():
            return
        if not self.retrieves and self.full_sort != "brute":
            raise UserError(
                "eval_args.mode full re-ranks the best top_k items of another model: set retriever: SASRec (or "
                "retriever_checkpoint: PATH; full_sort: brute asks about every item), or eval_args.mode: uniN"
            )
        if self.fusion is not None and not self.retrieves:
            raise UserError("fusion mixes in a retriever's scores; set retriever: SASRec, or fusion: null")
        if self.fusion == "auto" and modes.get("valid") != "full":
            raise UserError("fusion: auto is chosen on validation; set eval_args.mode full for valid too, or a number")


@dataclass(frozen=True, slots=True)
class EvaluationSettings(_FromConfig):
    """Which pairs every model is asked for."""

    frozen_candidates: bool | None
    candidate_seed: Seed
    candidates_file: str | None
    limit_users: Count | None
    exclude_seen: bool | None


@dataclass(frozen=True, slots=True)
class FeatureSettings(_FromConfig):
    """What RecBole's feature models read of an item; what the vectors are made of are MLLMMSR's keys."""

    item_features: list[str] | str | None
    feature_encoder: str | None
    feature_size: Count | None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in ("text", "image"):
                raise UserError(f"item_features names {kind!r}; it must be of text and image, e.g. [text, image]")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The features wanted, each once."""
        named = [self.item_features] if isinstance(self.item_features, str) else self.item_features or []
        return tuple(dict.fromkeys(str(kind) for kind in named))


@dataclass(frozen=True, slots=True)
class Settings:
    """All of MLLMMSR's keys."""

    mllm: MLLMSettings
    server: ServerSettings
    summary: SummarySettings
    recommend: RecommendSettings
    lora: LoraSettings
    train: TrainSettings
    ranking: RankingSettings

    def __post_init__(self) -> None:
        if is_server(self.mllm.mllm) and self.lora.finetune != "none":
            raise UserError(
                f"finetune is {self.lora.finetune}, but mllm is behind a server, which is scored and not trained; set "
                "finetune: none, or give a hub id or a local folder"
            )
        summary = self.summary
        summarizes = summary.summary_mode != "none"
        shows_images = self.recommend.use_image or (summarizes and summary.item_summary in ("image", "fused"))
        reads_history = summarizes or summary.history_titles > (summary.control == "shuffled-history")
        if summary.control and not (shows_images if summary.control == "wrong-image" else reads_history):
            raise UserError(f"control: {summary.control} would change nothing under these settings; leave it out")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Parse a complete mapping of keys (the border between RecBole's Config and this project).

        Raises:
            UserError: A value is wrong, or a model is not set that summaries need.
        """
        check_models(config)
        if config["mllm"] is None:  # no recommender: these settings can write summaries, and no more
            config = ChainMap({"mllm": config["item_summarizer"], "finetune": "none"}, cast(Any, config))
        return cls(**{name: group.from_config(config) for name, group in get_type_hints(cls).items()})


def check_models(config: Mapping[str, Any], *, recommender: bool = False) -> None:
    """Refuse a configuration that names no model for what reads one: summaries, and the `recommender` if asked.

    Raises:
        UserError: Names presets.
    """
    if config["mllm"] is None and (recommender or not (config["item_summarizer"] and config["user_summarizer"])):
        raise no_model()


_GROUPS = (
    MLLMSettings, ServerSettings, SummarySettings, RecommendSettings, LoraSettings, TrainSettings, RankingSettings,
    EvaluationSettings, FeatureSettings,
)  # fmt: skip


@cache
def own_types() -> dict[str, Any]:
    """Return the type of each of this project's keys, for `checked`."""
    return {key: hint for group in _GROUPS for key, hint in get_type_hints(group, include_extras=True).items()}


def filters_of(keys: Mapping[str, Any]) -> list[str]:
    """Return those of RecBole's filters of interactions that `keys` set to leave any out."""
    names = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")
    return [name for name in names if keys.get(name) not in (None, {}, "[0,inf)")]  # as RecBole's sample.yaml has it


def mllm_keys() -> frozenset[str]:
    """Return the keys that MLLMMSR alone reads, and item features, which its models write; no other model does."""
    return frozenset(key for group in get_type_hints(Settings).values() for key in get_type_hints(group))


def known_keys() -> frozenset[str]:
    """Return every key of this project."""
    return frozenset(own_types()) | {"benchmark_defaults", "note", "per_model"}
