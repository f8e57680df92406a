"""Cost, state, mask and reference of a layer on whole sequences, with the input schedule of its model.

A stateful layer is evaluated on whole sequences, because it handles segments itself. Any other layer is
evaluated on the windows of the input schedule.

Shapes: B batch, T tokens, C channels (d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from variants.base.mixer import SequenceMixer
from variants.base.protocols import HasMask
from variants.base.work import Context, Cost, Dims, Workload
from variants.input_schedule import InputSchedule, NetworkOut


def scheduled_dims(mixer: type[SequenceMixer], schedule: InputSchedule, dims: Dims) -> Dims:
    """The sizes with which a layer is built: `seq_len` is the longest window that the layer processes."""
    windows = schedule.windows(dims.seq_len, carried=mixer.info.caps.stateful)
    return replace(dims, seq_len=max(length for length, _ in windows))


def scheduled_cost(
    layer: SequenceMixer,
    schedule: InputSchedule,
    work: Workload,
    windows_of: Callable[[int], Sequence[tuple[int, int]]] = lambda tokens: [(tokens, 1)],
) -> Cost:
    """Algorithmic forward FLOPs of the layer on whole sequences of `work.seq_len` tokens; of a window of n
    tokens it processes `windows_of(n)` separately, (length, number) each."""
    total = Cost()
    for window, windows in schedule.windows(work.seq_len, carried=layer.info.caps.stateful):
        for length, count in windows_of(window):
            total += layer.cost(replace(work, seq_len=length)) * (windows * count)
    return total


def scheduled_state_bytes(
    layer: SequenceMixer,
    schedule: InputSchedule,
    work: Workload,
    length_of: Callable[[int], int] = lambda tokens: tokens,
) -> int:
    """Bytes of state after `work.seq_len` tokens that are needed to process the next token; the layer has
    processed `length_of(n)` tokens of a window of n."""
    if layer.info.caps.stateful:
        return layer.state_bytes(work)
    windows = schedule.open_windows(work.seq_len)
    return sum(layer.state_bytes(replace(work, seq_len=length_of(length))) for length in windows if length)


def segment_mask(layer: object, schedule: InputSchedule, seq_len: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: the keys (columns) that a query (row) reads within one segment or chunk of T tokens.

    None if the keys depend on content.
    """
    if not (isinstance(layer, HasMask) and isinstance(layer, SequenceMixer)):
        return None
    mask_of = layer.attention_mask
    return schedule.mask(
        lambda length: mask_of(length, causal=causal), seq_len, carried=layer.info.caps.stateful
    )


def sequence_mask(
    layer: SequenceMixer, schedule: InputSchedule, seq_len: int, *, causal: bool
) -> Tensor | None:
    """(T, T) bool: the keys (columns) that a query (row) of a whole sequence reads; None if they depend on
    content."""
    if segment_mask(layer, schedule, seq_len, causal=causal) is None:
        return None

    def network(window: Tensor, state: None) -> NetworkOut:  # (N, L, T): one-hot tokens of each window
        mask = segment_mask(layer, schedule, window.shape[1], causal=causal)
        assert mask is not None
        return NetworkOut(mask.float() @ window)

    return schedule.apply(network, torch.eye(seq_len)[None], causal=causal).y[0] > 0


def scheduled_reference(layer: SequenceMixer, schedule: InputSchedule, x: Tensor, ctx: Context) -> Tensor:
    """The reference of a layer on whole sequences: (B, T, C) → (B, T, C)."""
    if layer.info.caps.stateful:
        return layer.reference(x, ctx)
    outputs = [
        schedule.apply(
            lambda window, _: NetworkOut(layer.reference(window, ctx)), x[:, segment], causal=ctx.causal
        )
        for segment in schedule.segments(x.shape[1])
    ]
    return torch.cat([output.y for output in outputs], dim=1)
