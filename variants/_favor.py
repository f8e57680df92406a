"""Linear attention over positive features, in memory that does not grow with T · m (for performer.py).

Shapes: B batch, H heads, N = B·H, T tokens, D channels of a head, m features, E = D + 1 (the values
and a one, whose weighted sum is the normaliser), n chunks in a segment, c tokens in a chunk.

With features φ the output of query t is Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), over all s or, causal,
over s ≤ t. The features of a whole sequence, T · m, would outweigh everything else a layer holds, so both
functions below walk over segments of the sequence, hold the features of one, save only their inputs, their
output and the small running sums (E, m) for the backward pass, and compute the features there again.

Exponentials are kept in range without a look at the future. A key's features are divided by their own
sum and carry its logarithm `level` beside them; whatever is summed over keys is stored relative to the
highest level *so far*: the running maximum R_t in a weight, R at a chunk's end in a running sum. Each
exponent is then ≤ 0, the factor e^{−R_t} cancels between numerator and normaliser, and no R_t depends on a
later key. All sums are float32 or wider, whatever the inputs' dtype.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SEGMENT = 4096
"""Tokens whose features exist at a time, rounded to whole chunks."""
LOWEST = -1e30
"""The level of an empty sum: finite, so that the difference of two is 0 and not NaN."""
TINY = 1e-30
"""Least normaliser: a query all of whose weights underflow reads 0 and not NaN."""
RELU_FLOOR = 1e-3
"""Added to relu features, so that no normaliser is 0 (the paper's ε)."""


class Kernel(NamedTuple):
    """A feature map: softmax's positive features or relu's, and its directions (m, D).

    The directions come divided by D^¼, which is how queries and keys get softmax's 1/√D between them.
    """

    directions: Tensor
    softmax: bool

    def queries(self, x: Tensor) -> Tensor:
        """(…, D) → (…, m), up to a factor per query, which cancels."""
        h = x @ self.directions.mT
        return h.softmax(-1) if self.softmax else h.relu_().add_(RELU_FLOOR)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, D) → features (…, m) and levels (…): φ(x) = e^level · features."""
        h = x @ self.directions.mT
        if not self.softmax:
            return h.relu_().add_(RELU_FLOOR), x.new_zeros(x.shape[:-1])
        features = h.softmax(-1)
        # the largest entry tells the sum that softmax divided by: max h − log(max softmax h)
        level = h.amax(-1) - features.amax(-1).log_() - x.square().sum(-1) / (2 * math.sqrt(x.shape[-1]))
        return features, level

    def queries_backward(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """The gradient of x; overwrites `grad`. Its level cancels, so it counts as a constant."""
        return self._through(features, grad) @ self.directions

    def keys_backward(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """The gradient of x; overwrites `grad`."""
        h = self._through(features, grad)
        if not self.softmax:
            return h @ self.directions
        return (h @ self.directions).addcmul_(h.sum(-1, keepdim=True), x, value=-(x.shape[-1] ** -0.5))

    def _through(self, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the features → gradient of the exponents."""
        return grad.mul_(features if self.softmax else features > RELU_FLOOR)


def _cut(x: Tensor, lo: int, hi: int, chunk: int) -> Tensor:
    """Tokens [lo, hi) of (B, H, T, D) as whole chunks (N, n, c, D), wide; zeros follow the last token."""
    part = x[:, :, lo:hi].to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
    rest = -(hi - lo) % chunk
    if rest:
        part = torch.nn.functional.pad(part, (0, 0, 0, rest))
    chunks: Tensor = part.unflatten(1, (-1, chunk))
    return chunks


def _paste(target: Tensor, lo: int, hi: int, part: Tensor) -> None:
    """Write (N, n, c, D) back to tokens [lo, hi) of (B, H, T, D)."""
    target[:, :, lo:hi] = part.flatten(1, 2)[:, : hi - lo].unflatten(0, target.shape[:2])


def _with_one(v: Tensor) -> Tensor:
    """(…, D) → (…, E): a one beside each value, for the normaliser."""
    with_one = v.new_empty(*v.shape[:-1], v.shape[-1] + 1)
    with_one[..., :-1] = v
    with_one[..., -1] = 1
    return with_one


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Products over the last two dimensions of (N, n, …)."""
    product: Tensor = torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return product


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same, added to `total` in place."""
    flat = total.flatten(0, 1)
    torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1), out=flat)
    return total


def _segments(seq_len: int, chunk: int) -> list[tuple[int, int]]:
    """The bounds of the segments, whole chunks but for the last."""
    length = max(1, SEGMENT // chunk) * chunk
    return [(lo, min(lo + length, seq_len)) for lo in range(0, seq_len, length)]


def _output_gradient(grad: Tensor, y: Tensor, inverse: Tensor, lo: int, hi: int, chunk: int) -> Tensor:
    """Gradients of numerator and normaliser (N, n, c, E) from those of their quotient y."""
    g = _cut(grad, lo, hi, chunk) * _cut(inverse, lo, hi, chunk)
    return torch.cat([g, -(g * _cut(y, lo, hi, chunk)).sum(-1, keepdim=True)], dim=-1)


class _Step(NamedTuple):
    """What one segment of the causal sum is made of; computed in the forward and again in the backward."""

    q_features: Tensor  # (N, n, c, m)
    k_features: Tensor  # (N, n, c, m)
    values: Tensor  # (N, n, c, E)
    key_weight: Tensor  # (N, n, c, 1): e^(level − R at the chunk's end)
    query_weight: Tensor  # (N, n, c, 1): e^(R before the chunk − R_t)
    decay: Tensor  # (N, n, c, c): e^(level_s − R_t) for s ≤ t, else 0
    scores: Tensor  # (N, n, c, c): φ(q_t)·φ(k_s), not yet weighted
    passing: Tensor  # (N, n, n): from a chunk's own sum to the running sums before later chunks
    ageing: Tensor  # (N, n + 1, n + 1): e^(R at border j − R at border i) for j ≤ i
    sums: Tensor  # (N, n, E, m): running sum before each chunk
    carried: Tensor  # (N, E, m): running sum after the last chunk
    level: Tensor  # (N, 1): R after the last chunk

    @classmethod
    def make(cls, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, carried: Tensor, level: Tensor) -> _Step:
        """From chunks (N, n, c, D), the running sum (N, E, m) before them and its level (N, 1)."""
        rows, chunks, chunk = q.shape[:3]
        q_features = kernel.queries(q)
        k_features, levels = kernel.keys(k)
        values = _with_one(v)
        highest = torch.maximum(levels.flatten(1).cummax(-1).values, level).view(rows, chunks, chunk)
        edges = torch.cat([level, highest[..., -1]], dim=1)  # (N, n + 1): R at the chunks' borders
        key_weight = (levels - edges[:, 1:, None]).exp_()[..., None]
        query_weight = (edges[:, :-1, None] - highest).exp_()[..., None]
        decay = (levels[:, :, None, :] - highest[..., None]).exp_().tril_()
        ageing = (edges[:, None, :] - edges[..., None]).exp_().tril_()
        passing = ageing[:, :-1, 1:]  # strictly lower: a chunk's own sum does not precede it
        own = _bmm((values * key_weight).mT, k_features)
        sums = (ageing[:, :-1, :1] * carried.flatten(1)[:, None]).view_as(own)
        torch.baddbmm(sums.flatten(2), passing, own.flatten(2), out=sums.flatten(2))
        carried = torch.addcmul(own[:, -1], sums[:, -1], ageing[:, -1, -2, None, None])
        scores = _bmm(q_features, k_features.mT)
        return cls(
            q_features, k_features, values, key_weight, query_weight,
            decay, scores, passing, ageing, sums, carried, edges[:, -1:],
        )  # fmt: skip

    def output(self) -> Tensor:
        """Numerator and normaliser (N, n, c, E); overwrites the scores."""
        total = _bmm(self.q_features, self.sums.mT).mul_(self.query_weight)
        return _add_bmm(total, self.scores.mul_(self.decay), self.values)

    def gradients(self, g: Tensor, carried: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of query features, key features, values (N, n, c, …) and the sum before (N, E, m).

        From those of the output (N, n, c, E) and of the sum after. Overwrites the scores.
        """
        g_earlier = g * self.query_weight
        g_sums = _bmm(g_earlier.mT, self.q_features)  # of the running sums, from their own chunk's queries
        g_own = (self.ageing[:, -1, 1:, None] * carried.flatten(1)[:, None]).view_as(g_sums)
        torch.baddbmm(g_own.flatten(2), self.passing.mT, g_sums.flatten(2), out=g_own.flatten(2))
        g_carried = torch.addcmul(g_sums[:, 0], g_own[:, 0], self.ageing[:, 1, 0, None, None])
        g_scores = _bmm(g, self.values.mT).mul_(self.decay)
        g_queries = _add_bmm(_bmm(g_earlier, self.sums), g_scores, self.k_features)
        g_keys = _bmm(self.values * self.key_weight, g_own)
        g_keys = _add_bmm(g_keys, g_scores.mT, self.q_features)
        g_values = _bmm(self.k_features, g_own.mT).mul_(self.key_weight)
        g_values = _add_bmm(g_values, self.scores.mul_(self.decay).mT, g)
        return g_queries, g_keys, g_values, g_carried


class _CausalFavor(torch.autograd.Function):
    """A segment at a time forwards, carrying the running sum; the same backwards, carrying its gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, chunk: int
    ) -> Tensor:
        kernel = Kernel(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        chunk = min(chunk, seq_len)
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)  # as the output projection reads it
        inverse = directions.new_empty(batch, heads, seq_len, 1)
        carried = directions.new_zeros(batch * heads, head_dim + 1, directions.shape[0])
        level = directions.new_full((batch * heads, 1), LOWEST if softmax else 0.0)
        starts = []
        for lo, hi in _segments(seq_len, chunk):
            starts += [carried, level]
            q_part, k_part, v_part = (_cut(x, lo, hi, chunk) for x in (q, k, v))
            step = _Step.make(q_part, k_part, v_part, kernel, carried, level)
            carried, level = step.carried, step.level
            total, normaliser = step.output().split([head_dim, 1], dim=-1)
            normaliser = normaliser.clamp_min(TINY).reciprocal_()
            _paste(y, lo, hi, total * normaliser)
            _paste(inverse, lo, hi, normaliser)
        ctx.save_for_backward(q, k, v, directions, y, inverse, *starts)
        ctx.softmax, ctx.chunk = softmax, chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, inverse, *starts = ctx.saved_tensors
        kernel, chunk = Kernel(directions, ctx.softmax), ctx.chunk
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        g_carried = torch.zeros_like(starts[0])
        segments = _segments(q.shape[2], chunk)
        for i in reversed(range(len(segments))):
            lo, hi = segments[i]
            q_part, k_part, v_part = (_cut(x, lo, hi, chunk) for x in (q, k, v))
            step = _Step.make(q_part, k_part, v_part, kernel, starts[2 * i], starts[2 * i + 1])
            g_out = _output_gradient(grad, y, inverse, lo, hi, chunk)
            g_queries, g_keys, g_values, g_carried = step.gradients(g_out, g_carried)
            _paste(g_q, lo, hi, kernel.queries_backward(q_part, step.q_features, g_queries))
            _paste(g_k, lo, hi, kernel.keys_backward(k_part, step.k_features, g_keys))
            _paste(g_v, lo, hi, g_values[..., :-1])
        return g_q, g_k, g_v, None, None, None


class _FullFavor(torch.autograd.Function):
    """One sum over all keys, then one product a query; segments only bound the features that exist."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool) -> Tensor:
        kernel = Kernel(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
        inverse = directions.new_empty(batch, heads, seq_len, 1)
        sums = directions.new_zeros(batch * heads, 1, head_dim + 1, directions.shape[0])
        level = directions.new_full((batch * heads, 1, 1), LOWEST if softmax else 0.0)
        segments = _segments(seq_len, 1)
        for lo, hi in segments:
            features, levels = kernel.keys(_cut(k, lo, hi, hi - lo))
            before, level = level, torch.maximum(level, levels.amax(-1, keepdim=True))
            values = _with_one(_cut(v, lo, hi, hi - lo)).mul_((levels - level).exp_()[..., None])
            sums = _add_bmm(sums.mul_((before - level).exp_()[..., None]), values.mT, features)
        for lo, hi in segments:
            total = _bmm(kernel.queries(_cut(q, lo, hi, hi - lo)), sums.mT)
            total, normaliser = total.split([head_dim, 1], dim=-1)
            normaliser = normaliser.clamp_min(TINY).reciprocal_()
            _paste(y, lo, hi, total * normaliser)
            _paste(inverse, lo, hi, normaliser)
        ctx.save_for_backward(q, k, v, directions, y, inverse, sums, level)
        ctx.softmax = softmax
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, inverse, sums, level = ctx.saved_tensors
        kernel = Kernel(directions, ctx.softmax)
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        g_sums = torch.zeros_like(sums)
        segments = _segments(q.shape[2], 1)
        for lo, hi in segments:
            part = _cut(q, lo, hi, hi - lo)
            features = kernel.queries(part)
            g_out = _output_gradient(grad, y, inverse, lo, hi, hi - lo)
            g_sums = _add_bmm(g_sums, g_out.mT, features)
            _paste(g_q, lo, hi, kernel.queries_backward(part, features, _bmm(g_out, sums)))
        for lo, hi in segments:
            part = _cut(k, lo, hi, hi - lo)
            features, levels = kernel.keys(part)
            weight = (levels - level).exp_()[..., None]
            values = _with_one(_cut(v, lo, hi, hi - lo)).mul_(weight)
            _paste(g_k, lo, hi, kernel.keys_backward(part, features, _bmm(values, g_sums)))
            _paste(g_v, lo, hi, _bmm(features, g_sums.mT).mul_(weight)[..., :-1])
        return g_q, g_k, g_v, None, None


def causal_favor(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, chunk: int) -> Tensor:
    """(B, H, T, D) queries, keys and values → (B, H, T, D), each query from the keys up to its own.

    `directions` (m, D) are scaled as in `Kernel` and get no gradient; `chunk` is in tokens.
    """
    y: Tensor = _CausalFavor.apply(q, k, v, directions, softmax, chunk)  # type: ignore[no-untyped-call]
    return y


def full_favor(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool) -> Tensor:
    """The same with each query from every key."""
    y: Tensor = _FullFavor.apply(q, k, v, directions, softmax)  # type: ignore[no-untyped-call]
    return y
