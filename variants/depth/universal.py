"""The Universal Transformer: one block, visited again and again (Dehghani 2018, arXiv:1807.03819, §2).

Shapes: B batch, T tokens, C channels, N visits.

Without halting every token makes N visits. With `signal=true` each visit is told its number, by the part of
the coordinate embedding (§2.1) that depends on the step; the part that depends on the position is left to the
mixer. The block is this model's own.

With `halting=true` each token decides after how many visits it halts (§2.2, after Graves 2016, Adaptive
Computation Time, arXiv:1603.08983, §2). Before visit n, a unit reads the token's state s_n and gives the
probability p_n = σ(w · s_n + b). The token halts in the first visit in which p_1 + … + p_n exceeds
`halt_threshold`, and in visit N at the latest. The probability of that visit becomes the remainder R, what
the earlier ones leave of 1. The output is the mean of the states after the visits that the token makes,
weighted by the probabilities. Its state stays as it is in later visits, so that other tokens read it. The
ponder cost, the mean over tokens of the number of visits plus R, is trained with the weight `ponder`; the
number has no gradient. The defaults are those of the authors' tensor2tensor: b = 1 at first, a threshold of
1 − 0.01, a weight of 0.01.

All visits are computed for every token; what a token needs is counted, not saved. Deviations: the authors'
code goes on changing the state of a token that has halted, only its output stays, and mixes each new state
with the output before it; here it is the paper's text, and Graves's weighted sum. Their unit reads the state
with the signal, this one without.

A path that runs visits one by one leaves `activations=sqrt` groups of one visit: with halting it is then
`checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from variants.base import (
    Context,
    Cost,
    DepthConfig,
    DepthSchedule,
    Dims,
    Path,
    PathOut,
    RunVisits,
    Workload,
)
from variants.knobs import knob

INITIAL_BIAS = 1.0
"""Of the halting unit: at first it halts a token in the second visit."""


@dataclass(frozen=True, kw_only=True)
class UniversalConfig(DepthConfig):
    """The number of visits is the model's depth, or at most the depth with halting."""

    signal: bool = knob(False, younger=True)
    """Add sinusoids of the number of the visit to the hidden states before each visit."""
    halting: bool = knob(False, younger=True)
    """Each token decides after how many visits it halts, at most after as many as the depth."""
    halt_threshold: float = knob(0.99, above=0, most=1, younger=True)
    """Sum of the halting probabilities above which a token halts. Only for halting=true."""
    ponder: float = knob(0.01, least=0, younger=True)
    """Weight of the ponder cost in the training loss, in nats for each visit of a token. Only for
    halting=true."""


class HaltingPath(Path):
    """All visits, one by one; the state of a token that has halted stays as it is."""

    def __init__(self, config: UniversalConfig, dims: Dims, depth: int) -> None:
        super().__init__()
        self.config, self.depth = config, depth
        # a single visit has the whole probability
        self.unit = nn.Linear(dims.d_model, 1) if depth > 1 else None
        if self.unit is not None:
            nn.init.constant_(self.unit.bias, INITIAL_BIAS)

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """See `Path`. Probabilities and their sums are float32 at least."""
        running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        visits = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        left = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        remainder, y = torch.zeros_like(left), torch.zeros_like(x)
        for place in places:
            if self.unit is None or place == places[-1]:
                halts, weight = running, left
            else:
                p = self.unit(x)[..., 0].to(left.dtype).sigmoid()
                halts = running & (1 - left + p > self.config.halt_threshold)
                weight = torch.where(halts, left, p)
            x = torch.where(running[..., None], run([place], x), x)
            y = y + torch.where(running, weight, 0)[..., None].to(x.dtype) * x
            visits = visits + running
            remainder = torch.where(halts, left, remainder)
            running = running & ~halts
            left = torch.where(running, left - weight, left)
        cost = self.config.ponder * (visits + remainder).mean()
        return PathOut(y, (cost,) if self.unit is not None else (), visits=visits)

    def cost(self, work: Workload) -> Cost:
        """The halting unit, before every visit but the last."""
        return Cost({"halting": 2 * (self.depth - 1) * work.batch_size * work.seq_len * work.d_model})


class Universal(DepthSchedule):
    """Block 0, `depth` times: the cost of a stack of this depth with the parameters of one block."""

    Config = UniversalConfig
    config: UniversalConfig
    paper = "Dehghani et al. 2018, Universal Transformers, arXiv:1807.03819"

    @classmethod
    def unsupported(cls, config: Any, *, depth: int, activations: str) -> str | None:
        """A reversible network has no single hidden state between visits."""
        if config.halting and activations == "reversible" and depth > 1:
            return (
                "its two streams are one only after the last visit, and stack.halting=true reads the state "
                "before every visit; allowed are all other strategies"
            )
        return None

    def visits(self) -> Sequence[int]:
        """Block 0 each time."""
        return [0] * self.depth

    def path(self, dims: Dims) -> Path:
        """With a halting unit, or plain."""
        return HaltingPath(self.config, dims, self.depth) if self.config.halting else Path()

    def signals(self, d_model: int) -> Tensor | None:
        """sin(t / 10000^(2j / C)) in channel 2j and the cosine in channel 2j + 1, for visits t = 1, 2, …

        The paper's embeddings have a standard deviation of 1, hence the unit of `DepthSchedule.signals`.
        """
        if not self.config.signal:
            return None
        channel = torch.arange(d_model)
        rate = 10_000.0 ** -((channel - channel % 2) / d_model)
        angle = torch.arange(1, self.depth + 1)[:, None] * rate
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
