"""Parts of a mask for tokens that read the rows of segments: r keys for each segment of l tokens.

The rows lie behind the T keys of the tokens: row i of segment s has the index T + s·r + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.ops.patterns.strided_parts import Part, StridedTokens
from variants.ops.tile_size import Sizes

BLOCK = 8
"""Segments of a block, within which rows are masked. Smaller blocks compute fewer forbidden pairs, in more
parts, each of which is merged into the outputs."""
SCORES = Sizes(cpu=2**22, accelerator=2**27)
"""Scores of a head in one part, at most. Otherwise a kernel that stores scores would store T × T of them."""


def all_rows(seq_len: int, rows: int, heads: int, device_type: str) -> list[Part]:
    """Every token reads every row."""
    return _rectangle(0, seq_len, seq_len, rows, heads, device_type)


def earlier_rows(
    seq_len: int, segment: int, rank: int, heads: int, device: torch.device, device_type: str
) -> list[Part]:
    """A token reads the rows of all segments before its own.

    Within a block of segments, rows are masked. Beyond it, the sequence is halved again and again: the
    right half of a range reads all rows of the left half, so no part has a mask, and a token is in one part
    for each power of two.
    """
    block = BLOCK * segment
    parts = _within_blocks(seq_len, segment, rank, heads, device)
    size = block
    while size < seq_len:
        rows = size // segment * rank
        for left in range(0, seq_len - size, 2 * size):
            start, stop = left + size, min(left + 2 * size, seq_len)
            first_row = seq_len + left // segment * rank
            parts += _rectangle(start, stop, first_row, rows, heads, device_type)
        size *= 2
    return parts


def _rectangle(start: int, stop: int, first_row: int, rows: int, heads: int, device_type: str) -> list[Part]:
    """Tokens [start, stop) read `rows` rows, in parts of at most `SCORES` pairs."""
    run = max(1, SCORES.on(device_type) // rows)
    return [
        Part(
            heads=(0, heads),
            queries=StridedTokens(start=first, run=min(run, stop - first)),
            keys=StridedTokens(start=first_row, run=rows),
        )
        for first in range(start, stop, run)
    ]


def _within_blocks(seq_len: int, segment: int, rank: int, heads: int, device: torch.device) -> list[Part]:
    """In each block, the tokens after the first segment read the rows of the segments between."""
    block, mask = BLOCK * segment, staircase(segment, rank, device)
    full, rest = divmod(seq_len, block)
    parts = []
    if full:
        queries = StridedTokens(start=segment, groups=full, group_step=block, run=block - segment)
        keys = StridedTokens(start=seq_len, groups=full, group_step=BLOCK * rank, run=(BLOCK - 1) * rank)
        parts.append(Part(heads=(0, heads), queries=queries, keys=keys, mask=mask))
    if rest > segment:
        rows = (rest - 1) // segment * rank
        queries = StridedTokens(start=full * block + segment, run=rest - segment)
        keys = StridedTokens(start=seq_len + full * BLOCK * rank, run=rows)
        parts.append(Part(heads=(0, heads), queries=queries, keys=keys, mask=mask[: rest - segment, :rows]))
    return parts


def staircase(segment: int, rank: int, device: torch.device) -> Tensor:
    """((BLOCK − 1)·l, (BLOCK − 1)·r) bool: may a token of the segments after the first read a row."""
    token = torch.arange((BLOCK - 1) * segment, device=device)[:, None] // segment + 1
    return torch.arange((BLOCK - 1) * rank, device=device) // rank < token


def row_pairs(seq_len: int, segment: int, rank: int, *, causal: bool) -> int:
    """Number of pairs (token, row) of `earlier_rows`, or of all rows, that of the last segment included."""
    if not causal:
        return seq_len * -(-seq_len // segment) * rank
    full, rest = divmod(seq_len, segment)
    return rank * (segment * full * (full - 1) // 2 + rest * full)
