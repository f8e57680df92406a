"""Parts of the fixed pattern (Child 2019, arXiv:1904.10509, §4.3): blocks, and summary positions of blocks.

Shapes: T tokens, H heads; l the length of a block (the stride), c summary positions of a block.

They are not made from tiles of the rule, which would contain few summary positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from variants.ops.patterns.strided_parts import Part, StridedTokens, piece_size
from variants.ops.patterns.summaries import Positions, Run

STRIPS = 32
"""On a CPU: strips of queries, each with one rectangle of earlier summaries; n strips compute about 1/n more
pairs."""
LEVELS = ((2**25, 3), (2**20, 2), (0, 0))
"""On an accelerator: pairs of tokens and summaries → number of halvings of the sequence. For few pairs, one
rectangle with a mask is cheaper than several launches."""
LARGEST = 8
"""On an accelerator: one rectangle has at most the pairs of tokens and summaries divided by this number, so
that its scores fit in memory."""


def blocks_of(seq_len: int, positions: Positions, causal: bool) -> list[Part]:
    """Each block reads itself."""
    stride, heads = positions.stride, positions.heads
    blocks, remainder = divmod(seq_len, stride)
    full = StridedTokens(start=0, groups=blocks, group_step=stride, run=stride)
    short = StridedTokens(start=blocks * stride, run=remainder)
    parts = [Part(heads=heads, queries=full, keys=full, causal=causal)] if blocks else []
    return parts + ([Part(heads=heads, queries=short, keys=short, causal=causal)] if remainder else [])


def earlier_blocks(seq_len: int, positions: Positions, device: torch.device, device_type: str) -> list[Part]:
    """Each token reads the summaries of all earlier blocks.

    On an accelerator the summaries are keys after the sequence: see `Positions.append_to`.
    """
    if device_type != "cpu":
        return _halves(seq_len, positions, device)
    return [part for run in positions.runs() for part in _strips(seq_len, positions, run, device)]


def _staircase(width: int, device: torch.device) -> Tensor:
    """(width, width) bool: each block reads the blocks up to itself."""
    index = torch.arange(width, device=device)
    return index[:, None] >= index[None, :]


def _by_token(blocks: Tensor, positions: Positions) -> Tensor:
    """(query blocks, key blocks) → (tokens, summaries)."""
    return blocks.repeat_interleave(positions.stride, 0).repeat_interleave(positions.c, 1)


def _strips(seq_len: int, positions: Positions, run: Run, device: torch.device) -> list[Part]:
    """For each strip a staircase of its own blocks, and a rectangle of all blocks before the strip."""
    stride = positions.stride
    blocks, remainder = divmod(seq_len, stride)
    count = blocks if remainder else blocks - 1  # query block n + 1 reads key blocks 0 … n, n < count
    if count < 1:
        return []
    width = -(-count // STRIPS)  # blocks in a strip
    full, last_width = divmod(count, width)
    if remainder and not last_width:  # the last strip ends in a shorter block
        full, last_width = full - 1, width
    staircase = _staircase(width, device)
    mask = _by_token(staircase, positions) if width > 1 else None
    parts = []
    if full:
        queries = StridedTokens(start=stride, groups=full, group_step=width * stride, run=width * stride)
        keys = replace(positions.of_blocks(run, 0, width), groups=full, group_step=width * stride)
        parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=mask))
    start = (full * width + 1) * stride
    if last_width:
        queries = StridedTokens(start=start, run=seq_len - start)
        keys = positions.of_blocks(run, full * width, last_width)
        last_mask = None if mask is None else mask[: queries.run, : keys.length]
        parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=last_mask))
    for strip in range(1, full + bool(last_width)):
        start = (strip * width + 1) * stride
        queries = StridedTokens(start=start, run=min(width * stride, seq_len - start))
        keys = positions.of_blocks(run, 0, strip * width)
        parts.append(Part(heads=run.heads, queries=queries, keys=keys))
    return parts


def _halves(seq_len: int, positions: Positions, device: torch.device) -> list[Part]:
    """The second half of the sequence reads the first; so do the halves of each half, and so on. A staircase
    in each of the strips is left.

    All halves of a size are groups of one part, so there are few parts. The pairs are those of as many strips
    of `_strips`.
    """
    stride, blocks = positions.stride, -(-seq_len // positions.stride)
    pairs = seq_len * blocks * positions.c
    levels = next(levels for least, levels in LEVELS if pairs >= least)
    width = -(-blocks // 2**levels)  # blocks in a strip
    parts = []
    if width > 1:  # query block n + 1 of a strip reads its key blocks 0 … n
        mask = _by_token(_staircase(width - 1, device), positions)
        parts += _groups(seq_len, positions, (width, 1, width - 1), mask)
    while width < blocks:
        pieces = -(-LARGEST * width * stride * width * positions.c // pairs)
        parts += _groups(seq_len, positions, (2 * width, width, width), None, pieces)
        width *= 2
    return parts


def _groups(
    seq_len: int, positions: Positions, blocks: tuple[int, int, int], mask: Tensor | None, pieces: int = 1
) -> list[Part]:
    """In each group of blocks, the queries after the first `skipped` blocks read the summaries of the first
    `read` blocks. blocks: of a group, `skipped`, `read`. The last group may be shorter; queries are divided
    into pieces."""
    group, skipped, read = blocks
    stride, c = positions.stride, positions.c
    length = group * stride
    full, rest = divmod(seq_len, length)
    parts = []
    for groups, first, end in ((full, 0, length), (1, full * length, rest)):
        step = -(-(end - skipped * stride) // pieces)
        if not groups or step < 1:
            continue
        count = min(read, -(-end // stride) - 1) * c
        behind = seq_len + first // stride * c
        keys = StridedTokens(start=behind, groups=groups, group_step=group * c, run=count)
        for start in range(skipped * stride, end, step):
            run = min(step, end - start)
            queries = StridedTokens(start=first + start, groups=groups, group_step=length, run=run)
            cut = None if mask is None else mask[:run, :count]
            parts.append(Part(heads=positions.heads, queries=queries, keys=keys, mask=cut))
    return parts


def own_summaries(seq_len: int, positions: Positions, device: torch.device) -> list[Part]:
    """Each token reads the summaries of its own block, up to the token itself."""
    stride, c = positions.stride, positions.c
    blocks, remainder = divmod(seq_len, stride)
    index = torch.arange(stride, device=device)
    triangle = index[:, None] >= index[None, :c]
    parts = []
    for run in positions.runs():
        # heads with distinct positions have different numbers of queries after them: one part for each
        groups = [(h, h + 1) for h in range(*run.heads)] if run.step else [run.heads]
        for heads in groups:
            offset = positions.offset(heads[0])
            queries = StridedTokens(start=offset, groups=blocks, group_step=stride, run=stride - offset)
            keys = StridedTokens(start=offset, groups=blocks, group_step=stride, run=c)
            if blocks:
                parts.append(Part(heads=heads, queries=queries, keys=keys, mask=triangle[: stride - offset]))
            if remainder > offset:
                queries = StridedTokens(start=blocks * stride + offset, run=remainder - offset)
                keys = StridedTokens(start=queries.start, run=min(c, queries.run))
                mask = triangle[: queries.run, : keys.run]
                parts.append(Part(heads=heads, queries=queries, keys=keys, mask=mask))
    return parts


def blocks_without_summaries(seq_len: int, positions: Positions, device: torch.device) -> list[Part]:
    """Each block reads itself without its summary positions, which `all_summaries` contains."""
    stride, c = positions.stride, positions.c
    blocks, remainder = divmod(seq_len, stride)
    parts = []
    if blocks and c < stride:
        full = StridedTokens(start=0, groups=blocks, group_step=stride, run=stride)
        index = torch.arange(stride, device=device)
        for run in positions.runs():
            begins = [positions.offset(h) for h in range(*run.heads)]
            mask = torch.stack([(index < b) | (index >= b + c) for b in begins])[:, None]
            parts.append(Part(heads=run.heads, queries=full, keys=full, mask=mask))
    if remainder > c:
        queries, keys = (StridedTokens(start=blocks * stride, run=n) for n in (remainder, remainder - c))
        parts.append(Part(heads=positions.heads, queries=queries, keys=keys))
    return parts


def all_summaries(seq_len: int, positions: Positions, device_type: str) -> list[Part]:
    """Bidirectional: every token reads all summaries, in pieces of queries."""
    blocks, remainder = divmod(seq_len, positions.stride)
    size = piece_size(seq_len, device_type)
    parts = []
    for start in range(0, seq_len, size):
        queries = StridedTokens(start=start, run=min(size, seq_len - start))
        if blocks:
            parts += [
                Part(heads=run.heads, queries=queries, keys=positions.of_blocks(run, 0, blocks))
                for run in positions.runs()
            ]
        if remainder:
            short = min(positions.c, remainder)
            keys = StridedTokens(start=seq_len - short, run=short)
            parts.append(Part(heads=positions.heads, queries=queries, keys=keys))
    return parts
