"""A layer under an input schedule: what it costs, carries, reads and computes on a whole sequence.

A layer that carries state is asked about whole sequences, because its segments are its own; any other is
asked about the windows that it is fed.

Shapes: B batch, T tokens, C channels (d_model).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from variants.base.mixer import SequenceMixer
from variants.base.protocols import HasMask
from variants.base.work import Context, Cost, Dims, Workload
from variants.input_schedule import Fed, InputSchedule


def dims_fed(mixer: type[SequenceMixer], schedule: InputSchedule, dims: Dims) -> Dims:
    """The sizes that a layer of a model for these sizes is built for: its sequences are what it is fed."""
    windows = schedule.windows(dims.seq_len, carried=mixer.info.caps.stateful)
    return replace(dims, seq_len=max(length for length, _ in windows))


def cost_fed(layer: SequenceMixer, schedule: InputSchedule, work: Workload) -> Cost:
    """Algorithmic forward FLOPs of the layer on whole sequences of `work.seq_len` tokens."""
    total = Cost()
    for length, count in schedule.windows(work.seq_len, carried=layer.info.caps.stateful):
        total += layer.cost(replace(work, seq_len=length)) * count
    return total


def state_bytes_fed(layer: SequenceMixer, schedule: InputSchedule, work: Workload) -> int:
    """Bytes to carry after `work.seq_len` tokens in order to process the next one."""
    if layer.info.caps.stateful:
        return layer.state_bytes(work)
    windows = schedule.open_windows(work.seq_len)
    return sum(layer.state_bytes(replace(work, seq_len=length)) for length in windows if length)


def mask_fed(layer: object, schedule: InputSchedule, seq_len: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: which keys (columns) a query (row) of one pass of the network reads; None where content
    decides. Of chunks, T is the length of one."""
    if not (isinstance(layer, HasMask) and isinstance(layer, SequenceMixer)):
        return None
    mask_of = layer.attention_mask
    return schedule.mask(
        lambda length: mask_of(length, causal=causal), seq_len, carried=layer.info.caps.stateful
    )


def whole_mask(layer: SequenceMixer, schedule: InputSchedule, seq_len: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: which keys a query of a whole sequence reads; None where content decides."""
    if mask_fed(layer, schedule, seq_len, causal=causal) is None:
        return None

    def network(window: Tensor, state: None) -> Fed:  # (N, L, T): what each token of each window is
        mask = mask_fed(layer, schedule, window.shape[1], causal=causal)
        assert mask is not None
        return Fed(mask.float() @ window)

    return schedule.apply(network, torch.eye(seq_len)[None], causal=causal).y[0] > 0


def reference_fed(layer: SequenceMixer, schedule: InputSchedule, x: Tensor, ctx: Context) -> Tensor:
    """The layer's reference on whole sequences: (B, T, C) → (B, T, C)."""
    if layer.info.caps.stateful:
        return layer.reference(x, ctx)
    segments = [
        schedule.apply(lambda window, _: Fed(layer.reference(window, ctx)), x[:, segment], causal=ctx.causal)
        for segment in schedule.segments(x.shape[1])
    ]
    return torch.cat([fed.y for fed in segments], dim=1)
