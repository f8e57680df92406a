"""Overlapping chunks: chunks of c tokens every c/2, the whole network on each.

Every token is predicted from exactly one chunk: from its second half where the model is causal, so
that at least c/2 tokens of history are in view, and from its middle half where it reads both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.attention.dense import Dense, DenseConfig
from variants.base import Caps, Chunks, Complexity, Dims, VariantConfig
from variants.knobs import knob
from variants.ops import masks


@dataclass(frozen=True, kw_only=True)
class OverlappingConfig(DenseConfig):
    """Knobs of overlapping chunks."""

    chunk: int = knob(256, least=4, multiple=4, unit="tokens")
    """Tokens of a chunk; a new one starts every chunk/2 tokens."""


class Overlapping(Dense):
    """Dense attention within overlapping chunks; costs about twice what `chunked` does."""

    Config = OverlappingConfig
    config: OverlappingConfig
    caps = Caps(causal=True, bidirectional=True)
    paper = "engineering baseline"
    complexity = Complexity(time=1, memory=1, formula="2·T·c", source="arithmetic")

    @classmethod
    def plan(cls, config: VariantConfig) -> Chunks:
        """Chunks at half-chunk strides."""
        assert isinstance(config, OverlappingConfig)
        return Chunks(config.chunk, config.chunk // 2)

    def state_bytes(self, dims: Dims) -> int:
        """The keys and values of the one or two chunks that have begun and not ended.

        Each holds its own: positions restart in a chunk, and hidden states differ from chunk to chunk.
        """
        stride = self.config.chunk // 2
        younger = dims.seq_len % stride
        older = younger + stride if dims.seq_len >= stride else 0
        tokens = younger + older
        return 2 * dims.batch_size * tokens * dims.d_model * dims.element_bytes

    def pattern(self, seq_len: int, *, causal: bool) -> Tensor:
        """The chunk that predicts the query, up to the query where causal."""
        chunk, stride = self.config.chunk, self.config.chunk // 2
        last = max(0, -(-(seq_len - chunk) // stride))

        def first(i: Tensor) -> Tensor:
            skipped = stride if causal else stride // 2
            index = torch.div(i - skipped, stride, rounding_mode="floor")
            return index.clamp(0, last) * stride

        rule = masks.span(first, chunk)
        return masks.matrix(masks.both(rule, masks.causal) if causal else rule, seq_len)
