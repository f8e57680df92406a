"""Pairs of queries and keys that a pattern is made of, as strided views of the sequence.

Shapes: B batch, T tokens, H heads, D channels of a head; G groups of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

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

    def piece(self, first: int, count: int) -> Cut:
        """Groups [first, first + count) alone."""
        fields = {**self.__dict__, "start": self.start + first * self.group_step, "groups": count}
        return Cut(**fields)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Cut:
        """The cut with these fields, in their order."""
        return cls(**{field.name: number for field, number in zip(fields(cls), numbers, strict=True)})

    def view(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B, H, G, rows, run, …), a view."""
        x = x[:, :, self.start :]
        batch, heads, token, *rest = x.stride()
        heads, group, row = (
            base + step * token
            for base, step in ((heads, self.head_step), (0, self.group_step), (0, self.row_step))
        )
        size = (*x.shape[:2], self.groups, self.rows, self.run, *x.shape[3:])
        return x.as_strided(size, (batch, heads, group, row, token, *rest))

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·G, H, rows·run, …), a view where strides allow."""
        x = self.view(x).transpose(1, 2).flatten(3, 4).flatten(0, 1)
        # rows a power of two apart fall into the same cache sets: copied once they are read faster
        return x.contiguous() if self.run == 1 < self.rows else x

    def scatter(self, x: Tensor) -> Tensor:
        """(B·G, H, rows·run, …) → (B, H, G, rows, run, …): what `gather` undoes."""
        size = (-1, self.groups, x.shape[1], self.rows, self.run, *x.shape[3:])
        return x.reshape(size).transpose(1, 2)


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

    def pieces(self, size: int) -> list[tuple[Cut, Cut]]:
        """The groups, a few at a time: about `size` queries each, so that temporaries stay small."""
        groups, step = self.queries.groups, max(1, size // self.queries.length)
        spans = [(first, min(step, groups - first)) for first in range(0, groups, step)]
        return [(self.queries.piece(*span), self.keys.piece(*span)) for span in spans]

    def bias(self, like: Tensor) -> Tensor | None:
        """The mask as something to add to scores, (1, H or 1, queries or 1, keys)."""
        if self.mask is None:
            return None
        bias = torch.zeros(self.mask.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~self.mask, -math.inf)
        return bias.unsqueeze(0) if bias.dim() == 3 else bias.unsqueeze(0).unsqueeze(0)


def piece_size(seq_len: int, device: torch.device) -> int:
    """Queries worked on at a time: more than `PIECE` where that would make too many pieces."""
    return max(PIECE.on(device), -(-seq_len // MOST_PIECES))


def to_plain(parts: Iterable[Part]) -> tuple[list[Tensor], list[int]]:
    """Parts as what an operator of torch may be given: their masks, and whole numbers for all else."""
    masks, numbers = [], []
    for part in parts:
        masks += [] if part.mask is None else [part.mask]
        numbers += [
            *part.heads,
            *astuple(part.queries),
            *astuple(part.keys),
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
        mask = next(left) if masked else None
        parts.append(Part(heads=(first, last), queries=queries, keys=keys, causal=bool(causal), mask=mask))
    return parts
