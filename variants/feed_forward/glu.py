"""Gated linear units (Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202).

Deviations from §2: W and V are one matrix, so that both products are one kernel. As in the paper, the hidden
layer has two thirds of the width of an MLP of equal size; here this width is rounded to a multiple of 8.

Shapes: B batch, T tokens, C channels, D hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.knobs import knob

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
}
MULTIPLE = 8
"""The hidden width is a multiple of this, because kernels for bfloat16 are slow at other widths."""


@dataclass(frozen=True, kw_only=True)
class GLUConfig(FeedForwardConfig):
    """Knobs of the gated linear unit."""

    activation: Literal["silu", "gelu", "relu", "sigmoid"] = "silu"
    """Function of the gate. The paper calls the layers SwiGLU, GEGLU, ReGLU and GLU."""
    mult: int = knob(4, least=1)
    """Width of an MLP with about as many parameters, as a multiple of the model's channels. The hidden layer
    has two thirds of this width, rounded to the nearest multiple of 8, and at least 8 channels."""

    width: int | None = knob(None, least=1, unit="channels", younger=True)
    """Width of the hidden layer, in place of mult; null is two thirds of mult times the model's channels."""

    def hidden(self, d_model: int) -> int:
        """Channels of the hidden layer."""
        return self.width or MULTIPLE * max(1, round(2 * self.mult * d_model / (3 * MULTIPLE)))


class GLU(FeedForward):
    """W₂ (act(W x) ⊙ V x), without biases: C → D → C (§2, equation 6)."""

    Config = GLUConfig
    config: GLUConfig
    paper = "Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202"

    def __init__(self, config: GLUConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        hidden = config.hidden(d_model)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)  # rows of W, then rows of V
        self.out = nn.Linear(hidden, d_model, bias=False)

    @classmethod
    def widened(cls, config: GLUConfig, d_model: int, parameters: int) -> GLUConfig:
        """Each hidden channel has d_model parameters in the three matrices."""
        return replace(config, width=config.hidden(d_model) + round(parameters / (3 * d_model)))

    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return FFOut(self.out(ACTIVATIONS[self.config.activation](gate) * value))

    def choices(self, x: Tensor, ctx: Context) -> Tensor | None:
        """(B, T, C) → (B, T, D): the gates above 0, where the gradient of a ReLU jumps; None for other
        activations. See `MakesChoices`; nothing depends on `ctx`."""
        return self.up(x).chunk(2, dim=-1)[0] > 0 if self.config.activation == "relu" else None

    def reference(self, x: Tensor) -> Tensor:
        """Three products, and each activation by its definition."""
        above = self.choices(x, Context(causal=True))
        w, v = self.up.weight.chunk(2)
        gate = torch.einsum("btc,dc->btd", x, w)
        sigmoid = 1 / (1 + torch.exp(-gate))
        activated = {
            "silu": gate * sigmoid,
            "gelu": gate * (1 + torch.erf(gate / math.sqrt(2))) / 2,
            "relu": gate if above is None else gate * above,
            "sigmoid": sigmoid,
        }[self.config.activation]
        hidden = activated * torch.einsum("btc,dc->btd", x, v)
        return torch.einsum("btd,cd->btc", hidden, self.out.weight)

    def cost(self, work: Workload) -> Cost:
        """Three products of C·D multiply-accumulates a token."""
        hidden = self.config.hidden(work.d_model)
        return Cost({"feed_forward": 6 * work.batch_size * work.seq_len * work.d_model * hidden})
