"""Axial attention in one dimension of a grid a layer (Ho 2019, arXiv:1912.12180).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; b the tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from variants.base import Caps, Complexity, Dims, Info, VariantConfig
from variants.knobs import knob
from variants.ops.patterns.grid import default_width
from variants.ops.patterns.masked_attention import MaskedAttention, MaskedConfig
from variants.ops.patterns.masks import Rule, SameBlock, SameResidue


@dataclass(frozen=True, kw_only=True)
class AxialConfig(MaskedConfig):
    """Knobs of the grid."""

    row: int | None = knob(None, least=1, unit="tokens")
    """Tokens of a row of the grid; null: the power of two nearest to √T. The sequence is written into the
    grid row after row. T is the maximum sequence length of the layer, not the length of the current input,
    because a prefix must be read in the same way as the full sequence."""


@dataclass(frozen=True)
class OwnAndPreviousBlock(Rule):
    """Keys in the same block of `length` tokens as the query, and in the block before it."""

    length: int

    @property
    def period(self) -> int:
        """The length of a block."""
        return self.length

    @property
    def reach(self) -> int:
        """The distance between the ends of two blocks."""
        return 2 * self.length - 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """⌊i / length⌋ − ⌊j / length⌋ is 0 or 1."""
        behind = i // self.length - j // self.length
        return (behind == 0) | (behind == 1)


class Axial(MaskedAttention):
    """Softmax attention along the rows of a grid in even layers, and along its columns in odd layers.

    Causal: the paper's decoder (its semi-parallel form) has two stacks. The outer one is shifted down by a
    row: it reads complete rows above the own one, by attention along rows without a mask, and along columns
    with a causal mask. The inner one has causal attention along the own row, and gets the outputs of the
    outer one. A layer of this project is one attention over one stream of tokens, so both are united: in even
    layers, a token reads the complete row above it (outer) and its own row up to itself (inner) in one
    softmax; in odd layers, its column up to itself. Two layers so connect a token with all tokens before it,
    which they would not if rows were only causal: then no layer could move information to the left.
    Attention along the own row without a mask, followed by a column, would leak: the column contains the own
    row, which has read later tokens.

    Bidirectional: complete rows and complete columns, as in the paper's encoder.

    Deviations: the union of both stacks, and rotary positions in the sequence, as in every variant of this
    project, where the paper adds embeddings of row and column.
    """

    Config = AxialConfig
    config: AxialConfig
    info = Info(
        paper="Ho et al. 2019, Axial Transformers, arXiv:1912.12180",
        family="fixed patterns",
        complexity=Complexity(
            time=1.5, memory=1.5, formula="T·√T", source="Ho 2019, axial attention", survey=1.5
        ),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.row = self.config.row or default_width(dims.seq_len)
        self.along_columns = layer % 2 == 1

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """A row, in causal models with the row above; or a column."""
        if self.along_columns:
            return SameResidue(self.row)
        return OwnAndPreviousBlock(self.row) if causal else SameBlock(self.row)

    def order(self) -> int:
        """Sort the tokens by columns where they are read."""
        return self.row if self.along_columns else 1
