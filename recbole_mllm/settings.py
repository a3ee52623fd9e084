"""Every key of properties/model/MLLMMSR.yaml and overall.yaml, parsed once into values that cannot be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from recbole_mllm.endpoints import is_server, parse_endpoint
from recbole_mllm.errors import UserError
from recbole_mllm.placement import check_placement


class _FromConfig:
    """Reads each field of a dataclass from the key of the same name."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read and check every field.

        Raises:
            UserError: A key's value has the wrong type or is none of the allowed words.
        """
        hints = get_type_hints(cls)
        values = {f.name: _checked(f.name, config[f.name], hints[f.name]) for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**values)


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as `hint` asks; integers pass as floats, and a whole float as an integer."""
    words = next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())
    if words and not (value is None and type(None) in get_args(hint)):
        # YAML 1.1 reads a bare `off` as False
        value = "off" if value is False else value
        if value not in words:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(words)}")
        return value
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            return int(value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if (kind is str or get_origin(kind) in (list, dict)) and isinstance(value, get_origin(kind) or kind):
            return value
    wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"{key} is {value!r}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class MLLMSettings(_FromConfig):
    """Which models are loaded and how."""

    mllm: str
    item_summarizer: str | None
    user_summarizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    max_text_tokens: int
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        for key in ("mllm", "item_summarizer", "user_summarizer"):
            if is_server(name := getattr(self, key)):
                parse_endpoint(name, key)
        used = (self.mllm, self.item_summarizer or self.mllm, self.user_summarizer or self.mllm)
        served = all(map(is_server, used))
        check_placement(self.device_map, self.max_memory, self.offload_folder, all_served=served)


@dataclass(frozen=True, slots=True)
class ServerSettings(_FromConfig):
    """How servers are asked; nothing here but `server_thinking` changes a text."""

    server_concurrency: int
    server_timeout: float
    server_patience: float
    server_key_env: str | None
    server_thinking: Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        for key in ("server_concurrency", "server_timeout", "server_patience"):
            if not getattr(self, key) > 0:
                raise UserError(f"{key} is {getattr(self, key)}; it must be above 0")
        if self.server_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.server_key_env):
            # not repeated, as it may be the key itself
            raise UserError("server_key_env must name an environment variable in capitals, such as OPENAI_API_KEY")


@dataclass(frozen=True, slots=True)
class SummarySettings(_FromConfig):
    """What the summaries are made of; everything here but `summarize` and the batch size changes their text."""

    summary_mode: Literal["recurrent", "direct", "none"]
    block_size: int
    partial_block: bool
    max_history: int | None
    history_titles: int
    item_summary: Literal["image", "text", "fused", "none"]
    summarize: Literal["auto", "off"]
    summarize_batch_size: int | None
    item_summary_tokens: int
    user_summary_tokens: int
    summary_temperature: float
    summary_top_p: float
    summary_seed: int
    summary_repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.summary_temperature < 0 or not 0 < self.summary_top_p <= 1:
            raise UserError("summary_temperature must be at least 0 (greedy), and summary_top_p above 0 and at most 1")
        penalty = self.summary_repetition_penalty
        if penalty is not None and not 0 < penalty < math.inf:
            raise UserError(f"summary_repetition_penalty is {penalty}; it must be above 0 (1 is none), or null")
        for key in ("block_size", "summarize_batch_size", "item_summary_tokens", "user_summary_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key} is {value}; it must be at least 1")


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
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target: Literal["language", "all"]

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}; it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class TrainSettings(_FromConfig):
    """How the adapter is trained, beside RecBole's own keys."""

    loss_on: Literal["answer", "all"]
    train_last_k: int | None
    gradient_accumulation_steps: int
    warmup_ratio: float
    lr_scheduler: Literal["cosine", "linear", "constant"]
    micro_batch_size: int | None
    share_prefix: Literal["auto", "off"]
    group_by_item: Literal["auto", "off"]
    gradient_checkpointing: bool
    checkpoint_every_steps: int | None
    resume: str | None

    def __post_init__(self) -> None:
        for key in ("gradient_accumulation_steps", "micro_batch_size", "checkpoint_every_steps", "train_last_k"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key} is {value}; it must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"warmup_ratio is {self.warmup_ratio}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class RankingSettings(_FromConfig):
    """How all items are ranked (``eval_args.mode: full``), and which scores are kept."""

    retriever: str | None
    retriever_checkpoint: str | None
    retriever_dir: str | None
    top_k: int
    fusion: str | float | None
    full_sort: Literal["rerank", "brute"]
    score_cache: bool
    score_cache_mb: int

    def __post_init__(self) -> None:
        for key in ("top_k", "score_cache_mb"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.fusion is not None and self.fusion != "auto" and not (_is_share(self.fusion)):
            raise UserError(f"fusion is {self.fusion!r}; it must be null, auto, or a number between 0 and 1")
        if self.retriever and self.retriever_checkpoint:
            raise UserError("retriever and retriever_checkpoint are both set; the checkpoint names its model, drop one")
        if self.retriever == "MLLMMSR":
            raise UserError("retriever is MLLMMSR itself; name a model that ranks all items cheaply, e.g. SASRec")

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


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


@dataclass(frozen=True, slots=True)
class EvaluationSettings(_FromConfig):
    """Which pairs every model is asked for."""

    frozen_candidates: bool | None
    candidate_seed: int
    candidates_file: str | None
    limit_users: int | None
    exclude_seen: bool | None


@dataclass(frozen=True, slots=True)
class FeatureSettings(_FromConfig):
    """What RecBole's feature models read of an item; what the vectors are made of are MLLMMSR's keys."""

    item_features: list[str] | str | None
    feature_encoder: str | None
    feature_size: int | None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in ("text", "image"):
                raise UserError(f"item_features names {kind!r}; it must be of text and image, e.g. [text, image]")
        if self.feature_size is not None and self.feature_size < 1:
            raise UserError(f"feature_size is {self.feature_size}; it must be at least 1")

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Parse a complete mapping of keys (the border between RecBole's Config and this project)."""
        return cls(
            MLLMSettings.from_config(config),
            ServerSettings.from_config(config),
            SummarySettings.from_config(config),
            RecommendSettings.from_config(config),
            LoraSettings.from_config(config),
            TrainSettings.from_config(config),
            RankingSettings.from_config(config),
        )


def known_keys() -> frozenset[str]:
    """Return every key of this project."""
    groups = (
        MLLMSettings, ServerSettings, SummarySettings, RecommendSettings, LoraSettings, TrainSettings, RankingSettings,
        EvaluationSettings, FeatureSettings,
    )  # fmt: skip
    return frozenset(f.name for group in groups for f in fields(group)) | {"benchmark_defaults", "note", "per_model"}
