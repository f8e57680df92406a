"""Attention of the queries of a part to its keys, with logsumexp, and its gradients: two kernels.

Shapes: N sequences, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1e30
"""The logsumexp over no keys: finite, so that the difference of two of them is not NaN."""


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention by torch's CPU kernel: outputs (N, H, queries, D) and logsumexp (N, H, queries)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias
    )
    if bias is not None:  # the kernel returns the logsumexp 0 for a query without a key
        lse = lse.masked_fill((bias == -math.inf).all(-1), EMPTY)
    return out, lse


def _fused_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. y and lse may be those of a softmax over more keys than k."""
    grads: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse.contiguous(), 0.0, causal, attn_mask=bias
        )
    )
    return grads


# Matrix products launch few operations, for accelerators: sequences and heads are one dimension, so that no
# product copies its factors; a product scales and adds the bias; and an elementwise operation writes the
# dtype that the next product reads. Shapes: (N · H, queries or keys, D).


def _product(a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """bias + scale · a @ b, in one operation."""
    added = a.new_empty(1, 1, 1) if bias is None else bias
    return torch.baddbmm(added, a, b, beta=0 if bias is None else 1, alpha=scale)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """The scores of all pairs in the dtype of q, −∞ for forbidden ones. bias: (1, H or 1, queries, keys)."""
    if causal:
        later = torch.full((q.shape[1], k.shape[1]), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        bias = later[None, None] if bias is None else bias + later
    scale, keys = q.shape[-1] ** -0.5, k.transpose(1, 2)
    if bias is not None and bias.shape[1] > 1:  # heads differ
        scores = _product(q, keys, scale)
        scores.unflatten(0, (-1, bias.shape[1])).add_(bias)
        return scores
    return _product(q, keys, scale, None if bias is None else bias[0])


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """`_fused` as matrix products."""
    batches = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = _scores(q, k, bias, causal)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    if bias is None:
        weights = scores.softmax(-1)
    else:  # a query may have no key, for which softmax gives NaN
        lse.clamp_(min=EMPTY)
        weights = torch.exp(scores - lse[..., None], out=torch.empty_like(scores))
    return _product(weights, v, 1.0).unflatten(0, batches), lse.unflatten(0, batches)


def _plain_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_fused_backward` as matrix products (Dao 2022, arXiv:2205.14135, appendix B.2). `mean` is dy · y."""
    batches, scale = q.shape[:2], q.shape[-1] ** -0.5
    dy, q, k, v, mean, lse = (t.flatten(0, 1) for t in (dy, q, k, v, mean, lse))
    weights = (_scores(q, k, bias, causal) - lse[..., None]).exp_()
    d_scores = _product(dy, v.transpose(1, 2), 1.0) - mean  # times the weights, below; one name to free it
    d_scores = torch.mul(d_scores, weights, out=torch.empty_like(d_scores, dtype=q.dtype))
    dq, dk = _product(d_scores, k, scale), _product(d_scores.transpose(1, 2), q, scale)
    dv = _product(weights.to(dy.dtype).transpose(1, 2), dy, 1.0)
    return dq.unflatten(0, batches), dk.unflatten(0, batches), dv.unflatten(0, batches)


def _row_products(dy: Tensor, y: Tensor) -> Tensor:
    """dy · y of each query (B, H, T, 1), the mean of the gradients of its weights."""
    return (dy * y).sum(-1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32))


class Kernel(NamedTuple):
    """Attention of some queries to some keys, and its gradients."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    of_outputs: Callable[[Tensor, Tensor], Tensor]
    """(dy, y) → what `attend_backward` gets in place of y, a row for each query."""


KERNELS = {
    "fused": Kernel(_fused, _fused_backward, lambda dy, y: y),
    "plain": Kernel(_plain, _plain_backward, _row_products),
}


def missing_fused(device_type: str) -> str | None:
    """The reason why torch's CPU attention kernel cannot run on a type of device, or None."""
    if device_type != "cpu":
        return f"impl=fused: runs on the CPU only; on {device_type} use auto or plain"
    return None
