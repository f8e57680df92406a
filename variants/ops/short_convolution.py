"""A causal convolution over few tokens, with a filter of each channel: silu(Σ_j f_j ∘ x_{t−j} + b).

Shapes: B batch, T tokens, C channels, w taps.

By products of shifted inputs: with four taps, that is less work than any other form. torch's convolution
needs the channels in front of the tokens, and on a CPU torch 2.13 with oneDNN returns wrong gradients of some
depthwise filters (see `variants.ops.depthwise`). For the backward pass are saved: inputs, filters and biases.
Both passes go through the sequence in pieces that stay in a CPU's cache. Products of single numbers count 0
FLOPs, as all elementwise work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**16, accelerator=2**28)
"""Numbers that are processed at a time."""
PIECES = 48
"""Maximum number of pieces."""


def _wide(x: Tensor) -> Tensor:
    """Float32, or wider if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sums(x: Tensor, filters: Tensor, bias: Tensor, begin: int, end: int) -> Tensor:
    """The sums (B, t, C) before the activation, of the tokens from `begin` to `end`."""
    sums = torch.addcmul(bias, x[:, begin:end], filters[0])
    for lag in range(1, len(filters)):
        first = max(begin, lag)  # the first token with an input so far back
        if first < end:
            sums[:, first - begin :].addcmul_(x[:, first - lag : end - lag], filters[lag])
    return sums


@repeatable
def _convolve(x: Tensor, filters: Tensor, bias: Tensor, y: Tensor, begin: int, end: int) -> None:
    """Write the outputs of a piece."""
    first = max(0, begin - len(filters) + 1)
    y[:, begin:end] = F.silu(_sums(_wide(x[:, first:end]), filters, bias, begin - first, end - first))


@repeatable
def _convolve_backward(
    x: Tensor, filters: Tensor, bias: Tensor, grad: Tensor, of_x: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """Add the gradient of x that a piece of outputs has to `of_x`; return those of filters and bias."""
    first = max(0, begin - len(filters) + 1)
    inputs = _wide(x[:, first:end])
    sums = _sums(inputs, filters, bias, begin - first, end - first)
    sigmoid = sums.sigmoid()
    slope = (1 - sigmoid).mul_(sums).add_(1).mul_(sigmoid)
    g = _wide(grad[:, begin:end]) * slope
    of_filters = torch.zeros_like(filters)
    for lag in range(len(filters)):
        start = max(begin, lag)
        if start < end:
            part = g[:, start - begin :]
            of_x[:, start - lag : end - lag].addcmul_(part, filters[lag])
            of_filters[lag] = (part * inputs[:, start - lag - first : end - lag - first]).sum((0, 1))
    return of_filters, g.sum((0, 1))


@repeatable
class _ShortConvolution(torch.autograd.Function):
    """One piece after the other, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor, bias: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(x, filters, bias)
        ctx.tokens = tokens
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        by_lag = _wide(filters).mT.contiguous()  # (w, C)
        for begin in range(0, x.shape[1], tokens):
            _convolve(x, by_lag, _wide(bias), y, begin, min(begin + tokens, x.shape[1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, bias = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x = torch.zeros(x.shape, dtype=wide, device=x.device)
        by_lag = _wide(filters).mT.contiguous()
        of_filters, of_bias = torch.zeros_like(by_lag), torch.zeros_like(_wide(bias))
        for begin in range(0, x.shape[1], ctx.tokens):
            end = min(begin + ctx.tokens, x.shape[1])
            parts = _convolve_backward(x, by_lag, _wide(bias), grad, of_x, begin, end)
            of_filters.add_(parts[0])
            of_bias.add_(parts[1])
        return of_x.to(x.dtype), of_filters.mT.to(filters.dtype), of_bias.to(bias.dtype), None


def short_convolution(x: Tensor, filters: Tensor, bias: Tensor, *, device_type: str) -> Tensor:
    """Outputs with the shape and dtype of x (B, T, C), which is 0 before the first token.

    `filters` are f (C, w), where f_0 is for the token itself, and `bias` is b (C,). `device_type` decides the
    size of the pieces.
    """
    row = x.shape[0] * x.shape[2]
    tokens = max(1, PIECE.on(device_type) // row, -(-x.shape[1] // PIECES))
    y: Tensor = _ShortConvolution.apply(x, filters, bias, tokens)  # type: ignore[no-untyped-call]
    return y
