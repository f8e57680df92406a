"""Vectors of length 1, multiplied by a learnt scale of each channel.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 1e-12
"""Shorter vectors are divided by this."""


class _UnitVectors(torch.autograd.Function):
    """σ ∘ x/|x|. Saves x only; the operations of torch would save three tensors of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=LEAST)
        return torch.div(x, norms).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=LEAST)
        unit = x / norms
        of_scale = (grad * unit).sum((0, 2)).unsqueeze(1)
        g = grad * scale
        along = (g * unit).sum(-1, keepdim=True)
        # below LEAST the divisor is a constant
        along = along * (norms > LEAST)
        return g.addcmul_(unit, along, value=-1).div_(norms), of_scale


def unit_vectors(x: Tensor, scale: Tensor) -> Tensor:
    """σ ∘ x/|x| for vectors x (B, H, T, D) and scales σ (H, 1, D)."""
    y: Tensor = _UnitVectors.apply(x, scale)  # type: ignore[no-untyped-call]
    return y
