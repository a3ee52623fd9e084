"""In which precision a training step computes."""

from __future__ import annotations

from typing import Any

import torch


class Precision:
    """Autocast and loss scaling for one run; what is trained is always float32.

    A model loaded in half precision (`dtype`) computes in it, a float32 one in bfloat16 under RecBole's ``enable_amp``.
    Losses are scaled for float16 alone, whose smallest numbers gradients fall below; bfloat16 has float32's range.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, amp: bool) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if amp and dtype == torch.float32 else dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self, enabled: bool = True) -> Any:
        """Return the context of a forward pass."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=enabled and half)
