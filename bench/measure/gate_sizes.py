"""The sizes of the layers that the gates check."""

from __future__ import annotations

from dataclasses import replace

from bench.config.spec import CellSpec
from variants.base import Dims

GATE_TOKENS = 1000
"""Maximum sequence length in the gates: longer than the default windows, and not a multiple of a block."""
HEAD_DIM = 16


def gate_dims(spec: CellSpec) -> Dims:
    """Return the sizes of the layers in the gates of a cell."""
    tokens = min(spec.seq_len, GATE_TOKENS)
    dims = Dims(seq_len=tokens, d_model=HEAD_DIM * spec.model.heads, heads=spec.model.heads)
    variant, config, _ = spec.attention()
    if variant.unsupported(config, dims, causal=spec.causal):  # a variant may need the cell's own length
        dims = replace(dims, seq_len=spec.seq_len)
    return dims
