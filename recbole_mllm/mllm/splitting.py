"""A model larger than a card: its language model's layers are split among the processes, by FSDP or by DeepSpeed's
ZeRO-3, each put together only while it computes.

Both want every process to run the same layers at the same time, while ours take rows of their own, and different
numbers of forward passes. So before each pass a process says that it will make one, and whoever has nothing to do
makes an empty pass with it: `LockStep`. Adapters, embeddings, the head and the vision tower stay whole in every
process, so that gradients, optimizer and checkpoints are those of a run that splits nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from recbole_mllm import ranks, switches
from recbole_mllm.errors import UserError
from recbole_mllm.mllm import zero3
from recbole_mllm.mllm.architectures import can_be_split, language_part
from recbole_mllm.mllm.loading import family_of
from recbole_mllm.settings import MLLMSettings

_IDLE, _SCORES, _LEARNS = range(3)


def wanted() -> str | None:
    """Return what Accelerate's configuration asks to split models with, "FSDP" or "DeepSpeed" (at its stage 3).

    None without several processes to split among, and for DeepSpeed's stages 0 to 2, which split no model.

    Raises:
        UserError: DeepSpeed is asked for and not installed, or its configuration cannot be read.
    """
    if not ranks.is_launched():
        return None
    if switches.wants_fsdp():
        return "FSDP"
    return "DeepSpeed" if switches.wants_deepspeed() and zero3.settings().get("stage") == 3 else None


def why_not(name: str, settings: MLLMSettings) -> UserError | None:
    """Return why the model `name` could not be split, as far as its configuration tells: weights are not loaded."""
    how = wanted()
    family = family_of(name, trust_remote_code=settings.trust_remote_code) if how else None
    return None if how is None or family is None or can_be_split(family) else _unknown(how, family)


def _unknown(how: str, family: str) -> UserError:
    return UserError(
        f"{how} does not know the family {family} here; take a config without it, a model of a family it knows "
        "(docs/launching.md), or a server"
    )


def keep_whole() -> None:
    """Let this process hold models whole from now on, whatever is asked for: it works alone, the others have left."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)


def tell_of_the_unsplit() -> None:
    """Log that DeepSpeed is asked for and splits nothing: its stages 1 and 2 split what an adapter has little of."""
    if ranks.is_launched() and switches.wants_deepspeed() and wanted() is None:
        logging.getLogger().warning(
            "DeepSpeed's zero_stage is below 3, which splits no model: every process holds the whole of it, with its "
            "own optimizer (docs/launching.md)"
        )


def split(model: Any, device: torch.device) -> LockStep:
    """Split the frozen parameters of `model`'s decoder layers among all processes, in place; move the rest to `device`.

    Of Accelerate's settings for FSDP, `fsdp_reshard_after_forward` and `fsdp_offload_params` are followed; of those for
    DeepSpeed, its section `zero_optimization`.

    Raises:
        UserError: Its family is not among those tested, or its layers' own parameters are trained.
    """
    how = wanted()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, language = language_part(base)
    layers = _layers(language)
    if not can_be_split(base.config.model_type) or not layers:
        raise _unknown(str(how), base.config.model_type)
    if any(all(p.requires_grad for p in layer.parameters()) for layer in layers):
        raise UserError(f"finetune: full cannot be split by {how} here; set finetune: lora")
    ranks.start()
    partition = zero3.partition if how == "DeepSpeed" else _shard
    try:
        held = partition(language, layers, device)
        model.to(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory while {how} splits {base.config.model_type}: take more processes, or dtype: bfloat16"
        ) from None
    return LockStep(language, device, held)


def out_of_memory() -> UserError:
    """Return the complaint: the other processes are in the middle of the pass that failed here."""
    return UserError(
        f"out of memory; with {wanted()} a batch cannot be made smaller by itself: lower micro_batch_size, "
        "summarize_batch_size or max_text_tokens, or take more processes"
    )


def _shard(language: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> Any:
    fully_shard, options = _fsdp(device)
    for layer in layers:
        fully_shard(layer, ignored_params={p for p in layer.parameters() if p.requires_grad}, **options)
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(language, ignored_params={p for p in language.parameters() if p not in inside}, **options)
    return options["mesh"]


def _fsdp(device: torch.device) -> tuple[Any, dict[str, Any]]:
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

    def __init__(self, language: nn.Module, device: torch.device, held: Any = None) -> None:
        """Lead `language`, whose layers are split; what splits them is `held` as long as it is led."""
        self._language, self._device, self._held, self._empty = language, device, held, False
        # before the hooks of what splits it: these meet the other processes
        language.register_forward_pre_hook(self._announce, prepend=True)
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

    def let_go(self) -> None:
        """Have what splits the layers hold them no longer: their model is done with."""
        if not isinstance(self._held, DeviceMesh):
            zero3.forget(self._language)

    def drain(self) -> None:
        """Make empty passes until no process has any more of its own."""
        while (counts := self._agree(_IDLE))[_IDLE] < ranks.world_size():
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
