"""Causal linear attention over features that are numbers, in few large operations.

Shapes: B batch, H heads, T tokens, D channels of a head, m features.

The mathematics is that of `causal_linear_attention`: Σ_{s ≤ t} φ(q_t)·φ(k_s) v_s / Σ_{s ≤ t} φ(q_t)·φ(k_s).
The normaliser is one more channel of the values. Features: see `scaled_features`; the sums over keys:
`LinearProducts`. For the backward pass are saved: inputs, output, normalisers and the states between
segments. Features are computed again.

Difference to `causal_linear_attention`: a later token whose value is infinite or NaN reaches earlier queries
of its chunk (0 · NaN is NaN), as in fused kernels of softmax attention. A finite one changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.feature_sums import split_segments
from variants.ops.linear_products import ChunkedProducts, LinearProducts
from variants.ops.memoizable import repeatable
from variants.ops.scaled_features import ScaledFeatures, feature_dtype, with_normaliser
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**14, accelerator=2**20)
"""Tokens of all sequences together whose features exist at a time, rounded up to whole chunks. For 256
features in bfloat16, a tensor of features of 2^20 tokens has 512 MiB, and its exponents have 1 GiB."""


@repeatable
class _ScaledFavor(torch.autograd.Function):
    """Processes the segments in order with the state; in backward, in reverse with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        directions: Tensor,
        softmax: bool,
        products: LinearProducts,
        chunk: int,
        tokens: int,
    ) -> Tensor:
        features = ScaledFeatures(directions, softmax, feature_dtype(q.dtype))
        batch, heads, seq_len, head_dim = q.shape
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
        normaliser = directions.new_empty(batch, heads, seq_len, 1)
        states: list[Tensor] = []
        for segment in split_segments(tokens, chunk, q, k, v, y, normaliser):
            states = _read(features, products, states, *segment)
        ctx.save_for_backward(q, k, v, directions, y, normaliser, *states[:-1])
        ctx.softmax, ctx.products, ctx.chunk, ctx.tokens = softmax, products, chunk, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, normaliser, *states = ctx.saved_tensors
        features = ScaledFeatures(directions, ctx.softmax, feature_dtype(q.dtype))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        segments = split_segments(ctx.tokens, ctx.chunk, q, k, v, y, normaliser, grad, *grads)
        of_end = torch.zeros_like(states[-1])
        for segment, state in zip(reversed(segments), reversed(states), strict=True):
            of_end = _read_backward(features, ctx.products, state, of_end, *segment)
        return *grads, None, None, None, None, None


def _rows(products: LinearProducts, x: Tensor, dtype: torch.dtype) -> Tensor:
    return products.rows(x).to(dtype, memory_format=torch.contiguous_format)


def _weighted(features: ScaledFeatures, values: Tensor, weights: Tensor | None) -> Tensor:
    return with_normaliser(values if weights is None else values * weights, weights, features.dtype)


@repeatable
def _read(
    features: ScaledFeatures,
    products: LinearProducts,
    states: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
) -> list[Tensor]:
    """Write the outputs of a segment to y, and its normalisers to `normaliser`.

    Returns the states before all segments so far and after this one.
    """
    wide = features.directions.dtype
    keys, weights = features.of(_rows(products, k, wide))
    values = _weighted(features, products.rows(v), weights)
    queries, _ = features.of(_rows(products, q, wide))
    states = states or [products.empty_state(keys, values)]
    found, end = products.forward(queries, keys, values, states[-1])
    sums, norms, _ = found.split([q.shape[-1], 1, found.shape[-1] - q.shape[-1] - 1], dim=-1)
    y.copy_(products.heads(sums / norms, len(q)))
    normaliser.copy_(products.heads(norms, len(q)))
    return [*states, end]


@repeatable
def _read_backward(
    features: ScaledFeatures,
    products: LinearProducts,
    state: Tensor,
    of_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    *grads: Tensor,
) -> Tensor:
    """Write a segment's gradients of q, k and v to `grads`; return the gradient of the state before it."""
    wide, head_dim, batch = features.directions.dtype, q.shape[-1], len(q)
    of_norms = (y * grad).sum(-1, keepdim=True, dtype=wide).neg_().div_(normaliser)
    g = with_normaliser(products.rows(grad / normaliser), products.rows(of_norms), features.dtype)
    x_k = _rows(products, k, wide)
    keys, weights = features.of(x_k)
    values = _weighted(features, products.rows(v), weights)
    queries, _ = features.of(_rows(products, q, wide))
    g_queries, g_keys, g_values, of_state = products.backward(g, of_end, queries, keys, values, state)
    of_values = g_values[..., :head_dim]
    parts = (
        features.queries_backward(g_queries, queries),
        features.keys_backward(g_keys, keys, x_k),
        of_values if weights is None else of_values * weights,
    )
    for target, part in zip(grads, parts, strict=True):
        target.copy_(products.heads(part, batch))
    return of_state


def scaled_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    products: LinearProducts,
    chunk: int,
    device_type: str | None = None,
) -> Tensor:
    """Causal linear attention: queries, keys and values (B, H, T, D) → (B, H, T, D).

    `directions` (m, D), divided by D^¼, get no gradient. Segments consist of whole chunks of `chunk` tokens.
    `device_type` decides their size; None: the device of q.
    """
    tokens = SEGMENT.on(device_type or q.device.type)
    y: Tensor = _ScaledFavor.apply(q, k, v, directions, softmax, products, chunk, tokens)  # type: ignore[no-untyped-call]
    return y


def chunked_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    chunk: int,
    device_type: str | None = None,
) -> Tensor:
    """`scaled_favor` by matrix products of torch over chunks of `chunk` tokens."""
    chunk = min(chunk, q.shape[2])
    return scaled_favor(q, k, v, directions, softmax, ChunkedProducts(chunk), chunk, device_type)
