"""Funnel and Hourglass: the visits in the middle process means of several tokens.

Shapes: B batch, T tokens, C channels, s stride, G = ⌈T / s⌉ groups.

    x  ← the first third of the visits, T tokens
    p  ← the visits in the middle, G tokens: p[g] is at first the mean of the tokens of group g
    x  ← the last third of the visits, of x[t] + p[⌊t / s⌋]

Bidirectional: Funnel-Transformer (Dai 2020, arXiv:2006.03236, §2.2, where the sum with the hidden states
of full length is that of the decoder). Group g are the tokens gs … gs + s − 1; the last group may be shorter,
and then is the mean of its tokens.

Causal: Hourglass (Nawrot 2021, arXiv:2110.13711, §2, with its shift to the right by s − 1). Group g are the
tokens gs − s + 1 … gs, of which the first group has only token 0, and no token reads a mean of later ones:
p[g] is read from its last token on. Tokens after the last whole group are in no mean.

Relations: with stride 1, p is x in both forms and the model is a stack with one more residual connection
around the visits in the middle: last(x + middle(x)) where a stack is last(middle(x)). The first and the last
third are ⌊depth / 3⌋ visits each, so that with depth 1 or 2 all visits are in the middle.

Deviations: means are taken once and before a visit, not by queries inside attention (Funnel's "pool query
only"); there is one shortening, and upsampling is by repetition (Hourglass prefers attention for it); the
first causal group is not padded by zeros; the block is this model's own. Rotary positions in the middle are
the indices of groups, so that a distance of 1 is that of s tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from variants.base import Context, DepthConfig, Dims, Path, PathOut, RunVisits, Workload
from variants.base.lengths import ChangesLength
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class FunnelConfig(DepthConfig):
    """How much shorter the sequence is in the middle."""

    stride: int = knob(2, least=1, unit="tokens")
    """Tokens that are pooled to one for the visits in the middle."""


def ends(depth: int) -> int:
    """Number of visits at full length before the middle, and after it."""
    return depth // 3


def pooled(x: Tensor, stride: int) -> Tensor:
    """Means of groups of `stride` tokens, of which the last group may have fewer: (B, T, C) → (B, G, C)."""
    whole = x.shape[1] // stride * stride
    means = x[:, :whole].unflatten(1, (-1, stride)).mean(2) if whole else x[:, :0]
    if whole == x.shape[1]:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True)], dim=1)


def pooled_before(x: Tensor, stride: int) -> Tensor:
    """Means of the tokens gs − s + 1 … gs for each group g, of which group 0 has only token 0."""
    groups = -(-x.shape[1] // stride)
    means = x[:, 1 : 1 + (groups - 1) * stride].unflatten(1, (groups - 1, stride)).mean(2)
    return torch.cat([x[:, :1], means], dim=1)


class FunnelPath(Path):
    """See the top of the file; it has no parameters."""

    def __init__(self, depth: int, stride: int) -> None:
        super().__init__()
        self.ends, self.stride = ends(depth), stride
        self.last = depth - self.ends
        """The place of the first visit after the middle."""

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """Three calls of `run`, so that every strategy stores x and p at the borders of the middle."""
        x = run([place for place in places if place < self.ends], x)
        p = self.pool(x, causal=ctx.causal)
        p = run([place for place in places if self.ends <= place < self.last], p)
        x = x + p.repeat_interleave(self.stride, dim=1)[:, : x.shape[1]]
        return PathOut(run([place for place in places if place >= self.last], x))

    def pool(self, x: Tensor, *, causal: bool) -> Tensor:
        """(B, T, C) → (B, G, C)."""
        return (pooled_before if causal else pooled)(x, self.stride)

    def state_bytes(self, work: Workload) -> int:
        """The sum of the tokens of an open group, and the last vector of the middle."""
        kept = 2 if self.stride > 1 else 0
        return kept * work.batch_size * work.d_model * work.element_bytes


class Funnel(ChangesLength):
    """Blocks 0, 1, …, depth − 1, of which those in the middle process T / stride tokens."""

    Config = FunnelConfig
    config: FunnelConfig
    paper = (
        "Dai et al. 2020, Funnel-Transformer, arXiv:2006.03236; causal: "
        "Nawrot et al. 2021, Hierarchical Transformers Are More Efficient Language Models, arXiv:2110.13711"
    )

    def path(self, dims: Dims) -> Path:
        """No parameters."""
        return FunnelPath(self.depth, self.config.stride)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """⌈T / stride⌉ in the middle."""
        groups, whole = -(-seq_len // self.config.stride), ends(self.depth)
        middle = self.depth - 2 * whole
        return [*[seq_len] * whole, *[groups] * middle, *[seq_len] * whole]

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """The clock of a decoder counts tokens, for all visits alike. With stride 1 it can."""
        if config.stride == 1:
            return None
        return f"makes one visit in the middle for {config.stride} tokens, and a decoder one for each token"
