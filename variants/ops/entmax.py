"""α-entmax (Peters 2019, arXiv:1905.05702) and attention with it, in memory linear in the length.

Over 300 lines: one function in pieces, both its passes, and the operators that a compiler takes whole.

Shapes: B batch, H heads, N = B·H, T tokens, D channels of a head; g rows of heads, P queries and J keys of a
piece.

p = [z − τ]₊^m with z = (α − 1)·scores, m = 1/(α − 1) and 1 < α ≤ 2. τ is the number for which p sums up to 1.
Sums are float32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.tile_size import Sizes

FEW_STEPS, MANY_STEPS = 8, 14
"""Newton steps for a fixed α up to 1.5, and for others. For 16,384 normal scores of any size, 7 and 11 leave
an error of the sum below 1e-9."""
STRIPS = 16
"""Maximum number of strips of queries. In causal models, all queries of a strip compute scores with the keys
of the last one."""
FEWEST_QUERIES = 64
"""Minimum number of queries of a strip, and of a piece of a strip unless it is shorter."""
PIECE = Sizes(cpu=2**20, accelerator=2**26)
"""Scores computed at a time, if that is `FEWEST_QUERIES` queries or more."""

Alpha = float | Tensor
"""One α, or one for each row of heads: (g, 1, 1)."""


def powers(u: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """u^(m − 1), which is p^(2 − α), and u^m of u ≥ 0; both are 0 where u is 0."""
    if isinstance(alpha, float) and alpha == 2:
        return (u > 0).to(u.dtype), u
    if isinstance(alpha, float) and alpha == 1.5:
        return u, u * u
    slope = u.pow(1 / (alpha - 1) - 1).masked_fill_(u == 0, 0)  # an α may be so near to 2 that 0^0 occurs
    return slope, slope * u


def threshold(z: Tensor, alpha: Alpha) -> Tensor:
    """τ of each row: (…, J) → (…, 1). The largest z of a row is 0.

    Newton's method for the m-norm of [z − τ]₊, which is to be 1. The norm is a convex function of τ, so the
    steps from −1 approach τ from one side for any scores; for equal scores the first step is exact.
    """
    tau = -torch.ones_like(z[..., :1])
    few = isinstance(alpha, float) and alpha <= 1.5
    for _ in range(FEW_STEPS if few else MANY_STEPS):
        slope, p = powers(torch.sub(z, tau).clamp_(min=0), alpha)
        total = p.sum(-1, keepdim=True)
        tau = tau + (total - total.pow(2 - alpha)) / slope.sum(-1, keepdim=True)
    return tau


def entmax(scores: Tensor, alpha: Alpha) -> Tensor:
    """α-entmax of the last dimension, without its own gradient: scores of −∞ have the weight 0."""
    z = scores * (alpha - 1)
    z = z - z.amax(-1, keepdim=True)
    _, p = powers(torch.sub(z, threshold(z, alpha)).clamp_(min=0), alpha)
    return p / p.sum(-1, keepdim=True)


# --- pieces ---------------------------------------------------------------------------------------


def strips(tokens: int, *, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, last query, keys) of each strip."""
    size = max(FEWEST_QUERIES, -(-tokens // STRIPS)) if causal else tokens
    return [(first, min(first + size, tokens), min(first + size, tokens)) for first in range(0, tokens, size)]


def computed_pairs(tokens: int, *, causal: bool) -> int:
    """The pairs of one head whose scores are computed."""
    return sum((end - first) * keys for first, end, keys in strips(tokens, causal=causal))


def _pieces(n: int, tokens: int, causal: bool, device_type: str) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of heads, queries and keys of each piece."""
    most = PIECE.on(device_type)
    for first, end, keys in strips(tokens, causal=causal):
        queries = min(end - first, max(FEWEST_QUERIES, most // keys))
        heads = max(1, most // (queries * keys))
        for head in range(0, n, heads):
            for start in range(first, end, queries):
                yield slice(head, min(head + heads, n)), slice(start, min(start + queries, end)), slice(keys)


def _alpha_of(alpha: Tensor, fixed: float | None, heads: slice) -> Alpha:
    """The α of a piece."""
    return alpha[heads] if fixed is None else fixed


def _scores(q: Tensor, k: Tensor, alpha: Alpha, ahead: int | None) -> Tensor:
    """z of a piece (g, P, J), minus the largest of each row, so that rounding leaves a threshold beside
    scores of any size. Causal: the first query may read `ahead` keys; None: all are read."""
    z = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    z = z.mul_((alpha - 1) * q.shape[-1] ** -0.5)
    if ahead is not None:
        later = torch.ones(z.shape[1:], dtype=torch.bool, device=z.device).triu_(ahead)
        z = z.masked_fill_(later, -torch.inf)
    return z.sub_(z.amax(-1, keepdim=True))


@repeatable
def _attend(q: Tensor, k: Tensor, v: Tensor, alpha: Alpha, ahead: int | None) -> tuple[Tensor, Tensor]:
    """Outputs (g, P, D) and thresholds (g, P, 1) of a piece."""
    z = _scores(q, k, alpha, ahead)
    tau = threshold(z, alpha)
    _, p = powers(z.sub_(tau).clamp_(min=0), alpha)
    return (p / p.sum(-1, keepdim=True)).to(v.dtype) @ v, tau


@repeatable
def _attend_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor],
    alpha: Alpha,
    ahead: int | None,
) -> Tensor | None:
    """Add the gradients of a piece to those of q, k and v. Returns that of α (g,) if α is a tensor.

    With the slope w = p^(2 − α), the gradient of scores is w·(dp − Σ w·dp / Σ w) (Peters 2019), and that of
    α is m·Σ dp·(b − w·Σ b / Σ w) with b = w·scores − p·log p (cf. Correia 2019, arXiv:1909.00015, §3,
    proposition 1).
    """
    dy, q, k, v, tau = inputs
    dq, dk, dv = sums
    u = _scores(q, k, alpha, ahead).sub_(tau).clamp_(min=0)
    w, p = powers(u, alpha)
    total = p.sum(-1, keepdim=True)
    dv += (p / total).to(dy.dtype).mT @ dy
    dp = (dy @ v.mT).to(u.dtype).masked_fill_(u == 0, 0.0)  # a value without weight may be of any size
    of_slopes = w.sum(-1, keepdim=True)
    d_alpha = None
    if isinstance(alpha, Tensor):
        m = 1 / (alpha - 1)
        b = w * (u + tau) * m - torch.xlogy(p, p)
        d_alpha = (m * dp * (b - w * (b.sum(-1, keepdim=True) / of_slopes))).sum((1, 2))
    mean = (w * dp).sum(-1, keepdim=True) / of_slopes
    d_scores = dp.sub_(mean).mul_(w).mul_(q.shape[-1] ** -0.5).to(q.dtype)
    dq += d_scores @ k
    dk += d_scores.mT @ q
    return d_alpha


def _forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, fixed: float | None, causal: bool, device_type: str
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, D) and thresholds (N, T, 1) for q, k and v (B, H, T, D) and α (N, 1, 1)."""
    shape, tokens = q.shape, q.shape[2]
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    y = torch.empty_like(q)
    tau = q.new_empty(len(q), tokens, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, queries, keys in _pieces(len(q), tokens, causal, device_type):
        ahead = queries.start + 1 if causal else None
        here = _attend(
            q[heads, queries], k[heads, keys], v[heads, keys], _alpha_of(alpha, fixed, heads), ahead
        )
        y[heads, queries], tau[heads, queries] = here
    return y.view(shape), tau


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Tensor,
    alpha: Tensor,
    fixed: float | None,
    causal: bool,
    device_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and α."""
    shape, tokens = q.shape, q.shape[2]
    dy, q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (dy, q, k, v))
    dq, dk, dv = (torch.zeros_like(q, dtype=tau.dtype) for _ in range(3))
    d_alpha = torch.zeros_like(alpha)
    for heads, queries, keys in _pieces(len(q), tokens, causal, device_type):
        inputs = dy[heads, queries], q[heads, queries], k[heads, keys], v[heads, keys], tau[heads, queries]
        sums = dq[heads, queries], dk[heads, keys], dv[heads, keys]
        ahead = queries.start + 1 if causal else None
        of_alpha = _attend_backward(inputs, sums, _alpha_of(alpha, fixed, heads), ahead)
        if of_alpha is not None:
            d_alpha[heads, 0, 0] += of_alpha
    return *(t.to(q.dtype).view(shape) for t in (dq, dk, dv)), d_alpha  # type: ignore[return-value]


@repeatable
class _EntmaxAttention(torch.autograd.Function):
    """Saves its inputs and the thresholds; backward computes the weights again, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        fixed: float | None,
        causal: bool,
        device_type: str,
    ) -> Tensor:
        y, tau = _forward(q, k, v, alpha, fixed, causal, device_type)
        ctx.save_for_backward(q, k, v, tau, alpha)
        ctx.fixed, ctx.causal, ctx.device_type = fixed, causal, device_type
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tau, alpha = ctx.saved_tensors
        given = ctx.fixed, ctx.causal, ctx.device_type
        *grads, d_alpha = _backward(dy, q, k, v, tau, alpha, *given)
        return *grads, None if ctx.fixed is not None else d_alpha, None, None, None


# --- operators for torch.compile, which would otherwise trace every piece ---------------------------------

_forward_operator = operator(
    "entmax_attention",
    _forward,
    schema="(Tensor q, Tensor k, Tensor v, Tensor alpha, float? fixed, bool causal, str device_type)"
    " -> (Tensor, Tensor)",
)
_backward_operator = operator(
    "entmax_attention_backward",
    _backward,
    schema="(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor tau, Tensor alpha, float? fixed, bool causal,"
    " str device_type) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    y = q.new_empty(q.shape)
    return y, q.new_empty(len(alpha), q.shape[2], 1, dtype=wide)


@_backward_operator.register_fake
def _backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, tau: Tensor, alpha: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(alpha)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, alpha, ctx.fixed, ctx.causal, ctx.device_type = inputs
    ctx.save_for_backward(q, k, v, output[1], alpha)


def _operator_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    *grads, d_alpha = _backward_operator(dy, *ctx.saved_tensors, ctx.fixed, ctx.causal, ctx.device_type)
    return *grads, None if ctx.fixed is not None else d_alpha, None, None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_save)


def _flops(q: Tensor, causal: bool, products: int) -> int:
    """FLOPs of `products` products of the computed pairs and the channels."""
    batch, heads, tokens, head_dim = q.shape
    return 2 * products * batch * heads * head_dim * computed_pairs(tokens, causal=causal)


@register_flop_formula(torch.ops.longctx_bench.entmax_attention, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, fixed: Any, causal: bool, *_: Any, **__: Any) -> int:
    return _flops(q, causal, 2)


@register_flop_formula(torch.ops.longctx_bench.entmax_attention_backward, get_raw=True)
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Tensor,
    alpha: Tensor,
    fixed: Any,
    causal: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(q, causal, 5)


def entmax_attention(
    q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor, *, causal: bool, device_type: str
) -> Tensor:
    """entmax(QKᵀ/√D)V for q, k and v (B, H, T, D) → (B, H, T, D).

    `alpha`, between 1 and 2, is a number or one for each head (H,), which then has a gradient.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    fixed = alpha if isinstance(alpha, float) else None
    by_head = q.new_zeros(q.shape[1], dtype=wide) if isinstance(alpha, float) else alpha.to(wide)
    rows = by_head.expand(q.shape[:2]).reshape(-1, 1, 1)
    if torch.compiler.is_compiling():
        y, _ = _forward_operator(q, k, v, rows, fixed, causal, device_type)
    else:  # operation by operation, so that counters see all computation and memory
        y = _EntmaxAttention.apply(q, k, v, rows, fixed, causal, device_type)  # type: ignore[no-untyped-call]
    result: Tensor = y
    return result
