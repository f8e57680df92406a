"""Linear attention over positive features, in memory that does not grow with T · m (for performer.py).

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of a head, m features,
n chunks of each sequence in a segment, G = N·n chunks, c tokens in a chunk.

With features φ the output of query t is Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), over all s or, causal,
over s ≤ t. The features of a whole sequence, T · m, would outweigh everything else a layer holds, so both
functions below walk over segments of the sequence, hold the features of one, save only their inputs, their
output and the small running sums (m, D) for the backward pass, and compute the features there again.

Exponentials are kept in range without a look at the future. A key's features are divided by their
largest and carry its logarithm `level` beside them; whatever is summed over keys is stored relative to the
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

from variants._pieces import Sizes
from variants._repeats import repeatable

SEGMENT = Sizes(cpu=1536, accelerator=2**15)
"""Tokens of all sequences together whose features exist at a time, rounded up to whole chunks: few, so
that they stay in cache."""
SEGMENTS = 32
"""Most segments; longer sequences have longer ones, which bounds the dispatched operations."""
AT_ONCE = 128
"""Chunks whose running sums are one product: it grows as their square."""
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
        return self._features(x)[0]

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, D) → features (…, m) and levels (…): φ(x) = e^level · features."""
        features, level = self._features(x)
        if self.softmax:
            level = level - x.square().sum(-1) / (2 * math.sqrt(x.shape[-1]))
        return features, level

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (…, m), for softmax without |x|² and divided by their largest, and its logarithm (…)."""
        # one product of matrices: of a stack, matmul would make a batch of small ones
        h = (x.flatten(0, -2) @ self.directions.mT).view(*x.shape[:-1], -1)
        if not self.softmax:
            return h.relu_().add_(RELU_FLOOR), x.new_zeros(x.shape[:-1])
        highest = h.amax(-1, keepdim=True)
        return h.sub_(highest).exp_(), highest.squeeze(-1)

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


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) as whole chunks (G, c, D), wide; zeros follow the last token.

    It may be a view of x: not to be written to.
    """
    part = x.to(torch.promote_types(x.dtype, torch.float32))
    rest = -x.shape[2] % chunk
    if rest:
        part = torch.nn.functional.pad(part, (0, 0, 0, rest))
    return part.reshape(-1, chunk, x.shape[-1])


def _whole(x: Tensor) -> Tensor:
    """(B, H, T, D) as one chunk of each sequence (G, T, D), likewise."""
    return _cut(x, x.shape[2])


def _paste(target: Tensor, part: Tensor) -> None:
    """Write (G, c, D) back to (B, H, T, D)."""
    target.copy_(part.view(*target.shape[:2], -1, target.shape[-1])[:, :, : target.shape[2]])


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds the products of two stacks of matrices to `total` in place."""
    # `out=`, because torch's FLOP counter knows no in-place form
    return torch.baddbmm(total, a, b, out=total)


def _segments(chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors (B, H, T, …) segment by segment, views: whole chunks but for the last."""
    batch, heads, seq_len = tensors[0].shape[:3]
    tokens = SEGMENT.on(tensors[0].device)
    length = -(-max(tokens // (batch * heads), -(-seq_len // SEGMENTS)) // chunk) * chunk
    return list(zip(*(x.split(length, dim=2) for x in tensors), strict=True))


class _Sums(NamedTuple):
    """Sums over keys of φ(k) with their values and alone, or the gradients of such sums.

    The two are kept apart: products over D + 1 channels take up to twice as long as over 64.
    """

    values: Tensor  # (G, D, m)
    norms: Tensor  # (G, 1, m)

    @classmethod
    def empty(cls, directions: Tensor, sequences: int) -> _Sums:
        """Over no keys, one of each sequence."""
        m, head_dim = directions.shape
        return cls(directions.new_zeros(sequences, head_dim, m), directions.new_zeros(sequences, 1, m))

    @classmethod
    def over(cls, values: Tensor, norms: Tensor, features: Tensor) -> _Sums:
        """Over the tokens of each chunk: (G, c, D), (G, c, 1) and (G, c, m)."""
        return cls(torch.bmm(values.mT, features), torch.bmm(norms.mT, features))

    def read(self, values: Tensor, norms: Tensor) -> Tensor:
        """(G, c, D) and (G, c, 1) times the sums: (G, c, m)."""
        return torch.bmm(values, self.values).addcmul_(norms, self.norms)

    def running(self, carried: _Sums, ageing: Tensor, *, backward: bool = False) -> tuple[_Sums, _Sums]:
        """From each chunk's own sum and the one carried in: those before each chunk, and the one after all.

        `ageing` (N, n + 1, n + 1) is the factor from border j to border i ≥ j of the chunks. `backward`:
        from the gradients of what this returned to those of what it was given, by the mirrored recurrence.
        """
        values, last_values = _running(self.values, carried.values, ageing, backward)
        norms, last_norms = _running(self.norms, carried.norms, ageing, backward)
        return _Sums(values, norms), _Sums(last_values, last_norms)


def _running(own: Tensor, carried: Tensor, ageing: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """One part of `_Sums.running`, `AT_ONCE` chunks after the others; overwrites `own`."""
    each = own.view(len(ageing), -1, *own.shape[1:])  # (N, n, …)
    if each.shape[1] <= AT_ONCE:
        total, carried = _running_at_once(each, carried, ageing, backward)
        return total.view_as(own), carried
    total = torch.empty_like(each)
    starts = range(0, each.shape[1], AT_ONCE)
    for start in reversed(starts) if backward else starts:
        stop = min(start + AT_ONCE, each.shape[1])
        borders = ageing[:, start : stop + 1, start : stop + 1]
        total[:, start:stop], carried = _running_at_once(each[:, start:stop], carried, borders, backward)
    return total.view_as(own), carried


@repeatable
def _running_at_once(each: Tensor, carried: Tensor, ageing: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """One product over all chunks of each (N, n, …), which it overwrites."""
    passing = ageing[:, :-1, 1:]  # strictly lower: a chunk's own sum does not precede it
    (enters, entering), (leaves, leaving) = (0, ageing[:, 1, 0]), (-1, ageing[:, -1, -2])
    if backward:
        passing = passing.mT
        (enters, entering), (leaves, leaving) = (leaves, leaving), (enters, entering)
    # what is carried in passes on as if the chunk it meets first had added it
    each[:, enters].addcmul_(carried, entering[:, None, None])
    if each.shape[1] == 1:
        return carried.unsqueeze(1), each[:, 0]
    total = torch.bmm(passing, each.flatten(2)).view(each.shape)
    total[:, enters] = carried
    last = torch.addcmul(each[:, leaves], total[:, leaves], leaving[:, None, None])
    return total, last


def _divide(values: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (G, c, D), and one over the normalisers (G, c, 1); overwrites both."""
    inverse = norms.clamp_min_(TINY).reciprocal_()
    return values.mul_(inverse), inverse


def _divide_backward(grad: Tensor, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values and normalisers, from that of the outputs."""
    g = grad * inverse
    return g, (y * g).sum(-1, keepdim=True).neg_()


class _Step(NamedTuple):
    """What one segment of the causal sum is made of; computed in the forward and again in the backward."""

    q_features: Tensor  # (G, c, m)
    k_features: Tensor  # (G, c, m)
    values: Tensor  # (G, c, D)
    key_weight: Tensor  # (G, c, 1): e^(level − R at the chunk's end)
    query_weight: Tensor  # (G, c, 1): e^(R before the chunk − R_t)
    decay: Tensor  # (G, c, c): e^(level_s − R_t) for s ≤ t, else 0
    weights: Tensor  # (G, c, c): φ(q_t)·φ(k_s) times the decay
    ageing: Tensor  # (N, n + 1, n + 1): e^(R at border j − R at border i) for j ≤ i
    sums: _Sums  # before each chunk
    carried: _Sums  # after the last chunk
    level: Tensor  # (N, 1): R after the last chunk

    @classmethod
    def make(cls, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, carried: _Sums, level: Tensor) -> _Step:
        """From chunks (G, c, D), the sums before them and their level (N, 1)."""
        sequences, (chunks, chunk) = len(level), q.shape[:2]
        q_features = kernel.queries(q)
        k_features, levels = kernel.keys(k)
        highest = torch.maximum(levels.view(sequences, -1).cummax(-1).values, level)
        edges = torch.cat([level, highest[:, chunk - 1 :: chunk]], dim=1)  # (N, n + 1): R at the borders
        ageing = (edges[:, None, :] - edges[..., None]).exp_().tril_()
        before, after = (edge.reshape(chunks, 1) for edge in (edges[:, :-1], edges[:, 1:]))
        highest = highest.view(chunks, chunk)
        key_weight = (levels - after).exp_()[..., None]
        query_weight = (before - highest).exp_()[..., None]
        decay = (levels[:, None, :] - highest[..., None]).exp_().tril_()
        sums, carried = _Sums.over(v * key_weight, key_weight, k_features).running(carried, ageing)
        weights = torch.bmm(q_features, k_features.mT).mul_(decay)
        return cls(
            q_features, k_features, v, key_weight, query_weight,
            decay, weights, ageing, sums, carried, edges[:, -1:],
        )  # fmt: skip

    def output(self) -> tuple[Tensor, Tensor]:
        """Weighted sums of the values (G, c, D), and their normalisers (G, c, 1)."""
        values, norms = (torch.bmm(self.q_features, s.mT).mul_(self.query_weight) for s in self.sums)
        return _add_bmm(values, self.weights, self.values), norms.add_(self.weights.sum(-1, keepdim=True))

    def gradients(
        self, kernel: Kernel, q: Tensor, k: Tensor, g: Tensor, g_norm: Tensor, carried: _Sums
    ) -> tuple[Tensor, Tensor, Tensor, _Sums]:
        """Of queries, keys, values (G, c, D) and the sums before the segment.

        From those of both outputs and of the sums after the segment.
        """
        g_earlier, g_norm_earlier = g * self.query_weight, g_norm * self.query_weight
        g_own, g_carried = _Sums.over(g_earlier, g_norm_earlier, self.q_features).running(
            carried, self.ageing, backward=True
        )
        g_scores = torch.bmm(g, self.values.mT).add_(g_norm).mul_(self.decay)
        g_features = _add_bmm(self.sums.read(g_earlier, g_norm_earlier), g_scores, self.k_features)
        g_q = kernel.queries_backward(q, self.q_features, g_features)
        del g_features  # as large as all of the above
        g_features = g_own.read(self.values * self.key_weight, self.key_weight)
        g_features = _add_bmm(g_features, g_scores.mT, self.q_features)
        g_k = kernel.keys_backward(k, self.k_features, g_features)
        g_v = torch.bmm(self.k_features, g_own.values.mT).mul_(self.key_weight)
        return g_q, g_k, _add_bmm(g_v, self.weights.mT, g), g_carried


@repeatable
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
        carried = _Sums.empty(directions, batch * heads)
        level = directions.new_full((batch * heads, 1), LOWEST if softmax else 0.0)
        starts = []
        for segment in _segments(chunk, q, k, v, y, inverse):
            starts += [*carried, level]
            carried, level = _read_causally(kernel, chunk, carried, level, *segment)
        ctx.save_for_backward(q, k, v, directions, y, inverse, *starts)
        ctx.softmax, ctx.chunk = softmax, chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, inverse, *starts = ctx.saved_tensors
        kernel, chunk = Kernel(directions, ctx.softmax), ctx.chunk
        grads = [torch.empty_like(x) for x in (q, k, v)]
        g_carried = _Sums.empty(directions, q.shape[0] * q.shape[1])

        for segment in reversed(_segments(chunk, q, k, v, y, inverse, grad, *grads)):
            *carried, level = starts[-3:]
            del starts[-3:]
            g_carried = _read_causally_backward(kernel, chunk, _Sums(*carried), level, g_carried, *segment)
        return *grads, None, None, None


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
    inverse: Tensor,
) -> tuple[_Sums, Tensor]:
    """Write a segment's outputs to y, and one over its normalisers; the sums after it and their level."""
    q, k, v = (_cut(x, chunk) for x in (q, k, v))
    step = _Step.make(q, k, v, kernel, carried, level)
    for target, part in zip((y, inverse), _divide(*step.output()), strict=True):
        _paste(target, part)
    return step.carried, step.level


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
    inverse: Tensor,
    grad: Tensor,
    *grads: Tensor,
) -> _Sums:
    """Write a segment's gradients to `grads`; the gradients of the sums before it."""
    q, k, v = (_cut(x, chunk) for x in (q, k, v))
    step = _Step.make(q, k, v, kernel, carried, level)
    g, g_norm = _divide_backward(*(_cut(x, chunk) for x in (grad, y, inverse)))
    *parts, g_carried = step.gradients(kernel, q, k, g, g_norm, g_carried)
    for target, part in zip(grads, parts, strict=True):
        _paste(target, part)
    return g_carried


@repeatable
class _FullFavor(torch.autograd.Function):
    """One sum over all keys, then one product a query; segments only bound the features that exist."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool) -> Tensor:
        kernel = Kernel(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
        inverse = directions.new_empty(batch, heads, seq_len, 1)
        sums = _Sums.empty(directions, batch * heads)
        level = directions.new_full((batch * heads, 1), LOWEST if softmax else 0.0)
        for k_part, v_part in _segments(1, k, v):
            features, levels = kernel.keys(_whole(k_part))
            before, level = level, torch.maximum(level, levels.amax(-1, keepdim=True))
            weight, ageing = ((x - level).exp_()[..., None] for x in (levels, before))
            own = _Sums.over(_whole(v_part) * weight, weight, features)
            sums = _Sums(*(new.addcmul_(old, ageing) for new, old in zip(own, sums, strict=True)))
        for q_part, *targets in _segments(1, q, y, inverse):
            features = kernel.queries(_whole(q_part))
            for target, part in zip(
                targets, _divide(*(torch.bmm(features, s.mT) for s in sums)), strict=True
            ):
                _paste(target, part)
        ctx.save_for_backward(q, k, v, directions, y, inverse, *sums, level)
        ctx.softmax = softmax
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, inverse, values, norms, level = ctx.saved_tensors
        sums = _Sums(values, norms)
        kernel = Kernel(directions, ctx.softmax)
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        g_sums = _Sums.empty(directions, len(values))
        for q_part, y_part, inverse_part, grad_part, g_part in _segments(1, q, y, inverse, grad, g_q):
            part = _whole(q_part)
            features = kernel.queries(part)
            g, g_norm = _divide_backward(*(_whole(x) for x in (grad_part, y_part, inverse_part)))
            own = _Sums.over(g, g_norm, features)
            g_sums = _Sums(*(a + b for a, b in zip(own, g_sums, strict=True)))
            _paste(g_part, kernel.queries_backward(part, features, sums.read(g, g_norm)))
        for k_part, v_part, g_k_part, g_v_part in _segments(1, k, v, g_k, g_v):
            part = _whole(k_part)
            features, levels = kernel.keys(part)
            weight = (levels - level).exp_()[..., None]
            g_features = g_sums.read(_whole(v_part) * weight, weight)
            _paste(g_k_part, kernel.keys_backward(part, features, g_features))
            _paste(g_v_part, torch.bmm(features, g_sums.values.mT).mul_(weight))
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
