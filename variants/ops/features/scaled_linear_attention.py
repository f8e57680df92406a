"""Causal linear attention over features that are numbers, in few large operations.

Shapes: B batch, H heads, T tokens, D channels of a head, m features; rows: see `LinearProducts`.

The mathematics is that of `causal_linear_attention`: Σ_{s ≤ t} φ(q_t)·φ(k_s) v_s / Σ_{s ≤ t} φ(q_t)·φ(k_s).
The normaliser is one more channel of the values. Features: see `scaled_features`; sums over keys: see
`linear_products`. For the backward pass are saved: inputs, output, normalisers and the states between
segments. Features are computed again.

Difference to `causal_linear_attention`: a later token whose value is infinite or NaN reaches earlier queries
of its chunk (0 · NaN is NaN), as in fused kernels of softmax attention. A finite one changes no bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.features.linear_products import ChunkedProducts, LinearProducts, Store
from variants.ops.features.scaled_features import ALIGNED, ScaledFeatures, exact_or_nan, write
from variants.ops.memoizable import repeatable
from variants.ops.recurrences.feature_sums import split_segments
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**14, accelerator=2**20)
"""Tokens of all sequences together whose features exist at a time, rounded up to whole chunks. 256 features
of 2^20 tokens have 512 MiB in bfloat16."""
LEAST_CHUNK = Sizes(cpu=1, accelerator=128)
"""Tokens of a chunk at least. On an accelerator the states before chunks of 64 tokens would be larger than
the features."""


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
        features = ScaledFeatures.of_dtype(directions, softmax, q.dtype)
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
        features = ScaledFeatures.of_dtype(directions, ctx.softmax, q.dtype)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        segments = split_segments(ctx.tokens, ctx.chunk, q, k, v, y, normaliser, grad, *grads)
        of_end = torch.zeros_like(states[-1])
        for segment, state in zip(reversed(segments), reversed(states), strict=True):
            of_end = _read_backward(features, ctx.products, state, of_end, *segment)
        return *grads, None, None, None, None, None


def _put_features(
    features: ScaledFeatures, products: LinearProducts, x: Tensor, *, weighted: bool
) -> tuple[Store, Tensor | None]:
    """Return the features of x (B, H, T, D), and the weights in rows if x are keys."""
    rows, channels = products.rows(x, features.vector_dtype), x.shape[-1] + ALIGNED
    store = products.store(rows, len(features.directions), channels, features.dtype)
    weights = features.put(store.features, rows, weighted=weighted)
    return store, weights


def _join(
    features: ScaledFeatures, products: LinearProducts, x: Tensor, by: Tensor | None, norms: Tensor | None
) -> Tensor:
    """x · by (B, H, T, D) with `norms` (B, H, T, 1) as one more channel, padded to rows (…, D + 8)."""
    head_dim = x.shape[-1]
    joined = products.empty(x, head_dim + ALIGNED, features.dtype)
    target = products.heads(joined, x)
    if by is None:
        target[..., :head_dim] = x
    else:
        write(target[..., :head_dim], torch.mul, x, by)
    if norms is None:
        target[..., head_dim].fill_(1)
    else:
        target[..., head_dim : head_dim + 1] = norms
    target[..., head_dim + 1 :].zero_()
    return joined


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
    keys, weights = _put_features(features, products, k, weighted=True)
    by = None if weights is None else products.heads(weights, v)
    values = _join(features, products, v, by, by)
    queries, _ = _put_features(features, products, q, weighted=False)
    states = states or [products.empty_state(keys, values, features.directions.dtype)]
    found, end = products.forward(queries, keys, values, states[-1])
    sums, norms, _ = products.heads(found, q).split([q.shape[-1], 1, ALIGNED - 1], dim=-1)
    norms = exact_or_nan(norms)
    write(y, torch.div, sums, norms)
    normaliser.copy_(norms)
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
    g_q: Tensor,
    g_k: Tensor,
    g_v: Tensor,
) -> Tensor:
    """Write a segment's gradients of q, k and v; return the gradient of the state before it."""
    inverse = normaliser.reciprocal()
    of_norms = (y * grad).sum(-1, keepdim=True, dtype=inverse.dtype).neg_().mul_(inverse)
    g = _join(features, products, grad, inverse, of_norms)
    keys, weights = _put_features(features, products, k, weighted=True)
    by = None if weights is None else products.heads(weights, v)
    values = _join(features, products, v, by, by)
    queries, _ = _put_features(features, products, q, weighted=False)
    of_queries, of_keys, of_values, of_state = products.backward(g, of_end, queries, keys, values, state)
    g_q.copy_(products.heads(features.backward(of_queries, queries.features, weighted=False)[0], q))
    along, sums = features.backward(of_keys, keys.features, weighted=True)
    of_v = products.heads(of_values, v)[..., : v.shape[-1]]
    if sums is None or by is None:
        g_k.copy_(products.heads(along, k))
        g_v.copy_(of_v)
    else:
        add = partial(torch.addcmul, value=-(k.shape[-1] ** -0.5))
        write(g_k, add, products.heads(along, k), products.heads(sums, k), k)
        write(g_v, torch.mul, of_v, by)
    return of_state


def scaled_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    products: LinearProducts,
    chunk: int,
    device_type: str,
) -> Tensor:
    """Causal linear attention: queries, keys and values (B, H, T, D) → (B, H, T, D).

    `directions` (m, D), divided by D^¼, get no gradient. Segments consist of whole chunks of `chunk` tokens;
    `device_type` decides their size.
    """
    tokens = SEGMENT.on(device_type)
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
    """`scaled_favor` by matrix products of torch over chunks of `chunk` tokens, or of `LEAST_CHUNK`.

    `device_type` decides the sizes; None: the device of q.
    """
    device_type = device_type or q.device.type
    batch, heads, seq_len, _ = q.shape
    least = LEAST_CHUNK.on(device_type)
    if chunk < least:
        # equal chunks, so that little of the last one is padding
        chunk = max(chunk, -(-seq_len // (ALIGNED * -(-seq_len // least))) * ALIGNED)
    chunk = min(chunk, seq_len)
    products = ChunkedProducts(chunk, batch * heads)
    return scaled_favor(q, k, v, directions, softmax, products, chunk, device_type)
