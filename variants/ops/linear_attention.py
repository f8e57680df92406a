"""Positive features, sums over them, and attention to all keys (for performer.py; causal: _favor_causal.py).

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of a head, m features,
n chunks of each sequence in a segment, G = n·N chunks, c tokens in a chunk.

With features φ the output of query t is Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), over all s or, causal,
over s ≤ t. The features of a whole sequence, T · m, would take more memory than everything else in a layer.
Both forms therefore go through segments of the sequence and hold the features of one. For the backward pass
they save their inputs, their output, a number per query and the small running sums (m, D), and compute the
features again.

The softmax features are powers, φ_j(q_t) = 2^{a_tj} and φ_j(k_s) = 2^{b_sj}, whose exponents may be far
outside of float32's range. Let R_j be the largest b_sj of the keys of a sum, and Λ_t the logarithm of query
t's normaliser. The weight 2^{a_tj + b_sj − Λ_t} is computed as the product 2^{a_tj + R_j − Λ_t} ·
2^{b_sj − R_j}. Neither exponent is positive, and the largest term of every query has both of them near 0: no
normaliser is lost, whatever the norms. A factor underflows only where the term is below 2^-126 of the query's
largest one. All sums are float32 or wider, whatever the inputs' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=1536, accelerator=2**15)
"""Tokens of all sequences together whose features exist at a time, rounded up to whole chunks: few, so
that they stay in cache."""
SEGMENTS = 48
"""Most segments; longer sequences have longer ones, which bounds the dispatched operations."""
LOWEST = -1e30
"""The level of an empty sum: finite, so that the difference of two is 0 and not NaN."""
RELU_FLOOR = 1e-3
"""Added to relu features, so that no normaliser is 0 (the paper's ε)."""


class Kernel(NamedTuple):
    """A feature map: softmax's positive features or relu's, and its directions (m, D).

    The directions come divided by D^¼, which is how queries and keys get softmax's 1/√D between them.
    Of softmax's features only the exponents, base 2, are held (exp2 is several times faster than exp on
    CPUs); of relu's the features themselves.
    """

    directions: Tensor
    softmax: bool

    def queries(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """(…, D) → exponents without the |x|² that the normaliser cancels, or features: (…, m).

        With `level` (…, 1), those of weights divided by 2^level.
        """
        if not self.softmax:
            return self._relu(x) if level is None else self.lower(self._relu(x), level)
        flat, directions = x.flatten(0, -2), self._base_2()
        h = (
            flat @ directions
            if level is None
            else torch.addmm(level.flatten(0, -2), flat, directions, beta=-1)
        )
        return h.view(*x.shape[:-1], -1)

    def keys(self, x: Tensor) -> Tensor:
        """(…, D) → exponents or features (…, m)."""
        if not self.softmax:
            return self._relu(x)
        flat = x.flatten(0, -2)
        half_square = flat.square().sum(-1, keepdim=True) * (-0.5 / math.log(2) / math.sqrt(x.shape[-1]))
        return torch.addmm(half_square, flat, self._base_2()).view(*x.shape[:-1], -1)

    def _base_2(self) -> Tensor:
        return self.directions.mT / math.log(2)

    def _relu(self, x: Tensor) -> Tensor:
        # one product of matrices: of a stack, matmul would make a batch of small ones
        return (x.flatten(0, -2) @ self.directions.mT).view(*x.shape[:-1], -1).relu_().add_(RELU_FLOOR)

    def highest(self, queries: Tensor, levels: Tensor) -> Tensor:
        """Level of the largest term of each query (…, 1), from the keys' levels (…, m); 0 for relu."""
        if not self.softmax:
            return queries.new_zeros(*queries.shape[:-1], 1)
        return (queries + levels).amax(-1, keepdim=True)

    def lower(self, queries: Tensor, level: Tensor) -> Tensor:
        """Queries with all their weights divided by 2^level (…, 1); overwrites them."""
        return queries.sub_(level) if self.softmax else queries.mul_((-level).exp2())

    def queries_at(self, queries: Tensor, level: Tensor) -> Tensor:
        """Features of queries for keys whose features are divided by 2^level (…, m)."""
        return (queries + level).exp2_() if self.softmax else queries

    def keys_at(self, keys: Tensor, level: Tensor) -> Tensor:
        """Features of keys divided by 2^level (…, m)."""
        return (keys - level).exp2_() if self.softmax else keys

    def add(self, total: Tensor, grad: Tensor, features: Tensor) -> None:
        """Add to the gradient of what is held that of the features made of it."""
        if self.softmax:
            total.addcmul_(grad, features)
        else:
            total.add_(grad)

    def queries_backward(self, grad: Tensor, queries: Tensor, level: Tensor) -> Tensor:
        """Gradient of lowered queries (…, m) → of the vectors they are made of (…, D)."""
        if not self.softmax:
            scale = (-level).exp2()
            grad = grad.mul_(queries > RELU_FLOOR * scale).mul_(scale)
        return self._through(grad)

    def keys_backward(self, grad: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        """Gradient of keys (…, m) → of the vectors x (…, D) they are made of."""
        if not self.softmax:
            return self._through(grad.mul_(keys > RELU_FLOOR))
        return self._through(grad).addcmul_(grad.sum(-1, keepdim=True), x, value=-(x.shape[-1] ** -0.5))

    def _through(self, grad: Tensor) -> Tensor:
        through: Tensor = (grad.flatten(0, -2) @ self.directions).view(*grad.shape[:-1], -1)
        return through


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) as whole chunks (G, c, D), wide, a chunk of every sequence before the next chunk of any.

    Contiguous; zeros follow the last token. It may be x itself: not to be written to.
    """
    part = x.to(torch.promote_types(x.dtype, torch.float32))
    rest = -x.shape[2] % chunk
    if rest:
        part = torch.nn.functional.pad(part, (0, 0, 0, rest))
    chunks: Tensor = part.unflatten(2, (-1, chunk)).movedim(2, 0)
    return chunks.reshape(-1, chunk, x.shape[-1]).contiguous()


def _whole(x: Tensor) -> Tensor:
    """(B, H, T, D) as one chunk of each sequence (N, T, D), likewise."""
    return _cut(x, x.shape[2])


def _paste(target: Tensor, part: Tensor) -> None:
    """Write (G, c, D) back to (B, H, T, D)."""
    batch, heads, seq_len, channels = target.shape
    chunks = part.view(-1, batch, heads, part.shape[1], channels)
    target.copy_(chunks.movedim(0, 2).flatten(2, 3)[:, :, :seq_len])


def _segments(tokens: int, chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors (B, H, T, …) segment by segment, views: about `tokens` of all heads, whole chunks but for the
    last."""
    batch, heads, seq_len = tensors[0].shape[:3]
    length = -(-max(tokens // (batch * heads), -(-seq_len // SEGMENTS)) // chunk) * chunk
    return list(zip(*(x.split(length, dim=2) for x in tensors), strict=True))


def _doublings(size: int) -> Iterator[int]:
    """1, 2, 4, … below `size`."""
    length = 1
    while length < size:
        yield length
        length *= 2


def _joints(x: Tensor, length: int, dim: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbouring blocks along `dim` of `length` each, of which the last right one may be shorter.

    Views of the lefts and of the rights, (…, pairs, ≤ length, …). For each length of `_doublings`, two
    entries lie on the two sides of exactly one joint.
    """
    before, size, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    pairs = size // (2 * length)
    whole = pairs * 2 * length
    if pairs:
        joined = x if whole == size else x.narrow(dim, 0, whole)
        left, right = joined.view(*before, pairs, 2, length, *after).unbind(dim + 1)
        yield left, right
    rest = size - whole - length
    if rest > 0:
        yield x.narrow(dim, whole, length).unsqueeze(dim), x.narrow(dim, whole + length, rest).unsqueeze(dim)


class _Sums(NamedTuple):
    """Sums over keys of φ(k) with their values and alone, or the gradients of such sums, chunk after chunk.

    The two are kept apart: products over D + 1 channels take up to twice as long as over 64.
    """

    values: Tensor  # (n, N, D, m)
    norms: Tensor  # (n, N, 1, m)

    @classmethod
    def empty(cls, directions: Tensor, chunks: int, sequences: int) -> _Sums:
        """Not yet written."""
        m, head_dim = directions.shape
        return cls(
            directions.new_empty(chunks, sequences, head_dim, m),
            directions.new_empty(chunks, sequences, 1, m),
        )

    def put(self, chunks: slice, values: Tensor, norms: Tensor, features: Tensor) -> None:
        """Write the sums over the tokens of each chunk: of (G, c, D), (G, c, 1) and (G, c, m)."""
        for target, of in zip(self, (values, norms), strict=True):
            torch.bmm(of.mT, features, out=target[chunks].view(-1, *target.shape[2:]))

    def at(self, chunks: slice | int) -> _Sums:
        """Those of some chunks."""
        return _Sums(self.values[chunks], self.norms[chunks])

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(G, c, m) times the sums: of the values (G, c, D), and alone (G, c, 1)."""
        values, norms = (torch.bmm(features, s.flatten(0, 1).mT) for s in self)
        return values, norms

    def read_back(self, values: Tensor, norms: Tensor) -> Tensor:
        """(G, c, D) and (G, c, 1) times the sums: (G, c, m)."""
        return torch.bmm(values, self.values.flatten(0, 1)).addcmul_(norms, self.norms.flatten(0, 1))

    def accumulate(self, levels: Tensor, *, backward: bool = False) -> None:
        """Each with all before it or, `backward`, after it, in place and in ⌈log₂ n⌉ steps.

        `levels` (n, N, m) do not fall. Sums are stored divided by 2^level, gradients of sums multiplied by
        it: either way, what is added is scaled down.
        """
        for length in _doublings(len(levels)):
            for (left, right), *sums in zip(*(_joints(x, length) for x in (levels, *self)), strict=True):
                if backward:
                    scale = (left - right[:, :1]).exp2_().unsqueeze(-2)
                    for earlier, later in sums:
                        earlier.addcmul_(later[:, :1], scale)
                else:
                    scale = (left[:, -1:] - right).exp2_().unsqueeze(-2)
                    for earlier, later in sums:
                        later.addcmul_(earlier[:, -1:], scale)


def _start(directions: Tensor, sequences: int, softmax: bool) -> tuple[_Sums, Tensor]:
    """The sums over no keys (N, …), and their level (N, m)."""
    level = directions.new_full((sequences, directions.shape[0]), LOWEST if softmax else 0.0)
    m, head_dim = directions.shape
    zeros = _Sums(directions.new_zeros(sequences, head_dim, m), directions.new_zeros(sequences, 1, m))
    return zeros, level


@repeatable
class _FullFavor(torch.autograd.Function):
    """One sum over all keys, then one product a query; segments only bound the features that exist."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, tokens: int
    ) -> Tensor:
        kernel = Kernel(directions, softmax)
        batch, heads, seq_len, head_dim = q.shape
        y = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
        normaliser = directions.new_empty(batch, heads, seq_len, 1)
        start, level = _start(directions, batch * heads, softmax)
        sums = _Sums.empty(directions, 2, batch * heads)  # so far, and of a segment
        for s, zeros in zip(sums, start, strict=True):
            s[0] = zeros
        for k_part, v_part in _segments(tokens, 1, k, v):
            keys, values = kernel.keys(_whole(k_part)), _whole(v_part)
            levels = torch.stack([level, torch.maximum(level, keys.amax(1)) if softmax else level])
            level = levels[1]
            sums.put(
                slice(1, 2), values, torch.ones_like(values[..., :1]), kernel.keys_at(keys, level[:, None])
            )
            sums.accumulate(levels)
            for s in sums:
                s[0] = s[1]
        for q_part, *targets in _segments(tokens, 1, q, y, normaliser):
            queries = kernel.queries(_whole(q_part))
            highest = kernel.highest(queries, level[:, None])
            features = kernel.queries_at(kernel.lower(queries, highest), level[:, None])
            values, norms = sums.at(slice(1)).read(features)
            for target, part in zip(targets, (values.div_(norms), norms.log2_().add_(highest)), strict=True):
                _paste(target, part)
        ctx.save_for_backward(
            q, k, v, directions, y, normaliser, *(s[:1].clone() for s in sums), level.clone()
        )
        ctx.softmax, ctx.tokens = softmax, tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, directions, y, normaliser, values, norms, level = ctx.saved_tensors
        sums = _Sums(values, norms)
        kernel = Kernel(directions, ctx.softmax)
        g_q, g_k, g_v = (torch.empty_like(x) for x in (q, k, v))
        g_sums, g_own = (_Sums(*(torch.zeros_like(s) for s in sums)) for _ in range(2))
        for *parts, g_part in _segments(ctx.tokens, 1, q, y, normaliser, grad, g_q):
            q_part, y_part, normaliser_part, g = (_whole(x) for x in parts)
            queries = kernel.queries(q_part, normaliser_part)
            features = kernel.queries_at(queries, level[:, None])
            g_norm = (y_part * g).sum(-1, keepdim=True).neg_()
            g_own.put(slice(None), g, g_norm, features)
            for total, own in zip(g_sums, g_own, strict=True):
                total.add_(own)
            g_queries = sums.read_back(g, g_norm)
            if ctx.softmax:
                g_queries.mul_(features)
            _paste(g_part, kernel.queries_backward(g_queries, queries, normaliser_part))
        for k_part, v_part, g_k_part, g_v_part in _segments(ctx.tokens, 1, k, v, g_k, g_v):
            part, values = _whole(k_part), _whole(v_part)
            keys = kernel.keys(part)
            features = kernel.keys_at(keys, level[:, None])
            g_keys = g_sums.read_back(values, torch.ones_like(values[..., :1]))
            if ctx.softmax:
                g_keys.mul_(features)
            _paste(g_k_part, kernel.keys_backward(g_keys, keys, part))
            _paste(g_v_part, g_sums.read(features)[0])
        return g_q, g_k, g_v, None, None, None


def full_favor(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, softmax: bool, device_type: str | None = None
) -> Tensor:
    """The same with each query from every key. The work is cut for a type of device; None: that of q."""
    tokens = SEGMENT.on(device_type or q.device.type)
    y: Tensor = _FullFavor.apply(q, k, v, directions, softmax, tokens)  # type: ignore[no-untyped-call]
    return y
