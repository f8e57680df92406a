"""The feed-forward layer of GPT-2: two linear maps with a GELU between (Hendrycks 2016, arXiv:1606.08415).

Other activations are knobs: ReLU (Vaswani 2017, arXiv:1706.03762, §3.3), SiLU (Ramachandran 2017, Searching
for Activation Functions, arXiv:1710.05941) and the squared ReLU (So 2021, Primer, arXiv:2109.08668).

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
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(FeedForwardConfig):
    """Knobs of the multilayer perceptron."""

    mult: int = knob(4, least=1, younger=True)
    """Width of the hidden layer as a multiple of the model's channels."""
    width: int | None = knob(None, least=1, unit="channels", younger=True)
    """Width of the hidden layer, in place of mult; null is mult times the model's channels."""
    activation: Literal["gelu", "relu", "silu", "squared_relu"] = knob("gelu", younger=True)
    """Function between the two linear maps."""

    def hidden(self, d_model: int) -> int:
        """Channels of the hidden layer."""
        return self.width or self.mult * d_model


class MLP(FeedForward):
    """W₂ act(W₁ x), without biases: C → D → C."""

    Config = MLPConfig
    config: MLPConfig
    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762"

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        hidden = config.hidden(d_model)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.out = nn.Linear(hidden, d_model, bias=False)

    @classmethod
    def widened(cls, config: MLPConfig, d_model: int, parameters: int) -> MLPConfig:
        """Each hidden channel has d_model parameters in both matrices."""
        return replace(config, width=config.hidden(d_model) + round(parameters / (2 * d_model)))

    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""
        return FFOut(self.out(ACTIVATIONS[self.config.activation](self.up(x))))

    def choices(self, x: Tensor, ctx: Context) -> Tensor | None:
        """(B, T, C) → (B, T, D): the hidden channels above 0, where the gradient of a ReLU jumps; None for
        other activations. See `MakesChoices`; nothing depends on `ctx`."""
        return self.up(x) > 0 if self.config.activation == "relu" else None

    def reference(self, x: Tensor) -> Tensor:
        """Both products written out, and each activation by its definition."""
        above = self.choices(x, Context(causal=True))
        inner = torch.einsum("btc,dc->btd", x, self.up.weight)
        hidden = {
            "gelu": inner * (1 + torch.erf(inner / math.sqrt(2))) / 2,
            "relu": inner if above is None else inner * above,
            "silu": inner / (1 + torch.exp(-inner)),
            "squared_relu": inner * inner.clamp(min=0),
        }[self.config.activation]
        return torch.einsum("btd,cd->btc", hidden, self.out.weight)

    def cost(self, work: Workload) -> Cost:
        """Two products of C·D multiply-accumulates a token."""
        hidden = self.config.hidden(work.d_model)
        return Cost({"feed_forward": 4 * work.batch_size * work.seq_len * work.d_model * hidden})
