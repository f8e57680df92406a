"""Bidirectional linear attention over features: y_t = φ(q_t) S / (φ(q_t)·z), with sums over all keys.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, m features, V channels
of values.

S = Σ φ(k_s) v_sᵀ and z = Σ φ(k_s). The causal form is in `gated_scan`, and the form for positive
random features, which need levels, in `features.linear_attention`. For the backward pass are saved:
inputs, output, normalisers and the sums. Features are computed again, in segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.feature_sums import as_one_chunk, split_segments, write_chunks
from variants.ops.recurrences.scan_chunks import SEGMENT
from variants.ops.recurrences.scan_features import FeatureMap


def full_flops(seq_len: int, features: int, channels: int) -> int:
    """Forward FLOPs of one sequence: a product of each key with its value, and of each query with the sums.
    `channels` includes the normaliser's."""
    return 4 * seq_len * features * channels


def _extended(values: Tensor) -> Tensor:
    """Values (N, T, V) with 1 as one more channel."""
    return torch.nn.functional.pad(values, (0, 1), value=1.0)


@repeatable
class _FullSums(torch.autograd.Function):
    """One sum over all keys, then one product for each query; segments bound the memory of the features."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        features: FeatureMap,
        table: Tensor | None,
        least: float | None,
        tokens: int,
    ) -> Tensor:
        batch, heads, seq_len, channels = v.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        y = v.new_empty(batch, seq_len, heads, channels).transpose(1, 2)
        normaliser = v.new_empty(batch, heads, seq_len, 1, dtype=wide)
        width = features.width(q.shape[-1], table)
        sums = v.new_zeros(batch * heads, width, channels + 1, dtype=wide)
        for parts in split_segments(tokens, 1, k, v):
            keys, values = (as_one_chunk(x) for x in parts)
            sums = torch.baddbmm(sums, features.features(keys, table).mT, _extended(values))
        for q_part, y_part, norms_part in split_segments(tokens, 1, q, y, normaliser):
            found = features.features(as_one_chunk(q_part), table) @ sums
            norms = found[..., channels:]
            if least is not None:
                norms = norms.clamp(min=least)
            write_chunks(y_part, found[..., :channels] / norms)
            write_chunks(norms_part, norms)
        ctx.save_for_backward(q, k, v, table, y, normaliser, sums)
        ctx.features, ctx.least, ctx.tokens = features, least, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, y, normaliser, sums = ctx.saved_tensors
        features: FeatureMap = ctx.features
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        of_sums = torch.zeros_like(sums)
        for *parts, target in split_segments(ctx.tokens, 1, q, y, normaliser, grad, g_q):
            raw, y_part, norms, g = (as_one_chunk(x) for x in parts)
            g = g / norms
            of_norms = (g * y_part).sum(-1, keepdim=True).neg_()
            if ctx.least is not None:
                of_norms.mul_(norms > ctx.least)
            g = torch.cat([g, of_norms], -1)
            queries = features.features(raw, table)
            of_sums = torch.baddbmm(of_sums, queries.mT, g)
            write_chunks(target, features.gradient(g @ sums.mT, queries, raw, table))
        for k_part, v_part, k_target, v_target in split_segments(ctx.tokens, 1, k, v, g_k, g_v):
            raw = as_one_chunk(k_part)
            keys = features.features(raw, table)
            write_chunks(v_target, (keys @ of_sums)[..., :-1])
            of_keys = _extended(as_one_chunk(v_part)) @ of_sums.mT
            write_chunks(k_target, features.gradient(of_keys, keys, raw, table))
        return g_q, g_k, g_v, None, None, None, None


def full_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: FeatureMap,
    table: Tensor | None = None,
    least: float | None = None,
    device_type: str,
) -> Tensor:
    """Outputs (B, H, T, V) for queries and keys (B, H, T, D), and values (B, H, T, V).

    `table` are constants of the feature map. `least` is the least normaliser, None for any. `device_type`
    decides the size of the segments.
    """
    widest = max(features.width(q.shape[-1], table), v.shape[-1])
    tokens = max(1, SEGMENT.on(device_type) // widest)
    y: Tensor = _FullSums.apply(q, k, v, features, table, least, tokens)  # type: ignore[no-untyped-call]
    return y
