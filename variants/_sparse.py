"""What the two patterns of Sparse Transformers share (Child 2019, arXiv:1904.10509).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride, G groups of a part.

A pattern is computed as *parts*: rectangles or triangles of (query, key) pairs that no other part
has, each over strided views of the sequence. `union_attention` takes one softmax over all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants import patterns
from variants.base import Attention, Caps, Complexity, Dims, Flops, Out, VariantConfig
from variants.layers import Projections, masked_attention

HEAD_MODES = ("merged", "split", "interleaved")
IMPLS = ("auto", "fused", "plain")

EMPTY = -1e30
"""Logsumexp over no keys: finite, so that the difference of two of them is not NaN."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """`groups` sets of tokens, each of `rows` runs of `run` neighbouring tokens.

    Token (g, r, i) of head h is start + g·group_step + r·row_step + i + h·head_step.
    """

    start: int
    groups: int = 1
    group_step: int = 0
    rows: int = 1
    row_step: int = 0
    run: int = 1
    head_step: int = 0

    @property
    def length(self) -> int:
        """Tokens of one group."""
        return self.rows * self.run

    def piece(self, first: int, count: int) -> Cut:
        """Groups [first, first + count) alone."""
        fields = {**self.__dict__, "start": self.start + first * self.group_step, "groups": count}
        return Cut(**fields)

    def view(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B, H, G, rows, run, …), a view."""
        batch, heads, token, *rest = x.stride()
        return x.as_strided(
            (*x.shape[:2], self.groups, self.rows, self.run, *x.shape[3:]),
            (
                batch,
                heads + self.head_step * token,
                self.group_step * token,
                self.row_step * token,
                token,
                *rest,
            ),
            x.storage_offset() + self.start * token,
        )

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·G, H, rows·run, …), a view where strides allow."""
        x = self.view(x).transpose(1, 2).flatten(3, 4).flatten(0, 1)
        # rows a power of two apart fall into the same cache sets: copied once they are read faster
        return x.contiguous() if self.run == 1 < self.rows else x

    def scatter(self, x: Tensor) -> Tensor:
        """(B·G, H, rows·run, …) → (B, H, G, rows, run, …): what `gather` undoes."""
        return x.unflatten(2, (self.rows, self.run)).unflatten(0, (-1, self.groups)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pairs (query, key) of the same group, of heads [first_head, last_head).

    `causal`: the n-th query reads keys up to the n-th. `mask`: True where it may read, (queries, keys)
    or (H, queries or 1, keys); a query may be left with no key.
    """

    heads: tuple[int, int]
    queries: Cut
    keys: Cut
    causal: bool = False
    mask: Tensor | None = None

    def pieces(self, size: int) -> list[tuple[Cut, Cut]]:
        """The groups, a few at a time: about `size` queries each, so that temporaries stay small."""
        groups, step = self.queries.groups, max(1, size // self.queries.length)
        spans = [(first, min(step, groups - first)) for first in range(0, groups, step)]
        return [(self.queries.piece(*span), self.keys.piece(*span)) for span in spans]

    def bias(self, like: Tensor) -> Tensor | None:
        """The mask as something to add to scores, (1, H or 1, queries or 1, keys)."""
        if self.mask is None:
            return None
        bias = torch.zeros(self.mask.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~self.mask, -math.inf)
        whole: Tensor = bias.expand((1,) * (4 - bias.dim()) + bias.shape)
        return whole


def piece_size(seq_len: int) -> int:
    """Queries worked on at a time: few enough for the cache, and at most 32 pieces a sequence."""
    return max(4096, -(-seq_len // 32))


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel: outputs (N, H, queries, D) and logsumexp (N, H, queries)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias
    )
    if bias is not None:  # the kernel says 0 where there is no key
        lse = lse.masked_fill((bias == -math.inf).all(-1), EMPTY)
    return out, lse


def _fused_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, where y and lse may come from a softmax over more keys than these."""
    grads: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, causal, attn_mask=bias
        )
    )
    return grads


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(
        q.shape[-1]
    )
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(later, -math.inf)
    return scores if bias is None else scores + bias


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """`_fused` by matrix products."""
    scores = _scores(q, k, bias, causal)
    lse = scores.logsumexp(-1).clamp(min=EMPTY)
    return (scores - lse[..., None]).exp_().to(v.dtype) @ v, lse


def _plain_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_fused_backward` by matrix products (Dao 2022, arXiv:2205.14135, appendix B.2)."""
    weights = (_scores(q, k, bias, causal) - lse[..., None]).exp_()
    share = (dy * y).sum(-1, keepdim=True, dtype=weights.dtype)
    d_scores = (weights * ((dy @ v.transpose(-1, -2)) - share) / math.sqrt(q.shape[-1])).to(q.dtype)
    return d_scores @ k, d_scores.transpose(-1, -2) @ q, weights.to(dy.dtype).transpose(-1, -2) @ dy


KERNELS = {"fused": (_fused, _fused_backward), "plain": (_plain, _plain_backward)}


def _rows_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of x (B, H, T, D), laid out (B, T, H, D) as projections read them."""
    batch, heads, seq_len, channels = x.shape
    return torch.zeros(batch, seq_len, heads, channels, dtype=dtype, device=x.device).transpose(1, 2)


class _UnionAttention(torch.autograd.Function):
    """One softmax over the keys of all parts, put together from each part's own by its logsumexp.

    The backward pass needs no partial result: a part's gradients follow from the weights
    exp(score − logsumexp of all), so the sequence-sized tensors kept are q, k, v and y alone.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
        attend, _ = KERNELS[impl]
        # sums over parts are float32 or wider: each part would round again
        wide = torch.promote_types(q.dtype, torch.float32)
        y = _rows_like(q, wide)
        lse = torch.full(q.shape[:3], EMPTY, dtype=wide, device=q.device)
        size = piece_size(q.shape[2])
        for part in parts:
            bias = part.bias(q)
            q_h, k_h, v_h, y_h, lse_h = (t[:, slice(*part.heads)] for t in (q, k, v, y, lse))
            for queries, keys in part.pieces(size):
                found = attend(queries.gather(q_h), keys.gather(k_h), keys.gather(v_h), bias, part.causal)
                y_part, lse_part = (queries.scatter(t) for t in found)
                lse_all = queries.view(lse_h)
                share = (lse_part - lse_all).sigmoid_()
                queries.view(y_h).lerp_(y_part.to(wide), share[..., None])
                lse_all.copy_(torch.logaddexp(lse_all, lse_part))
        y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.parts, ctx.impl = parts, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        _, attend_backward = KERNELS[ctx.impl]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the kernel takes rows without gaps
        wide = torch.promote_types(q.dtype, torch.float32)
        grads = [_rows_like(q, wide) for _ in range(3)]
        size = piece_size(q.shape[2])
        for part in ctx.parts:
            bias = part.bias(q)
            heads = slice(*part.heads)
            q_h, k_h, v_h, y_h, lse_h, dy_h = (t[:, heads] for t in (q, k, v, y, lse, dy))
            for queries, keys in part.pieces(size):
                found = attend_backward(
                    queries.gather(dy_h),
                    queries.gather(q_h),
                    keys.gather(k_h),
                    keys.gather(v_h),
                    queries.gather(y_h),
                    queries.gather(lse_h).contiguous(),
                    bias,
                    part.causal,
                )
                for total, cut, grad in zip(grads, (queries, keys, keys), found, strict=True):
                    cut.view(total[:, heads]).add_(cut.scatter(grad))
        return *(grad.to(q.dtype) for grad in grads), None, None


def union_attention(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
    """Softmax attention over the union of the parts' keys, (B, H, T, D) → (B, H, T, D); 0 without any."""
    y: Tensor = _UnionAttention.apply(q, k, v, parts, impl)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, kw_only=True)
class SparseConfig(VariantConfig):
    """Knobs of both patterns."""

    stride: int | None = None
    """Stride l in tokens; null: the power of two nearest to √T of the longest sequence that the layer
    is built for (not of the one it is fed: a prefix must be read as it is within the whole)."""
    head_mode: str = "merged"
    """merged: each head reads the union of both factors (eq. 7), the one mode that the paper's
    experiments name (§7.2). split: the first half of the heads reads the near factor, the rest the far
    one (eq. 8). interleaved: even layers read the near factor, odd ones the far one (eq. 6)."""
    impl: str = "auto"
    """fused: torch's CPU attention kernel, part by part. plain: matrix products, on any device. auto:
    fused on the CPU, plain elsewhere."""

    def __post_init__(self) -> None:
        self.require("stride", self.stride is None or self.stride >= 1, "null or an integer ≥ 1")
        self.require("head_mode", self.head_mode in HEAD_MODES, " or ".join(HEAD_MODES))
        self.require("impl", self.impl in IMPLS, " or ".join(IMPLS))

    def stride_for(self, seq_len: int) -> int:
        """The stride of a layer built for sequences up to seq_len."""
        return self.stride or 1 << math.floor(math.log2(seq_len) / 2 + 0.5)


@dataclass(frozen=True, kw_only=True)
class Role:
    """What heads [first, last) of a layer read: "near", "far" or "merged"."""

    factor: str
    first: int
    last: int


class SparseAttention(Attention):
    """Base of both patterns: which heads read which factor, and the bookkeeping.

    Positions are rotary, as for every variant here; the paper adds learnt embeddings of the row and
    the column of a token in a matrix of width l (§5.3).
    """

    config: SparseConfig
    caps = Caps(causal=True, bidirectional=True)
    paper = "Child et al. 2019, Sparse Transformers, arXiv:1904.10509"
    complexity = Complexity(time=1.5, memory=1.5, formula="T·√T", source="Child 2019, abstract and §4.2")

    def __init__(self, config: SparseConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        self.stride = config.stride_for(dims.seq_len)
        heads, half = dims.heads, dims.heads // 2
        if config.head_mode == "split":
            near, far = Role(factor="near", first=0, last=half), Role(factor="far", first=half, last=heads)
            self.roles: tuple[Role, ...] = (near, far)
        elif config.head_mode == "interleaved":
            self.roles = (Role(factor="far" if layer % 2 else "near", first=0, last=heads),)
        else:
            self.roles = (Role(factor="merged", first=0, last=heads),)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Splitting needs two heads."""
        assert isinstance(config, SparseConfig)
        if config.head_mode == "split" and dims.heads < 2:
            return f"heads={dims.heads}: head_mode=split needs at least 2"
        return super().unsupported(config, dims, causal=causal)

    @property
    def impl(self) -> str:
        """fused or plain."""
        if self.config.impl == "auto":
            return "fused" if self.projections.out.weight.device.type == "cpu" else "plain"
        return self.config.impl

    @abstractmethod
    def parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """The pairs that a role's heads read, each in exactly one part."""

    @abstractmethod
    def rule(self, seq_len: int, role: Role, head: int, *, causal: bool) -> patterns.Rule:
        """What a head reads, as a pure rule; causality is added to it."""

    @abstractmethod
    def pairs(self, seq_len: int, role: Role, head: int, *, causal: bool) -> int:
        """How many pairs that is, in closed form."""

    @abstractmethod
    def carried(self, seq_len: int, role: Role, head: int) -> int:
        """Tokens whose keys and values a head of a causal model can still read after seq_len tokens."""

    def forward(self, x: Tensor, *, causal: bool, state: Any = None) -> Out:
        """(B, T, C) → Out; carries no state."""
        if self.impl == "fused" and x.device.type != "cpu":
            raise ValueError(
                f"impl=fused: the kernel is the CPU's; on {x.device.type} allowed is auto or plain"
            )
        q, k, v = self.projections.split(x)
        parts = [
            part
            for role in self.roles
            for part in self.parts(x.shape[1], role, causal=causal, device=x.device)
        ]
        return Out(self.projections.merge(union_attention(q, k, v, parts, self.impl)))

    def allowed(self, seq_len: int, *, causal: bool) -> Tensor:
        """(H, T, T) bool: which keys a query may read, head by head."""
        rules = [
            self.rule(seq_len, role, h, causal=causal)
            for role in self.roles
            for h in range(role.first, role.last)
        ]
        if causal:
            rules = [patterns.both(rule, patterns.causal) for rule in rules]
        return torch.stack([patterns.matrix(rule, seq_len) for rule in rules])

    def reference(self, x: Tensor, *, causal: bool) -> Tensor:
        """The oracle on each head's own pattern; a query with no key gets 0."""
        q, k, v = self.projections.split(x)
        allowed = self.allowed(x.shape[1], causal=causal).to(x.device)
        some = allowed.any(-1, keepdim=True)
        return self.projections.merge(masked_attention(q, k, v, allowed | ~some) * some)

    def flops(self, dims: Dims, *, causal: bool) -> Flops:
        """Scores and weighted sum: 4·D for each head's pairs."""
        pairs = sum(
            self.pairs(dims.seq_len, role, h, causal=causal)
            for role in self.roles
            for h in range(role.first, role.last)
        )
        return Flops(
            Projections.flops(dims.batch_size, dims.seq_len, dims.d_model),
            4 * dims.batch_size * dims.head_dim * pairs,
        )

    def state_bytes(self, dims: Dims) -> int:
        """The keys and values that later queries can still read, head by head."""
        tokens = sum(
            self.carried(dims.seq_len, role, h) for role in self.roles for h in range(role.first, role.last)
        )
        return 2 * dims.batch_size * tokens * dims.head_dim * dims.element_bytes

    def pattern(self, seq_len: int, *, causal: bool) -> Tensor:
        """What any head may read."""
        return self.allowed(seq_len, causal=causal).any(dim=0)
