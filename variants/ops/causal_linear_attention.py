"""Causal attention over positive features (shapes and features: _favor.py).

The level of a causal sum is R_tj, the largest exponent b_sj of the keys s ≤ t, and a weight is computed as

    2^{a_tj + R_ej − Λ_t} · 2^{b_sj − R_ej},    s ≤ e ≤ t.

Each border e splits the tokens into keys up to e and queries after e. The keys before a chunk share one
border and come as one sum. The tokens of a chunk are blocks of 1, 2, 4, …; two neighbouring blocks have the
border between them, so that no forbidden pair is computed: there is nothing to mask, no R depends on a later
key, and no value of a later token, NaN and infinity included, meets an earlier query. When two blocks become
one, half of the features are multiplied by a power 2^{R − R'} ≤ 1 of each block and feature: exponentials
are taken once a token and not once a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops import linear_attention
from variants.ops.linear_attention import Kernel, _cut, _doublings, _joints, _paste, _segments, _start, _Sums
from variants.ops.memoizable import repeatable

Parts = tuple[Tensor, ...]


def _rising(keys: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """R, the largest exponent so far of each feature: at each token (G, c, m), and at the borders of the
    chunks (n + 1, N, m). `level` (N, m) is R before the first chunk."""
    highest = keys.clone()
    for length in _doublings(keys.shape[1]):
        for left, right in _joints(highest, length, 1):
            right.clamp_min_(left[:, :, -1:])
    own = highest[:, -1].view(-1, *level.shape)
    borders = torch.cat([level[None], own]).cummax(0).values
    return torch.maximum(highest, borders[:-1].reshape(-1, 1, keys.shape[-1]), out=highest), borders


class _Features(NamedTuple):
    """Features of the queries and keys of a segment, at levels that change from block to block.

    At first each token is a block. `pairs` joins the blocks two by two until each is a whole chunk.
    Always φ(q) is multiplied by 2^R before its block, and φ(k) divided by 2^R at the end of its.
    """

    queries: Tensor  # (G, c, m)
    keys: Tensor  # (G, c, m)
    decay: Tensor | None
    """(G, c, m): at the first token of each block, 2^(R before it − R at its end); None for relu."""
    borders: Tensor  # (n + 1, N, m): R before each chunk and after the last; 0 for relu

    @classmethod
    def make(
        cls, kernel: Kernel, q: Tensor, k: Tensor, level: Tensor, normaliser: Tensor | None = None
    ) -> tuple[_Features, Tensor, Tensor]:
        """Of chunks (G, c, D); also the weights of each query's own key by feature (G, c, m), and the
        logarithm by which all weights of a query are lowered (G, c, 1): `normaliser`, or its largest term's.
        """
        keys = kernel.keys(k)
        if not kernel.softmax:
            queries = kernel.queries(q, normaliser)
            lowered = torch.zeros_like(q[..., :1]) if normaliser is None else normaliser
            borders = level.expand(len(keys) // len(level) + 1, -1, -1)
            return cls(queries, keys, None, borders), queries * keys, lowered
        highest, borders = _rising(keys, level)
        keys.sub_(highest).exp2_()
        earlier = highest.roll(1, 1)
        earlier[:, 0] = borders[:-1].flatten(0, 1)
        decay = earlier.sub_(highest).exp2_()
        queries = kernel.queries(q, normaliser).add_(highest)
        if normaliser is None:
            normaliser = queries.amax(-1, keepdim=True)
            queries.sub_(normaliser)
        queries.exp2_()
        own = torch.mul(queries, keys, out=highest)
        queries.mul_(decay)
        return cls(queries, keys, decay, borders), own, normaliser

    def pairs(self, of_queries: Parts, of_keys: Parts) -> Iterator[tuple[Parts, Parts]]:
        """All pairs of a query and an earlier key of its chunk, each once.

        Yields queries (G, p, r, m) with their parts of `of_queries`, and keys (G, p, s, m) before them with
        their parts of `of_keys`: views of p blocks in each chunk. The features are overwritten before the
        next are yielded; at the end all of them are at the levels of their chunk's borders.
        """
        tensors = self.queries, *of_queries, self.keys, *of_keys
        first_key = 1 + len(of_queries)
        for length in _doublings(self.keys.shape[1]):
            joints = zip(*(_joints(x, length, 1) for x in tensors), strict=True)
            decays = _joints(self.decay, length, 1) if self.decay is not None else None
            for joint in joints:
                lefts, rights = zip(*joint, strict=True)
                yield rights[:first_key], lefts[first_key:]
                if decays:
                    left, right = (x[:, :, :1] for x in next(decays))
                    rights[0].mul_(left)
                    lefts[first_key].mul_(right)
                    left.mul_(right)


def _add_product(total: Tensor, weights: Tensor, values: Tensor) -> None:
    """Add to `total` (…, r, D) the products of (…, r, s) and (…, s, D)."""
    if weights.shape[-1] > 2:
        total.add_(weights @ values)
        return
    for i in range(weights.shape[-1]):  # bmm of a multitude of tiny matrices takes several times as long
        total.addcmul_(weights[..., i : i + 1], values[..., i : i + 1, :])


def _segment_sums(kernel: Kernel, features: _Features, v: Tensor, before: _Sums) -> _Sums:
    """The sums before each chunk and after the last, from those before the first (N, …)."""
    sums = _Sums.empty(kernel.directions, *features.borders.shape[:2])
    for target, carried in zip(sums, before, strict=True):
        target[0] = carried
    sums.put(slice(1, None), v, torch.ones_like(v[..., :1]), features.keys)
    sums.accumulate(features.borders)
    return sums


@repeatable
class _CausalFavor(torch.autograd.Function):
    """A segment at a time forwards, carrying the running sum; the same backwards, carrying its gradient."""

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
        kernel = Kernel(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        chunk = min(chunk, seq_len)
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)  # as the output projection reads it
        normaliser = directions.new_empty(batch, heads, seq_len, 1)
        carried, level = _start(directions, batch * heads, softmax)
        starts = []
        for segment in _segments(tokens, chunk, q, k, v, y, normaliser):
            starts += [*carried, level]
            carried, level = _read_causally(kernel, chunk, carried, level, *segment)
        ctx.save_for_backward(q, k, v, directions, y, normaliser, *starts)
        ctx.softmax, ctx.chunk, ctx.tokens = softmax, chunk, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, normaliser, *starts = ctx.saved_tensors
        kernel, chunk = Kernel(directions, ctx.softmax), ctx.chunk
        grads = [torch.empty_like(x) for x in (q, k, v)]
        g_carried, _ = _start(directions, q.shape[0] * q.shape[1], ctx.softmax)

        segments = _segments(ctx.tokens, chunk, q, k, v, y, normaliser, grad, *grads)
        # no start is freed early: autograd holds them until the end, or, where it would not, a plan does
        for index, segment in reversed(list(enumerate(segments))):
            *carried, level = starts[3 * index : 3 * index + 3]
            g_carried = _read_causally_backward(kernel, chunk, _Sums(*carried), level, g_carried, *segment)
        return *grads, None, None, None, None


@repeatable
def _read_causally(
    kernel: Kernel,
    chunk: int,
    carried: _Sums,
    level: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
) -> tuple[_Sums, Tensor]:
    """Write a segment's outputs to y, and its normalisers' logarithms; the sums after it and their level."""
    q, k, v = (_cut(x, chunk) for x in (q, k, v))
    features, own, lowered = _Features.make(kernel, q, k, level)
    norms = own.sum(-1, keepdim=True)
    del own
    values = norms * v
    for (q_, values_, norms_), (k_, v_) in features.pairs((values, norms), (v,)):
        weights = (q_ * k_).sum(-1, keepdim=True) if k_.shape[2] == 1 else q_ @ k_.mT
        _add_product(values_, weights, v_)
        norms_.add_(weights.sum(-1, keepdim=True))
    sums = _segment_sums(kernel, features, v, carried)
    for total, earlier in zip((values, norms), sums.at(slice(-1)).read(features.queries), strict=True):
        total.add_(earlier)
    _paste(y, values.div_(norms))
    _paste(normaliser, norms.log2_().add_(lowered))
    # copies: what is kept for the backward pass must not keep the sums before every chunk
    return _Sums(*(s.clone() for s in sums.at(-1))), features.borders[-1].clone()


@repeatable
def _read_causally_backward(
    kernel: Kernel,
    chunk: int,
    carried: _Sums,
    level: Tensor,
    g_carried: _Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    *grads: Tensor,
) -> _Sums:
    """Write a segment's gradients to `grads`; the gradients of the sums before it."""
    q, k, v, y, normaliser, g = (_cut(x, chunk) for x in (q, k, v, y, normaliser, grad))
    features, own, _ = _Features.make(kernel, q, k, level, normaliser)
    g_norm = (y * g).sum(-1, keepdim=True).neg_()
    g_weights = (g * v).sum(-1, keepdim=True).add_(g_norm)
    g_values = own.sum(-1, keepdim=True) * g
    if kernel.softmax:
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
            if kernel.softmax:
                products.mul_(g_weights)
                g_q.add_(products)
                g_k.add_(products)
            else:
                g_q.addcmul_(k_, g_weights)
                g_k.addcmul_(q_, g_weights)
        else:
            _add_product(g_v, k_ @ q_.mT, g_)
            g_weights = (g_ @ v_.mT).add_(n_)
            kernel.add(g_q, g_weights @ k_, q_)
            kernel.add(g_k, g_weights.mT @ q_, k_)
    sums = _segment_sums(kernel, features, v, carried)
    kernel.add(g_queries, sums.at(slice(-1)).read_back(g, g_norm), features.queries)
    g_sums = sums  # overwritten: they are not needed any more
    g_sums.put(slice(-1), g, g_norm, features.queries)
    for target, after in zip(g_sums, g_carried, strict=True):
        target[-1] = after
    g_sums.accumulate(features.borders, backward=True)
    later = g_sums.at(slice(1, None))
    kernel.add(g_keys, later.read_back(v, torch.ones_like(g_norm)), features.keys)
    g_values.add_(later.read(features.keys)[0])
    parts = (
        kernel.queries_backward(g_queries, features.queries, normaliser),
        kernel.keys_backward(g_keys, features.keys, k),
        g_values,
    )
    for target, part in zip(grads, parts, strict=True):
        _paste(target, part)
    return _Sums(*(s.clone() for s in g_sums.at(0)))


def causal_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    chunk: int,
    device_type: str | None = None,
) -> Tensor:
    """(B, H, T, D) queries, keys and values → (B, H, T, D), each query from the keys up to its own.

    `directions` (m, D) are scaled as in `Kernel` and get no gradient; `chunk`, a power of 2, is in tokens.
    The work is cut for a type of device; None: that of q.
    """
    tokens = linear_attention.SEGMENT.on(device_type or q.device.type)
    y: Tensor = _CausalFavor.apply(q, k, v, directions, softmax, chunk, tokens)  # type: ignore[no-untyped-call]
    return y
