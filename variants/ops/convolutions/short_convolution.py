"""A short causal convolution of each channel with its own taps, and swish; saves its inputs only.

Shapes: B batch, T tokens, C channels, w taps.

Not by torch's convolution, whose gradients are wrong at some lengths (see `depthwise`). A few
taps are a few shifted sums, which are elementwise and count no FLOPs. They are computed in pieces of the
sequence, so that on a CPU temporaries stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

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


def _convolved(x: Tensor, taps: Tensor, bias: Tensor | None, first: int, end: int) -> Tensor:
    """The sums of a piece, float32 or wider."""
    own = x[:, first:end]
    result = own * taps[:, -1] if bias is None else torch.addcmul(bias, own, taps[:, -1])
    for tap, here, there in _shifts(first, end, taps.shape[1]):
        if tap < taps.shape[1] - 1:
            result[:, here].addcmul_(x[:, there], taps[:, tap])
    return result


@repeatable
class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, device_type: str) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        ctx.device_type = device_type
        y = torch.empty_like(x, dtype=taps.dtype)
        for first, end in pieces(x, device_type):
            y[:, first:end] = F.silu(_convolved(x, taps, bias, first, end), inplace=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A token's gradient comes from up to w − 1 tokens after the piece, which are computed twice."""
        x, taps, bias = ctx.saved_tensors
        seq_len, width = x.shape[1], taps.shape[1]
        of_x, of_taps = torch.empty_like(x), torch.zeros_like(taps)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for first, end in pieces(x, ctx.device_type):
            after = min(seq_len, end + width - 1)
            sums = _convolved(x, taps, bias, first, after)
            of_sums = torch.ops.aten.silu_backward(grad[:, first:after], sums)
            of_part = of_sums[:, : end - first] * taps[:, -1]
            for shift in range(1, width):
                later = of_sums[:, shift : shift + end - first]
                of_part[:, : later.shape[1]].addcmul_(later, taps[:, width - 1 - shift])
            of_x[:, first:end] = of_part
            for tap, here, there in _shifts(first, end, width):
                of_taps[:, tap] += (of_sums[:, here] * x[:, there]).sum((0, 1))
            if of_bias is not None:
                of_bias += of_sums[:, : end - first].sum((0, 1))
        return of_x, of_taps, of_bias, None


def short_convolution(x: Tensor, taps: Tensor, bias: Tensor | None = None, *, device_type: str) -> Tensor:
    """silu(Σ_i taps_i x_{t − w + 1 + i} + bias), where x is 0 before the first token: (B, T, C) → (B, T, C).

    `taps` are (C, w); the last one multiplies the token itself. `bias` is (C,); None: 0. Outputs are float32
    or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    added = None if bias is None else bias.to(wide)
    y: Tensor = _ShortConvolution.apply(x, taps.to(wide), added, device_type)  # type: ignore[no-untyped-call]
    return y
