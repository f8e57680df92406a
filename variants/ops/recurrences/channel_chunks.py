"""Sums of linear attention with a decay of each channel, over the chunks of one segment, for
`channel_scan`.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, V channels of values; n
chunks of each sequence in a segment, G = n·N chunks, c tokens of a chunk.

The weight of the pair (t, s) is Σ_d q_td k_sd Π α_ud over s < u ≤ t. A product of a query with all keys of a
chunk needs one reference point r between them: (q_t Π_{r < u ≤ t} α_u) · (k_s Π_{s < u ≤ r} α_u). A chunk is
therefore divided in halves, these in halves, and so on down to single tokens. Each pair s < t lies in the
left and the right half of exactly one block, and the border of the halves is its r. From one level to the
next, queries of right halves are multiplied by the whole decay of the left half, and keys of left halves by
that of the right one. At the top, they are what the state before and after the chunk needs.

Nothing is divided, and no logarithms are subtracted: every factor is a product of some α, between 0 and 1. A
factor that underflows is one that should, and α = 0 is exact. No pair is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.feature_sums import (
    doublings,
    neighbours,
    split_segments,
    to_chunks,
    write_chunks,
)
from variants.ops.recurrences.scan_chunks import chunk_length
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**16, accelerator=2**28)
"""Numbers of a tensor of all sequences together that are processed at a time. The CPU's value keeps the
levels of the tree in cache."""


class DecayMap(Protocol):
    """log α as a function of what a layer computes, number by number."""

    def logs(self, x: Tensor) -> Tensor:
        """log α ≤ 0, for x in float32 or wider. A new tensor."""

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, from that of log α, which may be overwritten."""


@dataclass(frozen=True)
class Logarithm:
    """x is log α; −∞ is α = 0."""

    def logs(self, x: Tensor) -> Tensor:
        """x."""
        return x.clone()

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """The same, and 0 where α is 0, so that no rounding error is left there."""
        return grad.masked_fill_(x.exp() == 0, 0)


@dataclass(frozen=True)
class SigmoidRoot:
    """α = sigmoid(x)^(1/root) (Yang 2023, arXiv:2312.06635)."""

    root: float

    def logs(self, x: Tensor) -> Tensor:
        """log sigmoid(x) / root."""
        return F.logsigmoid(x).div_(self.root)

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """sigmoid(−x) / root, times the gradient."""
        return grad.mul_((-x).sigmoid_()).div_(self.root)


class Plan(NamedTuple):
    """What a scan computes, apart from its tensors."""

    decay: DecayMap
    chunk: int
    tokens: int
    """Tokens of a segment, of all sequences together."""

    @classmethod
    def make(cls, decay: DecayMap, q: Tensor, v: Tensor, chunk: int, device_type: str) -> Plan:
        """Segments that suit the device, in chunks of equal lengths, of at most `chunk` tokens."""
        tokens = max(1, SEGMENT.on(device_type) // max(q.shape[-1], v.shape[-1]))
        return cls(decay, chunk_length(q.shape[2], chunk), tokens)


class Segment(NamedTuple):
    """The tensors of a segment: (B, H, T, …) in views of the whole sequence, or (G, c, …) in chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    """(…, D): the arguments of the decay map or, in chunks, α. Padded tokens do not decay."""

    def split(self, plan: Plan, *others: Tensor) -> list[tuple[Segment, tuple[Tensor, ...]]]:
        """The segments, each with its parts of `others`."""
        parts = split_segments(plan.tokens, plan.chunk, *self, *others)
        return [(Segment(*part[:4]), part[4:]) for part in parts]

    def chunks(self, plan: Plan) -> Segment:
        """The same in chunks."""
        q, k, v = (to_chunks(each, plan.chunk) for each in self[:3])
        wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        return Segment(q, k, v, to_chunks(plan.decay.logs(wide), plan.chunk).exp())


class Halves(NamedTuple):
    """Blocks of one level that have the same lengths; p blocks of each chunk."""

    queries: Tensor  # (G, p, right, D)
    keys: Tensor  # (G, p, left, D)
    left: Tensor  # (G, p, 1, D): the decay of all tokens of the left half
    right: Tensor  # (G, p, 1, D)
    first: int
    """The first token of the first block."""

    def place(self, pairs: Tensor) -> Tensor:
        """The pairs of right and left halves (G, p, right, left), as a view of all pairs (G, c, c)."""
        count, length = self.keys.shape[1:3]
        if count == 1:
            border = self.first + length
            end = border + self.queries.shape[2]
            return pairs[:, None, border:end, self.first : border]
        end = self.first + count * 2 * length
        blocks = pairs[:, self.first : end, self.first : end]
        shape = count, 2, length
        halves = blocks.unflatten(2, shape).unflatten(1, shape)[:, :, 1, :, :, 0]  # (G, p, right, p, left)
        placed: Tensor = halves.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return placed


def tree(queries: Tensor, keys: Tensor, decays: Tensor, *, keep: bool) -> Iterator[Halves]:
    """Yield the halves of all levels, from single tokens on, and scale queries and keys (G, c, D) in place.

    At first, `queries` are multiplied by their own α, and `keys` are not. `decays` are α (G, c, D). A yielded
    result holds copies if `keep`; else it is valid until the next one is asked for.
    """
    totals = decays
    for length in doublings(queries.shape[1]):
        pairs = totals.shape[1] // 2
        left, right = totals[:, : 2 * pairs : 2], totals[:, 1 : 2 * pairs : 2]
        first = done = 0
        for (_, q), (k, _) in zip(neighbours(queries, length, 1), neighbours(keys, length, 1), strict=True):
            own = slice(done, done + q.shape[1])
            by_left, by_right = left[:, own, None], right[:, own, None]
            yield Halves(*((q.clone(), k.clone()) if keep else (q, k)), by_left, by_right, first)
            q.mul_(by_left)
            k.mul_(by_right)
            done, first = own.stop, first + 2 * length * q.shape[1]
        joined = left * right
        odd = totals[:, 2 * pairs :]
        totals = torch.cat([joined, odd], 1) if odd.shape[1] else joined


def accumulate(states: Tensor, decays: Tensor) -> None:
    """Turn own sums of chunks into states: states (n + 1, N, D, V), in place, in ⌈log₂ n⌉ steps.

    State i is the sum of chunk i and of state i − 1 times decays_i, for decays (n + 1, N, D), which are
    overwritten; decays_0 is not used.
    """
    for length in doublings(len(states)):
        for (left, right), (by_left, by_right) in zip(
            neighbours(states, length), neighbours(decays, length), strict=True
        ):
            right.addcmul_(left[:, -1:], by_right[..., None])
            by_right.mul_(by_left[:, -1:])


def accumulate_backward(states: Tensor, decays: Tensor) -> None:
    """The same from the last to the first: state i + 1 times decays_i is added to state i."""
    for length in doublings(len(states)):
        for (left, right), (by_left, by_right) in zip(
            neighbours(states, length), neighbours(decays, length), strict=True
        ):
            left.addcmul_(right[:, :1], by_left[..., None])
            by_left.mul_(by_right[:, :1])


class Chunks(NamedTuple):
    """A segment in chunks, with the weights of all pairs, and the states before each chunk and after the
    last."""

    own: Segment
    weights: Tensor  # (G, c, c): 0 for later keys
    levels: list[Halves]
    queries: Tensor  # (G, c, D): times the decays from the beginning of the chunk
    keys: Tensor  # (G, c, D): times the decays to the end of the chunk
    totals: Tensor  # (n + 2, N, D): decays of whole chunks, between two 1
    states: Tensor  # (n + 1, N, D, V)

    @classmethod
    def make(cls, plan: Plan, segment: Segment, start: Tensor, *, keep: bool) -> Chunks:
        """`start` (N, D, V) are the sums before the segment. `keep` the levels for the backward pass."""
        own = segment.chunks(plan)
        q, k, v, decays = own
        weights = q.new_zeros(*q.shape[:2], q.shape[1])
        weights.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        queries, keys = q * decays, k.clone()
        levels: list[Halves] = []
        for halves in tree(queries, keys, decays, keep=keep):
            halves.place(weights).copy_(halves.queries @ halves.keys.mT)
            if keep:
                levels.append(halves)
        states = start.new_empty(len(q) // len(start) + 1, *start.shape)
        states[0] = start
        torch.bmm(keys.mT, v, out=states[1:].view(-1, *start.shape[1:]))
        totals = F.pad(decays.prod(1).view(-1, *start.shape[:2]), (0, 0, 0, 0, 1, 1), value=1.0)
        accumulate(states, totals[:-1].clone())
        return cls(own, weights, levels, queries, keys, totals, states)

    def earlier(self) -> Tensor:
        """The state before each chunk (G, D, V)."""
        return self.states[:-1].reshape(-1, *self.states.shape[2:])


@repeatable
def read(plan: Plan, segment: Segment, start: Tensor, y: Tensor) -> Tensor:
    """Write the outputs of a segment; return the sums after it (N, D, V)."""
    chunks = Chunks.make(plan, segment, start, keep=False)
    found = torch.baddbmm(torch.bmm(chunks.queries, chunks.earlier()), chunks.weights, chunks.own.v)
    write_chunks(y, found)
    return chunks.states[-1].clone()  # a view would keep those before all chunks


@repeatable
def read_backward(
    plan: Plan,
    segment: Segment,
    start: Tensor,
    of_end: Tensor,
    of_later: Tensor,
    grad: Tensor,
    of_segment: Segment,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of a segment; return that of `start`, and the gradient of the logarithm of a decay
    that all tokens from this segment on share (B, H, 1, D), float64.

    `of_later` is the latter of the following segment.
    """
    chunks = Chunks.make(plan, segment, start, keep=True)
    q, k, v, decays = chunks.own
    g = to_chunks(grad, plan.chunk)
    of_states = torch.empty_like(chunks.states)
    of_states[-1] = of_end
    torch.bmm(chunks.queries.mT, g, out=of_states[:-1].view(-1, *start.shape[1:]))
    accumulate_backward(of_states, chunks.totals[1:].clone())
    later = of_states[1:].reshape(-1, *start.shape[1:])

    of_weights = torch.bmm(g, v.mT)
    write_chunks(of_segment.v, torch.baddbmm(torch.bmm(chunks.keys, later), chunks.weights.mT, g))
    of_q, of_k = torch.bmm(g, chunks.earlier().mT), torch.bmm(v, later.mT)
    for halves in reversed(chunks.levels):
        of_pairs = halves.place(of_weights)
        of_right, of_left = halves_of(of_q, halves)[1], halves_of(of_k, halves)[0]
        of_right.mul_(halves.left).add_(of_pairs @ halves.keys)
        of_left.mul_(halves.right).add_(of_pairs.mT @ halves.queries)
    of_q.mul_(decays)
    # a product of decays multiplies the weights of its query, and divides those of its key
    of_sums = (q * of_q).sub_(k * of_k)
    of_self = of_weights.diagonal(dim1=1, dim2=2)[..., None]  # no decay lies between a token and itself
    write_chunks(of_segment.q, of_q.addcmul_(of_self, k))
    write_chunks(of_segment.k, of_k.addcmul_(of_self, q))

    sums = torch.empty_like(of_segment.x, dtype=torch.float64)
    write_chunks(sums, of_sums)
    sums = sums.flip(2).cumsum_(2).flip(2).add_(of_later)
    first = sums[:, :, :1].clone()
    x = segment.x.to(of_sums.dtype)
    of_segment.x.copy_(plan.decay.gradient(sums.to(x.dtype), x))
    return of_states[0].clone(), first


def halves_of(x: Tensor, halves: Halves) -> tuple[Tensor, Tensor]:
    """The left and right halves of these blocks, as views of x (G, c, D)."""
    count, left = halves.keys.shape[1:3]
    right = halves.queries.shape[2]
    if left != right:  # one block, at the end
        border = halves.first + left
        return x[:, None, halves.first : border], x[:, None, border : border + right]
    blocks = x[:, halves.first : halves.first + count * 2 * left].unflatten(1, (count, 2, left))
    return blocks[:, :, 0], blocks[:, :, 1]
