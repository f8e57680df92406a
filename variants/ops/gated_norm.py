"""Normalised outputs times a gate, of recurrent layers: norm(y) ∘ w ∘ a(z), or norm(y ∘ a(z)) ∘ w.

Shapes: R vectors of V channels; z has one logit for each channel, and w one weight for each channel.

For the backward pass are saved: y, z and w. The operations of torch would save five more tensors of their
size. Both passes go through the vectors in pieces that stay in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**16, accelerator=2**28)
"""Numbers of y that are processed at a time."""
PIECES = 48
"""Maximum number of pieces."""


@dataclass(frozen=True)
class GatedNorm:
    """What is computed."""

    activation: Literal["silu", "sigmoid"]
    """a."""
    centred: bool = False
    """Subtract the mean of the channels first, as layer and group normalisation do; else RMS normalisation
    (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    gate_first: bool = False
    """norm(y ∘ a(z)) in place of norm(y) ∘ a(z)."""
    eps: float = 1e-5
    """Added to the mean square."""


class _Piece(NamedTuple):
    """A piece of the forward pass, in float32 or wider."""

    y: Tensor
    sigmoid: Tensor
    gate: Tensor
    scale: Tensor
    """(R, 1): 1 / root mean square."""
    unit: Tensor
    """The normalised vectors, without w and, unless it comes first, without the gate."""

    @classmethod
    def make(cls, form: GatedNorm, y: Tensor, z: Tensor) -> _Piece:
        """From vectors and logits (R, V)."""
        y, z = _wide(y), _wide(z)
        sigmoid = z.sigmoid()
        gate = z * sigmoid if form.activation == "silu" else sigmoid
        h = y * gate if form.gate_first else y
        if form.centred:
            h = h - h.mean(-1, keepdim=True)
        mean_square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1])
        scale = mean_square.add_(form.eps).rsqrt_()
        return cls(y, sigmoid, gate, scale, h * scale)

    def slope(self, form: GatedNorm) -> Tensor:
        """The derivative of the activation."""
        # silu' = σ + silu · (1 − σ), and σ' = σ · (1 − σ)
        slope = (1 - self.sigmoid).mul_(self.gate)
        return slope.add_(self.sigmoid) if form.activation == "silu" else slope


def _wide(x: Tensor) -> Tensor:
    """Float32, or wider if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@repeatable
def _normalise(form: GatedNorm, y: Tensor, z: Tensor, weight: Tensor | None, out: Tensor) -> None:
    """Write a piece of the outputs."""
    piece = _Piece.make(form, y, z)
    found = piece.unit if form.gate_first else piece.unit.mul_(piece.gate)
    out.copy_(found if weight is None else found.mul_(weight))


@repeatable
def _normalise_backward(
    form: GatedNorm,
    y: Tensor,
    z: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    of_y: Tensor,
    of_z: Tensor,
) -> Tensor | None:
    """Write a piece of the gradients of y and z; return that of w."""
    piece = _Piece.make(form, y, z)
    grad = _wide(grad)
    own = grad if form.gate_first else grad * piece.gate  # of unit ∘ w
    of_weight = None if weight is None else (own * piece.unit).sum(0)
    of_unit = own if weight is None else own * weight
    along = (of_unit * piece.unit).mean(-1, keepdim=True)
    of_h = torch.addcmul(of_unit, piece.unit, along, value=-1).mul_(piece.scale)
    if form.centred:
        of_h.sub_(of_h.mean(-1, keepdim=True))
    if form.gate_first:
        of_gate = of_h * piece.y
        of_y.copy_(of_h.mul_(piece.gate))
    else:
        of_gate = grad * piece.unit
        if weight is not None:
            of_gate.mul_(weight)
        of_y.copy_(of_h)
    of_z.copy_(of_gate.mul_(piece.slope(form)))
    return of_weight


@repeatable
class _GatedNorm(torch.autograd.Function):
    """One piece after the other, in both passes."""

    @staticmethod
    def forward(ctx: Any, form: GatedNorm, rows: int, y: Tensor, z: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.form, ctx.rows = form, rows
        out = torch.empty_like(z)
        wide = None if weight is None else _wide(weight)
        for own, logits, target in zip(*(x.split(rows) for x in (y, z, out)), strict=True):
            _normalise(form, own, logits, wide, target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        form, rows = ctx.form, ctx.rows
        of_y, of_z = torch.empty_like(y), torch.empty_like(z)
        wide = None if weight is None else _wide(weight)
        of_weight = None if wide is None else torch.zeros_like(wide)
        for own, logits, g, *targets in zip(*(x.split(rows) for x in (y, z, grad, of_y, of_z)), strict=True):
            found = _normalise_backward(form, own, logits, wide, g, *targets)
            if of_weight is not None and found is not None:
                of_weight.add_(found)
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        return None, None, of_y, of_z, of_weight


def gated_norm(
    form: GatedNorm, y: Tensor, z: Tensor, weight: Tensor | None = None, *, device_type: str
) -> Tensor:
    """Outputs with the shape and dtype of the logits z (…, G·V), for y (…, G, V): each of the G vectors of a
    token is normalised.

    `weight` is w (V,), common to the G vectors; None: 1. `device_type` decides the size of the pieces.
    """
    channels = y.shape[-1]
    rows = y.numel() // channels
    piece = max(1, PIECE.on(device_type) // channels, -(-rows // PIECES))
    out: Tensor = _GatedNorm.apply(  # type: ignore[no-untyped-call]
        form, piece, y.reshape(rows, channels), z.reshape(rows, channels), weight
    )
    return out.view(z.shape)
