"""A model larger than a card: FSDP splits its language model's layers among the processes, each put together only while
it computes.

FSDP wants every process to run the same layers at the same time, while ours take rows of their own, and different
numbers of forward passes. So before each pass a process says that it will make one, and whoever has nothing to do
makes an empty pass with it: `LockStep`. Adapters, embeddings, the head and the vision tower stay whole in every
process, so that gradients, optimizer and checkpoints are those of a run that splits nothing.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.settings import MLLMSettings
from recbole_mllm.mllm.families import can_be_split, language_part
from recbole_mllm.mllm.loading import family_of

_IDLE, _SCORES, _LEARNS = range(3)


def wanted() -> str | None:
    """Return what Accelerate's configuration asks to split models with: "FSDP", or None.

    Raises:
        UserError: It asks for DeepSpeed.
    """
    if not distributed.is_launched():
        return None
    if distributed.wants("DEEPSPEED"):
        raise UserError(
            "DeepSpeed is withdrawn here; FSDP splits a model among processes: accelerate launch --config_file "
            "properties/accelerate/fsdp.yaml (docs/launching.md)"
        )
    return "FSDP" if distributed.wants("FSDP") else None


def check_supported(name: str, settings: MLLMSettings) -> None:
    """Refuse to split the model `name`, as far as its configuration tells: weights are not loaded.

    Raises:
        UserError: It is to be split, and its family is not among those tested.
    """
    family = family_of(name, trust_remote_code=settings.trust_remote_code) if wanted() else None
    if family is not None and not can_be_split(family):
        raise _unknown(family)


def _unknown(family: str) -> UserError:
    return UserError(
        f"FSDP does not know the family {family} here; take a config without it, a model of a family it knows "
        "(docs/launching.md), or a server"
    )


def keep_whole() -> None:
    """Let this process hold models whole from now on, whatever is asked for: it works alone, the others have left."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)


def split(model: Any, device: torch.device) -> None:
    """Split the frozen parameters of `model`'s decoder layers among all processes, in place; move the rest to `device`.

    Of Accelerate's settings for FSDP, `fsdp_reshard_after_forward` and `fsdp_offload_params` are followed.

    Raises:
        UserError: Its family is not among those tested, or its layers' own parameters are trained.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, language = language_part(base)
    layers = max((list(m) for m in language.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])
    if not can_be_split(base.config.model_type) or not layers:
        raise _unknown(base.config.model_type)
    if any(all(p.requires_grad for p in layer.parameters()) for layer in layers):
        raise UserError("finetune: full cannot be split by FSDP here; set finetune: lora")
    distributed.start()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (distributed.world_size(),)),
        "reshard_after_forward": bool(plugin.reshard_after_forward),
    }
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    try:
        for layer in layers:
            fully_shard(layer, ignored_params={p for p in layer.parameters() if p.requires_grad}, **options)
        inside = {p for layer in layers for p in layer.parameters()}
        fully_shard(language, ignored_params={p for p in language.parameters() if p not in inside}, **options)
        model.to(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory while FSDP splits {base.config.model_type}: take more processes, or dtype: bfloat16"
        ) from None
    LockStep(language, device)


def out_of_memory() -> UserError:
    """Return the complaint: the other processes are in the middle of the pass that failed here."""
    return UserError(
        "out of memory; with FSDP a batch cannot be made smaller by itself: lower micro_batch_size, "
        "summarize_batch_size or max_text_tokens, or take more processes"
    )


class LockStep:
    """Sees to it that all processes run the split layers of `language` equally often, whatever each has to do.

    At every meeting of the processes (`distributed.before_meeting`), who comes early takes part in the passes of those
    still at work. A pass with gradients is followed by its way back before the next one.
    """

    def __init__(self, language: nn.Module, device: torch.device) -> None:
        self._language, self._device, self._empty = language, device, False
        # before FSDP's own hooks: these meet the other processes
        language.register_forward_pre_hook(self._announce, prepend=True)
        distributed.before_meeting(self.drain)

    def _announce(self, *_: Any) -> None:
        if not self._empty:
            self._agree(_LEARNS if torch.is_grad_enabled() else _SCORES)

    def _agree(self, mine: int) -> list[int]:
        """Say what this process does next; return how many do nothing, score and learn."""
        said = torch.zeros(3, dtype=torch.int64)
        said[mine] = 1
        dist.all_reduce(said)
        counts = [int(count) for count in said.tolist()]
        if counts[_SCORES] and counts[_LEARNS]:
            raise RuntimeError("a process scores while another one learns, which split layers cannot do")
        return counts

    def drain(self) -> None:
        """Make empty passes until no process has any more of its own."""
        while (counts := self._agree(_IDLE))[_IDLE] < distributed.world_size():
            self._empty = True
            try:
                self._pass(learns=bool(counts[_LEARNS]))
            except torch.OutOfMemoryError:  # a RuntimeError, which where all meet says that another one is gone
                raise out_of_memory() from None
            finally:
                self._empty = False

    def _pass(self, *, learns: bool) -> None:
        """Pass one token, from its embedding on as all passes here, and back through all that one of theirs takes."""
        token: Tensor = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        with torch.set_grad_enabled(learns):
            embedded = self._language.get_input_embeddings()(token)  # type: ignore[operator]
            states = self._language(inputs_embeds=embedded, use_cache=False).last_hidden_state
        if learns:
            ends = [p for p in (embedded, *self._language.parameters()) if p.requires_grad]
            torch.autograd.grad(states.float().sum(), ends, allow_unused=True)
