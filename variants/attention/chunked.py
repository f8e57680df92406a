"""Chunked attention: the network runs on independent chunks, and positions restart in each chunk.

An engineering baseline, and the usual treatment of a document that is too long.
"""

from __future__ import annotations

from dataclasses import dataclass

from variants.attention.dense import Dense, DenseConfig
from variants.base import Caps, Complexity, Info, VariantConfig
from variants.input_schedule import Chunks
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class ChunkedConfig(DenseConfig):
    """Knobs of chunked attention."""

    chunk: int = knob(256, least=1, unit="tokens")
    """Tokens of a chunk. No token reads tokens of another chunk."""


class Chunked(Dense):
    """Dense attention within ⌈T/c⌉ chunks of c tokens. The last chunk may be shorter; no chunk is padded.

    Difference to Hugging Face transformers: in the local layer of its Reformer a chunk also reads the chunk
    before it, and the first chunk reads the last. Here a chunk reads only itself; see also `overlapping`.
    """

    Config = ChunkedConfig
    config: ChunkedConfig
    info = Info(
        paper="engineering baseline",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·c", source="arithmetic"),
        caps=Caps(causal=True, bidirectional=True),
    )

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> Chunks:
        """Adjacent chunks."""
        assert isinstance(config, ChunkedConfig)
        return Chunks(config.chunk, config.chunk)
