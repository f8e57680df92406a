"""Softmax attention of blocks of queries to their own sets of blocks of keys, which are gathered.

Shapes: B batch, T tokens, H heads, D channels of a head, n rows, which are blocks of queries, S slots, which
are blocks of keys of one row, b tokens of a block, F full blocks of the sequence.

A row has one softmax over its gathered keys, in one call of a kernel. Merging a call for each slot would cost
more than the copies. Rows are processed in pieces, and the backward pass gathers again: of tensors as long as
the sequence, only q, k, v, y and the logsumexp are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.patterns.part_kernels import KERNELS
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**10, accelerator=2**16)
"""Queries of a sequence computed at a time. The CPU's value keeps gathered keys in cache."""
MOST_PIECES = 64
"""Maximum number of pieces of a sequence. Longer sequences have larger pieces, to bound the operations."""


class Rows(NamedTuple):
    """`n` rows of `queries` tokens each, from token `start` on, and their keys."""

    start: int
    n: int
    queries: int
    tail_length: int = 0
    """Tokens at the end of the sequence that a row reads after the blocks in its slots: none, or all that are
    no full block."""
    causal: bool = False
    """Whether the last `queries` keys are the queries themselves, of which none reads a later one."""
    alone: bool = False
    """Whether the rows have no slots; the only row reads its own tokens."""

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.n * self.queries

    def pieces(self, size: int) -> Iterator[tuple[Rows, slice]]:
        """About `size` queries at a time, and the place of their rows among the rows."""
        rows = max(1, size // self.queries)
        for first in range(0, self.n, rows):
            n = min(rows, self.n - first)
            start = self.start + first * self.queries
            yield self._replace(start=start, n=n), slice(first, first + n)

    def of_queries(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B, H, n, b, …), a view."""
        rows: Tensor = x[:, :, self.start : self.stop].unflatten(2, (self.n, self.queries))
        return rows

    def of_tail(self, x: Tensor) -> Tensor:
        """(B, H, T, D) → (B, H, tail_length, D), a view."""
        return x[:, :, x.shape[2] - self.tail_length :]

    def bias(self, like: Tensor, keys: int) -> Tensor | None:
        """0 or −∞ for each query and key (1, 1, queries, keys)."""
        if not self.causal:
            return None
        later = torch.full((self.queries, keys), -math.inf, dtype=like.dtype, device=like.device)
        later.triu_(keys - self.queries + 1)
        return later[None, None]


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, T, D) → (B·H·F, b·D), a copy unless heads are apart in memory."""
    full = x.shape[2] // block
    return x[:, :, : full * block].reshape(-1, block * x.shape[3])


def _places(slots: Tensor, batch: int, full: int) -> Tensor:
    """Slots (H, n, S) → rows (B·H·n·S,) of `_blocks`."""
    sequences = torch.arange(batch * slots.shape[0], device=slots.device) * full
    return (sequences.view(batch, -1, 1, 1) + slots).flatten()


def _gather(blocks: Tensor, places: Tensor, tail: Tensor, rows: int) -> Tensor:
    """The keys (B·H·n, 1, keys, D) of n rows: blocks, and a tail (B, H, tail_length, D)."""
    batch, heads, length, channels = tail.shape
    keys = len(places) * blocks.shape[1] // (batch * heads * rows * channels)
    gathered = blocks.index_select(0, places).view(batch * heads * rows, 1, keys, channels)
    if not length:
        return gathered
    tails = tail[:, :, None].expand(-1, -1, rows, -1, -1).flatten(0, 2)
    return torch.cat([gathered, tails.unsqueeze(1)], dim=2)


def _sequences(x: Tensor) -> Tensor:
    """(B, H, n, b, …) → (B·H·n, 1, b, …)."""
    return x.flatten(0, 2).unsqueeze(1)


@repeatable
def _attend(
    by_query: list[Tensor], by_key: list[Tensor], places: Tensor, bias: Tensor | None, impl: str
) -> None:
    """Write the outputs and the logsumexp of some rows (B, H, n, b, …)."""
    q, y, lse = by_query
    k, v, k_tail, v_tail = by_key
    rows = q.shape[2]
    keys, values = _gather(k, places, k_tail, rows), _gather(v, places, v_tail, rows)
    out, sums = KERNELS[impl].attend(_sequences(q), keys, values, bias, False)
    y.copy_(out.reshape(y.shape))
    lse.copy_(sums.reshape(lse.shape))


@repeatable
def _attend_backward(
    by_query: list[Tensor],
    by_key: list[Tensor],
    gradients: list[Tensor],
    places: Tensor,
    bias: Tensor | None,
    impl: str,
) -> None:
    """Write the gradient of some queries, and add those of their keys and values."""
    *given, dq = by_query
    k, v, k_tail, v_tail = by_key
    rows, length = dq.shape[2], k_tail.shape[2]
    dy, q, y, lse = (_sequences(t) for t in given)
    keys, values = _gather(k, places, k_tail, rows), _gather(v, places, v_tail, rows)
    grads = KERNELS[impl].attend_backward(dy, q, keys, values, y, lse, bias, False)
    dq.copy_(grads[0].reshape(dq.shape))
    for grad, blocks, tail in zip(grads[1:], gradients[:2], gradients[2:], strict=True):
        wide = grad[:, 0].to(blocks.dtype)
        in_slots = wide.shape[1] - length
        blocks.index_add_(0, places, wide[:, :in_slots].reshape(len(places), blocks.shape[1]))
        if length:
            tail.add_(wide[:, in_slots:].unflatten(0, dq.shape[:3]).sum(2))


class Plan(NamedTuple):
    """How rows are computed."""

    rows: tuple[Rows, ...]
    block: int
    impl: str
    """One of `KERNELS`."""
    piece: int
    """Queries of a sequence computed at a time."""


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return outputs (B, H, T, D) and logsumexp (B, H, T)."""
    batch, heads, seq_len, channels = q.shape
    y = q.new_zeros(batch, seq_len, heads, channels).transpose(1, 2)
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    in_blocks = [_blocks(t, plan.block) for t in (k, v)]
    for rows, table in zip(plan.rows, tables, strict=True):
        if rows.alone:
            own = [t[:, :, rows.start : rows.stop] for t in (q, k, v, y, lse)]
            out, sums = KERNELS[plan.impl].attend(*own[:3], None, rows.causal)
            own[3].copy_(out)
            own[4].copy_(sums)
            continue
        bias = rows.bias(q, table.shape[2] * plan.block + rows.tail_length)
        by_key = [*in_blocks, rows.of_tail(k), rows.of_tail(v)]
        for some, place in rows.pieces(plan.piece):
            places = _places(table[:, place], batch, seq_len // plan.block)
            _attend([some.of_queries(t) for t in (q, y, lse)], by_key, places, bias, plan.impl)
    return y, lse


def _backward(given: Sequence[Tensor], plan: Plan, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (B, H, T, D), from the weights exp(score − logsumexp)."""
    dy, q, k, v, y, lse = given
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the kernel needs rows without gaps
    batch, heads, seq_len, channels = q.shape
    full, wide = seq_len // plan.block, torch.promote_types(q.dtype, torch.float32)
    of_outputs = KERNELS[plan.impl].of_outputs(dy, y)
    dq = q.new_zeros(batch, seq_len, heads, channels).transpose(1, 2)
    in_blocks = [_blocks(t, plan.block) for t in (k, v)]
    # gradients of full blocks, and of the tokens after them
    sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in in_blocks]
    sequences = [t.view(batch, heads, full * plan.block, channels) for t in sums]
    rest = [t.new_zeros(batch, heads, seq_len - full * plan.block, channels) for t in sums]
    for rows, table in zip(plan.rows, tables, strict=True):
        if rows.alone:
            own = [t[:, :, rows.start : rows.stop] for t in (dy, q, k, v, of_outputs, lse)]
            dq_own, *grads = KERNELS[plan.impl].attend_backward(*own, None, rows.causal)
            dq[:, :, rows.start : rows.stop] = dq_own
            for grad, *totals in zip(grads, sequences, rest, strict=True):
                in_full = min(rows.stop, full * plan.block) - rows.start
                totals[0][:, :, rows.start : rows.start + in_full] += grad[:, :, :in_full]
                totals[1][:, :, : rows.queries - in_full] += grad[:, :, in_full:]
            continue
        bias = rows.bias(q, table.shape[2] * plan.block + rows.tail_length)
        by_key = [*in_blocks, rows.of_tail(k), rows.of_tail(v)]
        for some, place in rows.pieces(plan.piece):
            places = _places(table[:, place], batch, full)
            by_query = [some.of_queries(t) for t in (dy, q, of_outputs, lse, dq)]
            _attend_backward(by_query, by_key, [*sums, *rest], places, bias, plan.impl)
    if seq_len > full * plan.block:
        sequences = [torch.cat(both, dim=2) for both in zip(sequences, rest, strict=True)]
    dk, dv = (total.to(q.dtype) for total in sequences)
    return dq, dk, dv


class _GatheredAttention(torch.autograd.Function):
    """`_forward` with the gradients of `_backward`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *tables: Tensor) -> Tensor:
        y, lse = _forward(q, k, v, plan, tables)
        ctx.save_for_backward(q, k, v, y, lse, *tables)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, *tables = ctx.saved_tensors
        grads = _backward((dy, q, k, v, y, lse), ctx.plan, tables)
        return *grads, None, *[None] * len(tables)


def piece_size(seq_len: int, device_type: str) -> int:
    """Queries computed at a time: `PIECE`, or more if there would be more than `MOST_PIECES` pieces."""
    return max(PIECE.on(device_type), -(-seq_len // MOST_PIECES))


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, tables: Sequence[Tensor]) -> Tensor:
    """Softmax attention of rows to the blocks in their slots: (B, H, T, D) → (B, H, T, D).

    `tables` has the slots (H, n, S) of each of the rows of the plan. Tokens outside the plan give 0.
    """
    y: Tensor = _GatheredAttention.apply(q, k, v, plan, *tables)  # type: ignore[no-untyped-call]
    return y
