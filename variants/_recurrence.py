"""What variants with a memory of earlier segments share: relative positions, attention over memory.

Shapes: B batch, S tokens of a segment, M positions of memory before them, J = M + S keys, C channels,
H heads, D = C / H; heads come first, (H, B, S, D), because all sequences of a batch share a head's positions.

The score of a query at a key d positions back has four terms (Dai 2019, arXiv:1901.02860, §3.3):
(q + u)·k + (q + v)·(W_r R_d), where R_d is a sinusoid and u and v are learnt, one of each a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from variants.base import Attention, Caps, Dims, Flops, Segments, VariantConfig
from variants.layers import Projections

SINUSOID_BASE = 10_000.0
BLOCK = 128
"""Queries that are scored at a time: (H, B, 128, J) weights stay in the cache, and of the S × S scores
within a segment, half of which the future forbids, only the blocks on the diagonal are computed in vain."""


def sinusoids(farthest: int, channels: int, like: Tensor) -> Tensor:
    """(farthest + 1, C) sinusoids (Vaswani 2017, §3.5) of distances farthest, …, 1, 0, dtype as `like`.

    Angles are float64: in float32, sines at a distance of a few thousand are wrong in the fourth digit.
    """
    distance = torch.arange(farthest, -1, -1, device=like.device, dtype=torch.float64)
    channel = torch.arange(channels // 2, device=like.device, dtype=torch.float64)
    angle = distance[:, None] * torch.exp(channel * (-2 * math.log(SINUSOID_BASE) / channels))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def plain_attention(q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`relative_attention` for reading: outputs (H, B, S, D) and weights (H, B, S, J)."""
    queries, keys = q.shape[2], kv.shape[3]
    index = torch.arange(keys, device=q.device)
    distance = (index[keys - queries :, None] - index).expand(*q.shape[:2], queries, keys)
    content = (q + u[:, None, None]) @ kv[0].transpose(-1, -2)
    by_distance = (q + v[:, None, None]) @ r.flip(1)[:, None].transpose(
        -1, -2
    )  # (H, B, S, J + 1), nearest first
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


class _Blocks:
    """The forward pass over one block of queries after the other, for forward and its replay in backward."""

    def __init__(self, q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor) -> None:
        self.heads, self.batch, self.queries, self.head_dim = q.shape
        self.batches = self.heads * self.batch
        self.q, self.r, self.u, self.v = q, r, u[:, None, None], v[:, None, None]
        self.keys = kv.shape[3]
        self.k, self.values = (t.reshape(self.batches, self.keys, self.head_dim) for t in kv.unbind(0))
        self.scale = self.head_dim**-0.5
        size = min(BLOCK, self.queries)
        self.future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)

    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, end, reach) of each block: its queries [begin, end) read some of the keys [0, reach)."""
        past = self.keys - self.queries
        ends = [(b, min(b + BLOCK, self.queries)) for b in range(0, self.queries, BLOCK)]
        return [(begin, end, past + end) for begin, end in ends]

    def biased(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Scaled queries for the content (H·B, b, D) and position (H, B·b, D) terms."""
        q = self.q[:, :, begin:end]
        content = ((q + self.u) * self.scale).reshape(self.batches, end - begin, self.head_dim)
        return content, ((q + self.v) * self.scale).reshape(self.heads, -1, self.head_dim)

    def scores(self, content: Tensor, position: Tensor, reach: int) -> Tensor:
        """(H·B, b, reach), −∞ for keys after the query."""
        queries = content.shape[1]
        by_distance = torch.bmm(position, self.r[:, -reach - 1 :].transpose(1, 2))
        scores = _shifted(by_distance, self.batches, queries)
        accumulate(scores, content, self.k[:, :reach].transpose(1, 2))
        scores[:, :, reach - queries :].masked_fill_(self.future[:queries, :queries], float("-inf"))
        return scores


class _RelativeAttention(torch.autograd.Function):
    """Saves what it is given, what it returns and the logarithms of the softmax's sums; the weights are
    computed again in backward.

    On a CPU, three quarters of a layer's time are matrix products near the machine's peak. Position
    scores, the memory's keys and values, and W_r R, all made anew for each segment, are why it takes
    about 0.3 of the time of dense attention at T = 16,384 with S = M = 512. Keeping the weights would
    save two of the eleven products a block, for H·S·J numbers a layer.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, r: Tensor, u: Tensor, v: Tensor, count: bool
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _Blocks(q, kv, r, u, v)
        y = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(blocks.batches, blocks.queries, 1, dtype=wide)
        usage = q.new_zeros(blocks.batch, blocks.keys, dtype=wide) if count else None
        for begin, end, reach in blocks.spans():
            scores = blocks.scores(*blocks.biased(begin, end), reach)
            highest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(dim=-1, keepdim=True, dtype=wide)
            found = torch.bmm(weights, blocks.values[:, :reach]).div_(total)
            y[:, :, begin:end] = found.view(blocks.heads, blocks.batch, -1, blocks.head_dim)
            if usage is not None:
                received = weights.div_(total).sum(dim=1, dtype=wide)
                usage[:, :reach] += received.view(blocks.heads, blocks.batch, reach).mean(dim=0)
            lse[:, begin:end] = total.log_().add_(highest)
        ctx.save_for_backward(q, kv, r, u, v, y, lse)
        if usage is not None:
            ctx.mark_non_differentiable(usage)
        return y, usage

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, kv, r, u, v, y, lse = ctx.saved_tensors
        blocks = _Blocks(q, kv, r, u, v)
        dq, dr = torch.empty_like(q), torch.zeros_like(r)
        dkv = kv.new_zeros(kv.shape)
        dk, dvalues = (t.view(blocks.batches, blocks.keys, -1) for t in dkv.unbind(0))
        du, dv = torch.zeros_like(u), torch.zeros_like(v)
        for begin, end, reach in blocks.spans():
            content, position = blocks.biased(begin, end)
            weights = blocks.scores(content, position, reach).sub_(lse[:, begin:end]).exp_()
            dy_block = dy[:, :, begin:end].reshape(content.shape)
            accumulate(dvalues[:, :reach], weights.transpose(1, 2), dy_block)
            # the gradient of the scores is made where `_shifted` makes it that of the scores by distance
            by_distance = q.new_empty(blocks.heads, position.shape[1], reach + 1)
            # these are distances that no query has
            by_distance.view(blocks.batches, -1)[:, : end - begin].zero_()
            scores = _shifted(by_distance, blocks.batches, end - begin)
            torch.bmm(dy_block, blocks.values[:, :reach].transpose(1, 2), out=scores)
            scores.sub_((dy_block * y[:, :, begin:end].reshape(content.shape)).sum(dim=-1, keepdim=True))
            scores.mul_(weights)
            accumulate(dk[:, :reach], scores.transpose(1, 2), content)
            accumulate(dr[:, -reach - 1 :], by_distance.transpose(1, 2), position)
            shape = blocks.heads, blocks.batch, end - begin, blocks.head_dim
            d_content = torch.bmm(scores, blocks.k[:, :reach]).view(shape)
            d_position = torch.bmm(by_distance, r[:, -reach - 1 :]).view(shape)
            torch.add(d_content, d_position, out=dq[:, :, begin:end])
            du += d_content.sum(dim=(1, 2))
            dv += d_position.sum(dim=(1, 2))
        return dq.mul_(blocks.scale), dkv, dr, du.mul_(blocks.scale), dv.mul_(blocks.scale), None


class Attended(NamedTuple):
    """Outputs (B, S, C), and what later steps may reuse."""

    y: Tensor
    q: Tensor
    """Queries without biases (H, B, S, D)."""
    kv: Tensor
    """Keys and values of memory and segment (2, H, B, J, D)."""
    usage: Tensor | None
    """(B, J) attention that each position received from the segment, mean over heads; if counted."""


class Recurrent(Attention):
    """A layer that attends to a memory of its own earlier inputs and to its segment up to the query.

    The memory is detached: it takes part in the gradients of weights alone.
    """

    caps = Caps(causal=True, bidirectional=False, stateful=True)
    padding = f"blocks of {BLOCK} queries on the diagonal compute the scores that the future forbids"

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
    def plan(cls, config: VariantConfig) -> Segments:
        """Segments in order."""

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Memories hold the past alone, and sinusoids come in pairs."""
        if dims.d_model % 2:
            return f"d_model={dims.d_model}: sinusoidal positions need an even number of channels"
        return super().unsupported(config, dims, causal=causal)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, B, S, D) of x (B, S, C), keys and values (2, H, B, J, D), positions (H, J + 1, D)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        # two products, so that backward computes no gradient of the memory, which would be dropped
        kv = torch.cat([self.kv(memory), self.kv(x)], dim=1) if memory.shape[1] else self.kv(x)
        kv = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 3, 0, 1, 4)
        r = self.r(sinusoids(kv.shape[3], x.shape[-1], x)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return q, kv, r

    def attend(self, x: Tensor, memory: Tensor, *, count: bool = False) -> Attended:
        """x (B, S, C) reads all of memory (B, M, C) and itself up to the query; `count` asks for `usage`."""
        q, kv, r = self.project(x, memory)
        u, v = self.u.to(q.dtype), self.v.to(q.dtype)  # under autocast, projections are narrower
        y, usage = _RelativeAttention.apply(q, kv, r, u, v, count)  # type: ignore[no-untyped-call]
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, usage)

    def plainly_attend(self, x: Tensor, memory: Tensor) -> Attended:
        """`attend` for reading."""
        q, kv, r = self.project(x, memory)
        y, weights = plain_attention(q, kv, r, self.u, self.v)
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, weights.sum(dim=2).mean(dim=0))

    def segment_flops(self, dims: Dims, tokens: int, memory: int) -> Flops:
        """Forward FLOPs of one segment: content, position and weighted sum are 2·C for each pair.

        The keys and values of the memory and the projection of the positions are counted as attention.
        """
        pairs = tokens * memory + tokens * (tokens + 1) // 2
        channels = dims.d_model
        again = 4 * dims.batch_size * memory * channels**2 + 2 * (tokens + memory) * channels**2
        return Flops(
            Projections.flops(dims.batch_size, tokens, channels),
            6 * dims.batch_size * channels * pairs + again,
        )


def slide(memory: Tensor, x: Tensor, drop: int) -> Tensor:
    """The last of memory (B, M, C) and x (B, S, C) without the oldest `drop` positions, detached."""
    kept = memory[:, drop:], x[:, max(0, drop - memory.shape[1]) :]
    return torch.cat(kept, dim=1).detach()
