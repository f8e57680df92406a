"""TokenLearner: learnt gates pool all tokens to a few, and a fuser returns them to all positions
(Ryoo 2021, arXiv:2106.11297, §2).

Shapes: B batch, T tokens, C channels, S learnt tokens.

    x ← the first half of the visits, T tokens
    z ← gates(x)ᵀ x, weighted means of the tokens       S tokens
    z ← the other visits, S tokens
    y ← x + gates′(x) M norm(z)                         T tokens; M (S × S) mixes the learnt tokens

Gates are a map of each token to S numbers, by two layers with a bottleneck. A learnt token depends on all
tokens, so there is no causal form.

Deviations: the gates of the paper are convolutions over an image; here they see single tokens, as a 1 × 1
convolution does (the authors' later code has an MLP too). There is one pooling for all later visits and one
fuser, where the paper's video models have a pair around each layer. Rotary positions of the later visits are
the indices of the learnt tokens. The gates have a layer norm, whatever the blocks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, DepthConfig, Dims, Path, PathOut, RunVisits, Workload
from variants.base.lengths import ChangesLength
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class TokenLearnerConfig(DepthConfig):
    """How many tokens are learnt, and how."""

    tokens: int = knob(64, least=1, unit="tokens")
    """Learnt tokens that the later visits process."""
    gate: Literal["sigmoid", "softmax"] = "softmax"
    """What makes weights of the gates. sigmoid: a number from 0 to 1 for each token, and a mean over all, as
    in the paper. softmax: weights of all tokens add up to 1, as in the authors' later code."""
    bottleneck: int = knob(64, least=1, unit="channels")
    """Hidden channels of the gates."""


class Gates(nn.Module):
    """A number of each token for each of S learnt tokens: (B, T, C) → (B, T, S)."""

    def __init__(self, d_model: int, bottleneck: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.down = nn.Linear(d_model, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        numbers: Tensor = self.up(F.gelu(self.down(self.norm(x))))
        return numbers


class TokenLearnerPath(Path):
    """See the top of the file."""

    def __init__(self, dims: Dims, config: TokenLearnerConfig, depth: int) -> None:
        super().__init__()
        self.config, self.first = config, depth // 2
        self.pool = Gates(dims.d_model, config.bottleneck, config.tokens)
        self.spread = Gates(dims.d_model, config.bottleneck, config.tokens)
        self.norm = nn.LayerNorm(dims.d_model)
        self.out = nn.Linear(config.tokens, config.tokens, bias=False)  # M: writes to the residual stream

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """(B, T, C) → PathOut."""
        x = run([place for place in places if place < self.first], x)
        z = run([place for place in places if place >= self.first], self.learn(x))
        mixed = self.out(self.norm(z).transpose(1, 2)).transpose(1, 2)  # (B, S, C)
        return PathOut(x + self.spread(x).sigmoid() @ mixed)

    def learn(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, S, C)."""
        gates: Tensor = self.pool(x).transpose(1, 2)
        if self.config.gate == "softmax":
            return gates.softmax(-1) @ x
        return gates.sigmoid() @ x / x.shape[1]

    def cost(self, work: Workload) -> Cost:
        """Two pairs of products for each token, and the weighted sums in both directions."""
        learnt, hidden = self.config.tokens, self.config.bottleneck
        gates = 2 * work.seq_len * (work.d_model * hidden + hidden * learnt)
        sums = 2 * work.seq_len * learnt * work.d_model + learnt**2 * work.d_model
        parts = {"projections": gates, "attention": sums}
        return Cost({name: 2 * work.batch_size * each for name, each in parts.items()})


class TokenLearner(ChangesLength):
    """Blocks 0, 1, …, depth − 1, of which the upper half, rounded up, processes S learnt tokens."""

    Config = TokenLearnerConfig
    config: TokenLearnerConfig
    paper = "Ryoo et al. 2021, TokenLearner, arXiv:2106.11297"

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """A learnt token is a mean of all tokens."""
        return "has no causal form: every learnt token is a mean of all tokens" if causal else None

    def path(self, dims: Dims) -> Path:
        """Two gates and the matrix of the fuser."""
        return TokenLearnerPath(dims, self.config, self.depth)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """T, and then S."""
        first = self.depth // 2
        return [*[seq_len] * first, *[self.config.tokens] * (self.depth - first)]

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """A decoder is causal."""
        return "has no causal form"
