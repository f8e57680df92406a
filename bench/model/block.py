"""A residual block of the model, and the options that all blocks of a model share.

Shapes: B batch, T tokens, C channels (d_model).

    norm_position  residual  x ←
    pre            plain     x + F(norm(x))         Xiong 2020, arXiv:2002.04745
    post           plain     norm(x + F(x))         Vaswani 2017, arXiv:1706.03762, §3.1
    pre            rezero    x + α · F(norm(x))     without norms: Bachlechner 2020, arXiv:2003.04887, §3
    post           rezero    norm(x + α · F(x))

F is the mixer, and then the feed-forward layer. α is a learnt number, one for both branches of a block, that
starts at 0, as in the paper's Transformer. Norms are layer norm (Ba 2016, arXiv:1607.06450), or RMSNorm
(Zhang 2019, arXiv:1910.07467), which neither subtracts the mean nor adds a bias; ReZero has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from bench.model.visits import summed, weighted
from variants.base import Context, ExposesScores, FeedForward, FFOut, MixerOut, SequenceMixer, VisitOut

EPSILON = 1e-5
"""Added to the variance, or to the mean square."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Options of all blocks of a model; see the table at the top of the file."""

    norm: Literal["layer", "rms", "none"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    residual: Literal["plain", "rezero"] = "plain"

    def unsupported(self, activations: str) -> str | None:
        """Return why a model with these options cannot run with this strategy for activations, or None."""
        if activations == "reversible" and self.norm_position == "post":
            return (
                "rebuilds the inputs of a block by subtraction, and a norm after the sum cannot be undone; "
                "allowed is model.norm_position=pre"
            )
        return None

    def make_norm(self, d_model: int) -> nn.Module:
        """A norm of d_model channels."""
        if self.norm == "layer":
            return nn.LayerNorm(d_model, eps=EPSILON)
        return nn.RMSNorm(d_model, eps=EPSILON) if self.norm == "rms" else nn.Identity()

    def last_norm(self, d_model: int) -> nn.Module:
        """The norm before the output layer. Blocks with norms after their sums need no other."""
        return self.make_norm(d_model) if self.norm_position == "pre" else nn.Identity()


USUAL = BlockOptions()


class Block(nn.Module):
    """Two residual branches, of the mixer and of the feed-forward layer; see `Visit`."""

    def __init__(
        self,
        mixer: SequenceMixer,
        feed_forward: FeedForward,
        d_model: int,
        *,
        ff_chunks: int,
        dropout: float,
        options: BlockOptions = USUAL,
    ) -> None:
        super().__init__()
        self.mixer_norm = options.make_norm(d_model)
        self.mixer = mixer
        self.feed_forward_norm = options.make_norm(d_model)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)
        self.ff_chunks = ff_chunks
        self.norm_first = options.norm_position == "pre"
        self.branch_scale = nn.Parameter(torch.zeros(())) if options.residual == "rezero" else None

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """The mixer's branch: (B, T, C) → MixerOut."""
        out = self.mixer(self.mixer_norm(x) if self.norm_first else x, ctx, state)
        return out._replace(y=self._scaled(out.y))

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, D) of a mixer with `ExposesScores`."""
        assert isinstance(self.mixer, ExposesScores)
        return self.mixer.queries_keys(self.mixer_norm(x) if self.norm_first else x, ctx)

    def feed(self, x: Tensor) -> FFOut:
        """The feed-forward branch: (B, T, C) → FFOut; tokens are independent."""
        fed: FFOut = self.feed_forward(self.feed_forward_norm(x) if self.norm_first else x)
        return fed._replace(y=self._scaled(fed.y))

    def _scaled(self, y: Tensor) -> Tensor:
        y = self.dropout(y)
        return y if self.branch_scale is None else self.branch_scale * y

    def _feed_in_chunks(self, x: Tensor) -> FFOut:
        """`feed` in chunks of the sequence. The backward pass recomputes each chunk; otherwise the hidden
        layers of all chunks would be stored."""
        chunks = x.chunk(self.ff_chunks, dim=1)
        fed = [recompute(self.feed, chunk, use_reentrant=False) for chunk in chunks]
        losses = weighted([out.aux_loss for out in fed], chunks)
        return FFOut(torch.cat([out.y for out in fed], dim=1), summed(*losses))

    def forward(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """(B, T, C) → VisitOut."""
        out = self.attend(x, state, ctx)
        x = x + out.y
        if not self.norm_first:
            x = self.mixer_norm(x)
        fed = self.feed(x) if self.ff_chunks == 1 else self._feed_in_chunks(x)
        x = x + fed.y
        if not self.norm_first:
            x = self.feed_forward_norm(x)
        return VisitOut(x, out.state, summed(out.aux_loss, fed.aux_loss))
