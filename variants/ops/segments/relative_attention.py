"""Softmax attention of a segment to itself and to a memory before it, with relative positions.

Shapes: B sequences, S tokens of a segment, M positions of memory before them, J = M + S keys, C channels,
H heads, D channels of a head. Heads come first, (H, B, S, D), because all sequences share the positions of a
head.

The score of a query at a key d positions back has four terms (Dai 2019, arXiv:1901.02860, §3.3):
(q + u)·k + (q + v)·(W_r R_d). R_d is a sinusoid; u and v are learnt vectors, one of each for every head.
The positions W_r R are (H, D, J + 1), for the distances J, …, 1, 0. In this layout, products with queries
read memory in order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.tile_size import Sizes

SINUSOID_BASE = 10_000.0
BLOCK = Sizes(cpu=128, accelerator=512)
"""Queries of a segment that are scored at a time.

Half of the S × S scores within a segment are forbidden, because their keys come after the query. Small blocks
skip most of them, and on a CPU the weights (H, B, 128, J) of a block stay in the cache. On an accelerator,
computing these scores costs less than the launches of more blocks."""


def sinusoids(farthest: int, channels: int, like: Tensor) -> Tensor:
    """Return the sinusoids (farthest + 1, C) of the distances farthest, …, 1, 0 (Vaswani 2017, §3.5), with
    the dtype of `like`.

    Angles are float64: with float32 angles, sines at a distance of a few thousand have errors in the fourth
    digit.
    """
    distance = torch.arange(farthest, -1, -1, device=like.device, dtype=torch.float64)
    channel = torch.arange(channels // 2, device=like.device, dtype=torch.float64)
    angle = distance[:, None] * torch.exp(channel * (-2 * math.log(SINUSOID_BASE) / channels))
    return torch.cat([angle.sin().to(like.dtype), angle.cos().to(like.dtype)], dim=-1)


def plain_attention(q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The readable form of `relative_attention`: outputs (H, B, S, D) and weights (H, B, S, J)."""
    queries, keys = q.shape[2], kv.shape[3]
    index = torch.arange(keys, device=q.device)
    distance = (index[keys - queries :, None] - index).expand(*q.shape[:2], queries, keys)
    content = (q + u[:, None, None]) @ kv[0].transpose(-1, -2)
    by_distance = (q + v[:, None, None]) @ r.flip(-1)[:, None]  # (H, B, S, J + 1), nearest first
    scores = content + by_distance.gather(-1, distance.clamp(min=0))
    scores = (scores / math.sqrt(q.shape[-1])).masked_fill(distance < 0, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ kv[1], weights


def _shifted(by_distance: Tensor, batches: int, queries: int) -> Tensor:
    """View scores by distance (…, b, J + 1) as scores by key (batches, b, J), without a copy.

    Column e of row i is distance J − e. Key j of row i is at distance (J − b) + i − j, which is column
    e = j − i + b. So the view is the same memory, read from element b on with rows of J elements instead of
    J + 1. Keys after the query fall on the next row and contain its most distant scores; the caller must
    mask them.
    """
    flat = by_distance.view(batches, -1)
    return flat[:, queries:].view(batches, queries, -1)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b."""
    total.baddbmm_(a, b)


class _Terms:
    """The operands of the scores of each block of queries, for forward and backward."""

    def __init__(self, q: Tensor, kv: Tensor, u: Tensor, v: Tensor, block: int) -> None:
        self.heads, self.batch, self.queries, self.head_dim = q.shape
        self.batches, self.keys = self.heads * self.batch, kv.shape[3]
        self.scale = self.head_dim**-0.5
        self.block = min(block, self.queries)
        self.k, self.values = kv.flatten(1, 2).unbind(0)
        flat = q.flatten(0, 1).contiguous()  # (H·B, S, D); sums take its strides, as torch.compile needs
        self.content, self._position = (self._biased(flat, bias) for bias in (u, v))

    def _biased(self, flat: Tensor, bias: Tensor) -> Tensor:
        """Return the scaled queries (H·B, S, D) of one term."""
        scaled = (bias * self.scale).repeat_interleave(self.batch, dim=0)[:, None]
        return torch.add(scaled, flat, alpha=self.scale)

    def position(self, begin: int, end: int) -> Tensor:
        """Return the scaled queries of the position term (H, B·b, D): all sequences share the positions of
        a head."""
        return self._position[:, begin:end].reshape(self.heads, -1, self.head_dim)

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (begin, end, reach) of each block: its queries [begin, end) read keys in [0, reach)."""
        past = self.keys - self.queries
        starts = range(0, self.queries, self.block)
        ends = [(begin, min(begin + self.block, self.queries)) for begin in starts]
        return [(begin, end, past + end) for begin, end in ends]


def _forward(q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, count: bool, block: int) -> list[Tensor]:
    """Return outputs (H, B, S, D), sums of the exponentials, the exponentials of each block of queries and,
    if `count`, the usage (B, J) of every key."""
    terms = _Terms(q, kv, u, v, block)
    y = torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    totals = q.new_empty(terms.batches, terms.queries, 1, dtype=wide)
    usage = q.new_zeros(terms.batch, terms.keys, dtype=wide) if count else None
    future = q.new_full((terms.block, terms.block), float("-inf")).triu_(1)
    kept = []
    for begin, end, reach in terms.spans():
        size = end - begin
        by_distance = torch.bmm(terms.position(begin, end), r[:, :, -reach - 1 :])
        scores = _shifted(by_distance, terms.batches, size)
        accumulate(scores, terms.content[:, begin:end], terms.k[:, :reach].transpose(1, 2))
        scores[:, :, reach - size :].add_(future[:size, :size])
        weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
        total = torch.sum(weights, dim=-1, keepdim=True, dtype=wide)
        found = torch.bmm(weights, terms.values[:, :reach]).div_(total)
        y[:, :, begin:end] = found.view(terms.heads, terms.batch, size, -1)
        if usage is not None:
            received = weights.div(total).sum(dim=1, dtype=wide)
            usage[:, :reach] += received.view(terms.heads, terms.batch, reach).mean(dim=0)
        totals[:, begin:end] = total
        kept.append(weights)
    return [y, totals, *kept, *([] if usage is None else [usage])]


def _backward(
    dy: Tensor, q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, kept: list[Tensor], block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, kv, r, u and v; `kept` is the result of `_forward` without the usage."""
    y, totals, *weights_of_blocks = kept
    terms = _Terms(q, kv, u, v, block)
    by_query = (terms.batches, terms.queries, -1)
    # the weights are not divided by their sums; their factors are divided instead
    mean = (dy * y).sum(dim=-1, keepdim=True).reshape(by_query).div(totals)
    dy = dy.reshape(by_query).div(totals).to(q.dtype)
    # (…, D, J), because products over queries are faster if the result has long rows
    dkv = kv.new_zeros(*kv.shape[:3], terms.head_dim, terms.keys)
    dk, dvalues = dkv.flatten(1, 2).unbind(0)
    dr = torch.zeros_like(r)
    d_content, d_position = torch.empty_like(terms.content), torch.empty_like(terms.content)
    for (begin, end, reach), weights in zip(terms.spans(), weights_of_blocks, strict=True):
        here, size = slice(begin, end), end - begin
        accumulate(dvalues[:, :, :reach], dy[:, here].transpose(1, 2), weights)
        # written through the view `_shifted`, so that it is the gradient of the scores by distance too
        by_distance = q.new_empty(terms.heads, terms.batch * size, reach + 1)
        by_distance.view(terms.batches, -1)[:, :size].zero_()  # distances that no query has
        scores = _shifted(by_distance, terms.batches, size)
        torch.bmm(dy[:, here], terms.values[:, :reach].transpose(1, 2), out=scores)
        scores.sub_(mean[:, here]).mul_(weights)
        accumulate(dk[:, :, :reach], terms.content[:, here].transpose(1, 2), scores)
        accumulate(dr[:, :, -reach - 1 :], terms.position(begin, end).transpose(1, 2), by_distance)
        d_content[:, here] = torch.bmm(scores, terms.k[:, :reach])
        found = torch.bmm(by_distance, r[:, :, -reach - 1 :].transpose(1, 2))
        d_position[:, here] = found.view(terms.batches, size, -1)
    d_content, d_position = (d.view(q.shape).mul_(terms.scale) for d in (d_content, d_position))
    du, dv = d_content.sum(dim=(1, 2)), d_position.sum(dim=(1, 2))
    return d_content.add_(d_position), dkv.transpose(-1, -2), dr, du, dv


@repeatable
class _RelativeAttention(torch.autograd.Function):
    """Stores the exponentials of the scores for backward: up to H·B·S·J numbers. That is 8 MiB in float32
    for one sequence with 4 heads and S = M = 512.

    Computing them again would take two products of queries × keys in addition to the nine, and the
    exponentials again. Use activation checkpointing if memory matters more than time: it computes the whole
    layer again, and a recomputation here would be repeated by it.

    Time on a CPU, with these sizes and C = 256, for the 3.3 GFLOP of a segment: the nine products are 60 % of
    the FLOPs (a thirteenth of this is above the diagonal); W_r R and the keys and values of the memory, which
    are computed for each segment and have a backward pass of their own, 16 %; the other projections 24 %. The
    total is 0.21 of the FLOPs of dense attention at T = 16,384. Products take 70 % of the time; the rest is
    passes over the scores, copies and the overhead of some four hundred calls for each segment. Measured on
    two cores, median of three rounds: 0.28 of the time of dense attention.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, count: bool, block: int
    ) -> tuple[Tensor, Tensor | None]:
        y, *kept = _forward(q, kv, r, u, v, count, block)
        usage = kept.pop() if count else None
        ctx.block = block
        ctx.save_for_backward(q, kv, r, u, v, y, *kept)
        if usage is not None:
            ctx.mark_non_differentiable(usage)
        return y, usage

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, kv, r, u, v, *kept = ctx.saved_tensors
        return *_backward(dy, q, kv, r, u, v, kept, ctx.block), None, None


# --- the same as operators: torch.compile would take hours to analyse the shifted views ---


_forward_operator = operator(
    "relative_attention",
    _forward,
    schema="(Tensor q, Tensor kv, Tensor r, Tensor u, Tensor v, bool count, int block) -> Tensor[]",
)
_backward_operator = operator(
    "relative_attention_backward",
    _backward,
    schema="(Tensor dy, Tensor q, Tensor kv, Tensor r, Tensor u, Tensor v, Tensor[] kept, int block)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward_operator.register_fake(_forward)
_backward_operator.register_fake(_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, count, ctx.block = inputs
    ctx.save_for_backward(*tensors, *(output[:-1] if count else output))


def _operator_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, kv, r, u, v, *kept = ctx.saved_tensors
    return *_backward_operator(grads[0], q, kv, r, u, v, kept, ctx.block), None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_keep)


def relative_attention(
    q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, *, count: bool, block: int
) -> tuple[Tensor, Tensor | None]:
    """Return outputs (H, B, S, D) and, if `count`, the usage (B, J) of every key: the attention that it
    received, summed over queries, mean over heads.

    q (H, B, S, D) reads keys and values kv (2, H, B, J, D): the M = J − S keys of the memory and those of its
    segment up to the query. r (H, D, J + 1) are the positions, u and v (H, D) the biases. `block` is the
    number of queries that are scored at a time.
    """
    if torch.compiler.is_compiling():
        found = _forward_operator(q, kv, r, u, v, count, block)
        return found[0], found[-1].detach() if count else None
    # not as one operator, so that counters see each operation and each tensor
    return _RelativeAttention.apply(q, kv, r, u, v, count, block)  # type: ignore[no-any-return, no-untyped-call]
