"""How memories are compressed, and the bookkeeping of compressed memories (Rae 2019, arXiv:1911.05507).

Shapes: B sequences, F positions that fall out of the memory after a segment, c compression rate, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Cost
from variants.input_schedule import Segments
from variants.ops.segments.segment_windows import SegmentRun, SegmentSizes, Span, runs_of


class Compressor(nn.Module):
    """(B, F, C) → (B, F / c, C), F a multiple of c: the mean of each group of c."""

    reach = 0
    """Positions outside its own group, on either side, that a compressed memory depends on."""

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__()
        self.d_model, self.rate = d_model, rate

    def groups(self, x: Tensor) -> Tensor:
        """(B, F / c, c, C)."""
        grouped: Tensor = x.unflatten(1, (-1, self.rate))
        return grouped

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """`usage` (B, F) is the mean attention that each position received; None if it is not counted."""
        return self.groups(fallen).mean(dim=2)

    def cost(self, fallen: int) -> Cost:
        """Of F positions in all, which are detached."""
        return Cost()


class MaxPool(Compressor):
    """The maximum of each group, for each channel."""

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        return self.groups(fallen).amax(dim=2)


class MostUsed(Compressor):
    """The F / c positions that received most attention, in their order."""

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        assert usage is not None
        kept = usage.topk(fallen.shape[1] // self.rate, dim=1).indices.sort(dim=1).values
        return fallen.gather(1, kept[..., None].expand(-1, -1, fallen.shape[2]))


class Conv(Compressor):
    """A convolution with kernel and stride c, computed as one linear map of each group."""

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__(d_model, rate)
        self.pool = nn.Linear(rate * d_model, d_model, bias=False)

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        pooled: Tensor = self.pool(self.groups(fallen).flatten(2))
        return pooled

    def cost(self, fallen: int) -> Cost:
        """Each position is multiplied by one C × C matrix."""
        return Cost({"compression": 2 * fallen * self.d_model**2}, gradients={"compression": 1})


class DilatedConv(Conv):
    """A convolution with kernel 3 and dilation 2 over the positions that fall out together, a GELU, then
    `Conv`.

    The paper names dilated convolutions without sizes; these sizes are ours. Ends are padded with zeros.
    """

    reach = 2

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__(d_model, rate)
        self.spread = nn.Linear(3 * d_model, d_model, bias=False)

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        tokens, padded = fallen.shape[1], F.pad(fallen, (0, 0, self.reach, self.reach))
        taps = [padded[:, i : i + tokens] for i in (0, self.reach, 2 * self.reach)]
        return super().forward(F.gelu(self.spread(torch.cat(taps, dim=-1))), usage)

    def cost(self, fallen: int) -> Cost:
        """Three matrices for each position, then that of `Conv`, whose input is not detached here."""
        each = 2 * fallen * self.d_model**2
        return Cost({"compression": 3 * each, "pooling": each}, gradients={"compression": 1})


COMPRESSIONS: dict[str, type[Compressor]] = {
    "mean": Compressor,
    "max": MaxPool,
    "conv": Conv,
    "dilated_conv": DilatedConv,
    "most_used": MostUsed,
}


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """The sizes of two queues: a memory of positions, and compressed memories of positions that left it."""

    segment: int
    mem_len: int
    comp_len: int
    rate: int

    def falls(self, memory: int, tokens: int) -> int:
        """Positions that leave a memory of this size when a segment enters it."""
        over = max(0, memory + tokens - self.mem_len)
        return over - over % self.rate if self.comp_len else over

    def new(self, fallen: int) -> int:
        """Compressed memories that are made of so many positions and enter the queue."""
        return min(fallen // self.rate, self.comp_len)

    def sizes(self, seq_len: int, memory: int, compressed: int) -> tuple[SegmentSizes, ...]:
        """The sizes at each segment of a sequence or a group that begins with memories of these sizes."""
        found = []
        for segment in Segments(self.segment).split(seq_len):
            tokens = segment.stop - segment.start
            fallen = self.falls(memory, tokens)
            found.append(SegmentSizes(tokens, memory, compressed, fallen))
            compressed = min(self.comp_len, compressed + self.new(fallen))
            memory += tokens - fallen
        return tuple(found)


class Group(NamedTuple):
    """The sizes of a group of segments."""

    runs: tuple[SegmentRun, ...]
    read: list[Span]
    """For each run, the compressed memories that its segments read. Their stream contains those that exist
    before the group, then those of each segment of the group but the last."""
    new: int
    """Compressed memories of the group in this stream."""
    memory: int
    """Size of the memory after the group."""
    compressed: int
    """Number of compressed memories after the group."""


def group_of(rule: MemoryRule, seq_len: int, memory: int, compressed: int) -> Group:
    """Return the sizes of a group of `seq_len` tokens that begins with memories of these sizes."""
    sizes = rule.sizes(seq_len, memory, compressed)
    runs, read, made = runs_of(sizes), [], compressed
    for run in runs:
        new = rule.new(run.sizes.fallen)
        read.append(Span(made - run.sizes.compressed, run.sizes.compressed, max(1, new)))
        made += run.segments * new
    last = sizes[-1]
    after = min(rule.comp_len, last.compressed + rule.new(last.fallen))
    new = made - compressed - rule.new(last.fallen)
    return Group(runs, read, new, last.memory + last.tokens - last.fallen, after)


class Stretch(NamedTuple):
    """A segment of a sequence, and what it can read; both follow from the length of the sequence."""

    segment: slice
    sizes: SegmentSizes
    first: int
    """The earliest token that the segment can read, compressed or not."""


@lru_cache(maxsize=16)
def stretches(rule: MemoryRule, reach: int, seq_len: int) -> tuple[Stretch, ...]:
    """Return the segments of a sequence. `reach` is that of the compressor.

    Cached, because every layer of a model asks for them several times: 0.1 s at a million tokens.
    """
    found = []
    queue: list[int] = []  # the earliest token that each compressed memory depends on
    parts: Sequence[slice] = Segments(rule.segment).split(seq_len)
    for segment, sizes in zip(parts, rule.sizes(seq_len, 0, 0), strict=True):
        oldest = segment.start - sizes.memory
        found.append(Stretch(segment, sizes, min(queue, default=oldest)))
        if rule.comp_len:
            groups = range(oldest, oldest + sizes.fallen, rule.rate)
            queue += [max(oldest, group - reach) for group in groups]
            queue = queue[-rule.comp_len :]
    return tuple(found)
