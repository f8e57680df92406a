"""Segments of a sequence, and sums of features over their keys, for linear attention.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of a head, m features,
n chunks of each sequence in a segment, G = n·N chunks, c tokens in a chunk.

The features of a whole sequence, T · m, would need more memory than all other tensors of a layer. The
sequence is therefore processed in segments, and only the features of one segment exist at a time. Sums are
float32 or wider, for any dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=1536, accelerator=2**18)
"""Tokens of all sequences together whose features exist at a time, rounded up to whole chunks. The CPU's
value keeps the features in cache."""
SEGMENTS = 48
"""Maximum number of segments. Longer sequences have longer segments, which bounds the operations."""
LOWEST = -1e30
"""The level of an empty sum: finite, so that the difference of two is 0 and not NaN."""


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) → whole chunks (G, c, D), contiguous, float32 or wider, padded with zeros.

    The first chunks of all sequences come first, then all second chunks, and so on. The result may be x
    itself, so do not write to it.
    """
    part = x.to(torch.promote_types(x.dtype, torch.float32))
    remainder = -x.shape[2] % chunk
    if remainder:
        part = torch.nn.functional.pad(part, (0, 0, 0, remainder))
    chunks: Tensor = part.unflatten(2, (-1, chunk)).movedim(2, 0)
    return chunks.reshape(-1, chunk, x.shape[-1]).contiguous()


def as_one_chunk(x: Tensor) -> Tensor:
    """(B, H, T, D) → one chunk for each sequence (N, T, D); see `to_chunks`."""
    return to_chunks(x, x.shape[2])


def write_chunks(target: Tensor, part: Tensor) -> None:
    """Write the chunks `part` (G, c, D) to `target` (B, H, T, D)."""
    batch, heads, seq_len, channels = target.shape
    chunks = part.view(-1, batch, heads, part.shape[1], channels)
    target.copy_(chunks.movedim(0, 2).flatten(2, 3)[:, :, :seq_len])


def split_segments(tokens: int, chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors (B, H, T, …) into segments (views) of about `tokens` tokens of all sequences together.

    All segments but the last consist of whole chunks.
    """
    batch, heads, seq_len = tensors[0].shape[:3]
    length = -(-max(tokens // (batch * heads), -(-seq_len // SEGMENTS)) // chunk) * chunk
    return list(zip(*(x.split(length, dim=2) for x in tensors), strict=True))


def doublings(size: int) -> Iterator[int]:
    """Yield the powers of 2 below `size`: 1, 2, 4, …"""
    length = 1
    while length < size:
        yield length
        length *= 2


def neighbours(x: Tensor, length: int, dim: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Divide dimension `dim` into pairs of neighbouring blocks of `length` entries.

    Yields views of the left and of the right blocks (…, pairs, ≤ length, …); the last right block may be
    shorter. Any two entries of `dim` are in the left and the right block of one pair for exactly one length
    of `doublings`.
    """
    before, size, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    pairs = size // (2 * length)
    paired = pairs * 2 * length
    if pairs:
        joined = x if paired == size else x.narrow(dim, 0, paired)
        left, right = joined.view(*before, pairs, 2, length, *after).unbind(dim + 1)
        yield left, right
    remainder = size - paired - length
    if remainder > 0:
        yield (
            x.narrow(dim, paired, length).unsqueeze(dim),
            x.narrow(dim, paired + length, remainder).unsqueeze(dim),
        )


class Sums(NamedTuple):
    """For each of n chunks: the sums over keys of v·φ(k) and of φ(k), or the gradients of these sums.

    Two tensors, because products over D + 1 channels can take twice as long as products over 64 channels.
    """

    values: Tensor  # (n, N, D, m)
    norms: Tensor  # (n, N, 1, m)

    @classmethod
    def empty(cls, directions: Tensor, chunks: int, sequences: int) -> Sums:
        """Uninitialised sums of `chunks` chunks."""
        m, head_dim = directions.shape
        return cls(
            directions.new_empty(chunks, sequences, head_dim, m),
            directions.new_empty(chunks, sequences, 1, m),
        )

    def put(self, chunks: slice, values: Tensor, norms: Tensor, features: Tensor) -> None:
        """Write the sums over the tokens of each chunk, from values (G, c, D), norms (G, c, 1) and features
        (G, c, m)."""
        for target, of in zip(self, (values, norms), strict=True):
            torch.bmm(of.mT, features, out=target[chunks].view(-1, *target.shape[2:]))

    def at(self, chunks: slice | int) -> Sums:
        """The sums of some chunks."""
        return Sums(self.values[chunks], self.norms[chunks])

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply features (G, c, m) by the sums; returns values (G, c, D) and norms (G, c, 1)."""
        values, norms = (torch.bmm(features, s.flatten(0, 1).mT) for s in self)
        return values, norms

    def read_back(self, values: Tensor, norms: Tensor) -> Tensor:
        """The transpose of `read`: values (G, c, D) and norms (G, c, 1) → (G, c, m)."""
        return torch.bmm(values, self.values.flatten(0, 1)).addcmul_(norms, self.norms.flatten(0, 1))

    def accumulate(self, levels: Tensor, *, backward: bool = False) -> None:
        """Prefix sums over the chunks or, if `backward`, suffix sums; in place, in ⌈log₂ n⌉ steps.

        `levels` (n, N, m) never decrease. Sums are stored divided by 2^level, and gradients of sums
        multiplied by 2^level, so in both cases the term that is added is scaled down.
        """
        for length in doublings(len(levels)):
            for (left, right), *sums in zip(*(neighbours(x, length) for x in (levels, *self)), strict=True):
                if backward:
                    scale = (left - right[:, :1]).exp2_().unsqueeze(-2)
                    for earlier, later in sums:
                        earlier.addcmul_(later[:, :1], scale)
                else:
                    scale = (left[:, -1:] - right).exp2_().unsqueeze(-2)
                    for earlier, later in sums:
                        later.addcmul_(earlier[:, -1:], scale)


def empty_sums(directions: Tensor, sequences: int, softmax: bool) -> tuple[Sums, Tensor]:
    """Return sums over no keys (N, …), and their level (N, m)."""
    level = directions.new_full((sequences, directions.shape[0]), LOWEST if softmax else 0.0)
    m, head_dim = directions.shape
    zeros = Sums(directions.new_zeros(sequences, head_dim, m), directions.new_zeros(sequences, 1, m))
    return zeros, level
