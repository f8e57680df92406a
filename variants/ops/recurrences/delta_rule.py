"""The gated delta rule: S_t = (I − β_t k_t k_tᵀ) g_t S_{t−1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t, by chunks.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, V channels of values.

A write replaces a share β_t of what the state returns for the key k_t by the value v_t (Schlag 2021,
arXiv:2102.11174; by chunks: Yang 2024, arXiv:2406.06484; with decays: Yang 2024, arXiv:2412.06464; of
channels: Kimi Team 2025, arXiv:2510.26692). g_t is one number for each head and token, or a diagonal matrix
of one for each channel of the keys, between 0 and 1, given by its logarithm; without it, g_t = 1. How a
segment is computed: see `delta_chunks`.

For the backward pass are saved: inputs, and the state before each segment, of which there are at most
`feature_sums.SEGMENTS`. Everything else is computed again.

A later value that is infinite or NaN reaches earlier queries of its chunk (0 · NaN is NaN), as in fused
kernels of softmax attention. A finite one changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.delta_chunks import Plan, Tokens, read, read_backward
from variants.ops.recurrences.scan_chunks import chunk_length
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**17, accelerator=2**28)
"""Channels of all sequences together that are computed at a time. The CPU's value keeps them in cache."""
FLOP_OVERHEAD = "causal: all pairs of a chunk are computed, and the last chunk is padded"
"""The reason why more FLOPs are dispatched than `delta_flops`."""


def delta_flops(seq_len: int, keys: int, values: int, *, chunk: int) -> int:
    """Forward FLOPs of one sequence, in chunks of at most `chunk` tokens; D = `keys`, V = `values`.

    Pairs within chunks: scores, overlaps of keys and the sums over the differences X; the triangular system
    is substituted by elementary operations, which count 0. Products of all tokens with states or transitions:
    W S, Q S, and the sums for the next state. Products of transitions with states: one for each chunk.
    """
    c = chunk_length(seq_len, chunk)
    full, remainder = divmod(seq_len, c)
    pairs = full * (c * (c + 1) // 2) + remainder * (remainder + 1) // 2
    own = seq_len  # pairs of a token with itself, which have no overlap
    within = (2 * pairs - own) * keys + pairs * values
    across = seq_len * keys * (3 * values + keys) + (full + bool(remainder)) * keys * keys * values
    return 2 * (within + across)


def make_plan(q: Tensor, v: Tensor, *, unit: bool, chunk: int, device_type: str) -> Plan:
    """Segments that suit the device, in chunks of equal lengths, of at most `chunk` tokens."""
    tokens = max(1, SEGMENT.on(device_type) // max(q.shape[-1], v.shape[-1]))
    return Plan(chunk_length(q.shape[2], chunk), tokens, unit, tree=device_type != "cpu")


def empty_state(q: Tensor, v: Tensor) -> Tensor:
    """The state before the first token: zeros (N, D, V), float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(q.shape[0] * q.shape[1], q.shape[-1], v.shape[-1], dtype=wide)


def _empty(x: Tensor) -> Tensor:
    """An empty tensor (B, H, T, …) like x, in the layout of projections."""
    batch, heads, seq_len, channels = x.shape
    return x.new_empty(batch, seq_len, heads, channels).transpose(1, 2)


def read_segments(plan: Plan, whole: Tokens, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, H, T, V), and the states before all segments and after the last one."""
    y, states = _empty(whole.v), [state]
    for tokens, (target,) in whole.split(plan, y):
        states.append(read(plan, tokens, states[-1], target))
    return y, states


@repeatable
class _DeltaRule(torch.autograd.Function):
    """Processes the segments in order with the state; in backward, in reverse with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Tensor:
        whole = Tokens.of(*tensors)
        y, states = read_segments(plan, whole, empty_state(whole.q, whole.v))
        ctx.save_for_backward(*tensors, *states[:-1])
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors
        whole, starts = Tokens.of(*saved[:5]), saved[5:]
        grads = Tokens.of(*(None if x is None else _empty(x) for x in whole))
        of_end = torch.zeros_like(starts[0])
        segments = whole.split(plan, grad, *(x for x in grads if x is not None))
        for (tokens, (part, *own)), start in zip(reversed(segments), reversed(starts), strict=True):
            of_tokens = Tokens.of(*own, *([None] if grads.log_decay is None else []))
            of_end = read_backward(plan, tokens, start, of_end, part, of_tokens)
        return None, *grads


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    unit: bool = False,
    chunk: int,
    device_type: str,
) -> Tensor:
    """Outputs (B, H, T, V) for queries and keys (B, H, T, D), and values (B, H, T, V).

    `beta` (B, H, T, 1) and `log_decay` (B, H, T, 1 or D) are β_t and log g_t ≤ 0; None: g_t = 1. With `unit`,
    queries and keys are divided by √(|x|² + 1e-6) first. `chunk` is in tokens, `device_type` decides the size
    of the segments, and whether the states of chunks follow in order.
    """
    plan = make_plan(q, v, unit=unit, chunk=chunk, device_type=device_type)
    y: Tensor = _DeltaRule.apply(plan, q, k, v, beta, log_decay)  # type: ignore[no-untyped-call]
    return y


def recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The definition, token by token: a reference. Arguments: see `delta_rule`."""
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])  # (B, H, D, V)
    outputs = []
    for t in range(q.shape[2]):
        if log_decay is not None:
            state = log_decay[:, :, t, :, None].exp() * state
        returned = torch.einsum("bhd,bhdv->bhv", k[:, :, t], state)
        written = beta[:, :, t] * (v[:, :, t] - returned)
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, :, t], written)
        outputs.append(torch.einsum("bhd,bhdv->bhv", q[:, :, t], state))
    return torch.stack(outputs, dim=2)
