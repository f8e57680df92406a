"""Chunked attention: the whole network runs on independent chunks; positions restart in each.

An engineering baseline, and what most pipelines do with a document that is too long.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from variants.attention.dense import Dense, DenseConfig
from variants.base import Caps, Chunks, Complexity, Dims, VariantConfig
from variants.knobs import knob
from variants.ops import masks


@dataclass(frozen=True, kw_only=True)
class ChunkedConfig(DenseConfig):
    """Knobs of chunked attention."""

    chunk: int = knob(256, least=1, unit="tokens")
    """Tokens of a chunk; no token reads outside its own."""


class Chunked(Dense):
    """Dense attention within ⌈T/c⌉ chunks of c tokens; the last may be shorter, none is padded.

    transformers' local layer of Reformer, with neighbours before a chunk, has the first chunk read the last;
    here a chunk reads itself alone, and `overlapping` what stands before it.
    """

    Config = ChunkedConfig
    config: ChunkedConfig
    caps = Caps(causal=True, bidirectional=True)
    paper = "engineering baseline"
    complexity = Complexity(time=1, memory=1, formula="T·c", source="arithmetic")

    @classmethod
    def plan(cls, config: VariantConfig) -> Chunks:
        """Chunks side by side."""
        assert isinstance(config, ChunkedConfig)
        return Chunks(config.chunk, config.chunk)

    def state_bytes(self, dims: Dims) -> int:
        """The keys and values of the chunk that has begun and not ended."""
        tokens = dims.seq_len % self.config.chunk
        return 2 * dims.batch_size * tokens * dims.d_model * dims.element_bytes

    def pattern(self, seq_len: int, *, causal: bool) -> Tensor:
        """The chunk, up to the query where causal."""
        chunk = masks.same(lambda i: i // self.config.chunk)
        return masks.matrix(masks.both(chunk, masks.causal) if causal else chunk, seq_len)
