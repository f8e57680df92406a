"""One softmax over a union of key sets, each computed by itself where its keys lie close together.

Shapes: B batch, T tokens, C channels, H heads, D = C / H; G groups of a part.

A pattern is given as *parts*: rectangles or triangles of (query, key) pairs that no other part has,
each over strided views of the sequence. `UnionAttention` is the base of variants made of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants._pieces import Sizes
from variants._repeats import repeatable
from variants.base import Attention, Dims, VariantConfig

PIECE = Sizes(cpu=2**12, accelerator=2**15)
"""Queries of a sequence that are worked on at a time: on a CPU few enough for the cache."""
MOST_PIECES = 16
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
        x = x[:, :, self.start :]
        batch, heads, token, *rest = x.stride()
        heads, group, row = (
            base + step * token
            for base, step in ((heads, self.head_step), (0, self.group_step), (0, self.row_step))
        )
        size = (*x.shape[:2], self.groups, self.rows, self.run, *x.shape[3:])
        return x.as_strided(size, (batch, heads, group, row, token, *rest))

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·G, H, rows·run, …), a view where strides allow."""
        x = self.view(x).transpose(1, 2).flatten(3, 4).flatten(0, 1)
        # rows a power of two apart fall into the same cache sets: copied once they are read faster
        return x.contiguous() if self.run == 1 < self.rows else x

    def scatter(self, x: Tensor) -> Tensor:
        """(B·G, H, rows·run, …) → (B, H, G, rows, run, …): what `gather` undoes."""
        size = (-1, self.groups, x.shape[1], self.rows, self.run, *x.shape[3:])
        return x.reshape(size).transpose(1, 2)


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
        return bias.unsqueeze(0) if bias.dim() == 3 else bias.unsqueeze(0).unsqueeze(0)


def piece_size(seq_len: int, device: torch.device) -> int:
    """Queries worked on at a time: more than `PIECE` where that would make too many pieces."""
    return max(PIECE.on(device), -(-seq_len // MOST_PIECES))


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


@repeatable
class _UnionAttention(torch.autograd.Function):
    """One softmax over the keys of all parts, put together from each part's own by its logsumexp.

    The backward pass needs no partial result: a part's gradients follow from the weights
    exp(score − logsumexp of all), so the sequence-sized tensors kept are q, k, v and y alone.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
        attend, _ = KERNELS[impl]
        # values are a third of the storage that the projection wrote: a copy lets go of the other two
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
        # sums over parts are float32 or wider: each part would round again
        wide = torch.promote_types(q.dtype, torch.float32)
        y = _rows_like(q, wide)
        lse = torch.full(q.shape[:3], EMPTY, dtype=wide, device=q.device)
        size = piece_size(q.shape[2], q.device)
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
        size = piece_size(q.shape[2], q.device)
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


# the compiler takes no writes through `as_strided`: it compiles what stands around this
@torch.compiler.disable  # type: ignore[untyped-decorator]
def union_attention(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
    """Softmax attention over the union of the parts' keys, (B, H, T, D) → (B, H, T, D); 0 without any."""
    y: Tensor = _UnionAttention.apply(q, k, v, parts, impl)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, kw_only=True)
class UnionConfig(VariantConfig):
    """Knobs of every variant that is computed in parts."""

    IMPLS: ClassVar[tuple[str, ...]] = ("auto", "fused", "plain")

    impl: str = "auto"
    """fused: torch's CPU attention kernel, part by part. plain: matrix products, on any device. auto:
    fused on the CPU, plain elsewhere."""

    def __post_init__(self) -> None:
        self.require("impl", self.impl in self.IMPLS, " or ".join(self.IMPLS))


class UnionAttention(Attention):
    """Base of variants that are computed in parts: which implementation runs, and running it."""

    config: UnionConfig

    @property
    def impl(self) -> str:
        """fused or plain: what `auto` stands for where the parameters are."""
        if self.config.impl == "auto":
            return "fused" if next(self.parameters()).device.type == "cpu" else "plain"
        return self.config.impl

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """The fused kernel anywhere but on the CPU."""
        assert isinstance(config, UnionConfig)
        if config.impl == "fused" and device.type != "cpu":
            return f"impl=fused: the kernel is the CPU's; on {device.type} use auto or plain"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part]) -> Tensor:
        """Softmax over the union of the parts' keys, (B, H, T, D) → (B, H, T, D).

        Raises ValueError for impl=fused away from the CPU.
        """
        if reason := UnionAttention.missing(self.config, self.dims, device=q.device, dtype=q.dtype):
            raise ValueError(reason)
        y: Tensor = union_attention(q, k, v, parts, self.impl)
        return y
