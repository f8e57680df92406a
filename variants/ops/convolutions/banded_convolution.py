"""Depthwise convolutions whose taps are a softmax, for `convolution_mixer`.

Shapes: B batch, T outputs, S inputs, H heads, R channels of a head, k taps; n blocks of b outputs, which read
windows of p = b + k − 1 inputs; G groups of a batched product.

Output t of a head is Σ_j w_j x_{t + offset + j}, where inputs outside of the sequence are 0. The taps w are
shared by the channels of a head; they are the same for all outputs, or differ. The outputs of a block are one
product of a band matrix (b, p), which holds the taps, with the window of the block. For the backward pass are
saved: the inputs and the logits of the taps. Windows and bands exist for one segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**17, accelerator=2**26)
"""Outputs of all channels together that are computed at a time. The CPU keeps their windows in cache."""
SEGMENTS = 48
"""Maximum number of segments."""


class _Shape(NamedTuple):
    """How outputs are divided."""

    static: bool
    """Whether all outputs have the same taps."""
    taps: int
    offset: int
    block: int
    segment: int
    """Outputs of a segment, a multiple of `block`."""

    @property
    def window(self) -> int:
        """p, the number of inputs that a block reads."""
        return self.block + self.taps - 1

    def blocks(self, outputs: int) -> int:
        """n, the number of blocks of so many outputs."""
        return -(-outputs // self.block)

    def segments(self, outputs: int) -> Iterator[tuple[int, int]]:
        """The first output of each segment, and the first after it."""
        for begin in range(0, outputs, self.segment):
            yield begin, min(begin + self.segment, outputs)

    def groups(self, x: Tensor) -> Tensor:
        """(B, n, q, H, R) → (G, q, R') with a group for each band: of a head, or of a block and head."""
        if self.static:
            return x.permute(3, 2, 0, 1, 4).reshape(x.shape[3], x.shape[2], -1)
        return x.transpose(2, 3).reshape(-1, x.shape[2], x.shape[4])

    def ungroup(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `groups`, for a tensor with B, n, H and R of `like` (B, n, ·, H, R)."""
        batch, blocks, _, heads, channels = like.shape
        if self.static:
            return x.view(heads, x.shape[1], batch, blocks, channels).permute(2, 3, 1, 0, 4)
        return x.view(batch, blocks, heads, x.shape[1], channels).transpose(2, 3)

    def in_blocks(self, x: Tensor) -> Tensor:
        """(B, T, H, ·) → (B, n, b, H, ·), padded with zeros."""
        missing = self.blocks(x.shape[1]) * self.block - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        blocks: Tensor = x.unflatten(1, (-1, self.block))
        return blocks

    def windows(self, x: Tensor, begin: int, outputs: int) -> Tensor:
        """The windows (B, n, p, H, R) of the outputs from `begin` on, from inputs (B, S, H, R)."""
        first = begin + self.offset
        last = first + self.blocks(outputs) * self.block + self.taps - 1
        rows = x[:, max(first, 0) : max(min(last, x.shape[1]), 0)]
        missing = min(-min(first, 0), last - first)
        rows = F.pad(rows, (0, 0, 0, 0, missing, last - first - missing - rows.shape[1]))
        return rows.unfold(1, self.window, self.block).permute(0, 1, 4, 2, 3)

    def add_windows(self, total: Tensor, x: Tensor, begin: int) -> None:
        """The transpose of `windows`: add windows (B, n, p, H, R) to inputs (B, S, H, R)."""
        batch, blocks, _, heads, channels = x.shape
        overlap = -(-self.window // self.block)
        parts = F.pad(x, (0, 0, 0, 0, 0, overlap * self.block - self.window))
        rows = x.new_zeros(batch, blocks + overlap - 1, self.block, heads, channels)
        for index, part in enumerate(parts.unflatten(2, (overlap, self.block)).unbind(2)):
            rows[:, index : index + blocks].add_(part)
        first = begin + self.offset
        lo, hi = max(first, 0), min(first + blocks * self.block + self.taps - 1, total.shape[1])
        if lo < hi:
            total[:, lo:hi].add_(rows.flatten(1, 2)[:, lo - first : hi - first])

    def bands(self, taps: Tensor) -> Tensor:
        """Taps (B, T, H, k), or (H, k) if static → band matrices (G, b, p)."""
        blocks = taps[:, None].expand(-1, self.block, -1) if self.static else self.in_blocks(taps)
        rows = blocks if self.static else self.groups(blocks)
        # rows that are longer by one than those of the result, so that row i begins i entries further right
        padded = F.pad(rows, (0, self.block)).flatten(1)
        return padded[:, : self.block * self.window].view(-1, self.block, self.window)

    def taps_of(self, bands: Tensor, outputs: int, like: Tensor) -> Tensor:
        """The transpose of `bands`; `like` (B, n, ·, H, ·) gives B, n and H."""
        padded = F.pad(bands.flatten(1), (0, self.block)).view(-1, self.block, self.block + self.taps)
        rows = padded[..., : self.taps]
        if self.static:
            return rows.sum(1)
        batch, blocks, _, heads, _ = like.shape
        taps: Tensor = rows.unflatten(0, (batch, blocks, heads)).transpose(2, 3).flatten(1, 2)
        return taps[:, :outputs]


def _wide(x: Tensor) -> Tensor:
    """Float32, or wider if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@repeatable
def _read(shape: _Shape, x: Tensor, logits: Tensor, y: Tensor, begin: int) -> None:
    """Write outputs y (B, t, H, R) from `begin` on; logits (B, t, H, k), or (H, k)."""
    windows = _wide(shape.windows(x, begin, y.shape[1]))
    bands = shape.bands(_wide(logits).softmax(-1))
    found = shape.ungroup(torch.bmm(bands, shape.groups(windows)), windows)
    y.copy_(found.flatten(1, 2)[:, : y.shape[1]])


@repeatable
def _read_backward(
    shape: _Shape, x: Tensor, logits: Tensor, grad: Tensor, of_x: Tensor, begin: int
) -> Tensor:
    """Add the gradient of x to `of_x`; return that of the logits."""
    windows = _wide(shape.windows(x, begin, grad.shape[1]))
    taps = _wide(logits).softmax(-1)
    g = shape.groups(shape.in_blocks(_wide(grad)))
    of_bands = torch.bmm(g, shape.groups(windows).mT)
    of_windows = torch.bmm(shape.bands(taps).mT, g)
    shape.add_windows(of_x, shape.ungroup(of_windows, windows), begin)
    of_taps = shape.taps_of(of_bands, grad.shape[1], windows)
    return (of_taps - (of_taps * taps).sum(-1, keepdim=True)).mul_(taps)


@repeatable
class _Convolution(torch.autograd.Function):
    """Processes the segments one by one; a segment reads inputs of its neighbours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, shape: _Shape, outputs: int) -> Tensor:
        y = x.new_empty(x.shape[0], outputs, *x.shape[2:])
        for begin, end in shape.segments(outputs):
            _read(shape, x, logits if shape.static else logits[:, begin:end], y[:, begin:end], begin)
        ctx.save_for_backward(x, logits)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits = ctx.saved_tensors
        shape: _Shape = ctx.shape
        of_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        of_logits = torch.zeros_like(logits)
        for begin, end in shape.segments(grad.shape[1]):
            part = logits if shape.static else logits[:, begin:end]
            found = _read_backward(shape, x, part, grad[:, begin:end], of_x, begin)
            (of_logits if shape.static else of_logits[:, begin:end]).add_(found)
        return of_x.to(x.dtype), of_logits, None, None


def softmax_convolution(x: Tensor, logits: Tensor, *, offset: int, outputs: int, device_type: str) -> Tensor:
    """Outputs (B, T, H, R) from inputs x (B, S, H, R).

    `logits` are those of the taps: (H, k) for all outputs, or (B, T, H, k). Output t reads the inputs from
    t + `offset` on. `outputs` is T. `device_type` decides the size of the segments.
    """
    taps = logits.shape[-1]
    largest = (taps + 1) // 2  # a block of this size computes at most half as many products again
    block = -(-outputs // -(-outputs // largest))
    channels = x.shape[0] * x.shape[2] * x.shape[3]
    segment = max(SEGMENT.on(device_type) // channels, -(-outputs // SEGMENTS))
    shape = _Shape(logits.dim() == 2, taps, offset, block, -(-segment // block) * block)
    y: Tensor = _Convolution.apply(x, logits, shape, outputs)  # type: ignore[no-untyped-call]
    return y
