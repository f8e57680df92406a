"""Normalised outputs, with an optional gate, of recurrent layers: norm(y) ∘ w ∘ a(z), or norm(y ∘ a(z)) ∘ w.

Shapes: B batch, T tokens, G vectors of a token with V channels each; z has a logit for each channel, and w a
weight for each channel of a vector.

For the backward pass are saved: y, z and w. The operations of torch would save five more tensors of their
size. Both passes go through the tokens in pieces that stay in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.convolutions.short_convolution import pieces
from variants.ops.memoizable import repeatable

Activation = Literal["silu", "sigmoid"]


@dataclass(frozen=True)
class GatedNorm:
    """What is computed."""

    activation: Activation = "silu"
    """a; not used without a gate."""
    centred: bool = False
    """Subtract the mean of the channels first, as layer and group normalisation do; else RMS normalisation
    (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    gate_first: bool = False
    """norm(y ∘ a(z)) in place of norm(y) ∘ a(z)."""
    eps: float = 1e-5
    """Added to the mean square."""


class _Gate(NamedTuple):
    """A piece of the gate, in float32 or wider."""

    sigmoid: Tensor
    value: Tensor
    activation: Activation

    @classmethod
    def make(cls, form: GatedNorm, z: Tensor | None) -> _Gate | None:
        """From logits (B, t, G, V); None: no gate."""
        if z is None:
            return None
        z = _wide(z)
        sigmoid = z.sigmoid()
        return cls(sigmoid, z * sigmoid if form.activation == "silu" else sigmoid, form.activation)

    def slope(self) -> Tensor:
        """The derivative of the activation."""
        # silu' = σ + silu · (1 − σ), and σ' = σ · (1 − σ)
        slope = (1 - self.sigmoid).mul_(self.value)
        return slope.add_(self.sigmoid) if self.activation == "silu" else slope


class _Unit(NamedTuple):
    """A piece of the normalised vectors, without w; float32 or wider."""

    vectors: Tensor
    scale: Tensor
    """(B, t, G, 1): 1 / root mean square."""

    @classmethod
    def make(cls, form: GatedNorm, h: Tensor) -> _Unit:
        """From vectors (B, t, G, V)."""
        if form.centred:
            h = h - h.mean(-1, keepdim=True)
        mean_square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1])
        scale = mean_square.add_(form.eps).rsqrt_()
        return cls(h * scale, scale)


def _wide(x: Tensor) -> Tensor:
    """Float32, or wider if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(form: GatedNorm, y: Tensor, z: Tensor | None, weight: Tensor | None) -> Tensor:
    """A piece of the outputs."""
    gate = _Gate.make(form, z)
    if gate is None:
        found = _Unit.make(form, _wide(y)).vectors
    elif form.gate_first:
        found = _Unit.make(form, _wide(y) * gate.value).vectors
    else:
        found = _Unit.make(form, _wide(y)).vectors.mul_(gate.value)
    return found if weight is None else found.mul_(weight)


def _normalise_backward(
    form: GatedNorm, y: Tensor, z: Tensor | None, weight: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A piece of the gradients of y, z and w; that of w is its share of the sum."""
    y, grad, gate = _wide(y), _wide(grad), _Gate.make(form, z)
    unit = _Unit.make(form, y * gate.value if gate and form.gate_first else y)
    own = grad * gate.value if gate and not form.gate_first else grad  # of vectors ∘ w
    of_weight = None if weight is None else (own * unit.vectors).sum((0, 1, 2))
    of_unit = own if weight is None else own * weight
    along = (of_unit * unit.vectors).mean(-1, keepdim=True)
    of_h = torch.addcmul(of_unit, unit.vectors, along, value=-1).mul_(unit.scale)
    if form.centred:
        of_h.sub_(of_h.mean(-1, keepdim=True))
    if gate is None:
        return of_h, None, of_weight
    if form.gate_first:
        of_gate, of_y = of_h * y, of_h.mul_(gate.value)
    else:
        of_gate, of_y = grad * unit.vectors, of_h
        if weight is not None:
            of_gate.mul_(weight)
    return of_y, of_gate.mul_(gate.slope()), of_weight


@repeatable
class _GatedNorm(torch.autograd.Function):
    """One piece of the tokens after the other, in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        form: GatedNorm,
        dtype: torch.dtype,
        device_type: str,
        y: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.form, ctx.device_type = form, device_type
        out = y.new_empty(y.shape, dtype=dtype)
        wide = None if weight is None else _wide(weight)
        for first, end in pieces(y, device_type):
            logits = None if z is None else z[:, first:end]
            out[:, first:end] = _normalise(form, y[:, first:end], logits, wide)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        of_y = torch.empty_like(y)
        of_z = None if z is None else torch.empty_like(z)
        wide = None if weight is None else _wide(weight)
        of_weight = None if wide is None else torch.zeros_like(wide)
        for first, end in pieces(y, ctx.device_type):
            here = slice(first, end)
            logits = None if z is None else z[:, here]
            found = _normalise_backward(ctx.form, y[:, here], logits, wide, grad[:, here])
            of_y[:, here], of_logits, share = found
            if of_z is not None and of_logits is not None:
                of_z[:, here] = of_logits
            if of_weight is not None and share is not None:
                of_weight.add_(share)
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        return None, None, None, of_y, of_z, of_weight


def gated_norm(
    form: GatedNorm,
    y: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    device_type: str,
) -> Tensor:
    """Normalise each vector of y (B, T, G, V) → (B, T, G, V), contiguous.

    `z` are the logits of the gate, with as many numbers for each token; None: no gate. `weight` is w (V,),
    common to all vectors; None: 1. `dtype` is that of the result; None: that of z, or of y without a gate.
    All else is float32 or wider. `device_type` decides the size of the pieces.
    """
    logits = None if z is None else z.reshape(y.shape)
    out: Tensor = _GatedNorm.apply(  # type: ignore[no-untyped-call]
        form, dtype or (y if z is None else z).dtype, device_type, y, logits, weight
    )
    return out
