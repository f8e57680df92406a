"""Decays that depend on the token, with learnt rates (Gu 2023, arXiv:2312.00752; Dao 2024, arXiv:2405.21060).

Shapes: B batch, H heads, T tokens, R decays of a head and token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_RATE = 16.0
"""Rates exp(A) are drawn from 0 up to this."""
STEPS = (1e-3, 1e-1)
"""Steps softplus(b) are drawn between these; their logarithms are uniform."""


class DecayRates(nn.Module):
    """log α = −exp(A) softplus(x + b), with A for each head, and b for each decay.

    Initially, as in the authors' code of Mamba-2: without an input, a token keeps from e^−1.6 to nearly all.
    """

    def __init__(self, heads: int, decays: int) -> None:
        super().__init__()
        # never 0, whose logarithm is infinite
        rates = torch.empty(heads).uniform_(1e-3, LARGEST_RATE)
        low, high = (math.log(step) for step in STEPS)
        steps = torch.empty(heads * decays).uniform_(low, high).exp()
        self.log_rates = nn.Parameter(rates.log())  # A (H,)
        self.bias = nn.Parameter(
            steps + torch.log(-torch.expm1(-steps))
        )  # b (H·R,): softplus(b) are the steps

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, H, T, R) → log α ≤ 0."""
        heads = len(self.log_rates)
        steps = F.softplus(x + self.bias.to(x.dtype).view(heads, 1, -1))
        return steps * -self.log_rates.to(x.dtype).exp().view(heads, 1, 1)
