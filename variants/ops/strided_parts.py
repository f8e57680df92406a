"""Pairs of queries and keys that a pattern is made of, as strided views of the sequence.

Shapes: B batch, T tokens, H heads, D channels of a head; G groups of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**12, accelerator=2**15)
"""Queries of a sequence that are worked on at a time: on a CPU few enough for the cache."""
MOST_PIECES = 16


@dataclass(frozen=True, kw_only=True)
class Cut:
    """`groups` sets of tokens, each of `rows` runs of `run` neighbouring tokens.

    Token (g, r, i) of head h is start + g·group_step + r·row_step + i + h·head_step.
    """

    start: int
    groups: int = 1
    group_step: int = 0
    rows: int = 1
    row_step: int = 0
    run: int = 1
    head_step: int = 0

    @property
    def length(self) -> int:
        """Tokens of one group."""
        return self.rows * self.run

    def tokens(self, device: torch.device) -> Tensor:
        """The tokens of the first group, for the first head."""
        row = torch.arange(self.rows, device=device)[:, None] * self.row_step
        return self.start + (row + torch.arange(self.run, device=device)).flatten()

    def piece(self, first: int, count: int) -> Cut:
        """Groups [first, first + count) alone."""
        fields = {**self.__dict__, "start": self.start + first * self.group_step, "groups": count}
        return Cut(**fields)

    @property
    def numbers(self) -> list[int]:
        """All fields, in order; by name, because the compiler cannot follow `astuple`."""
        rows = [self.rows, self.row_step, self.run]
        return [self.start, self.groups, self.group_step, *rows, self.head_step]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Cut:
        """The cut with these fields, in their order."""
        start, groups, group_step, rows, row_step, run, head_step = numbers
        return cls(
            start=start,
            groups=groups,
            group_step=group_step,
            rows=rows,
            row_step=row_step,
            run=run,
            head_step=head_step,
        )

    def view(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B, G, H, rows, run, …), a view."""
        batch, heads, token, *rest = x.stride()
        heads, group, row = (
            base + step * token
            for base, step in ((heads, self.head_step), (0, self.group_step), (0, self.row_step))
        )
        size = (x.shape[0], self.groups, x.shape[1], self.rows, self.run, *x.shape[3:])
        start = x.storage_offset() + self.start * token
        return x.as_strided(size, (batch, group, heads, row, token, *rest), start)

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·G, H, rows·run, …), a view where strides allow."""
        return packed(self.view(x))


def packed(view: Tensor) -> Tensor:
    """(B, G, H, rows, run, …) → (B·G, H, rows·run, …), a view where strides allow."""
    rows, run = view.shape[3:5]
    x = view.flatten(3, 4).flatten(0, 1)
    # rows a power of two apart fall into the same cache sets: copied once they are read faster
    return x.contiguous() if run == 1 < rows else x


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pairs (query, key) of the same group, of heads [first_head, last_head).

    `causal`: the n-th query reads keys up to the n-th. `mask`: True where it may read, (queries, keys)
    or (H, queries or 1, keys); a query may be left with no key.
    """

    heads: tuple[int, int]
    queries: Cut
    keys: Cut
    causal: bool = False
    mask: Tensor | None = None

    @property
    def pairs(self) -> int:
        """Pairs that are computed: all of a rectangle, also where it has a mask."""
        queries, keys = self.queries.length, self.keys.length
        pairs = queries * (queries + 1) // 2 if self.causal else queries * keys
        return (self.heads[1] - self.heads[0]) * self.queries.groups * pairs

    def pieces(self, size: int) -> list[tuple[Cut, Cut]]:
        """The groups, a few at a time: about `size` queries or keys each, so that temporaries stay small."""
        longer = max(self.queries.length, self.keys.length)
        groups, step = self.queries.groups, max(1, size // longer)
        spans = [(first, min(step, groups - first)) for first in range(0, groups, step)]
        return [(self.queries.piece(*span), self.keys.piece(*span)) for span in spans]

    def bias(self, like: Tensor) -> Tensor | None:
        """The mask as something to add to scores, (1, H or 1, queries or 1, keys)."""
        if self.mask is None:
            return None
        bias = torch.zeros(self.mask.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~self.mask, -math.inf)
        return bias.unsqueeze(0) if bias.dim() == 3 else bias.unsqueeze(0).unsqueeze(0)


def piece_size(seq_len: int, device_type: str) -> int:
    """Queries worked on at a time: more than `PIECE` where that would make too many pieces."""
    return max(PIECE.on(device_type), -(-seq_len // MOST_PIECES))


def to_plain(parts: Iterable[Part]) -> tuple[list[Tensor], list[int]]:
    """Parts as what an operator of torch may be given: their masks, and whole numbers for all else."""
    masks, numbers = [], []
    for part in parts:
        masks += [] if part.mask is None else [part.mask]
        numbers += [
            *part.heads,
            *part.queries.numbers,
            *part.keys.numbers,
            part.causal,
            part.mask is not None,
        ]
    return masks, [int(number) for number in numbers]


def from_plain(masks: Sequence[Tensor], numbers: Sequence[int]) -> list[Part]:
    """The parts that `to_plain` was given."""
    left, parts, size = iter(masks), [], len(fields(Cut))
    for at in range(0, len(numbers), 4 + 2 * size):
        first, last, *cuts, causal, masked = numbers[at : at + 4 + 2 * size]
        queries, keys = Cut.of(cuts[:size]), Cut.of(cuts[size:])
        mask = next(left, None) if masked else None
        parts.append(Part(heads=(first, last), queries=queries, keys=keys, causal=bool(causal), mask=mask))
    return parts
