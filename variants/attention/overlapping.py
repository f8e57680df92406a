"""Overlapping chunks: the network runs on chunks of c tokens, of which one starts every c/2 tokens.

Each output is taken from exactly one chunk. In a causal model it is in the second half of the chunk, so that
at least c/2 earlier tokens can be read. In a bidirectional model it is in the middle half of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from variants.attention.dense import Dense, DenseConfig
from variants.base import Caps, Complexity, Info, VariantConfig
from variants.input_schedule import Chunks
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class OverlappingConfig(DenseConfig):
    """Knobs of overlapping chunks."""

    chunk: int = knob(256, least=4, multiple=4, unit="tokens")
    """Tokens of a chunk. A chunk starts every chunk/2 tokens."""


class Overlapping(Dense):
    """Dense attention within overlapping chunks. Costs about twice as much as `chunked`."""

    Config = OverlappingConfig
    config: OverlappingConfig
    info = Info(
        paper="engineering baseline",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="2·T·c", source="arithmetic"),
        caps=Caps(causal=True, bidirectional=True),
    )

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> Chunks:
        """Chunks with a stride of half a chunk."""
        assert isinstance(config, OverlappingConfig)
        return Chunks(config.chunk, config.chunk // 2)
