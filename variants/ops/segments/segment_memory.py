"""A memory of linear attention that is read by whole segments (Munkhdalai 2024, arXiv:2404.07143, §2.1.2).

Shapes: N sequences, n segments of s tokens, D channels of a head. The memory is a matrix (D, D) and a
normaliser (D,), in float32 or wider. φ(x) = elu(x) + 1.

Both functions save their inputs and compute the features again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.recurrences.scan_features import EluPlusOne

PHI = EluPlusOne()


def features(x: Tensor) -> Tensor:
    """φ(x), in float32 or wider."""
    return PHI.features(x.to(torch.promote_types(x.dtype, torch.float32)), None)


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v)
        keys = features(k)
        return keys.mT @ v.to(keys.dtype), keys.sum(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_matrix: Tensor, d_norm: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ctx.saved_tensors
        keys = features(k)
        d_keys = v.to(keys.dtype) @ d_matrix.mT + d_norm[..., None, :]
        d_values = keys @ d_matrix
        return PHI.gradient(d_keys, keys, k, None).to(k.dtype), d_values.to(v.dtype)


def written(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """φ(K)ᵀV and Σφ(k) of each segment: keys and values (N, n, s, D) → (N, n, D, D) and (N, n, D)."""
    sums: tuple[Tensor, Tensor] = _Written.apply(k, v)  # type: ignore[no-untyped-call]
    return sums


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, matrix: Tensor, norm: Tensor) -> Tensor:
        ctx.save_for_backward(q, matrix, norm)
        queries = features(q)
        return (queries @ matrix).div_(queries @ norm[..., None]).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, matrix, norm = ctx.saved_tensors
        queries = features(q)
        weight = (queries @ norm[..., None]).reciprocal_()
        d_sum = dy.to(queries.dtype) * weight
        # y = φM / φz, so the gradient of φz is −dy · y / φz
        d_norm = -(d_sum * (queries @ matrix)).sum(-1, keepdim=True).mul_(weight)
        d_queries = (d_sum @ matrix.mT).addcmul_(d_norm, norm[..., None, :])
        d_matrix = queries.mT @ d_sum
        d_norms = (queries * d_norm).sum(-2)
        return PHI.gradient(d_queries, queries, q, None).to(q.dtype), d_matrix, d_norms


def read(q: Tensor, matrix: Tensor, norm: Tensor) -> Tensor:
    """φ(q)M / φ(q)z: queries (…, s, D), memories (…, D, D) and (…, D) → (…, s, D)."""
    y: Tensor = _Read.apply(q, matrix, norm)  # type: ignore[no-untyped-call]
    return y


def transitions(k: Tensor, norms: Tensor) -> Tensor:
    """The matrix (N, n, D, D) with which the delta rule multiplies the memory: 1 − φ(K)ᵀ(φ(K) / φ(K)z).

    Keys (N, n, s, D), normalisers before each segment (N, n, D). The delta rule writes v − φ(k)M / φ(k)z in
    place of v, so M becomes M + φ(K)ᵀV − φ(K)ᵀ(φ(K)M / φ(K)z).
    """
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    keys = wide.clamp(max=0).exp() + wide.clamp(min=0)  # φ(k), for autograd without operations in place
    relative = keys / (keys @ norms[..., None])
    return torch.eye(k.shape[-1], dtype=keys.dtype, device=k.device) - keys.mT @ relative


def scanned(factors: Tensor, terms: Tensor) -> Tensor:
    """M after each segment, of M ← A·M + B from M = B of the first segment on; A and B are (N, n, D, D).

    By doubling (Hillis and Steele 1986): ⌈log₂ n⌉ steps, in each of which every segment is joined with all
    those before it that a power of two of segments cover.
    """
    span, count = 1, terms.shape[1]
    while span < count:
        later, earlier = factors[:, span:], slice(0, count - span)
        terms = torch.cat([terms[:, :span], later @ terms[:, earlier] + terms[:, span:]], dim=1)
        factors = torch.cat([factors[:, :span], later @ factors[:, earlier]], dim=1)
        span *= 2
    return terms


def scan_products(count: int) -> int:
    """Number of products of two D × D matrices in `scanned`."""
    total, span = 0, 1
    while span < count:
        total += 2 * (count - span)
        span *= 2
    return total
