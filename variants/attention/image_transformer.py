"""Local attention of Image Transformers, in one and two dimensions (Parmar 2018, arXiv:1802.05751).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from variants.base import Caps, Complexity, Dims, Info, VariantConfig
from variants.knobs import knob
from variants.ops.patterns.grid import Memory, default_width, memory_rectangles
from variants.ops.patterns.masked_attention import MaskedAttention, MaskedConfig
from variants.ops.patterns.masks import Rule


@dataclass(frozen=True, kw_only=True)
class ImageTransformerConfig(MaskedConfig):
    """Knobs of query blocks and of their memory."""

    dims: int = knob(1, least=1, most=2)
    """Dimensions of a query block. 1: neighbouring tokens. 2: a rectangle of a grid, in which the sequence is
    written row after row."""
    block: int = knob(256, least=1, unit="tokens")
    """Tokens of a query block in one dimension."""
    memory: int = knob(256, least=0, unit="tokens")
    """Tokens before the query block that its queries also read, in one dimension. Bidirectional: also as many
    after it."""
    row: int | None = knob(None, least=1, unit="tokens")
    """Tokens of a row of the grid; null: the power of two nearest to √T. T is the maximum sequence length of
    the layer, not the length of the current input."""
    block_rows: int = knob(8, least=1, unit="rows")
    """Rows of a query block in two dimensions."""
    block_columns: int = knob(16, least=1, unit="columns")
    """Columns of a query block in two dimensions."""
    memory_rows: int = knob(8, least=0, unit="rows")
    """Rows above the query block that its queries also read. Bidirectional: also as many below it."""
    memory_columns: int = knob(8, least=0, unit="columns")
    """Columns on each side of the query block that its queries also read."""


@dataclass(frozen=True)
class BlockMemory(Rule):
    """Keys in the block of `length` tokens of the query, `before` tokens before it and `after` after it."""

    length: int
    before: int
    after: int

    @property
    def period(self) -> int:
        """The length of a block."""
        return self.length

    @property
    def reach(self) -> int:
        """The distance between the last query and the first key, or the first query and the last key."""
        return self.length - 1 + max(self.before, self.after)

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The place of the key, from the start of the block on, is −before … length + after − 1."""
        place = j - i // self.length * self.length
        return (place >= -self.before) & (place < self.length + self.after)


class ImageTransformer(MaskedAttention):
    """Softmax attention of blocks of queries to a memory that they share: the block and what surrounds it.

    In contrast to a sliding window, all queries of a block have the same memory, so the first token of a
    block reads fewer neighbours than the last one.

    Causal: a query reads no later token of the sequence. In two dimensions, the paper generates images block
    by block, and masks by this order. Here the order is that of the sequence, which is written into the grid
    row after row, because a layer must suit any sequence; a memory on the right therefore has keys only in
    the rows above. Bidirectional: the paper has it for encoders; the memory also extends to what follows.

    Deviation: positions are rotary, as in every variant of this project, where the paper adds embeddings of
    the coordinates.
    """

    Config = ImageTransformerConfig
    config: ImageTransformerConfig
    info = Info(
        paper="Parmar et al. 2018, Image Transformer, arXiv:1802.05751",
        family="fixed patterns",
        complexity=Complexity(
            time=1,
            memory=1,
            formula="T·(block + memory)",
            source="Parmar 2018, local self-attention",
            survey=1,
        ),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.row = self.config.row or default_width(dims.seq_len)

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The memory of each query block."""
        config = self.config
        if config.dims == 2:
            return self.memory(causal=causal)
        return BlockMemory(config.block, config.memory, 0 if causal else config.memory)

    def carried(self, seq_len: int) -> int:
        """The keys of the block that has not ended, and of its memory."""
        config = self.config
        if config.dims == 2:
            return super().carried(seq_len)
        return self.dims.key_heads * min(seq_len, seq_len % config.block + config.memory)

    def memory(self, *, causal: bool) -> Memory:
        """The rectangles of the grid."""
        config = self.config
        return Memory(
            width=self.row,
            height=config.block_rows,
            columns=config.block_columns,
            above=config.memory_rows,
            below=0 if causal else config.memory_rows,
            beside=config.memory_columns,
        )

    def _rectangles(self, seq_len: int, causal: bool) -> list[tuple[int, ...]]:
        """In two dimensions, those of the grid: no tile of a sequence is a rectangle of it."""
        if self.config.dims == 1:
            return super()._rectangles(seq_len, causal)
        rule, heads = self.mask(seq_len, causal=causal), (0, self.dims.heads)
        found = memory_rectangles(self.memory(causal=causal), rule, seq_len, heads)
        return [(0, *rectangle.numbers) for rectangle in found]

    _rectangles._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see MaskedAttention
