"""A model larger than a card: its language model's layers are split among the processes (FSDP), each put together only
while it computes.

FSDP wants every process to run the same layers at the same time, while ours take rows of their own, and different
numbers of forward passes. So before each pass a process says that it will make one, and whoever has nothing to do
makes an empty pass with it: `LockStep`. Adapters, embeddings, the head and the vision tower stay whole in every
process, so that gradients, optimizer and checkpoints are those of a run without FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch import distributed as dist

from recbole_mllm import ranks
from recbole_mllm.errors import UserError
from recbole_mllm.mllm.architectures import architecture_of, language_part

_IDLE, _SCORES, _LEARNS = range(3)


def wanted() -> bool:
    """Return whether Accelerate's configuration asks for FSDP, and there are several processes to split among."""
    return ranks.is_launched() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def split(model: Any, device: torch.device) -> LockStep:
    """Split the frozen parameters of `model`'s decoder layers among all processes, in place; move the rest to `device`.

    Of Accelerate's settings, `fsdp_reshard_after_forward` and `fsdp_offload_params` are followed.

    Raises:
        UserError: Its family is not among those tested, or its layers' own parameters are trained.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, language = language_part(base)
    layers = _layers(language)
    if not architecture_of(base).known or not layers:
        raise UserError(f"FSDP does not know the family {base.config.model_type}; take a config without it")
    ranks.start()
    fully_shard, options = _fsdp(device)
    for layer in layers:
        kept = {p for p in layer.parameters() if p.requires_grad}
        if all(p.requires_grad for p in layer.parameters()):
            raise UserError("finetune: full cannot be split by FSDP here; set finetune: lora")
        fully_shard(layer, ignored_params=kept, **options)
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(language, ignored_params={p for p in language.parameters() if p not in inside}, **options)
    model.to(device)
    return LockStep(language, device)


def _fsdp(device: torch.device) -> tuple[Any, dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    policy = {"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {}
    return fully_shard, {"mesh": mesh, "reshard_after_forward": bool(plugin.reshard_after_forward), **policy}


def _layers(language: nn.Module) -> Sequence[nn.Module]:
    lists = [list(module) for module in language.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


class LockStep:
    """Sees to it that all processes run the split layers equally often, whatever each has to do.

    At every meeting of the processes (`ranks.before_meeting`), who comes early takes part in the passes of those still
    at work. A pass with gradients is followed by its way back before the next one.
    """

    def __init__(self, language: nn.Module, device: torch.device) -> None:
        self._language, self._device, self._empty = language, device, False
        language.register_forward_pre_hook(self._announce)
        ranks.before_meeting(self.drain)

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
        while (counts := self._agree(_IDLE))[_IDLE] < ranks.world_size():
            self._empty = True
            try:
                self._pass(learns=bool(counts[_LEARNS]))
            finally:
                self._empty = False

    def _pass(self, *, learns: bool) -> None:
        token: Tensor = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        with torch.set_grad_enabled(learns):
            states = self._language(input_ids=token, use_cache=False).last_hidden_state
        if learns:
            trained = [p for p in self._language.parameters() if p.requires_grad]
            torch.autograd.grad(states.float().sum(), trained, allow_unused=True)
