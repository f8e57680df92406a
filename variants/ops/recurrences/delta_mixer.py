"""The parts that layers with the delta rule have in common: inputs, read-out, reference, decoding and cost.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, w taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Clock,
    Context,
    Cost,
    Dims,
    Impl,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.convolutions.short_convolution import short_convolution
from variants.ops.projections import Projections
from variants.ops.recurrences.delta_chunks import LEAST_SQUARE
from variants.ops.recurrences.delta_rule import FLOP_OVERHEAD, delta_flops, delta_rule, recurrence
from variants.ops.recurrences.delta_state import DeltaState
from variants.ops.recurrences.fla_kernels import KERNELS
from variants.ops.recurrences.fla_scans import fla_impl, scan
from variants.ops.recurrences.gated_norm import Activation, GatedNorm, gated_norm

EPSILON = 1e-5
"""Added to the mean square of the outputs of a head before they are divided by its root."""


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(VariantConfig):
    """Knobs of the convolution and of the chunks."""

    conv: int = knob(4, least=1, most=64, unit="tokens")
    """Taps of the causal convolution of queries, keys and values; 1: none."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Weights are computed pair by pair within it; earlier chunks are one state.
    It changes the cost, and not the outputs."""
    impl: Literal["auto", "plain", "fla"] = knob("auto", younger=True)
    """Implementation of the delta rule. plain: batched matrix products in float32. fla: kernels of the
    package fla-core, in half precision; untried. auto: plain. Decoding has one implementation."""

    kernel: ClassVar[str]
    """Name of fla-core's kernel, see `fla_kernels`."""

    def __post_init__(self) -> None:
        if self.impl == "fla":
            chunks = KERNELS[self.kernel].chunks
            self.require("chunk", self.chunk in chunks, f"{', '.join(map(str, chunks))} with impl=fla")


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    logs: Tensor | None,
    chunk: int,
    device_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """In float32 or wider: `dtype` is that of the projections."""
    return delta_rule(q, k, v, beta, logs, unit=True, chunk=chunk, device_type=device_type)


def implementations(kernel: str) -> Mapping[str, Impl]:
    """Those of a layer, with this kernel of fla-core."""

    def fla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        logs: Tensor | None,
        chunk: int,
        device_type: str,
        dtype: torch.dtype,
    ) -> Tensor:
        return scan(kernel, q, k, v, beta, logs, unit=True, chunk=chunk, dtype=dtype)

    return {
        "plain": Impl(run=_plain, flop_overhead_reason=FLOP_OVERHEAD, auto_on=("cpu", Impl.OTHER_DEVICES)),
        "fla": fla_impl(kernel, fla),
    }


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A projection without bias in float32 or wider, with autocast too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide))


class DeltaMixer(SequenceMixer):
    """Reads the state of a delta rule; a subclass may have decays, and a gate of the outputs.

    Queries, keys and values are convolved and activated by swish; queries and keys are divided by their
    lengths, and queries by √D too. The strengths of the writes are sigmoid(w·x). Outputs of each head have an
    RMS norm with a learnt scale that all heads share.
    """

    config: DeltaConfig
    position_scheme = "none"
    activation: ClassVar[Activation] = "silu"
    """Of the gate of the outputs."""

    def __init__(self, config: DeltaConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.strength = nn.Linear(dims.d_model, dims.heads, bias=False)
        self.scale = nn.Parameter(torch.ones(dims.head_dim))
        channels = 3 * dims.inner_dim
        self.taps = nn.Parameter(torch.empty(channels, config.conv)) if config.conv > 1 else None
        if self.taps is not None:
            # as a convolution of one input channel, as in the authors' code
            nn.init.kaiming_uniform_(self.taps, a=5**0.5)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithms of the decays (B, H, T, 1 or D) for inputs (B, T, C), float32 or wider; None: none."""
        return None

    def gate(self, x: Tensor) -> Tensor | None:
        """Gates of the outputs before their activation (B, H, T, D); None: none."""
        return None

    def extra_flops(self, work: Workload) -> int:
        """Forward FLOPs of decays and gates."""
        return 0

    def _beta(self, x: Tensor) -> Tensor:
        """Strengths (B, H, T, 1), float32 or wider."""
        return wide_linear(x, self.strength.weight).sigmoid().transpose(1, 2).unsqueeze(-1)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projections of queries and keys (B, T, 2·H·D), in float32 or wider, and of values (B, T, H·D).

        A head that forgets at once has outputs of the size of q·k, which the norm divides by. Where q·k is
        small, it would be the rounding of half precision.
        """
        w_qk, w_v = self.projections.qkv.weight.split([2 * self.dims.inner_dim, self.dims.inner_dim])
        return wide_linear(x, w_qk), F.linear(x, w_v)

    def _mixed(self, x: Tensor, channels: slice) -> list[Tensor]:
        """Projections (B, T, i·H·D), which have these channels of q, k and v: convolved and activated, in i
        tensors (B, H, T, D), float32 or wider."""
        if self.taps is None:
            mixed = F.silu(x.to(torch.promote_types(x.dtype, torch.float32)))
        else:
            mixed = short_convolution(x, self.taps[channels], device_type=self.device_type)
        # their gradients are written to one tensor in the layout of the projections
        heads = mixed.unflatten(-1, (-1, self.dims.heads, self.dims.head_dim))
        return [part.transpose(1, 2) for part in heads.unbind(2)]

    def _read_out(self, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) → (B, T, C)."""
        # instead of dividing queries by √D, which takes a pass over them
        form = GatedNorm(self.activation, eps=self.dims.head_dim * EPSILON)
        logits = None if gate is None else gate.transpose(1, 2)
        with torch.autocast(y.device.type, enabled=False):
            y = gated_norm(
                form, y.transpose(1, 2), logits, self.scale, dtype=dtype, device_type=self.device_type
            )
        out: Tensor = self.projections.out(y.flatten(2))
        return out

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        (qk, values), beta, logs, gate = self._inputs(x), self._beta(x), self.log_decay(x), self.gate(x)
        border = qk.shape[-1]
        with torch.autocast(x.device.type, enabled=False):  # states need float32
            q, k = self._mixed(qk, slice(border))
            (v,) = self._mixed(values, slice(border, None))
            y = self.run_impl(q, k, v, beta, logs, self.config.chunk, self.device_type, values.dtype)
        return MixerOut(self._read_out(y, gate, values.dtype))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The recurrence, token by token, in float32 or wider."""
        qkv = self.projections.qkv(x)
        qkv = qkv.to(torch.promote_types(x.dtype, torch.float32))
        if self.taps is not None:
            width = self.taps.shape[1]
            windows = F.pad(qkv, (0, 0, width - 1, 0)).unfold(1, width, 1)  # (B, T, 3·H·D, w)
            qkv = torch.einsum("btcw,cw->btc", windows, self.taps.to(qkv.dtype))
        qkv = qkv * qkv.sigmoid()
        q, k, v = qkv.unflatten(-1, (3, self.dims.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (t / (t.square().sum(-1, keepdim=True) + LEAST_SQUARE).sqrt() for t in (q, k))
        y = recurrence(q * q.shape[-1] ** -0.5, k, v, self._beta(x), self.log_decay(x))
        y = y / (y.square().mean(-1, keepdim=True) + EPSILON).sqrt() * self.scale.to(y.dtype)
        gate = self.gate(x)
        if gate is not None:
            y = y * gate.sigmoid() * (gate if self.activation == "silu" else 1)
        return self.projections.merge(y.to(x.dtype))

    def _sizes(self, dims: Dims, batch_size: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        shape = batch_size, dims.heads, dims.head_dim, dims.head_dim
        return shape, (self.config.conv - 1, 3 * dims.inner_dim)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> DeltaState:
        """The state of each head, and the projections that the convolution reads again."""
        shape, recent = self._sizes(self.dims, batch_size)
        return DeltaState(clock, max_len, shape, recent, dtype=dtype, device=self.scale.device)

    def step(self, x: Tensor, state: DeltaState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        (qk, values), beta, logs, gate = self._inputs(x), self._beta(x), self.log_decay(x), self.gate(x)
        chunk, device_type = self.config.chunk, self.device_type
        with torch.autocast(x.device.type, enabled=False):
            window = state.with_recent(torch.cat([qk, values.to(qk.dtype)], -1))
            q, k, v = (part[:, :, self.config.conv - 1 :] for part in self._mixed(window, slice(None)))
            y = state.read_next(q, k, v, beta, logs, unit=True, chunk=chunk, device_type=device_type)
        return self._read_out(y, gate, values.dtype)

    def decoding_bytes(self, work: Workload) -> int:
        """The state does not grow."""
        shape, recent = self._sizes(work, work.batch_size)
        return DeltaState.bytes(shape, recent, element_bytes=work.element_bytes)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the state of each head, in float32 or wider, and of the last projections."""
        shape, (taps, channels) = self._sizes(work, work.batch_size)
        recent = min(taps, work.seq_len), channels
        return DeltaState.bytes(shape, recent, element_bytes=work.element_bytes)

    def cost(self, work: Workload) -> Cost:
        """Projections, strengths, decays and gates, and the delta rule by chunks (see `delta_flops`). The
        convolution is elementwise and counts 0."""
        tokens, d = work.batch_size * work.seq_len, work.head_dim
        maps = 2 * tokens * work.d_model * work.heads + self.extra_flops(work)
        each = delta_flops(work.seq_len, d, d, chunk=self.config.chunk)
        return Cost(
            {
                "projections": Projections.flops(work) + maps,
                "attention": work.batch_size * work.heads * each,
            }
        )
