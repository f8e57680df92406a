<<<<<<< HEAD
"""A short causal convolution of each channel with its own taps, and swish; saves its inputs only.

Shapes: B batch, T tokens, C channels, w taps.

Not by torch's convolution, whose gradients are wrong at some lengths (see `variants.ops.depthwise`). A few
taps are a few shifted sums, which are elementwise and count no FLOPs. They are computed in pieces of the
sequence, so that on a CPU temporaries stay in cache.
=======
"""A causal convolution over few tokens, with a filter of each channel: silu(Σ_j f_j ∘ x_{t−j} + b).

Shapes: B batch, T tokens, C channels, w taps.

By products of shifted inputs: with four taps, that is less work than any other form. torch's convolution
needs the channels in front of the tokens, and on a CPU torch 2.13 with oneDNN returns wrong gradients of some
depthwise filters (see `variants.ops.depthwise`). For the backward pass are saved: inputs, filters and biases.
Both passes go through the sequence in pieces that stay in a CPU's cache. Products of single numbers count 0
FLOPs, as all elementwise work.
>>>>>>> help/gates23
"""

from __future__ import annotations

<<<<<<< HEAD
from collections.abc import Iterator
=======
>>>>>>> help/gates23
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

<<<<<<< HEAD
PIECE = Sizes(cpu=2**17, accelerator=2**62)
"""Numbers of all sequences together that are computed at a time."""
PIECES = 48
"""Maximum number of pieces. Longer sequences have longer pieces, which bounds the operations."""


def pieces(x: Tensor, device_type: str) -> Iterator[tuple[int, int]]:
    """First and last + 1 token of the pieces of x (B, T, …)."""
    seq_len = x.shape[1]
    length = max(1, PIECE.on(device_type) // (x.numel() // seq_len), -(-seq_len // PIECES))
    for first in range(0, seq_len, length):
        yield first, min(seq_len, first + length)


def _shifts(first: int, end: int, taps: int) -> Iterator[tuple[int, slice, slice]]:
    """Tap, tokens of a piece that have a token to read, and the tokens that are read."""
    for shift in range(taps):
        start = max(first, shift)
        if start < end:
            yield taps - 1 - shift, slice(start - first, end - first), slice(start - shift, end - shift)


def _convolved(x: Tensor, taps: Tensor, first: int, end: int) -> Tensor:
    """The sums of a piece, float32 or wider."""
    result = x[:, first:end] * taps[:, -1]
    for tap, here, there in _shifts(first, end, taps.shape[1]):
        if tap < taps.shape[1] - 1:
            result[:, here].addcmul_(x[:, there], taps[:, tap])
    return result
=======
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
>>>>>>> help/gates23


@repeatable
class _ShortConvolution(torch.autograd.Function):
<<<<<<< HEAD
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, device_type: str) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.device_type = device_type
        y = torch.empty_like(x, dtype=taps.dtype)
        for first, end in pieces(x, device_type):
            y[:, first:end] = F.silu(_convolved(x, taps, first, end), inplace=True)
=======
    """One piece after the other, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor, bias: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(x, filters, bias)
        ctx.tokens = tokens
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        by_lag = _wide(filters).mT.contiguous()  # (w, C)
        for begin in range(0, x.shape[1], tokens):
            _convolve(x, by_lag, _wide(bias), y, begin, min(begin + tokens, x.shape[1]))
>>>>>>> help/gates23
        return y

    @staticmethod
    @once_differentiable
<<<<<<< HEAD
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """A token's gradient comes from up to w − 1 tokens after the piece, which are computed twice."""
        x, taps = ctx.saved_tensors
        seq_len, width = x.shape[1], taps.shape[1]
        of_x, of_taps = torch.empty_like(x), torch.zeros_like(taps)
        for first, end in pieces(x, ctx.device_type):
            after = min(seq_len, end + width - 1)
            sums = _convolved(x, taps, first, after)
            of_sums = torch.ops.aten.silu_backward(grad[:, first:after], sums)
            of_part = of_sums[:, : end - first] * taps[:, -1]
            for shift in range(1, width):
                later = of_sums[:, shift : shift + end - first]
                of_part[:, : later.shape[1]].addcmul_(later, taps[:, width - 1 - shift])
            of_x[:, first:end] = of_part
            for tap, here, there in _shifts(first, end, width):
                of_taps[:, tap] += (of_sums[:, here] * x[:, there]).sum((0, 1))
        return of_x, of_taps, None


def short_convolution(x: Tensor, taps: Tensor, *, device_type: str) -> Tensor:
    """silu(Σ_i taps_i x_{t − w + 1 + i}), where x is 0 before the first token: (B, T, C) → (B, T, C).

    `taps` are (C, w); the last one multiplies the token itself. Outputs are float32 or wider.
    """
    wide = taps.to(torch.promote_types(x.dtype, torch.float32))
    y: Tensor = _ShortConvolution.apply(x, wide, device_type)  # type: ignore[no-untyped-call]
=======
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
>>>>>>> help/gates23
    return y
