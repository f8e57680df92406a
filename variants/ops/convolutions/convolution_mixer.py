"""The layer of LightConv and DynamicConv (Wu 2019, arXiv:1901.10430): a gated input, a convolution whose taps
are a softmax, and an output projection.

Shapes: B batch, T tokens, C channels, H heads, R channels of a head, k taps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Clock,
    Context,
    Cost,
    DecodingState,
    Dims,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.convolutions.banded_convolution import softmax_convolution


@dataclass(frozen=True, kw_only=True)
class ConvolutionConfig(VariantConfig):
    """Knobs of the convolution."""

    kernel: tuple[int, ...] = knob((31,), least=1, entries=1, unit="tokens")
    """Number of tokens that a token reads. One entry for each layer from the lowest on; all higher layers use
    the last entry. A causal token reads itself and tokens before it. Otherwise the tokens are centred, with
    one more before the token if their number is even. The paper has 3, 7, 15 and then 31."""


class RecentInputs(DecodingState):
    """The last k − 1 inputs of the convolution; 0 before the first token."""

    def __init__(
        self, clock: Clock, max_len: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (B, k − 1, H, R)."""
        super().__init__(clock, max_len)
        self.inputs = torch.zeros(shape, dtype=dtype, device=device)


class ConvolutionMixer(SequenceMixer):
    """W_out conv(a ∘ sigmoid(b)), where a and b are projections of the input ("gated linear unit").

    A token reads k tokens with the weights softmax(logits), which the channels of a head share; the tokens
    before the first one are 0, and have a weight. Subclasses state the logits.
    """

    config: ConvolutionConfig
    position_scheme = "relative"
    flop_overhead_reason = "a block of tokens is multiplied by all tokens in the window of the block"

    def __init__(self, config: ConvolutionConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.kernel = config.kernel[min(layer, len(config.kernel) - 1)]
        self.input = nn.Linear(dims.d_model, 2 * dims.inner_dim, bias=False)
        self.out = nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    @abstractmethod
    def logits(self, h: Tensor) -> Tensor:
        """The logits of the taps, for inputs h (B, T, H·R): (H, k) for all tokens, or (B, T, H, k)."""

    @abstractmethod
    def tap_flops(self, work: Workload) -> int:
        """FLOPs of `logits`."""

    def _offset(self, *, causal: bool) -> int:
        """The first token that a token reads, relative to it."""
        return 1 - self.kernel if causal else -(self.kernel // 2)

    def _heads(self, h: Tensor) -> Tensor:
        """(B, T, H·R) → (B, T, H, R)."""
        heads: Tensor = h.unflatten(-1, (self.dims.heads, -1))
        return heads

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        h = F.glu(self.input(x))
        y = softmax_convolution(
            self._heads(h),
            self.logits(h),
            offset=self._offset(causal=ctx.causal),
            outputs=x.shape[1],
            device_type=self.device_type,
        )
        return MixerOut(self.out(y.flatten(2)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """One tap after the other, on a padded sequence."""
        a, b = self.input(x).chunk(2, dim=-1)
        h = a * b.sigmoid()
        weights = self.logits(h).softmax(-1).expand(*x.shape[:2], -1, -1)  # (B, T, H, k)
        before = -self._offset(causal=ctx.causal)
        padded = self._heads(F.pad(h, (0, 0, before, self.kernel - 1 - before)))
        taps = [weights[..., j, None] * padded[:, j : j + x.shape[1]] for j in range(self.kernel)]
        reference: Tensor = self.out(torch.stack(taps).sum(0).flatten(2))
        return reference

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> RecentInputs:
        """The last k − 1 inputs of the convolution."""
        shape = batch_size, self.kernel - 1, self.dims.heads, self.dims.head_dim
        return RecentInputs(clock, max_len, shape, dtype, self.out.weight.device)

    def step(self, x: Tensor, state: RecentInputs) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        h = F.glu(self.input(x))
        inputs = torch.cat([state.inputs.to(h.dtype), self._heads(h)], dim=1)
        y = softmax_convolution(
            inputs, self.logits(h), offset=0, outputs=x.shape[1], device_type=self.device_type
        )
        state.inputs.copy_(inputs[:, x.shape[1] :])
        out: Tensor = self.out(y.flatten(2))
        return out

    def decoding_bytes(self, work: Workload) -> int:
        """All k − 1 inputs exist from the start."""
        return work.batch_size * (self.kernel - 1) * work.inner_dim * work.element_bytes

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the last k − 1 inputs of the convolution."""
        tokens = min(work.seq_len, self.kernel - 1)
        return work.batch_size * tokens * work.inner_dim * work.element_bytes

    def cost(self, work: Workload) -> Cost:
        """Projections of the input, which gives twice the channels, and of the output; the logits; k products
        for each token and channel, including those with the zeros before the first token."""
        tokens = work.batch_size * work.seq_len
        return Cost(
            {
                "projections": 6 * tokens * work.d_model * work.inner_dim + self.tap_flops(work),
                "convolution": 2 * tokens * work.inner_dim * self.kernel,
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The k tokens around, or before and at, a token."""
        token = torch.arange(seq_len)
        ahead = token[None] - token[:, None] - self._offset(causal=causal)
        return (ahead >= 0) & (ahead < self.kernel)
