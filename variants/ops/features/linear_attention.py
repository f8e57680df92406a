"""Bidirectional linear attention over positive features, for `variants.attention.performer`.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of a head, m features.

With features φ the output of query t is Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), with sums over all s. The
causal form, with sums over s ≤ t, is in `causal_linear_attention`. For the backward pass both
forms save their inputs, their output, one number for each query and the small running sums (m, D). They
compute the features again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.features.positive_features import FeatureMap
from variants.ops.memoizable import repeatable
from variants.ops.recurrences import feature_sums
from variants.ops.recurrences.feature_sums import Sums, as_one_chunk, empty_sums, split_segments, write_chunks


@repeatable
class _FullFavor(torch.autograd.Function):
    """One sum over all keys, then one product for each query; segments bound the memory of the features."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, tokens: int
    ) -> Tensor:
        feature_map = FeatureMap(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
        normaliser = directions.new_empty(batch, heads, seq_len, 1)
        start, level = empty_sums(directions, batch * heads, softmax)
        sums = Sums.empty(directions, 2, batch * heads)  # [0]: all segments so far; [1]: the current one
        for s, zeros in zip(sums, start, strict=True):
            s[0] = zeros
        for k_part, v_part in split_segments(tokens, 1, k, v):
            keys, values = feature_map.keys(as_one_chunk(k_part)), as_one_chunk(v_part)
            levels = torch.stack([level, torch.maximum(level, keys.amax(1)) if softmax else level])
            level = levels[1]
            sums.put(
                slice(1, 2),
                values,
                torch.ones_like(values[..., :1]),
                feature_map.keys_at(keys, level[:, None]),
            )
            sums.accumulate(levels)
            for s in sums:
                s[0] = s[1]
        for q_part, *targets in split_segments(tokens, 1, q, y, normaliser):
            queries = feature_map.queries(as_one_chunk(q_part))
            highest = feature_map.highest(queries, level[:, None])
            features = feature_map.queries_at(feature_map.lower(queries, highest), level[:, None])
            values, norms = sums.at(slice(1)).read(features)
            for target, part in zip(targets, (values.div_(norms), norms.log2_().add_(highest)), strict=True):
                write_chunks(target, part)
        ctx.save_for_backward(
            q, k, v, directions, y, normaliser, *(s[:1].clone() for s in sums), level.clone()
        )
        ctx.softmax, ctx.tokens = softmax, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, normaliser, values, norms, level = ctx.saved_tensors
        sums = Sums(values, norms)
        feature_map = FeatureMap(directions, ctx.softmax)
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        g_sums, g_own = (Sums(*(torch.zeros_like(s) for s in sums)) for _ in range(2))
        for *parts, g_part in split_segments(ctx.tokens, 1, q, y, normaliser, grad, g_q):
            q_part, y_part, normaliser_part, g = (as_one_chunk(x) for x in parts)
            queries = feature_map.queries(q_part, normaliser_part)
            features = feature_map.queries_at(queries, level[:, None])
            g_norm = (y_part * g).sum(-1, keepdim=True).neg_()
            g_own.put(slice(None), g, g_norm, features)
            for total, own in zip(g_sums, g_own, strict=True):
                total.add_(own)
            g_queries = sums.read_back(g, g_norm)
            if ctx.softmax:
                g_queries.mul_(features)
            write_chunks(g_part, feature_map.queries_backward(g_queries, queries, normaliser_part))
        for k_part, v_part, g_k_part, g_v_part in split_segments(ctx.tokens, 1, k, v, g_k, g_v):
            part, values = as_one_chunk(k_part), as_one_chunk(v_part)
            keys = feature_map.keys(part)
            features = feature_map.keys_at(keys, level[:, None])
            g_keys = g_sums.read_back(values, torch.ones_like(values[..., :1]))
            if ctx.softmax:
                g_keys.mul_(features)
            write_chunks(g_k_part, feature_map.keys_backward(g_keys, keys, part))
            write_chunks(g_v_part, g_sums.read(features)[0])
        return g_q, g_k, g_v, None, None, None


def full_favor(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, device_type: str | None = None
) -> Tensor:
    """Bidirectional linear attention: queries, keys and values (B, H, T, D) → (B, H, T, D).

    `directions` (m, D) are scaled as in `FeatureMap` and get no gradient. `device_type` decides the size of
    the segments; None: the device of q.
    """
    tokens = feature_sums.SEGMENT.on(device_type or q.device.type)
    y: Tensor = _FullFavor.apply(q, k, v, directions, softmax, tokens)  # type: ignore[no-untyped-call]
    return y
