"""What variants with a memory of earlier segments share: relative positions, attention over memory.

Shapes: B batch, S tokens of a segment, M positions of memory before them, J = M + S keys, C channels,
H heads, D = C / H; heads come first, (H, B, S, D), because all sequences of a batch share a head's positions.

The score of a query at a key d positions back has four terms (Dai 2019, arXiv:1901.02860, §3.3):
(q + u)·k + (q + v)·(W_r R_d), where R_d is a sinusoid and u and v are learnt, one of each a head.
Positions W_r R are (H, D, J + 1), of distances J, …, 1, 0: what products with queries read fastest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from variants.base import Cost, Dims, SequenceMixer, VariantConfig, Workload
from variants.input_schedule import Segments
from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.projections import Projections
from variants.ops.tile_size import Sizes

SINUSOID_BASE = 10_000.0
BLOCK = Sizes(cpu=128, accelerator=512)
"""Queries that are scored at a time. On a CPU (H, B, 128, J) weights stay in the cache, and of the S × S
scores within a segment, half of which the future forbids, only the blocks on the diagonal are computed in
vain; elsewhere whole segments of a usual length cost less than the launches of their blocks."""


def sinusoids(farthest: int, channels: int, like: Tensor) -> Tensor:
    """(farthest + 1, C) sinusoids (Vaswani 2017, §3.5) of distances farthest, …, 1, 0, dtype as `like`.

    Angles are float64: in float32, sines at a distance of a few thousand are wrong in the fourth digit.
    """
    distance = torch.arange(farthest, -1, -1, device=like.device, dtype=torch.float64)
    channel = torch.arange(channels // 2, device=like.device, dtype=torch.float64)
    angle = distance[:, None] * torch.exp(channel * (-2 * math.log(SINUSOID_BASE) / channels))
    return torch.cat([angle.sin().to(like.dtype), angle.cos().to(like.dtype)], dim=-1)


def plain_attention(q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`relative_attention` for reading: outputs (H, B, S, D) and weights (H, B, S, J)."""
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
    """A view of scores by distance (…, b, J + 1) as scores by key (batches, b, J), nothing moved.

    Column e of row i is distance J − e, and key j is at distance (J − b) + i − j, thus in column
    e = j − i + b: the same memory, read from its b-th number on with rows of J instead of J + 1.
    Keys after the query fall on the next row and hold its most distant scores; they are to be masked.
    """
    flat = by_distance.view(batches, -1)
    return flat[:, queries:].view(batches, queries, -1)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; not `baddbmm_`, because torch's FLOP counter knows no products in place."""
    torch.baddbmm(total, a, b, out=total)


class _Terms:
    """The operands of the scores, one block of queries after the other, for forward and backward."""

    def __init__(self, q: Tensor, kv: Tensor, u: Tensor, v: Tensor, block: int) -> None:
        self.heads, self.batch, self.queries, self.head_dim = q.shape
        self.batches, self.keys = self.heads * self.batch, kv.shape[3]
        self.scale = self.head_dim**-0.5
        self.block = min(block, self.queries)
        self.k, self.values = kv.flatten(1, 2).unbind(0)
        flat = q.flatten(0, 1).contiguous()  # (H·B, S, D); sums take its strides, as torch.compile needs
        self.content, self._position = (self._biased(flat, bias) for bias in (u, v))

    def _biased(self, flat: Tensor, bias: Tensor) -> Tensor:
        """Scaled queries (H·B, S, D) of one term."""
        scaled = (bias * self.scale).repeat_interleave(self.batch, dim=0)[:, None]
        return torch.add(scaled, flat, alpha=self.scale)

    def position(self, begin: int, end: int) -> Tensor:
        """Scaled queries of the position term (H, B·b, D): all sequences share a head's positions."""
        return self._position[:, begin:end].reshape(self.heads, -1, self.head_dim)

    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, end, reach) of each block: its queries [begin, end) read some of the keys [0, reach)."""
        past = self.keys - self.queries
        starts = range(0, self.queries, self.block)
        ends = [(begin, min(begin + self.block, self.queries)) for begin in starts]
        return [(begin, end, past + end) for begin, end in ends]


def _forward(q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, count: bool, block: int) -> list[Tensor]:
    """Outputs (H, B, S, D), sums of the exponentials, the exponentials of each block of queries and, if
    `count`, the usage (B, J) of every key."""
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
    """Gradients of q, kv, r, u and v; `kept` is what `_forward` returned, without the usage."""
    y, totals, *weights_of_blocks = kept
    terms = _Terms(q, kv, u, v, block)
    by_query = (terms.batches, terms.queries, -1)
    # weights were never divided by their sums: what they are multiplied by is
    mean = (dy * y).sum(dim=-1, keepdim=True).reshape(by_query).div(totals)
    dy = dy.reshape(by_query).div(totals).to(q.dtype)
    # (…, D, J), because products over queries are faster with a wide result than with a narrow one
    dkv = kv.new_zeros(*kv.shape[:3], terms.head_dim, terms.keys)
    dk, dvalues = dkv.flatten(1, 2).unbind(0)
    dr = torch.zeros_like(r)
    d_content, d_position = torch.empty_like(terms.content), torch.empty_like(terms.content)
    for (begin, end, reach), weights in zip(terms.spans(), weights_of_blocks, strict=True):
        here, size = slice(begin, end), end - begin
        accumulate(dvalues[:, :, :reach], dy[:, here].transpose(1, 2), weights)
        # the gradient of the scores is made where `_shifted` makes it that of the scores by distance
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
    """Keeps the exponentials of the scores for backward: up to H·S·J numbers a sequence of the batch, of
    one segment at a time; 8 MiB in float32 with 4 heads and S = M = 512.

    Making them again would be two products of queries × keys beside the nine, and exponentials twice.
    Whoever would rather have the memory lets the whole layer be computed again, as under activation
    checkpointing; doing so here too would pay for it twice.

    Where the time goes on a CPU, with those sizes and C = 256: of a segment's 3.3 GFLOP, the nine
    products are 60 % (a thirteenth of it above the diagonal); W_r R and the memory's keys and values,
    made anew for each segment with a backward of their own, 16 %; the other projections 24 %. That
    is 0.21 of the FLOPs of dense attention at T = 16,384. Products are 70 % of the time, and the rest
    are passes over the scores, copies and the overhead of some four hundred calls a segment. Measured on
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


# --- the same as operators, which torch.compile takes whole: it would analyse the shifted views for hours ---


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
    """Outputs (H, B, S, D) and, if `count`, the usage of every key (B, J). `block` is the number of queries
    worked on at a time; see `_RelativeAttention`."""
    if torch.compiler.is_compiling():
        found = _forward_operator(q, kv, r, u, v, count, block)
        return found[0], found[-1].detach() if count else None
    # operation by operation, so that counters see what is computed and held
    return _RelativeAttention.apply(q, kv, r, u, v, count, block)  # type: ignore[no-any-return, no-untyped-call]


class Attended(NamedTuple):
    """Outputs (B, S, C), and what later steps may reuse."""

    y: Tensor
    q: Tensor
    """Queries without biases (H, B, S, D)."""
    kv: Tensor
    """Keys and values of memory and segment (2, H, B, J, D)."""
    usage: Tensor | None
    """(B, J) attention that each position received from the segment, mean over heads; if counted."""


class Recurrent(SequenceMixer):
    """A layer that attends to a memory of its own earlier inputs and to its segment up to the query.

    The memory is detached: it takes part in the gradients of weights alone.
    """

    flop_overhead_reason = "blocks of queries on the diagonal compute the scores that the future forbids"

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        channels, self.heads = dims.d_model, dims.heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.r = nn.Linear(channels, channels, bias=False)
        self.u = nn.Parameter(0.02 * torch.randn(dims.heads, dims.head_dim, dtype=torch.float32))
        self.v = nn.Parameter(0.02 * torch.randn(dims.heads, dims.head_dim, dtype=torch.float32))
        self.out = nn.Linear(channels, channels, bias=False)

    @classmethod
    @abstractmethod
    def input_schedule(cls, config: VariantConfig) -> Segments:
        """Segments in order."""

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Memories hold the past alone, and sinusoids come in pairs."""
        if dims.d_model % 2:
            return f"d_model={dims.d_model}: sinusoidal positions need an even number of channels"
        return super().unsupported(config, dims, causal=causal)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, B, S, D) of x (B, S, C), keys and values (2, H, B, J, D), positions (H, D, J + 1)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        # two products, so that backward computes no gradient of the memory, which would be dropped
        parts = [self.kv(memory), self.kv(x)] if memory.shape[1] else [self.kv(x)]
        kv = torch.cat([p.unflatten(-1, (2, self.heads, -1)).permute(2, 3, 0, 1, 4) for p in parts], dim=3)
        r = F.linear(self.r.weight, sinusoids(kv.shape[3], x.shape[-1], x)).unflatten(0, (self.heads, -1))
        return q, kv, r

    def attend(self, x: Tensor, memory: Tensor, *, count: bool = False) -> Attended:
        """x (B, S, C) reads all of memory (B, M, C) and itself up to the query; `count` asks for `usage`."""
        q, kv, r = self.project(x, memory)
        u, v = self.u.to(q.dtype), self.v.to(q.dtype)  # under autocast, projections are narrower
        block = BLOCK.on(self.device_type)
        y, usage = relative_attention(q, kv, r, u, v, count=count, block=block)
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, usage)

    def plainly_attend(self, x: Tensor, memory: Tensor) -> Attended:
        """`attend` for reading."""
        q, kv, r = self.project(x, memory)
        y, weights = plain_attention(q, kv, r, self.u, self.v)
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, weights.sum(dim=2).mean(dim=0))

    def segment_cost(self, work: Workload, tokens: int, memory: int) -> Cost:
        """Forward FLOPs of one segment: content, position and weighted sum are 2·C for each pair.

        The keys and values of the memory, and the projection of the positions, are parts of their own.
        """
        pairs = tokens * memory + tokens * (tokens + 1) // 2
        channels = work.d_model
        return Cost(
            {
                "projections": Projections.flops(work.batch_size, tokens, channels),
                "attention": 6 * work.batch_size * channels * pairs,
                "memory": 4 * work.batch_size * memory * channels**2,
                "positions": 2 * (tokens + memory) * channels**2,
            }
        )


def slide(memory: Tensor, x: Tensor, drop: int) -> Tensor:
    """The last of memory (B, M, C) and x (B, S, C) without the oldest `drop` positions, detached."""
    kept = memory[:, drop:], x[:, max(0, drop - memory.shape[1]) :]
    return torch.cat(kept, dim=1).detach()
