"""Grouped softmax of queries over their own block and blocks that each query has selected by a landmark.

Shapes: N sequences of one head of keys, T tokens, G query heads that share the keys and the selection, D
channels of a head, b tokens of a block, F full blocks of a sequence, R queries of a tile.

One softmax gives weights to the keys of the own block and to the landmarks of the selected blocks. The weight
of a landmark is shared among the keys of its block by a second softmax (Mohtashami 2023, arXiv:2305.16300).
The layout is that of `routed_blocks`: a tile holds queries that selected one block, so that the
keys and the landmark of the block are gathered once for all of them. The partial results are merged by the
scores of the landmarks, in place of the logsumexp of the keys. The backward pass computes the partial results
again: of tensors as long as the sequence, only q, k, v, y, the logsumexp and the layout are saved.

The gradient of a landmark's score is a difference of nearly equal numbers. So a CPU, whose products are no
faster in bfloat16, computes in float32 or wider.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.chosen.block_layout import Layout, Plan, lay_out, tiles_of
from variants.ops.chosen.routed_blocks import (
    Routed,
    merge,
    routed_backward,
    routed_forward,
    sequences_at_a_time,
)
from variants.ops.memoizable import repeatable
from variants.ops.patterns.part_kernels import EMPTY, KERNELS


def _scores(queries: Tensor, landmarks: Tensor, like: Tensor) -> Tensor:
    """The scores (tiles, R) of queries (tiles, 1, R, D) and the landmarks (tiles, D), in the dtype of
    `like`."""
    scores = torch.bmm(queries[:, 0], landmarks[:, :, None])[..., 0].to(like.dtype)
    return scores.mul_(landmarks.shape[1] ** -0.5)


@repeatable
def _attend(
    by_row: list[Tensor], by_block: list[Tensor], slots: list[Tensor], out: list[Tensor], plan: Plan
) -> None:
    """Write the partial outputs and the scores of the landmarks of some tiles."""
    (q,), (k, v, landmarks), (query, block), (y, scores) = by_row, by_block, slots, out
    tiles, channels = len(block), landmarks.shape[-1]
    queries = q.index_select(0, query).view(tiles, 1, -1, channels)
    keys, values = (t.index_select(0, block).view(tiles, 1, -1, channels) for t in (k, v))
    part, _ = KERNELS[plan.impl].attend(queries, keys, values, None, False)
    y.copy_(part.reshape(y.shape))
    scores.copy_(_scores(queries, landmarks.index_select(0, block), scores).reshape(scores.shape))


@repeatable
def _attend_backward(
    by_row: list[Tensor],
    by_block: list[Tensor],
    slots: list[Tensor],
    out: list[Tensor],
    plan: Plan,
) -> None:
    """Write the partial gradients of the queries of some tiles, and add those of their keys, values and
    landmarks."""
    (dy, q, mean, lse), (k, v, landmarks), (query, block, empty), (dq, *sums) = by_row, by_block, slots, out
    tiles, channels = len(block), landmarks.shape[-1]
    kernel = KERNELS[plan.impl]
    d_rows, queries = (t.index_select(0, query).view(tiles, 1, -1, channels) for t in (dy, q))
    keys, values = (t.index_select(0, block).view(tiles, 1, -1, channels) for t in (k, v))
    of_tile = landmarks.index_select(0, block)
    part, inside = kernel.attend(queries, keys, values, None, False)
    # the weight of a landmark; exp(−∞) in an empty slot
    total = lse.index_select(0, query).masked_fill_(empty[:, None], math.inf).view(tiles, -1)
    share = _scores(queries, of_tile, lse).sub_(total).exp_()
    d_part = d_rows * share[:, None, :, None].to(d_rows.dtype)
    of_part = kernel.of_outputs(d_part, part)
    grads = kernel.attend_backward(d_part, queries, keys, values, of_part, inside, None, False)
    means = mean.index_select(0, query).view(tiles, -1)
    # dy · part and dy · y nearly cancel, so that their products are not rounded
    products = (d_rows.to(share.dtype) * part.to(share.dtype)).sum(-1)[:, 0]
    d_scores = products.sub_(means).mul_(share).mul_(channels**-0.5).to(q.dtype)
    dq.copy_(torch.baddbmm(grads[0][:, 0], d_scores[..., None], of_tile[:, None]).reshape(dq.shape))
    d_landmarks = torch.bmm(d_scores[:, None], queries[:, 0])
    for sum_, grad in zip(sums, (*grads[1:], d_landmarks), strict=True):
        sum_.index_add_(0, block, grad.reshape(tiles, -1).to(sum_.dtype))


def _by_block(here: slice, plan: Plan, k: Tensor, v: Tensor, landmarks: Tensor) -> list[Tensor]:
    """Keys and values of the full blocks of some sequences (blocks, b·D), and their landmarks (blocks, D)."""
    full = landmarks.shape[1] * plan.block
    rows = [t[here, :full].reshape(-1, plan.block * t.shape[-1]) for t in (k, v)]
    return [*rows, landmarks[here].flatten(0, 1)]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, layout: Layout, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Outputs (N, T, G, D) and logsumexp (N, T, G) over own keys and selected landmarks."""
    sequences, _, heads, channels = q.shape
    y, lse = routed_forward(q, k, v, layout, plan._replace(starts=()))
    tiles = tiles_of(q.shape[1], plan)
    if not tiles.number:
        return y, lse
    for group in sequences_at_a_time(sequences, tiles, plan.device_type):
        here = Routed(layout, group, q.shape, plan)
        rows, blocks = q[group].flatten(2).flatten(0, 1), _by_block(group, plan, k, v, landmarks)
        part, scores = here.results(heads * channels, q, 0.0), here.results(heads, lse, EMPTY)
        for slots, some in here.slices(heads):
            _attend([rows], blocks, [here.query[slots], here.block[some]], [part[slots], scores[slots]], plan)
        merge(y[group].flatten(0, 2), lse[group].flatten(), part, scores, here)
    return y, lse


def _backward(given: list[Tensor], layout: Layout, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, G, D), of k and v (N, T, D) and of the landmarks (N, F, D)."""
    dy, q, k, v, landmarks, y, lse = given
    sequences, seq_len, heads, channels = q.shape
    # a key of the own block has the weight exp(score − logsumexp) in the one softmax
    dq, dk, dv = routed_backward([dy, q, k, v, y, lse], layout, plan._replace(starts=()))
    wide = torch.promote_types(q.dtype, torch.float32)
    d_landmarks = torch.zeros(landmarks.shape, dtype=wide, device=q.device)
    tiles = tiles_of(seq_len, plan)
    if not tiles.number:
        return dq, dk, dv, d_landmarks.to(q.dtype)
    mean = (dy.to(wide) * y.to(wide)).sum(-1)
    full = landmarks.shape[1] * plan.block
    for group in sequences_at_a_time(sequences, tiles, plan.device_type):
        here = Routed(layout, group, q.shape, plan)
        by_row = [t[group].flatten(2).flatten(0, 1) for t in (dy, q)]
        by_row += [t[group].flatten(0, 1) for t in (mean, lse)]
        by_block = _by_block(group, plan, k, v, landmarks)
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in by_block[:2]]
        part = here.results(heads * channels, q, 0.0)
        for slots, some in here.slices(heads):
            places = [here.query[slots], here.block[some], here.empty[slots]]
            out = [part[slots], *sums, d_landmarks[group].flatten(0, 1)]
            _attend_backward(by_row, by_block, places, out, plan)
        results = part.view(-1, channels)
        dq[group].flatten(0, 2).add_(F.embedding_bag(here.slot, results, mode="sum"))
        for total, of_all in zip(sums, (dk, dv), strict=True):
            of_all[group, :full] += total.view(-1, full, channels).to(of_all.dtype)
    return dq, dk, dv, d_landmarks.to(q.dtype)


class _LandmarkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, plan: Plan, *layout: Tensor
    ) -> Tensor:
        y, lse = _forward(q, k, v, landmarks, Layout(*layout), plan)
        ctx.save_for_backward(q, k, v, landmarks, y, lse, *layout)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *given, query, block, slot = ctx.saved_tensors
        layout = Layout(query, block, slot)
        grads = _backward([dy.contiguous(), *given], layout, ctx.plan)
        return *grads, None, *[None] * len(layout)


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, picks: Tensor, plan: Plan
) -> Tensor:
    """Causal grouped softmax over the own block and the picked blocks: (B, H, T, D) → (B, H, T, D).

    k and v are (B, heads of keys, T, D), landmarks (B, heads of keys, F, D); neighbouring query heads share
    one. `picks` (B, heads of keys, T, K) are full blocks before the own one, of which a query names none
    twice. Of a pick that does not exist (see `Plan.starts`), the number is ignored. The picks have no
    gradient; the landmarks of picked blocks have one.
    """
    batch, key_heads = k.shape[:2]
    dtype = q.dtype
    within = torch.promote_types(dtype, torch.float32) if plan.device_type == "cpu" else dtype
    q, k, v, landmarks = (t.to(within) for t in (q, k, v, landmarks))
    rows = q.unflatten(1, (key_heads, -1)).permute(0, 1, 3, 2, 4).flatten(0, 1).contiguous()  # (N, T, G, D)
    by_key = (t.flatten(0, 1).contiguous() for t in (k, v, landmarks))
    layout = lay_out(picks.flatten(0, 1), plan)
    y: Tensor = _LandmarkAttention.apply(rows, *by_key, plan, *layout)  # type: ignore[no-untyped-call]
    by_head: Tensor = y.unflatten(0, (batch, key_heads)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return by_head.to(dtype)
