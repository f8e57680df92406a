"""Causal linear attention over positive features, for `variants.attention.performer`.

Shapes: see `feature_sums`; features and levels: see `positive_features`. The level of a causal sum is R_tj,
the largest exponent b_sj of the keys s ≤ t. A weight is computed as

    2^{a_tj + R_ej − Λ_t} · 2^{b_sj − R_ej},    s ≤ e ≤ t.

Each border e divides the tokens into keys up to e and queries after e. The keys before a chunk share one
border and are read as one sum. The tokens of a chunk form blocks of 1, 2, 4, … tokens. Two neighbouring
blocks have the border between them, so no forbidden pair is computed: no mask is needed, no R depends on a
later key, and no value of a later token, not even NaN, reaches an earlier query. Where two blocks are joined,
half of the features are multiplied by a power 2^{R − R'} ≤ 1, so exponentials are computed once a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.features.positive_features import FeatureMap
from variants.ops.memoizable import repeatable
from variants.ops.recurrences import feature_sums
from variants.ops.recurrences.feature_sums import (
    Sums,
    doublings,
    empty_sums,
    neighbours,
    split_segments,
    to_chunks,
    write_chunks,
)

Parts = tuple[Tensor, ...]


def _rising(keys: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return R, the running maximum of the exponents of each feature: at each token (G, c, m), and at the
    borders of the chunks (n + 1, N, m). `level` (N, m) is R before the first chunk."""
    highest = keys.clone()
    for length in doublings(keys.shape[1]):
        for left, right in neighbours(highest, length, 1):
            right.clamp_min_(left[:, :, -1:])
    own = highest[:, -1].view(-1, *level.shape)
    borders = torch.cat([level[None], own]).cummax(0).values
    return torch.maximum(highest, borders[:-1].reshape(-1, 1, keys.shape[-1]), out=highest), borders


class _Features(NamedTuple):
    """Features of the queries and keys of a segment, relative to the levels of their blocks.

    At first each token is a block. `pairs` joins neighbouring blocks until each block is a whole chunk.
    φ(q) is multiplied by 2^R with R before its block; φ(k) is divided by 2^R with R at the end of its block.
    """

    queries: Tensor  # (G, c, m)
    keys: Tensor  # (G, c, m)
    decay: Tensor | None
    """(G, c, m). At the first token of each block: 2^(R before the block − R at its end). None for relu."""
    borders: Tensor  # (n + 1, N, m): R before each chunk and after the last one; 0 for relu

    @classmethod
    def make(
        cls, feature_map: FeatureMap, q: Tensor, k: Tensor, level: Tensor, normaliser: Tensor | None = None
    ) -> tuple[_Features, Tensor, Tensor]:
        """Compute the features of chunks q and k (G, c, D).

        Returns them with two other tensors: the weight of each query's own key by feature (G, c, m), and the
        logarithm by which all weights of a query are divided (G, c, 1). It is `normaliser`, or by default
        the logarithm of the query's largest term.
        """
        keys = feature_map.keys(k)
        if not feature_map.softmax:
            queries = feature_map.queries(q, normaliser)
            lowered = torch.zeros_like(q[..., :1]) if normaliser is None else normaliser
            borders = level.expand(len(keys) // len(level) + 1, -1, -1)
            return cls(queries, keys, None, borders), queries * keys, lowered
        highest, borders = _rising(keys, level)
        keys.sub_(highest).exp2_()
        earlier = highest.roll(1, 1)
        earlier[:, 0] = borders[:-1].flatten(0, 1)
        decay = earlier.sub_(highest).exp2_()
        queries = feature_map.queries(q, normaliser).add_(highest)
        if normaliser is None:
            normaliser = queries.amax(-1, keepdim=True)
            queries.sub_(normaliser)
        queries.exp2_()
        own = torch.mul(queries, keys, out=highest)
        queries.mul_(decay)
        return cls(queries, keys, decay, borders), own, normaliser

    def pairs(self, of_queries: Parts, of_keys: Parts) -> Iterator[tuple[Parts, Parts]]:
        """Iterate over all pairs of a query and an earlier key in the same chunk; each pair occurs once.

        Yields queries (G, p, r, m) with their parts of `of_queries`, and keys (G, p, s, m) before them with
        their parts of `of_keys`. All are views of p blocks in each chunk. The features are overwritten before
        the next step. After the last step they are relative to the levels at the borders of their chunk.
        """
        tensors = self.queries, *of_queries, self.keys, *of_keys
        first_key = 1 + len(of_queries)
        for length in doublings(self.keys.shape[1]):
            joints = zip(*(neighbours(x, length, 1) for x in tensors), strict=True)
            decays = neighbours(self.decay, length, 1) if self.decay is not None else None
            for joint in joints:
                lefts, rights = zip(*joint, strict=True)
                yield rights[:first_key], lefts[first_key:]
                if decays:
                    left, right = (x[:, :, :1] for x in next(decays))
                    rights[0].mul_(left)
                    lefts[first_key].mul_(right)
                    left.mul_(right)


def _add_product(total: Tensor, weights: Tensor, values: Tensor) -> None:
    """Add weights (…, r, s) @ values (…, s, D) to `total` (…, r, D)."""
    if weights.shape[-1] > 2:
        total.add_(weights @ values)
        return
    for i in range(weights.shape[-1]):  # bmm of many very small matrices takes several times as long
        total.addcmul_(weights[..., i : i + 1], values[..., i : i + 1, :])


def _segment_sums(feature_map: FeatureMap, features: _Features, v: Tensor, before: Sums) -> Sums:
    """Return the sums before each chunk and after the last one. `before` (N, …): before the first chunk."""
    sums = Sums.empty(feature_map.directions, *features.borders.shape[:2])
    for target, carried in zip(sums, before, strict=True):
        target[0] = carried
    sums.put(slice(1, None), v, torch.ones_like(v[..., :1]), features.keys)
    sums.accumulate(features.borders)
    return sums


@repeatable
class _CausalFavor(torch.autograd.Function):
    """Processes the segments in order with the running sums; in backward, in reverse with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        directions: Tensor,
        softmax: bool,
        chunk: int,
        tokens: int,
    ) -> Tensor:
        feature_map = FeatureMap(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        chunk = min(chunk, seq_len)
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(
            1, 2
        )  # the layout that the output projection reads
        normaliser = directions.new_empty(batch, heads, seq_len, 1)
        carried, level = empty_sums(directions, batch * heads, softmax)
        starts = []
        for segment in split_segments(tokens, chunk, q, k, v, y, normaliser):
            starts += [*carried, level]
            carried, level = _read_causally(feature_map, chunk, carried, level, *segment)
        ctx.save_for_backward(q, k, v, directions, y, normaliser, *starts)
        ctx.softmax, ctx.chunk, ctx.tokens = softmax, chunk, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, normaliser, *starts = ctx.saved_tensors
        feature_map, chunk = FeatureMap(directions, ctx.softmax), ctx.chunk
        grads = [torch.empty_like(x) for x in (q, k, v)]
        g_carried, _ = empty_sums(directions, q.shape[0] * q.shape[1], ctx.softmax)

        segments = split_segments(ctx.tokens, chunk, q, k, v, y, normaliser, grad, *grads)
        # no start is freed early, because autograd keeps all saved tensors until the end of backward
        for index, segment in reversed(list(enumerate(segments))):
            *carried, level = starts[3 * index : 3 * index + 3]
            g_carried = _read_causally_backward(
                feature_map, chunk, Sums(*carried), level, g_carried, *segment
            )
        return *grads, None, None, None, None


@repeatable
def _read_causally(
    feature_map: FeatureMap,
    chunk: int,
    carried: Sums,
    level: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
) -> tuple[Sums, Tensor]:
    """Write the outputs of a segment to y, and the logarithms of its normalisers to `normaliser`.

    Returns the sums after the segment, and their level.
    """
    q, k, v = (to_chunks(x, chunk) for x in (q, k, v))
    features, own, lowered = _Features.make(feature_map, q, k, level)
    norms = own.sum(-1, keepdim=True)
    del own
    values = norms * v
    for (q_, values_, norms_), (k_, v_) in features.pairs((values, norms), (v,)):
        weights = (q_ * k_).sum(-1, keepdim=True) if k_.shape[2] == 1 else q_ @ k_.mT
        _add_product(values_, weights, v_)
        norms_.add_(weights.sum(-1, keepdim=True))
    sums = _segment_sums(feature_map, features, v, carried)
    for total, earlier in zip((values, norms), sums.at(slice(-1)).read(features.queries), strict=True):
        total.add_(earlier)
    write_chunks(y, values.div_(norms))
    write_chunks(normaliser, norms.log2_().add_(lowered))
    # copies, because saved views would keep the sums before all chunks in memory until the backward pass
    return Sums(*(s.clone() for s in sums.at(-1))), features.borders[-1].clone()


@repeatable
def _read_causally_backward(
    feature_map: FeatureMap,
    chunk: int,
    carried: Sums,
    level: Tensor,
    g_carried: Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    *grads: Tensor,
) -> Sums:
    """Write a segment's gradients of q, k and v to `grads`; return the gradient of the sums before it."""
    q, k, v, y, normaliser, g = (to_chunks(x, chunk) for x in (q, k, v, y, normaliser, grad))
    features, own, _ = _Features.make(feature_map, q, k, level, normaliser)
    g_norm = (y * g).sum(-1, keepdim=True).neg_()
    g_weights = (g * v).sum(-1, keepdim=True).add_(g_norm)
    g_values = own.sum(-1, keepdim=True) * g
    if feature_map.softmax:
        g_queries = own.mul_(g_weights)
        g_keys = g_queries.clone()
    else:
        g_queries, g_keys = features.keys * g_weights, features.queries * g_weights
    for (q_, g_, n_, g_q), (k_, v_, g_k, g_v) in features.pairs(
        (g, g_norm, g_queries), (v, g_keys, g_values)
    ):
        if k_.shape[2] == 1:
            products = q_ * k_
            g_v.addcmul_(products.sum(-1, keepdim=True), g_)
            g_weights = (g_ * v_).sum(-1, keepdim=True).add_(n_)
            if feature_map.softmax:
                products.mul_(g_weights)
                g_q.add_(products)
                g_k.add_(products)
            else:
                g_q.addcmul_(k_, g_weights)
                g_k.addcmul_(q_, g_weights)
        else:
            _add_product(g_v, k_ @ q_.mT, g_)
            g_weights = (g_ @ v_.mT).add_(n_)
            feature_map.add(g_q, g_weights @ k_, q_)
            feature_map.add(g_k, g_weights.mT @ q_, k_)
    sums = _segment_sums(feature_map, features, v, carried)
    feature_map.add(g_queries, sums.at(slice(-1)).read_back(g, g_norm), features.queries)
    g_sums = sums  # overwritten, because the sums are not needed any more
    g_sums.put(slice(-1), g, g_norm, features.queries)
    for target, after in zip(g_sums, g_carried, strict=True):
        target[-1] = after
    g_sums.accumulate(features.borders, backward=True)
    later = g_sums.at(slice(1, None))
    feature_map.add(g_keys, later.read_back(v, torch.ones_like(g_norm)), features.keys)
    g_values.add_(later.read(features.keys)[0])
    parts = (
        feature_map.queries_backward(g_queries, features.queries, normaliser),
        feature_map.keys_backward(g_keys, features.keys, k),
        g_values,
    )
    for target, part in zip(grads, parts, strict=True):
        write_chunks(target, part)
    return Sums(*(s.clone() for s in g_sums.at(0)))


def causal_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    chunk: int,
    device_type: str | None = None,
) -> Tensor:
    """Causal linear attention: queries, keys and values (B, H, T, D) → (B, H, T, D).

    `directions` (m, D) are scaled as in `FeatureMap` and get no gradient. `chunk` is in tokens.
    `device_type` decides the size of the segments; None: the device of q.
    """
    tokens = feature_sums.SEGMENT.on(device_type or q.device.type)
    y: Tensor = _CausalFavor.apply(q, k, v, directions, softmax, chunk, tokens)  # type: ignore[no-untyped-call]
    return y
