"""Sums of linear attention with a decay over the chunks of one segment, for `gated_scan`.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, m features of each,
V channels of values; n chunks of each sequence in a segment, G = n·N chunks, c tokens of a chunk.

Pairs within a chunk are computed and masked; earlier chunks are one state (m, V). With b_t the sum of log g
up to t, the weight of the pair (t, s) is exp(b_t − b_s) φ(q_t)·φ(k_s). The difference is taken in float64,
and later keys are removed before a factor is used, so none exceeds 1 and no decay is too strong. The states
before all chunks of a segment follow in ⌈log₂ n⌉ steps.

With a normaliser, the values are followed by the weights of the keys, as a tensor of one channel, and the
states by the sums of both: tuples of one or two tensors. Products over V + 1 channels can take twice as long
as products over V channels.

The gradient of log g_u is the sum of the terms w_ts ∂w_ts of all pairs s < u ≤ t: those within the chunk,
those with one token in it, and those that span it. Terms of a query add up to φ(q_t)·∂φ(q_t), those of a key
to φ(k_s)·∂φ(k_s), and those that span a chunk to a product of a state with a gradient. A sum of queries less
keys over all tokens from u on is shorter, but all pairs u ≤ s cancel in it, up to rounding errors that grow
with the length.

Over 300 lines: the two passes of a segment, and the decays that both use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.feature_sums import (
    doublings,
    neighbours,
    split_segments,
    to_chunks,
    write_chunks,
)
from variants.ops.recurrences.scan_features import FeatureMap
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**17, accelerator=2**28)
"""Features of all sequences together that exist at a time. The CPU's value keeps them in cache."""
LEAST_LOG = -1e4
"""Decays below exp(this) are 0 in any dtype. Finite, so that a difference of two sums is never NaN."""


def chunk_length(seq_len: int, chunk: int) -> int:
    """Tokens of a chunk: the sequence is divided equally, up to a multiple of 8, so that little is padded."""
    equal = -(-seq_len // -(-seq_len // chunk))
    return min(chunk, seq_len, -(-equal // 8) * 8)


class Plan(NamedTuple):
    """What a scan computes, apart from its tensors."""

    features: FeatureMap
    normalise: bool
    chunk: int
    tokens: int
    """Tokens of a segment, of all sequences together."""
    learnt_decay: bool = True
    """Whether decays have a gradient."""

    @classmethod
    def make(
        cls,
        features: FeatureMap,
        q: Tensor,
        v: Tensor,
        table: Tensor | None,
        normalise: bool,
        chunk: int,
        device_type: str,
    ) -> Plan:
        """Segments that suit the device, in chunks of equal lengths, of at most `chunk` tokens."""
        widest = max(features.width(q.shape[-1], table), v.shape[-1])
        tokens = max(1, SEGMENT.on(device_type) // widest)
        return cls(features, normalise, chunk_length(q.shape[2], chunk), tokens)


class Segment(NamedTuple):
    """The tensors of a segment: (B, H, T, …) in views of the whole sequence, or (G, c, …) in chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    """(…, 1): log g_t ≤ 0."""
    weight: Tensor | None
    """(…, 1): w_t."""
    least: Tensor | None
    """(…, 1): least normaliser; smaller ones are replaced by it."""

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Segment:
        """All of them, in order."""
        q, k, v, log_decay, weight, least = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        return cls(q, k, v, log_decay, weight, least)

    def split(self, plan: Plan, *others: Tensor) -> list[tuple[Segment, tuple[Tensor, ...]]]:
        """The segments, each with its parts of `others`."""
        given = [x for x in self if x is not None]
        found = []
        for parts in split_segments(plan.tokens, plan.chunk, *given, *others):
            each = iter(parts)
            own = Segment.of(*(None if x is None else next(each) for x in self))
            found.append((own, tuple(each)))
        return found

    def chunks(self, chunk: int) -> Segment:
        """The same in chunks. Padded tokens have the value 0 and do not decay, so they change nothing."""
        return Segment.of(*(None if x is None else to_chunks(x, chunk) for x in self))


class Decay(NamedTuple):
    """Products of g within the chunks of a segment."""

    within: Tensor
    """(G, c, c): from the key to the query of a pair; 0 for later keys."""
    before: Tensor
    """(G, c, 1): from the beginning of the chunk to the token, the token's own included."""
    after: Tensor
    """(G, c, 1): from the token to the end of the chunk."""
    totals: Tensor
    """(n + 2, N): of whole chunks, between two 1."""

    @classmethod
    def make(cls, log_decay: Tensor, sequences: int) -> Decay:
        """From the logarithms (G, c, 1)."""
        b = log_decay.double().clamp(min=LEAST_LOG).cumsum(1)
        # products with later keys may be infinite; `tril_` overwrites them
        within = (b - b.mT).to(log_decay.dtype).exp_().tril_()
        before = b.exp().to(log_decay.dtype)
        totals = torch.nn.functional.pad(before[:, -1].view(-1, sequences), (0, 0, 1, 1), value=1.0)
        return cls(within, before, (b[:, -1:] - b).exp().to(log_decay.dtype), totals)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of rows (G, ·, 1), float64: sums of them lose nothing."""
    return (a * b).sum(-1, keepdim=True, dtype=torch.float64)


def _masked(weights: Tensor, decay: Decay | None) -> Tensor:
    """Multiply weights (G, c, c) by the decays, and remove later keys; in place."""
    return weights.tril_() if decay is None else weights.mul_(decay.within)


def _times(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by


def accumulate(states: Tensor, decay: Decay | None, *, backward: bool = False) -> None:
    """Turn own sums of chunks into states: states (n + 1, N, m, V), in place.

    Forward, state i is the sum of chunk i and of the decayed state i − 1. Backward, from the last to the
    first. The decays from the border of two blocks to each state of one of them are products, which grow with
    the blocks.
    """
    decays = None
    if decay is not None:
        decays = (decay.totals[1:] if backward else decay.totals[:-1]).to(states.dtype, copy=True)
    for length in doublings(len(states)):
        blocks = None if decays is None else neighbours(decays, length)
        for left, right in neighbours(states, length):
            if blocks is None:
                if backward:
                    left.add_(right[:, :1])
                else:
                    right.add_(left[:, -1:])
                continue
            by_left, by_right = next(blocks)
            if backward:
                left.addcmul_(right[:, :1], by_left[..., None, None])
                by_left.mul_(by_right[:, :1])
            else:
                right.addcmul_(left[:, -1:], by_right[..., None, None])
                by_right.mul_(by_left[:, -1:])


def _of_chunks(states: Tensor) -> Tensor:
    """One state for each chunk: (n, N, m, …) → (G, m, …)."""
    return states.reshape(-1, *states.shape[2:])


def _times_transposed(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ x yᵀ over pairs of x (G, c, ·) and y (G, ·, same), whose second and later channels are one."""
    (x, y), *others = pairs
    total = torch.bmm(x, y.mT)
    for column, row in others:
        total.addcmul_(column, row.mT)
    return total


class Chunks(NamedTuple):
    """A segment in chunks, with features, and the states before each chunk and after the last."""

    raw: Segment
    queries: Tensor  # (G, c, m)
    keys: Tensor  # (G, c, m)
    values: tuple[Tensor, ...]  # (G, c, V): w v; with a normaliser also (G, c, 1): w
    decay: Decay | None
    states: tuple[Tensor, ...]  # (n + 1, N, m, V), and (n + 1, N, m, 1)

    @classmethod
    def make(cls, plan: Plan, segment: Segment, table: Tensor | None, start: Sequence[Tensor]) -> Chunks:
        """`start` (N, m, …) are the sums before the segment."""
        raw = segment.chunks(plan.chunk)
        queries, keys = (plan.features.features(x, table) for x in (raw.q, raw.k))
        values = [_times(raw.v, raw.weight)]
        if plan.normalise:
            # padded tokens have the feature φ(0), which may differ from 0
            ones = segment.v.new_ones(()).expand(*segment.v.shape[:3], 1)
            values.append(to_chunks(ones, plan.chunk) if raw.weight is None else raw.weight)
        decay = None if raw.log_decay is None else Decay.make(raw.log_decay, len(start[0]))
        decayed = keys if decay is None else keys * decay.after
        states = []
        for of, before in zip(values, start, strict=True):
            own = before.new_empty(len(keys) // len(before) + 1, *before.shape)
            own[0] = before
            torch.bmm(decayed.mT, of, out=own[1:].view(-1, *before.shape[1:]))
            accumulate(own, decay)
            states.append(own)
        return cls(raw, queries, keys, tuple(values), decay, tuple(states))

    def read(self) -> tuple[Tensor, ...]:
        """The outputs (G, c, V) before they are normalised, and the normalisers (G, c, 1)."""
        before = self.queries if self.decay is None else self.queries * self.decay.before
        weights = _masked(self.queries @ self.keys.mT, self.decay)
        return tuple(
            torch.baddbmm(torch.bmm(before, _of_chunks(states[:-1])), weights, values)
            for states, values in zip(self.states, self.values, strict=True)
        )

    def end(self) -> tuple[Tensor, ...]:
        """The sums after the segment: copies, because views would keep those before all chunks."""
        return tuple(states[-1].clone() for states in self.states)


@repeatable
def read(
    plan: Plan,
    segment: Segment,
    table: Tensor | None,
    start: tuple[Tensor, ...],
    y: Tensor,
    normaliser: Tensor | None,
) -> tuple[Tensor, ...]:
    """Write the outputs of a segment, and their normalisers; return the sums after it (N, m, …)."""
    chunks = Chunks.make(plan, segment, table, start)
    found, *norms = chunks.read()
    for norm in norms:
        assert normaliser is not None
        if chunks.raw.least is not None:
            # padded tokens have the least normaliser 0
            torch.maximum(norm, chunks.raw.least, out=norm)
        found.div_(norm)
        write_chunks(normaliser, norm)
    write_chunks(y, found)
    return chunks.end()


@repeatable
def read_backward(
    plan: Plan,
    segment: Segment,
    table: Tensor | None,
    start: tuple[Tensor, ...],
    of_end: tuple[Tensor, ...],
    y: Tensor | None,
    normaliser: Tensor | None,
    grad: Tensor,
    of_segment: Segment,
) -> tuple[Tensor, ...]:
    """Write the gradients of a segment; return those of `start`."""
    chunks = Chunks.make(plan, segment, table, start)
    raw, queries, keys, values, decay, states = chunks
    g = [to_chunks(grad, plan.chunk)]
    if normaliser is not None and y is not None:
        norms = to_chunks(normaliser, plan.chunk)
        norms = norms + (norms == 0)  # padded tokens
        g[0] = g[0] / norms
        of_norms = (g[0] * to_chunks(y, plan.chunk)).sum(-1, keepdim=True).neg_()
        if raw.least is not None:
            of_norms.mul_(norms > raw.least)
        g.append(of_norms)
    before = queries if decay is None else queries * decay.before
    after = keys if decay is None else keys * decay.after
    of_states = []
    for own, end in zip(g, of_end, strict=True):
        of = end.new_empty(len(states[0]), *end.shape)
        of[-1] = end
        torch.bmm(before.mT, own, out=of[:-1].view(-1, *end.shape[1:]))
        accumulate(of, decay, backward=True)
        of_states.append(of)
    earlier = [_of_chunks(of[:-1]) for of in states]
    later = [_of_chunks(of[1:]) for of in of_states]

    weights = _masked(queries @ keys.mT, decay)
    of_values = torch.baddbmm(torch.bmm(after, later[0]), weights.mT, g[0])
    of_weights = _masked(_times_transposed(zip(g, values, strict=True)), decay)
    of_queries = _times_transposed(zip(g, earlier, strict=True))
    of_keys = _times_transposed(zip(values, later, strict=True))
    if decay is not None:
        of_queries.mul_(decay.before)
        of_keys.mul_(decay.after)
    # the terms of pairs with queries of later chunks
    carried = None if of_segment.log_decay is None else _dot(keys, of_keys)
    of_queries = torch.baddbmm(of_queries, of_weights, keys)
    of_keys = torch.baddbmm(of_keys, of_weights.mT, queries)

    if of_segment.log_decay is not None:
        assert decay is not None
        assert carried is not None
        # pairs whose query is not before the token, less those whose key is not either
        terms = _dot(queries, of_queries).sub_(_dot(keys, of_keys)).add_(carried)
        of_log = terms.flip(1).cumsum(1).flip(1)
        of_log.add_(carried.cumsum(1)).sub_(carried)
        totals = decay.totals[1:-1].reshape(-1, 1, 1)
        for state, of_state in zip(earlier, later, strict=True):
            of_log.add_(_dot(state, of_state).sum(1, keepdim=True) * totals)
        write_chunks(of_segment.log_decay, of_log)
    if of_segment.weight is not None:
        of_weight = (of_values * raw.v).sum(-1, keepdim=True)
        for norm, end in zip(g[1:], later[1:], strict=True):
            of_weight.add_(torch.baddbmm(torch.bmm(after, end), weights.mT, norm))
        write_chunks(of_segment.weight, of_weight)
    write_chunks(of_segment.v, _times(of_values, raw.weight))
    write_chunks(of_segment.q, plan.features.gradient(of_queries, queries, raw.q, table))
    write_chunks(of_segment.k, plan.features.gradient(of_keys, keys, raw.k, table))
    return tuple(of[0].clone() for of in of_states)
