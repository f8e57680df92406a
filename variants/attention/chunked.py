"""Chunked attention: the whole network runs on independent chunks; positions restart in each.

An engineering baseline, and what most pipelines do with a document that is too long.
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
    """Tokens of a chunk; no token reads outside its own."""


class Chunked(Dense):
    """Dense attention within ⌈T/c⌉ chunks of c tokens; the last may be shorter, none is padded.

    transformers' local layer of Reformer, with neighbours before a chunk, has the first chunk read the last;
    here a chunk reads itself alone, and `overlapping` what stands before it.
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
        """Chunks side by side."""
        assert isinstance(config, ChunkedConfig)
        return Chunks(config.chunk, config.chunk)
