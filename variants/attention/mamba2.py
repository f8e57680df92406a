"""Mamba-2, the state space dual layer (Dao and Gu 2024, arXiv:2405.21060), as a mixer of tokens.

Shapes: B batch, T tokens, C channels, H heads of the state, P channels of a head, N channels of a state,
G groups of heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    DecodingState,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.convolutions.short_convolution import short_convolution
from variants.ops.recurrences.gated_norm import GatedNorm, gated_norm
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.recurrences.scan_features import Identity
from variants.ops.recurrences.scan_state import ScanState

EPS = 1e-5
"""Added to the mean square of the channels of a token."""
STEPS = (1e-3, 1e-1)
"""Δ without an input lies between these at first, on a logarithmic scale."""
RATES = (1.0, 16.0)
"""e^A lies between these at first."""


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(VariantConfig):
    """Knobs of the state, of the convolution and of the causal sums."""

    expand: int = knob(1, least=1)
    """Inner channels as a multiple of those of all heads. The paper has 2, in blocks that have no
    feed-forward layer."""
    state: int = knob(64, least=1)
    """N, the channels of a state for each channel of a head: those of B and C."""
    groups: int = knob(1, least=1)
    """G: heads of a group have B and C in common."""
    kernel: int = knob(4, least=1, unit="tokens")
    """Tokens that the convolution reads: a token and those before it."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Weights are computed pair by pair within it; earlier chunks are one sum. It
    changes the cost, and not the outputs."""


class Mamba2State(DecodingState):
    """The sums, and the last w − 1 inputs of the convolution; 0 before the first token."""

    def __init__(self, sums: ScanState, inputs: Tensor) -> None:
        super().__init__(sums.clock, sums.max_len)
        self.sums, self.inputs = sums, inputs

    def parts(self) -> Sequence[DecodingState]:
        """The sums."""
        return (self.sums,)


class Mamba2(SequenceMixer):
    """W_out norm((y + D ∘ x) ∘ silu(z)), y_t = h_tᵀ C_t, with h_t = exp(−Δ_t e^A) h_{t−1} + Δ_t B_t x_tᵀ.

    z, x, B, C and Δ are projections of the token; x, B and C then pass a causal convolution of a few tokens
    and a silu, and Δ = softplus(· + b). A, D and b are learnt for each head. This is linear attention with
    queries C, keys B, values Δ x, and a decay of each head and token. The norm is an RMS norm.

    Parameters: 3·C² of z, x and the output, and 2·G·N·C of B and C, for expand=1: between 3·C² and 4·C² from
    256 channels on with the default state; dense attention has 4·C². The paper's block has expand=2, which is
    6·C² and more, and replaces a feed-forward layer as well.

    Deviations from the paper: expand is 1. The heads have the channels of the model's heads. The norm covers
    all channels also if there are several groups. There are no positions but the decays and the convolution,
    as in the paper.
    """

    Config = Mamba2Config
    config: Mamba2Config
    position_scheme = "relative"
    info = Info(
        paper="Dao and Gu 2024, Transformers are SSMs (Mamba-2), arXiv:2405.21060",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·N·C", source="Dao 2024, Theorem 6.1"),
        caps=Caps(causal=True, bidirectional=False),
    )
    flop_overhead_reason = FLOP_OVERHEAD

    def __init__(self, config: Mamba2Config, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.heads, self.inner = config.expand * dims.heads, config.expand * dims.inner_dim
        self.shared = config.groups * config.state
        """Channels of B, and of C."""
        self.convolved = self.inner + 2 * self.shared
        self.input = nn.Linear(dims.d_model, self.inner + self.convolved + self.heads, bias=False)
        bound = config.kernel**-0.5
        self.filters = nn.Parameter(torch.empty(self.convolved, config.kernel).uniform_(-bound, bound))
        self.filter_bias = nn.Parameter(torch.zeros(self.convolved))
        low, high = (math.log(step) for step in STEPS)
        steps = torch.empty(self.heads).uniform_(low, high).exp()
        self.step_bias = nn.Parameter(steps + (-(-steps).expm1()).log())  # the inverse of softplus
        self.rate = nn.Parameter(torch.empty(self.heads).uniform_(*RATES).log())  # A
        self.skip = nn.Parameter(torch.ones(self.heads))  # D
        self.scale = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, dims.d_model, bias=False)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Heads that the groups do not divide."""
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        assert isinstance(config, Mamba2Config)
        heads = config.expand * dims.heads
        if heads % config.groups:
            return f"groups={config.groups}: must divide the {heads} heads of the state"
        return None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits z of the gate, inputs of the convolution, and Δ (B, H, T, 1) in float32 or wider."""
        z, inputs, steps = self.input(x).split([self.inner, self.convolved, self.heads], dim=-1)
        steps = steps.to(torch.promote_types(steps.dtype, torch.float32))
        return z, inputs, F.softplus(steps + self.step_bias).transpose(1, 2).unsqueeze(-1)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C and B (B, H, T, N), which heads of a group share, and x (B, H, T, P) in float32 or wider.

        The norm makes the gradient of y nearly orthogonal to x, and those of B, C and Δ are products of both,
        so rounding x and y to bfloat16 would change them. With heads of 16 channels, the bfloat16 gate may
        still report their parameters.
        """
        x, b, c = convolved.split([self.inner, self.shared, self.shared], dim=-1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        keys, queries = (
            part.unflatten(-1, (self.config.groups, 1, -1))
            .expand(-1, -1, -1, self.heads // self.config.groups, -1)
            .flatten(2, 3)
            .transpose(1, 2)
            for part in (b, c)
        )
        return queries, keys, x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _finish(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Skip, gate, norm and output projection."""
        y = torch.addcmul(y, x, self.skip[:, None, None].to(y.dtype)).transpose(1, 2).flatten(2)
        form = GatedNorm("silu", gate_first=True, eps=EPS)
        gated = gated_norm(form, y.unsqueeze(2), z, self.scale, device_type=self.device_type)
        out: Tensor = self.out(gated.flatten(2))
        return out

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        z, inputs, steps = self._project(x)
        convolved = short_convolution(inputs, self.filters, self.filter_bias, device_type=self.device_type)
        q, k, v = self._split(convolved)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            y = gated_scan(
                q,
                k,
                v,
                -steps * self.rate.exp()[:, None, None],
                steps,
                features=Identity(),
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return MixerOut(self._finish(z, v, y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form: the decays between key and query are masked before the exponential."""
        z, inputs, steps = self._project(x)
        tokens, width = x.shape[1], self.config.kernel
        padded = F.pad(inputs, (0, 0, width - 1, 0))
        taps = [self.filters[:, j] * padded[:, j:][:, :tokens] for j in range(width)]
        q, k, v = self._split(F.silu(torch.stack(taps).sum(0) + self.filter_bias))
        logs = (-steps * self.rate.exp()[:, None, None]).cumsum(2)  # (B, H, T, 1)
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        decays = (logs - logs.mT).masked_fill(later, float("-inf")).exp()
        y = (q @ k.mT * decays) @ (steps * v) + self.skip[:, None, None] * v
        y = y.transpose(1, 2).flatten(2) * F.silu(z)
        reference: Tensor = self.out(F.rms_norm(y, y.shape[-1:], self.scale, eps=EPS))
        return reference

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.heads, self.config.state, self.inner // self.heads

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> Mamba2State:
        """The decayed sums, and the last inputs of the convolution."""
        device = self.out.weight.device
        sums = ScanState(clock, max_len, self._shape(batch_size), normalise=False, dtype=dtype, device=device)
        recent = batch_size, self.config.kernel - 1, self.convolved
        return Mamba2State(sums, torch.zeros(recent, dtype=dtype, device=device))

    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        z, inputs, steps = self._project(x)
        inputs = torch.cat([state.inputs.to(inputs.dtype), inputs], dim=1)
        state.inputs.copy_(inputs[:, x.shape[1] :])
        convolved = short_convolution(inputs, self.filters, self.filter_bias, device_type=self.device_type)
        q, k, v = self._split(convolved[:, self.config.kernel - 1 :])
        with torch.autocast(x.device.type, enabled=False):
            y = state.sums.read_next(
                q,
                k,
                v,
                -steps * self.rate.exp()[:, None, None],
                steps,
                features=Identity(),
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return self._finish(z, v, y)

    def decoding_bytes(self, work: Workload) -> int:
        """Neither the sums nor the inputs grow."""
        recent = work.batch_size * (self.config.kernel - 1) * self.convolved * work.element_bytes
        shape = self._shape(work.batch_size)
        return recent + ScanState.bytes(shape, normalise=False, element_bytes=work.element_bytes)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums of each head, N × P, and of the last w − 1 inputs of the convolution."""
        tokens = min(work.seq_len, self.config.kernel - 1)
        recent = tokens * self.convolved * work.element_bytes
        return work.batch_size * (recent + 4 * self.inner * self.config.state)

    def cost(self, work: Workload) -> Cost:
        """Projections; sums over keys, products of queries with the sums and pairs within a chunk. The
        convolution is elementwise work, which counts 0."""
        tokens = work.batch_size * work.seq_len
        channels = 2 * self.inner + self.convolved + self.heads
        each = scan_flops(work.seq_len, self.config.state, self.inner // self.heads, chunk=self.config.chunk)
        return Cost(
            {
                "projections": 2 * tokens * work.d_model * channels,
                "attention": work.batch_size * self.heads * each,
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """None: content decides how far a token reads."""
        return None
