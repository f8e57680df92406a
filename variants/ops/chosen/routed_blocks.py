"""Softmax attention of queries to blocks of keys that each query has selected, and to its own block.

Shapes: N sequences of one head of keys, T tokens, G query heads that share the keys and the selection, D
channels of a head, b tokens of a block, F full blocks of a sequence, K picks of a query, P pairs (query,
pick) of a sequence, S slots of a sequence, in tiles of `size`.

To gather the keys of every query would move b keys for each pair. Instead the pairs are sorted by block, as
in the implementation of MoBA (Lu 2025, arXiv:2502.13189, §2.3): a tile holds `size` queries of one block,
whose keys are gathered once for all of them. The number of tiles depends on shapes only. Each query merges
its partial results by their logsumexp. The backward pass gathers again: of tensors as long as the sequence,
only q, k, v, y, the logsumexp and the layout are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.chosen.block_layout import Layout, Plan, Tiles, lay_out, tiles_of
from variants.ops.memoizable import repeatable
from variants.ops.patterns.part_kernels import EMPTY, KERNELS
from variants.ops.tile_size import Sizes

SLICE = Sizes(cpu=2**19, accelerator=2**28)
"""Scores computed at a time. On a CPU the keys of a slice must stay in cache."""
MOST_SLICES = 128
"""Maximum number of slices of a group of sequences; beyond it the slices grow, which bounds the number of
operations."""
ROWS = Sizes(cpu=2**18, accelerator=2**24)
"""Slots of a group of sequences, whose partial results are held at a time."""
MOST_GROUPS = 16
"""Maximum number of groups of sequences; beyond it the groups grow."""


def sequences_at_a_time(sequences: int, tiles: Tiles, device_type: str) -> Iterator[slice]:
    step = max(1, ROWS.on(device_type) // max(1, tiles.slots), -(-sequences // MOST_GROUPS))
    for first in range(0, sequences, step):
        yield slice(first, min(first + step, sequences))


class Routed:
    """The tiles of some sequences."""

    def __init__(self, layout: Layout, group: slice, shape: torch.Size, plan: Plan) -> None:
        _, seq_len, heads, _ = shape
        self.tiles, self.plan, self.sequences = tiles_of(seq_len, plan), plan, group.stop - group.start
        query, block, slot = layout.query[group], layout.block[group], layout.slot[group]
        number = torch.arange(self.sequences, device=query.device)[:, None]
        self.empty = (query < 0).flatten()
        self.query = (query.clamp(min=0) + number * seq_len).flatten()
        """(slots,): the row of each slot among the rows of the sequences."""
        self.block = (block + number * (seq_len // plan.block)).flatten()
        missing = slot == self.tiles.slots
        slot = (slot + number[..., None] * self.tiles.slots).masked_fill_(missing, len(self.query))
        head = torch.arange(heads, device=query.device)[:, None]
        self.slot = (slot[:, :, None] * heads + head).flatten(0, 2)
        """(rows · G, K): where each row finds its partial results, among those of `results`."""

    def slices(self, heads: int) -> Iterator[tuple[slice, slice]]:
        """(slots, tiles) computed at a time."""
        size, total = self.tiles.size, self.sequences * self.tiles.number
        scores = size * heads * self.plan.block
        step = max(1, SLICE.on(self.plan.device_type) // scores, -(-total // MOST_SLICES))
        for first in range(0, total, step):
            last = min(first + step, total)
            yield slice(first * size, last * size), slice(first, last)

    def results(self, width: int, like: Tensor, fill: float) -> Tensor:
        """Memory for the partial results of all slots, and `fill` for the picks that do not exist."""
        results = like.new_empty(len(self.query) + 1, width)
        results[-1].fill_(fill)
        return results


@repeatable
def _attend(
    by_row: list[Tensor], by_block: list[Tensor], slots: list[Tensor], out: list[Tensor], plan: Plan
) -> None:
    """Write the partial outputs and the logsumexp of some tiles."""
    (q,), (k, v), (query, block), (y, lse) = by_row, by_block, slots, out
    tiles, channels = len(block), k.shape[-1] // plan.block
    queries = q.index_select(0, query).view(tiles, 1, -1, channels)
    keys, values = (t.index_select(0, block).view(tiles, 1, -1, channels) for t in (k, v))
    part, sums = KERNELS[plan.impl].attend(queries, keys, values, None, False)
    y.copy_(part.reshape(y.shape))
    lse.copy_(sums.reshape(lse.shape))


@repeatable
def _attend_backward(
    by_row: list[Tensor],
    by_block: list[Tensor],
    slots: list[Tensor],
    out: list[Tensor],
    plan: Plan,
) -> None:
    """Write the partial gradients of the queries of some tiles, and add those of their keys and values."""
    (dy, q, y, lse), (k, v), (query, block, empty), (dq, dk, dv) = by_row, by_block, slots, out
    tiles, channels = len(block), k.shape[-1] // plan.block
    heads = q.shape[-1] // channels
    rows = [t.index_select(0, query).view(tiles, 1, -1, t.shape[-1] // heads) for t in (dy, q, y)]
    # the weights of an empty slot are exp(−∞)
    sums = lse.index_select(0, query).masked_fill_(empty[:, None], math.inf).view(tiles, 1, -1)
    keys, values = (t.index_select(0, block).view(tiles, 1, -1, channels) for t in (k, v))
    grads = KERNELS[plan.impl].attend_backward(*rows[:2], keys, values, rows[2], sums, None, False)
    dq.copy_(grads[0].reshape(dq.shape))
    for total, grad in zip((dk, dv), grads[1:], strict=True):
        total.index_add_(0, block, grad.reshape(tiles, -1).to(total.dtype))


def _own_blocks(x: Tensor, block: int) -> list[Tensor]:
    """(N, T, H, D) → views (N, F, b, H, D) of the full blocks and (N, 1, rest, H, D) of the tokens after
    them; empty ones are left out."""
    full = x.shape[1] // block
    views = []
    if full:
        views.append(x[:, : full * block].unflatten(1, (full, block)))
    if x.shape[1] > full * block:
        views.append(x[:, full * block :].unsqueeze(1))
    return views


def _by_head(blocks: Tensor) -> Tensor:
    """(N, F, b, H, D) → (N · F, H, b, D)."""
    return blocks.flatten(0, 1).transpose(1, 2)


def _by_token(part: Tensor, like: Tensor) -> Tensor:
    """(N · F, H, b, D) → (N, F, b, H, D)."""
    return part.transpose(1, 2).reshape(like.shape)


def _expanded(x: Tensor, heads: int) -> Tensor:
    """(n, 1, b, D) → (n, G, b, D), a view."""
    return x.expand(-1, heads, -1, -1)


def routed_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, Tensor]:
    """Outputs (N, T, G, D) and logsumexp (N, T, G)."""
    sequences, _, heads, channels = q.shape
    attend = KERNELS[plan.impl].attend
    y, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    own = (_own_blocks(t, plan.block) for t in (q, k[:, :, None], v[:, :, None], y, lse[..., None]))
    for *given, y_own, lse_own in zip(*own, strict=True):
        q_own, k_own, v_own = (_by_head(t) for t in given)
        part, sums = attend(q_own, _expanded(k_own, heads), _expanded(v_own, heads), None, True)
        y_own.copy_(_by_token(part, y_own))
        lse_own.copy_(_by_token(sums[..., None], lse_own))
    tiles = tiles_of(q.shape[1], plan)
    if not tiles.number:
        return y, lse
    full = q.shape[1] // plan.block * plan.block
    for group in sequences_at_a_time(sequences, tiles, plan.device_type):
        here = Routed(layout, group, q.shape, plan)
        rows = q[group].flatten(2).flatten(0, 1)
        blocks = [t[group, :full].reshape(-1, plan.block * channels) for t in (k, v)]
        part, sums = here.results(heads * channels, q, 0.0), here.results(heads, lse, EMPTY)
        for slots, some in here.slices(heads):
            _attend([rows], blocks, [here.query[slots], here.block[some]], [part[slots], sums[slots]], plan)
        merge(y[group].flatten(0, 2), lse[group].flatten(), part, sums, here)
    return y, lse


def merge(y: Tensor, lse: Tensor, part: Tensor, sums: Tensor, here: Routed) -> None:
    """Merge the partial results of all picks into those of the own block, (rows, D) and (rows,), in place."""
    sums = sums.flatten()[here.slot]  # (rows, K)
    total = torch.logaddexp(lse, sums.logsumexp(-1))
    shares = (sums - total[:, None]).exp_().to(y.dtype)
    y.mul_((lse - total).exp_().to(y.dtype)[:, None])
    results = part.view(-1, y.shape[-1])
    y.add_(F.embedding_bag(here.slot, results, mode="sum", per_sample_weights=shares))
    lse.copy_(total)


def routed_backward(given: list[Tensor], layout: Layout, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, G, D), and of k and v (N, T, D), from the weights exp(score − logsumexp)."""
    dy, q, k, v, y, lse = given
    sequences, seq_len, heads, channels = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    kernel = KERNELS[plan.impl]
    of_outputs = kernel.of_outputs(dy, y)  # (N, T, G, 1 or D)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty(k.shape, dtype=wide, device=k.device) for _ in range(2))
    of_keys = (t[:, :, None] for t in (k, v, dk, dv))
    own = (_own_blocks(t, plan.block) for t in (dy, q, of_outputs, lse[..., None], dq, *of_keys))
    for *given, dq_own, k_own, v_own, dk_own, dv_own in zip(*own, strict=True):
        dy_own, q_own, y_own, lse_own = (_by_head(t) for t in given)
        keys = [_expanded(_by_head(t), heads) for t in (k_own, v_own)]
        grads = kernel.attend_backward(dy_own, q_own, *keys, y_own, lse_own[..., 0], None, True)
        dq_own.copy_(_by_token(grads[0], dq_own))
        for total, grad in zip((dk_own, dv_own), grads[1:], strict=True):
            summed = grad if heads == 1 else grad.sum(1, keepdim=True, dtype=wide)
            total.copy_(_by_token(summed, total))
    tiles = tiles_of(seq_len, plan)
    if not tiles.number:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    full = seq_len // plan.block * plan.block
    for group in sequences_at_a_time(sequences, tiles, plan.device_type):
        here = Routed(layout, group, q.shape, plan)
        by_row = [t[group].flatten(2).flatten(0, 1) for t in (dy, q, of_outputs, lse)]
        by_block = [t[group, :full].reshape(-1, plan.block * channels) for t in (k, v)]
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in by_block]
        part = here.results(heads * channels, q, 0.0)
        for slots, some in here.slices(heads):
            places = [here.query[slots], here.block[some], here.empty[slots]]
            _attend_backward(by_row, by_block, places, [part[slots], *sums], plan)
        results = part.view(-1, channels)
        dq[group].flatten(0, 2).add_(F.embedding_bag(here.slot, results, mode="sum"))
        for total, own_blocks in zip(sums, (dk, dv), strict=True):
            own_blocks[group, :full] += total.view(-1, full, channels)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *layout: Tensor) -> Tensor:
        y, lse = routed_forward(q, k, v, Layout(*layout), plan)
        ctx.save_for_backward(q, k, v, y, lse, *layout)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, *layout = ctx.saved_tensors
        grads = routed_backward([dy.contiguous(), q, k, v, y, lse], Layout(*layout), ctx.plan)
        return *grads, None, *[None] * len(layout)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, picks: Tensor, plan: Plan) -> Tensor:
    """Causal softmax attention to the own block and to the picked blocks: (B, H, T, D) → (B, H, T, D).

    k and v are (B, heads of keys, T, D); neighbouring query heads share one. `picks` (B, heads of keys, T, K)
    are the blocks that all query heads of a group read: full blocks before the own one, of which a query
    names none twice. Of a pick that does not exist (see `Plan.starts`), the number is ignored.
    """
    batch, key_heads = k.shape[:2]
    rows = q.unflatten(1, (key_heads, -1)).permute(0, 1, 3, 2, 4).flatten(0, 1).contiguous()  # (N, T, G, D)
    keys, values = (t.flatten(0, 1).contiguous() for t in (k, v))
    layout = lay_out(picks.flatten(0, 1), plan)
    y: Tensor = _RoutedAttention.apply(rows, keys, values, plan, *layout)  # type: ignore[no-untyped-call]
    by_head: Tensor = y.unflatten(0, (batch, key_heads)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return by_head
