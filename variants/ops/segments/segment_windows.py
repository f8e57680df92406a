"""Keys and values of many segments, taken from tokens that were projected once.

Segments whose sizes are equal are attended to as one batch. Each needs a window of keys: its memory and its
own tokens. Windows of neighbouring segments overlap, because the tokens of one are the memory of the next.

Shapes: B sequences, P tokens of a stream, C channels, H heads, D channels of a head, N segments of a run,
J keys of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SegmentSizes(NamedTuple):
    """The sizes at one segment."""

    tokens: int
    memory: int
    """Positions of the memory that the segment reads."""
    compressed: int = 0
    """Compressed memories that it reads."""
    fallen: int = 0
    """Positions that leave the memory after it."""


class SegmentRun(NamedTuple):
    """Consecutive segments of equal sizes."""

    start: int
    """The first token, counted from the beginning of the group of segments."""
    segments: int
    sizes: SegmentSizes

    @property
    def keys(self) -> int:
        """Keys that each segment reads."""
        return self.sizes.compressed + self.sizes.memory + self.sizes.tokens

    @property
    def length(self) -> int:
        """Tokens of all segments."""
        return self.segments * self.sizes.tokens


def runs_of(sizes: Sequence[SegmentSizes]) -> tuple[SegmentRun, ...]:
    """Return the runs of a group of segments, in order."""
    runs: list[SegmentRun] = []
    for each in sizes:  # torch.compile cannot trace itertools.groupby
        if runs and runs[-1].sizes == each:
            start, segments, _ = runs.pop()
        else:
            start, segments = runs[-1].start + runs[-1].length if runs else 0, 0
        runs.append(SegmentRun(start, segments + 1, each))
    return tuple(runs)


class Span(NamedTuple):
    """The part of a stream that the segments of a run read: segment i reads `length` positions from
    start + i · stride on."""

    start: int
    length: int
    stride: int

    def of(self, stream: Tensor, count: int) -> Tensor:
        """View the windows (B, N, …, length) of a stream (B, P, …)."""
        stop = self.start + (count - 1) * self.stride + self.length
        return stream[:, self.start : stop].unfold(1, self.length, self.stride)

    def parts(self) -> list[tuple[int, Span]]:
        """Return (offset, span) of the parts of each window that are as long as the stride, or shorter.
        Windows of one part do not overlap, so that a view of them can be written to."""
        offsets = range(0, self.length, self.stride)
        return [(i, Span(self.start + i, min(self.stride, self.length - i), self.stride)) for i in offsets]

    def writable(self, stream: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Views (B, N', length, …) of windows that do not overlap, and the segments that each view is of.

        torch.compile writes to `Tensor.unfold` as if there were nothing between the windows, hence slices.
        """
        before = count if self.length == self.stride else count - 1
        stop = self.start + before * self.stride
        if before:
            strides = stream[:, self.start : stop].unflatten(1, (before, self.stride))
            yield slice(0, before), strides[:, :, : self.length]
        if before < count:
            yield slice(before, count), stream[:, None, stop : stop + self.length]


def fold(x: Tensor, run: SegmentRun, heads: int) -> Tensor:
    """(B, N·S, C) → (H, B·N, S, D): the segments of a run as sequences."""
    by_segment = x.unflatten(1, (run.segments, -1)).unflatten(-1, (heads, -1))
    folded: Tensor = by_segment.permute(3, 0, 1, 2, 4).flatten(1, 2)
    return folded


def unfold(y: Tensor, run: SegmentRun) -> Tensor:
    """(H, B·N, S, D) → (B, N·S, C)."""
    unfolded: Tensor = y.unflatten(1, (-1, run.segments)).permute(1, 2, 3, 0, 4).flatten(3).flatten(1, 2)
    return unfolded


class _Windows(torch.autograd.Function):
    """The windows of all runs; backward adds the gradients of overlapping windows in one buffer a stream.

    With slices of a stream instead, autograd would fill a buffer as large as the stream for each run.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: int, counts: list[int], spans: list[list[Span]], *streams: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.heads, ctx.counts, ctx.spans = heads, counts, spans
        ctx.shapes = [stream.shape for stream in streams]
        windows = []
        for run, count in enumerate(counts):
            parts = [
                _by_head(of_runs[run].of(stream, count).transpose(2, 3), heads)
                for stream, of_runs in zip(streams, spans, strict=True)
                if of_runs[run].length
            ]
            windows.append(torch.cat(parts, dim=4).flatten(2, 3))
        return tuple(windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        totals = [grads[0].new_zeros(shape) for shape in ctx.shapes]
        for run, (grad, count) in enumerate(zip(grads, ctx.counts, strict=True)):
            by_segment, begin = grad.unflatten(2, (-1, count)), 0
            for total, of_runs in zip(totals, ctx.spans, strict=True):
                span: Span = of_runs[run]
                for offset, part in span.parts():
                    new = by_segment.narrow(4, begin + offset, part.length)
                    for segments, windows in part.writable(total, count):
                        _by_head(windows, ctx.heads).add_(new[:, :, :, segments])
                begin += span.length
        return None, None, None, *totals


def _by_head(windows: Tensor, heads: int) -> Tensor:
    """View (B, N, J, 2·C) as (2, H, B, N, J, D)."""
    viewed: Tensor = windows.unflatten(3, (2, heads, -1)).permute(3, 4, 0, 1, 2, 5)
    return viewed


def windows_of(
    runs: Sequence[SegmentRun], streams: Sequence[tuple[Tensor, list[Span]]], heads: int
) -> tuple[Tensor, ...]:
    """Return the keys and values (2, H, B·N, J, D) of each run, from streams (B, P, 2·C) of projected tokens.

    Each stream has one span for every run. The keys of a segment are its windows of all streams, in order.
    """
    counts, spans = [run.segments for run in runs], [of_runs for _, of_runs in streams]
    found: tuple[Tensor, ...] = _Windows.apply(heads, counts, spans, *(s for s, _ in streams))  # type: ignore[no-untyped-call]
    return found


class _KnownProduct(torch.autograd.Function):
    """x @ weightᵀ of a detached x, where the product is known; its gradient reaches the weight alone."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        return product.view_as(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (x,) = ctx.saved_tensors
        d_weight = grad.flatten(0, 1).T @ x.flatten(0, 1).to(grad.dtype)
        # in training the product is detached; a tool that ignores `detach` sees which tokens are read
        return grad if ctx.needs_input_grad[0] else None, None, d_weight.to(ctx.dtype)


def known_product(product: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return `product`, which is x @ weightᵀ (B, P, …), as a product of the detached x (B, P, C).

    The tokens of a segment are the memory of later ones. Their keys and values there are the same numbers,
    but the gradient must not reach the tokens.
    """
    found: Tensor = _KnownProduct.apply(product.detach(), x.detach(), weight)  # type: ignore[no-untyped-call]
    return found
