"""Linear attention with a decay of each channel, by chunks.

y_t = S_tᵀ q_t, with S_t = diag(α_t) S_{t−1} + k_t v_tᵀ.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, V channels of values,
which may differ from D; n tokens of a step.

α_t (D,) are numbers between 0 and 1, both included. How a segment is computed: see
`channel_chunks`. For the backward pass are saved: inputs, and the state before each segment, of
which there are at most `feature_sums.SEGMENTS`. Weights and the states of chunks are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.base import Clock, DecodingState
from variants.ops.memoizable import repeatable
from variants.ops.recurrences.channel_chunks import DecayMap, Plan, Segment, read, read_backward
from variants.ops.recurrences.scan_chunks import chunk_length

FLOP_OVERHEAD = "the weighted sums of a chunk include zeros of later keys, and the last chunk is padded"
"""The reason why a scan dispatches more FLOPs than `channel_scan_flops`."""


def channel_scan_flops(seq_len: int, channels: int, values: int, *, chunk: int) -> int:
    """Forward FLOPs of one sequence: pairs within chunks of at most `chunk` tokens, a product of each key
    with its value, and one of each query with the state. The weight of a token's own key is a sum of
    products of single numbers, which count 0."""
    c = chunk_length(seq_len, chunk)
    full, remainder = divmod(seq_len, c)
    pairs = full * (c * (c + 1) // 2) + remainder * (remainder + 1) // 2
    return 2 * (pairs - seq_len) * channels + 2 * pairs * values + 4 * seq_len * channels * values


def _read_segments(plan: Plan, whole: Segment, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, H, T, V), and the sums before all segments and after the last one."""
    batch, heads, seq_len, values = whole.v.shape
    # the layout that an output projection reads
    y = whole.v.new_empty(batch, seq_len, heads, values).transpose(1, 2)
    states = [state]
    for segment, (target,) in whole.split(plan, y):
        states.append(read(plan, segment, states[-1], target))
    return y, states


@repeatable
class _ChannelScan(torch.autograd.Function):
    """Processes the segments in order with the state; in backward, in reverse with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Tensor:
        whole = Segment(*tensors)
        wide = torch.promote_types(whole.q.dtype, torch.float32)
        sequences = whole.q.shape[0] * whole.q.shape[1]
        empty = whole.q.new_zeros(sequences, whole.q.shape[-1], whole.v.shape[-1], dtype=wide)
        y, states = _read_segments(plan, whole, empty)
        ctx.save_for_backward(*tensors, *states[:-1])
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # once, as checkpointing demands
        whole, starts = Segment(*saved[:4]), saved[4:]
        grads = Segment(*(torch.empty_like(x) for x in whole))
        of_end = torch.zeros_like(starts[0])
        of_later = whole.x.new_zeros(*whole.x.shape[:2], 1, whole.x.shape[-1], dtype=torch.float64)
        parts = whole.split(plan, grad, *grads)
        for (segment, (g, *targets)), start in zip(reversed(parts), reversed(starts), strict=True):
            of_end, of_later = read_backward(plan, segment, start, of_end, of_later, g, Segment(*targets))
        return None, *grads


def channel_scan(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, decay: DecayMap, chunk: int, device_type: str
) -> Tensor:
    """Outputs (B, H, T, V) for queries and keys (B, H, T, D), and values (B, H, T, V).

    The decays are α = exp(decay.logs(x)), for x (B, H, T, D). `chunk` is in tokens, `device_type` decides the
    size of the segments.
    """
    plan = Plan.make(decay, q, v, chunk, device_type)
    y: Tensor = _ChannelScan.apply(plan, q, k, v, x)  # type: ignore[no-untyped-call]
    return y


def channel_recurrence(q: Tensor, k: Tensor, v: Tensor, logs: Tensor) -> Tensor:
    """The definition, token by token: a reference for tests and layers. `logs` are log α (B, H, T, D)."""
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        own = torch.einsum("bhd,bhv->bhdv", k[:, :, t], v[:, :, t])
        state = logs[:, :, t].exp()[..., None] * state + own
        outputs.append(torch.einsum("bhd,bhdv->bhv", q[:, :, t], state))
    return torch.stack(outputs, dim=2)


class ChannelScanState(DecodingState):
    """S of one layer, in float32 or wider."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, H, D, V); `dtype` is that of keys and values."""
        super().__init__(clock, max_len)
        wide = torch.promote_types(dtype, torch.float32)
        self.sums = torch.zeros(shape, dtype=wide, device=device)

    def read_next(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, decay: DecayMap, chunk: int, device_type: str
    ) -> Tensor:
        """Add the next n tokens, and return their outputs (B, H, n, V). Arguments: see `channel_scan`."""
        if q.shape[2] == 1:  # by the recurrence itself: a chunk would halve, mask and pad for it
            wide = self.sums.dtype
            self.sums.mul_(decay.logs(x.to(wide)).exp_().mT).addcmul_(k.to(wide).mT, v.to(wide))
            return (q.to(wide) @ self.sums).to(v.dtype)
        plan = Plan.make(decay, q, v, chunk, device_type)
        y, states = _read_segments(plan, Segment(q, k, v, x), self.sums.flatten(0, 1))
        self.sums.copy_(states[-1].view_as(self.sums))
        return y
