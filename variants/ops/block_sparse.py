"""One softmax over a union of key sets, each computed by itself where its keys lie close together.

Shapes: B batch, T tokens, C channels, H heads, D = C / H.

A pattern is given as *parts*: rectangles or triangles of (query, key) pairs that no other part has,
each over strided views of the sequence. `UnionAttention` is the base of variants made of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.base import Dims, SequenceMixer, VariantConfig
from variants.ops.memoizable import repeatable
from variants.ops.strided_parts import Part, from_plain, piece_size, to_plain
from variants.ops.tile_size import device_type

EMPTY = -1e30
"""Logsumexp over no keys: finite, so that the difference of two of them is not NaN."""


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


def _forward(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], impl: str) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, D) and the logsumexp of all scores of a query (B, H, T)."""
    attend, _ = KERNELS[impl]
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
    return y.to(q.dtype), lse


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, parts: Sequence[Part], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    No partial result is needed: they follow from the weights exp(score − logsumexp of all), so the
    sequence-sized tensors kept are q, k, v and y alone.
    """
    _, attend_backward = KERNELS[impl]
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the kernel takes rows without gaps
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [_rows_like(q, wide) for _ in range(3)]
    size = piece_size(q.shape[2], q.device)
    for part in parts:
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
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


@repeatable
class _UnionAttention(torch.autograd.Function):
    """One softmax over the keys of all parts, put together from each part's own by its logsumexp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
        y, lse = _forward(q, k, v, parts, impl)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.parts, ctx.impl = parts, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        return *_backward(dy, q, k, v, y, lse, ctx.parts, ctx.impl), None, None


# --- the same as operators, which the compiler takes whole: it cannot follow writes through `as_strided` ---

_forward_operator = torch.library.custom_op(
    "longctx_bench::union_attention",
    lambda q, k, v, masks, numbers, impl: _forward(q, k, v, from_plain(masks, numbers), impl),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] masks, SymInt[] numbers, str impl) -> (Tensor, Tensor)",
)
_backward_operator = torch.library.custom_op(
    "longctx_bench::union_attention_backward",
    lambda dy, q, k, v, y, lse, masks, numbers, impl: _backward(
        dy, q, k, v, y, lse, from_plain(masks, numbers), impl
    ),
    mutates_args=(),
    schema="(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor[] masks, SymInt[] numbers,"
    " str impl) -> (Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _forward_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _rows_like(q, q.dtype), q.new_empty(q.shape[:3], dtype=wide)


@_backward_operator.register_fake
def _backward_shapes(dy: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_like(q, q.dtype), _rows_like(q, q.dtype), _rows_like(q, q.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, masks, ctx.numbers, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, *masks)


def _operator_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, y, lse, *masks = ctx.saved_tensors
    grads = _backward_operator(dy, q, k, v, y, lse, masks, ctx.numbers, ctx.impl)
    return *grads, [None] * len(masks), None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_keep)


def union_attention(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str) -> Tensor:
    """Softmax attention over the union of the parts' keys, (B, H, T, D) → (B, H, T, D); 0 without any."""
    y: Tensor
    if torch.compiler.is_compiling():
        y, _ = _forward_operator(q, k, v, *to_plain(parts), impl)
    else:  # operation by operation, so that counters see what is computed and held
        y = _UnionAttention.apply(q, k, v, parts, impl)  # type: ignore[no-untyped-call]
    return y


def union_impl(device: torch.device) -> str:
    """Which of `KERNELS` suits a device: fused on the CPU, plain elsewhere."""
    return "fused" if device_type(device) == "cpu" else "plain"


@dataclass(frozen=True, kw_only=True)
class UnionConfig(VariantConfig):
    """Knobs of every variant that is computed in parts."""

    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of the parts. fused: torch's CPU attention kernel, part by part. plain: matrix products,
    on any device. auto: fused on the CPU, plain elsewhere."""


class UnionAttention(SequenceMixer):
    """Base of variants that are computed in parts: which implementation runs, and running it."""

    config: UnionConfig

    @property
    def impl(self) -> str:
        """fused or plain: what `auto` stands for where the parameters are, or where it is planned for."""
        if self.config.impl == "auto":
            return union_impl(next(self.parameters()).device)
        return self.config.impl

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """The fused kernel anywhere but on the CPU."""
        assert isinstance(config, UnionConfig)
        if config.impl == "fused" and (kind := device_type(device)) != "cpu":
            return f"impl=fused: the kernel is the CPU's; on {kind} use auto or plain"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part]) -> Tensor:
        """Softmax over the union of the parts' keys, (B, H, T, D) → (B, H, T, D).

        Raises ValueError for impl=fused away from the CPU.
        """
        if reason := UnionAttention.missing(self.config, self.dims, device=q.device, dtype=q.dtype):
            raise ValueError(reason)
        y: Tensor = union_attention(q, k, v, parts, self.impl)
        return y
