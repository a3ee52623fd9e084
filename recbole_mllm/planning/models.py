"""The models of a run, each once: blueprints of those that run here, readers of all."""

from __future__ import annotations

from dataclasses import dataclass, field

from recbole_mllm.endpoints import is_server
from recbole_mllm.mllm.anatomy import Anatomy, trained_parameters
from recbole_mllm.mllm.blueprint import Blueprint, blueprint
from recbole_mllm.mllm.loading import dtype_of
from recbole_mllm.model.stages import _SLOTS as SLOTS
from recbole_mllm.planning.memory import Precision
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import LocalReader, Reader, ServerReader

STAGES = ("items", "users", "sft", "valid", "test")


@dataclass(slots=True)
class Models:
    """Which model each stage of `p` asks."""

    p: Prepared
    _read: dict[str, Blueprint] = field(default_factory=dict)

    def name(self, stage: str) -> str:
        """Return the model's name."""
        m = self.p.settings.mllm
        own = {"items": m.item_summarizer, "users": m.user_summarizer}.get(stage)
        return own or m.mllm

    def blueprint(self, stage: str) -> Blueprint | None:
        """Return the stage's model without weights; None where a server has it."""
        name = self.name(stage)
        if is_server(name):
            return None
        if name not in self._read:
            self._read[name] = blueprint(name, self.p.settings.mllm)
        return self._read[name]

    def reader(self, stage: str) -> Reader:
        """Return what counts the stage's tokens."""
        found = self.blueprint(stage)
        return ServerReader() if found is None else LocalReader(found)

    def anatomies(self) -> dict[str, Anatomy]:
        """Return the anatomy of each stage's model, servers' left out."""
        return {stage: found.anatomy for stage in STAGES if (found := self.blueprint(stage)) is not None}

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        found = self.blueprint("sft")
        return trained_parameters(found.body.model, self.p.settings.lora) if found else 0

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return dtype_of(self.p.settings.mllm.dtype, self.p.device).itemsize

    def precision(self, stage: str) -> Precision:
        """Return in what precision the stage's model is held."""
        return Precision(
            self.item_bytes, stage in ("sft", "valid", "test") and self.p.settings.lora.finetune == "qlora"
        )

    @property
    def vision_frozen(self) -> bool:
        """Whether the recommender's vision tower stays as it is."""
        lora = self.p.settings.lora
        return lora.finetune == "none" or lora.lora_target == "language"

    @property
    def slots(self) -> int:
        """How many summaries are written side by side."""
        return self.p.settings.summary.summarize_batch_size or SLOTS["cpu" if self.p.device.type == "cpu" else "gpu"]
