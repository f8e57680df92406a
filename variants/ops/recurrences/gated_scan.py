"""Linear attention with a decay: S_t = g_t S_{t−1} + φ(k_t) (w_t v_t)ᵀ, y_t = φ(q_t) S_t, by chunks.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, m features of each,
V channels of values, which may differ from D.

g_t is one number for each head and token, between 0 and 1, given by its logarithm; without it, g_t = 1. With
`normalise`, the output is divided by φ(q_t)·z_t, where z_t = g_t z_{t−1} + w_t φ(k_t). How a segment is
computed: see `scan_chunks`.

For the backward pass are saved: inputs, output, normalisers, and the state before each segment, of which
there are at most `feature_sums.SEGMENTS`. Features and the states of chunks are computed again.

A later value that is infinite or NaN reaches earlier queries of its chunk (0 · NaN is NaN), as in fused
kernels of softmax attention. A finite one changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.scan_chunks import LEAST_LOG, Plan, Segment, chunk_length, read, read_backward
from variants.ops.recurrences.scan_features import FeatureMap

FLOP_OVERHEAD = "causal: all pairs of a chunk are computed, and the last chunk is padded"
"""The reason why a scan dispatches more FLOPs than `scan_flops`."""


def scan_flops(seq_len: int, features: int, channels: int, *, chunk: int) -> int:
    """Forward FLOPs of one sequence: pairs within chunks of at most `chunk` tokens, a product of each key
    with its value, and one of each query with the state. `channels` includes the normaliser's."""
    c = chunk_length(seq_len, chunk)
    full, remainder = divmod(seq_len, c)
    pairs = full * (c * (c + 1) // 2) + remainder * (remainder + 1) // 2
    return 2 * pairs * (features + channels) + 4 * seq_len * features * channels


def empty_state(plan: Plan, q: Tensor, v: Tensor, table: Tensor | None) -> tuple[Tensor, ...]:
    """The sums before the first token: zeros (N, m, V) and (N, m, 1), float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = q.shape[0] * q.shape[1], plan.features.width(q.shape[-1], table)
    channels = [v.shape[-1], 1] if plan.normalise else [v.shape[-1]]
    return tuple(q.new_zeros(*shape, each, dtype=wide) for each in channels)


def read_segments(
    plan: Plan, whole: Segment, table: Tensor | None, state: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, ...]]]:
    """Outputs (B, H, T, V), normalisers, and the sums before all segments and after the last one."""
    batch, heads, seq_len, channels = whole.v.shape
    # the layout that an output projection reads
    y = whole.v.new_empty(batch, seq_len, heads, channels).transpose(1, 2)
    normaliser = state[0].new_empty(batch, heads, seq_len, 1) if plan.normalise else None
    states = [state]
    for segment, targets in whole.split(plan, y, *([] if normaliser is None else [normaliser])):
        norms = targets[1] if plan.normalise else None
        states.append(read(plan, segment, table, states[-1], targets[0], norms))
    return y, normaliser, states


@repeatable
class _GatedScan(torch.autograd.Function):
    """Processes the segments in order with the state; in backward, in reverse with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, table: Tensor | None, *tensors: Tensor | None) -> Tensor:
        whole = Segment.of(*tensors)
        state = empty_state(plan, whole.q, whole.v, table)
        y, normaliser, states = read_segments(plan, whole, table, state)
        saved = [table, *tensors, y if plan.normalise else None, normaliser]
        ctx.save_for_backward(*saved, *(part for sums in states[:-1] for part in sums))
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        table, *saved = ctx.saved_tensors
        whole, (y, normaliser, *sums) = Segment.of(*saved[:6]), saved[6:]
        parts_of_state = 1 + plan.normalise
        starts = [tuple(sums[i : i + parts_of_state]) for i in range(0, len(sums), parts_of_state)]
        grads = Segment.of(
            *(torch.empty_like(x) for x in (whole.q, whole.k, whole.v)),
            torch.empty_like(whole.log_decay) if whole.log_decay is not None and plan.learnt_decay else None,
            None if whole.weight is None else torch.empty_like(whole.weight),
            None,
        )
        others = [grad, *([y, normaliser] if plan.normalise else []), *(x for x in grads if x is not None)]
        of_end = tuple(torch.zeros_like(part) for part in starts[0])
        for (segment, parts), start in zip(
            reversed(whole.split(plan, *others)), reversed(starts), strict=True
        ):
            each = iter(parts)
            g = next(each)
            y_part, norms = (next(each), next(each)) if plan.normalise else (None, None)
            targets = Segment.of(*(None if x is None else next(each) for x in grads))
            of_end = read_backward(plan, segment, table, start, of_end, y_part, norms, g, targets)
        of_log = None
        if whole.log_decay is not None and grads.log_decay is not None:
            of_log = grads.log_decay.masked_fill_(whole.log_decay <= LEAST_LOG, 0)
        return None, None, grads.q, grads.k, grads.v, of_log, grads.weight, None


def gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    features: FeatureMap,
    table: Tensor | None = None,
    normalise: bool = False,
    least: Tensor | None = None,
    chunk: int,
    device_type: str,
) -> Tensor:
    """Outputs (B, H, T, V) for queries and keys (B, H, T, D), and values (B, H, T, V).

    `log_decay` and `weight` (B, H, T, 1) are log g_t ≤ 0 and w_t; None: g_t = 1, w_t = 1. `table` are
    constants of the feature map. `least` (B, H, T, 1) are the least normalisers, which are constants too;
    None: any. `chunk` is in tokens, `device_type` decides the size of the segments.
    """
    plan = Plan.make(features, q, v, table, normalise, chunk, device_type)
    plan = plan._replace(learnt_decay=log_decay is not None and log_decay.requires_grad)
    tensors = (q, k, v, log_decay, weight, least)
    y: Tensor = _GatedScan.apply(plan, table, *tensors)  # type: ignore[no-untyped-call]
    return y


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    normalise: bool = False,
    least: Tensor | None = None,
) -> Tensor:
    """The definition, token by token, for features q and k (B, H, T, m): a reference for tests."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    norms, outputs = torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        g = torch.ones_like(v[:, :, t, :1]) if log_decay is None else log_decay[:, :, t].exp()  # (B, H, 1)
        w = torch.ones_like(g) if weight is None else weight[:, :, t]
        state = g[..., None] * state + torch.einsum("bhm,bhv->bhmv", k[:, :, t], w * v[:, :, t])
        norms = g * norms + w * k[:, :, t]
        y = torch.einsum("bhm,bhmv->bhv", q[:, :, t], state)
        if normalise:
            norm = (q[:, :, t] * norms).sum(-1, keepdim=True)
            y = y / (norm if least is None else torch.maximum(norm, least[:, :, t]))
        outputs.append(y)
    return torch.stack(outputs, dim=2)
