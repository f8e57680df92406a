"""Overlapping chunks: chunks of c tokens every c/2, the whole network on each.

Every token is predicted from exactly one chunk: from its second half where the model is causal, so
that at least c/2 tokens of history are in view, and from its middle half where it reads both sides.
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
    """Tokens of a chunk; a new one starts every chunk/2 tokens."""


class Overlapping(Dense):
    """Dense attention within overlapping chunks; costs about twice what `chunked` does."""

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
        """Chunks at half-chunk strides."""
        assert isinstance(config, OverlappingConfig)
        return Chunks(config.chunk, config.chunk // 2)
