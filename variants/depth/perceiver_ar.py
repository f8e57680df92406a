"""Perceiver AR: the last L tokens read all tokens once, and the visits process these L alone (Hawthorne 2022,
arXiv:2202.07765, §3).

Shapes: B batch, T tokens, C channels, L latents: min(latents, T).

    z ← x[T − L :] + attention(x[T − L :], x)      causal: token t reads tokens up to t; L × T scores
    z ← all visits, L tokens                       L outputs

There are outputs for the last L tokens only. The model is trained on these: a step of T tokens has L targets,
where the one of another model has T. It is evaluated on the same targets as every other model, each with the
same context: a window is read up to its token L, up to 2L, …, and each time the last L tokens are scored
(`bench.model.outputs`). Figures of the cost of a step are those of one sequence with its L outputs.

With L = T it is a stack after one more causal attention. Positions are rotary: those of the cross-attention
are the places in the sequence, and those of the visits count from the first latent, with equal distances.

Deviations: the cross-attention has no feed-forward layer of its own, and nothing of its input is dropped in
training. It computes all L × T scores with a mask, of which L (L − 1) / 2 are of later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from variants.base import Context, Cost, DepthConfig, Dims, Path, PathOut, RunVisits, Workload
from variants.base.lengths import ChangesLength
from variants.knobs import knob
from variants.ops.cross_attention import CrossAttention


@dataclass(frozen=True, kw_only=True)
class PerceiverARConfig(DepthConfig):
    """How many tokens have an output."""

    latents: int = knob(256, least=1, unit="tokens")
    """Tokens at the end of a sequence that the visits process, and that have outputs."""


class PerceiverARPath(Path):
    """See the top of the file."""

    flop_overhead_reason = "all scores of the cross-attention are computed, and those of later tokens masked"

    def __init__(self, dims: Dims, latents: int) -> None:
        super().__init__()
        self.count = latents
        self.read = CrossAttention(dims)

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """(B, T, C) → PathOut with (B, L, C); all visits are one call of `run`."""
        z = x[:, -self.count :]
        return PathOut(run(places, z + self.read.read_back(z, x)))

    def cost(self, work: Workload) -> Cost:
        """Latent i of L reads T − L + 1 + i tokens."""
        tokens, count = work.seq_len, min(self.count, work.seq_len)
        pairs = count * tokens - count * (count - 1) // 2
        return CrossAttention.cost(work, count, tokens, pairs)


class PerceiverAR(ChangesLength):
    """Blocks 0, 1, …, depth − 1 on the last `latents` tokens, after a cross-attention to all."""

    Config = PerceiverARConfig
    config: PerceiverARConfig
    paper = "Hawthorne et al. 2022, Perceiver AR, arXiv:2202.07765"

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """Masked tokens may be anywhere."""
        return None if causal else "has no bidirectional form: only the last tokens have outputs"

    def path(self, dims: Dims) -> Path:
        """A cross-attention."""
        return PerceiverARPath(dims, self.config.latents)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """Latents only."""
        return [self.outputs(seq_len)] * self.depth

    def outputs(self, seq_len: int) -> int:
        """One for each latent."""
        return min(self.config.latents, seq_len)

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """A token that is no latent yet would have to become one, or stop being one."""
        return "moves its latents with every token, and the states of its visits would have to be made again"
