"""Sums over keys of linear attention, which decoding keeps (Katharopoulos 2020, arXiv:2006.16236, §3.4).

Shapes: B batch, H heads, n tokens of a step, D channels of a head, m features.

Feature i of a key has the weight exp(e_i), where the exponent e_i may be large. So each feature has a level,
its largest exponent so far, and the sums are relative to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState

PIECE = 1024
"""Tokens of a prompt that are added to the sums at a time."""


class FeatureState(DecodingState):
    """The sums of one layer, in float32 or wider."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, H, m, D)."""
        super().__init__(clock, max_len)
        self.sums = torch.zeros(shape, dtype=dtype, device=device)
        self.norms = torch.zeros(shape[:3], dtype=dtype, device=device)
        self.levels = torch.zeros(shape[:3], dtype=dtype, device=device)

    def add(self, exponents: Tensor, v: Tensor) -> None:
        """Add keys with these exponents (B, H, n, m), and their values (B, H, n, D)."""
        for start in range(0, v.shape[2], PIECE):
            e, values = exponents[:, :, start : start + PIECE], v[:, :, start : start + PIECE]
            highest = e.amax(dim=2)
            is_first = self.clock.position + start == 0
            level = highest if is_first else torch.maximum(self.levels, highest)
            weights = (e - level[:, :, None]).exp()
            faded = (self.levels - level).exp()
            self.sums.mul_(faded[..., None]).add_(weights.transpose(2, 3) @ values.to(weights.dtype))
            self.norms.mul_(faded).add_(weights.sum(dim=2))
            self.levels.copy_(level)

    def read(self, exponents: Tensor) -> Tensor:
        """The outputs (B, H, D) of one query with these exponents (B, H, m)."""
        total = exponents + self.levels
        weights = (total - total.amax(dim=-1, keepdim=True)).exp()[:, :, None]
        return ((weights @ self.sums) / (weights @ self.norms[..., None])).squeeze(2)
