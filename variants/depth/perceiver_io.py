"""Perceiver IO: learnt latents read the tokens, the visits process the latents, and the tokens read them back
(Jaegle 2021, arXiv:2107.14795, §3.1; the latents are those of Perceiver, arXiv:2103.03206).

Shapes: B batch, T tokens, C channels, L latents.

    z ← latents + attention(latents, x)        L outputs
    z ← all visits, L vectors
    y ← x + attention(x, z)                    T outputs: the queries are the tokens with their positions

No token reads another, but all read the same latents: one read-out depends on every token, so there is no
causal form.

Deviations: an output query is made of the token and its position (§3.2 builds queries so where an output
belongs to an input; its language model uses positions alone), and the token is its residual connection. The
two cross-attentions have no feed-forward layers of their own, and heads of the model's width. Positions are
sinusoids (Vaswani 2017, arXiv:1706.03762, §3.5), added after the norm, instead of learnt ones: they hold for
any length. The visits are this model's blocks, whose rotary positions order the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, DepthConfig, Dims, Path, PathOut, RunVisits, Workload
from variants.base.lengths import ChangesLength
from variants.knobs import knob
from variants.ops.cross_attention import CrossAttention
from variants.ops.segments.relative_attention import sinusoids

LATENT_STD = 0.02
"""Standard deviation of the initial latents."""


@dataclass(frozen=True, kw_only=True)
class PerceiverIOConfig(DepthConfig):
    """The size of the latent array."""

    latents: int = knob(256, least=1, unit="vectors")
    """Learnt vectors that the visits process in place of the tokens."""


class PerceiverIOPath(Path):
    """See the top of the file."""

    def __init__(self, dims: Dims, latents: int) -> None:
        super().__init__()
        self.count = latents
        self.latents = nn.Parameter(LATENT_STD * torch.randn(latents, dims.d_model))
        self.encode, self.decode = CrossAttention(dims), CrossAttention(dims)

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """(B, T, C) → PathOut; all visits are one call of `run`."""
        tokens, channels = x.shape[1:]
        positions = F.pad(sinusoids(tokens - 1, channels, x).flip(0), (0, channels % 2))  # 0 … T − 1
        latents = self.latents.expand(x.shape[0], -1, -1)
        z = run(places, latents + self.encode(latents, x, add_z=positions))
        return PathOut(x + self.decode(x, z, add_x=positions))

    def cost(self, work: Workload) -> Cost:
        """Both cross-attentions, L × T pairs each."""
        tokens = work.seq_len
        encode = CrossAttention.cost(work, self.count, tokens)
        return encode + CrossAttention.cost(work, tokens, self.count)


class PerceiverIO(ChangesLength):
    """Blocks 0, 1, …, depth − 1 on `latents` vectors, between two cross-attentions."""

    Config = PerceiverIOConfig
    config: PerceiverIOConfig
    paper = "Jaegle et al. 2021, Perceiver IO, arXiv:2107.14795"

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """Latents have read all tokens."""
        if causal:
            return "has no causal form: every output reads latents that have read all tokens"
        return None

    def path(self, dims: Dims) -> Path:
        """Latents and two cross-attentions."""
        return PerceiverIOPath(dims, self.config.latents)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """Latents only."""
        return [self.config.latents] * self.depth

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """A decoder is causal."""
        return "has no causal form"
