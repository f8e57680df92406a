"""Parts of a band: blocks of queries, each with all its keys in one rectangle.

Shapes: T tokens; b units of a block.

Queries are counted in units of one or more tokens; the tokens of a unit read the same keys. A query is in one
part only, so no partial results are merged, unlike those of `tiles`. The price is a mask for
every part, and b − 1 keys for each query that it may not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.patterns.strided_parts import Part, StridedTokens

BLOCKS = 4
"""Blocks in the width of a band. With n blocks, about 1/n more pairs are computed, in about 2n + 1 parts."""
QUERIES = 64
"""Minimum number of queries of a block, unless the band is narrower."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Query unit i reads the keys from i − `back` to i + `ahead` that exist.

    `ahead` may be negative: −1 excludes the key with the index of the query.
    """

    seq_len: int
    """Tokens that are queries."""
    keys: int
    back: int
    ahead: int
    unit: int = 1
    """Tokens of a unit. The last unit may be shorter."""

    @property
    def width(self) -> int:
        """Keys of a query far from the ends."""
        return self.back + 1 + self.ahead

    @property
    def units(self) -> int:
        """Query units, the last included."""
        return -(-self.seq_len // self.unit)

    @property
    def block(self) -> int:
        """Units of a block."""
        width = min(self.width, self.units)
        return max(-(-width // BLOCKS), min(width, -(-QUERIES // self.unit)))

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """First key and end of the keys that some of the query units first … last − 1 reads."""
        return max(0, first - self.back), min(self.keys, last + self.ahead)

    def pairs(self) -> int:
        """Number of allowed pairs (token, key) of a head."""
        short = self.units * self.unit - self.seq_len
        last_low, last_high = self.bounds(self.units - 1, self.units)
        # Σ min(keys, i + 1 + ahead) − Σ max(0, i − back), over the units that read a key
        ends = _clipped_sum(self.units, 1 + self.ahead, self.keys)
        begins = _clipped_sum(self.units, -self.back, self.keys)
        return self.unit * (ends - begins) - short * max(0, last_high - last_low)


def _clipped_sum(count: int, offset: int, most: int) -> int:
    """Σ min(most, max(0, i + offset)) over 0 ≤ i < count."""

    def up_to(n: int) -> int:  # Σ min(most, j) over 0 ≤ j < n
        rising = min(n, most)
        return rising * (rising - 1) // 2 + (n - rising) * most if n > 0 else 0

    return up_to(count + offset) - up_to(offset)


def band_parts(band: Band, heads: int, device: torch.device) -> list[Part]:
    """Parts that contain each allowed pair once. The groups of a part have no common key."""
    block, first = band.block, max(0, -band.ahead)
    span = band.back + block + band.ahead  # keys of a block
    mask = _mask(band, block, device)
    # blocks whose keys all exist, and whose units are full
    begin = -(-max(0, band.back - first) // block)
    stop = min(band.keys - band.ahead - first, band.seq_len // band.unit - first) // block
    inner = max(0, stop - begin)
    apart = -(-span // block)
    parts = []
    for at in range(begin, begin + min(apart, inner)):
        start, groups = first + at * block, len(range(at, stop, apart))
        queries = StridedTokens(
            start=start * band.unit,
            groups=groups,
            group_step=apart * block * band.unit,
            run=block * band.unit,
        )
        keys = StridedTokens(start=start - band.back, groups=groups, group_step=apart * block, run=span)
        parts.append(Part(heads=(0, heads), queries=queries, keys=keys, mask=mask))
    blocks = range(-(-(band.units - first) // block))
    for at in [i for i in blocks if not (inner and begin <= i < stop)]:
        start = first + at * block
        end = min(start + block, band.units)
        low, high = band.bounds(start, end)
        if low >= high:
            continue
        tokens = min(end * band.unit, band.seq_len) - start * band.unit
        all_read = end - 1 - band.back <= low and start + 1 + band.ahead >= high
        shift = start - band.back  # the key in the first column of the mask
        cut = None if all_read else mask[:tokens, low - shift : high - shift]
        queries = StridedTokens(start=start * band.unit, run=tokens)
        keys = StridedTokens(start=low, run=high - low)
        parts.append(Part(heads=(0, heads), queries=queries, keys=keys, mask=cut))
    return parts


def _mask(band: Band, block: int, device: torch.device) -> Tensor:
    """(b · unit, keys of a block) bool: may a query read a key."""
    i = torch.arange(block, device=device)[:, None]
    ahead = torch.arange(band.back + block + band.ahead, device=device) - i
    return ((ahead >= 0) & (ahead < band.width)).repeat_interleave(band.unit, 0)
