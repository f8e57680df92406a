"""RMS norm of the outputs of each head, with an optional gate; saves its inputs only.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.short_convolution import pieces

Activation = Literal["silu", "sigmoid"]


def _activated(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The values of a gate, and their derivatives."""
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 - sigmoid)
    return (sigmoid, slope) if activation == "sigmoid" else (gate * sigmoid, slope.mul_(gate).add_(sigmoid))


def _inverse_rms(y: Tensor, epsilon: float) -> Tensor:
    return y.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()


@repeatable
class _HeadNorm(torch.autograd.Function):
    """Tensors are (B, T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        gate: Tensor | None,
        activation: Activation,
        epsilon: float,
        dtype: torch.dtype,
        device_type: str,
    ) -> Tensor:
        ctx.save_for_backward(y, scale, gate)
        ctx.activation, ctx.epsilon, ctx.device_type = activation, epsilon, device_type
        result = torch.empty_like(y, dtype=dtype)
        for first, end in pieces(y, device_type):
            part = y[:, first:end].to(scale.dtype)
            normed = (part * _inverse_rms(part, epsilon)).mul_(scale)
            if gate is not None:
                g = gate[:, first:end].to(scale.dtype)
                normed.mul_(g.sigmoid() if activation == "sigmoid" else F.silu(g))
            result[:, first:end] = normed
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, gate = ctx.saved_tensors
        of_y, of_scale = torch.empty_like(y), torch.zeros_like(scale)
        of_gate = None if gate is None else torch.empty_like(gate)
        for first, end in pieces(y, ctx.device_type):
            here = slice(first, end)
            part, of = y[:, here].to(scale.dtype), grad[:, here].to(scale.dtype)
            inverse = _inverse_rms(part, ctx.epsilon)
            normed = part * inverse
            if gate is not None and of_gate is not None:
                values, slopes = _activated(gate[:, here].to(scale.dtype), ctx.activation)
                of_gate[:, here] = slopes.mul_(of).mul_(normed).mul_(scale)
                of = of * values
            of_scale += (of * normed).sum((0, 1, 2))
            of = of * scale
            along = (of * normed).mean(-1, keepdim=True)
            of_y[:, here] = of.addcmul_(normed, along, value=-1).mul_(inverse)
        return of_y, of_scale, of_gate, None, None, None, None


def head_norm(
    y: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    *,
    activation: Activation = "silu",
    epsilon: float,
    dtype: torch.dtype | None = None,
    device_type: str,
) -> Tensor:
    """scale ∘ y/√(mean y² + epsilon) ∘ activation(gate): (B, H, T, D) → (B, H, T, D).

    The mean is over the channels of a head; all heads share `scale` (D,). `gate` is (B, H, T, D); None: 1.
    `dtype` is that of the result; None: that of y. All else is float32 or wider.
    """
    tokens_first = y.transpose(1, 2), None if gate is None else gate.transpose(1, 2)
    wide = scale.to(torch.promote_types(y.dtype, torch.float32))
    found: Tensor = _HeadNorm.apply(  # type: ignore[no-untyped-call]
        tokens_first[0], wide, tokens_first[1], activation, epsilon, dtype or y.dtype, device_type
    )
    return found.transpose(1, 2)
