"""Parts of a mask: pairs of queries and keys as strided views of the sequence.

Shapes: B batch, T tokens, H heads, D channels of a head; G groups of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**12, accelerator=2**16)
"""Queries of a sequence computed at a time. The CPU's value keeps temporaries in cache."""
MOST_PIECES = 16
"""Maximum number of pieces of a sequence. Longer sequences have larger pieces, to bound the operations."""


@dataclass(frozen=True, kw_only=True)
class StridedTokens:
    """`groups` sets of tokens, each with `rows` runs of `run` neighbouring tokens.

    Token (g, r, i) of head h has the index start + g·group_step + r·row_step + i + h·head_step.
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
        """Number of tokens of one group."""
        return self.rows * self.run

    def tokens(self, device: torch.device) -> Tensor:
        """The token indices of the first group, for the first head: (length,)."""
        row = torch.arange(self.rows, device=device)[:, None] * self.row_step
        return self.start + (row + torch.arange(self.run, device=device)).flatten()

    def piece(self, first: int, count: int) -> StridedTokens:
        """Groups [first, first + count)."""
        fields = {**self.__dict__, "start": self.start + first * self.group_step, "groups": count}
        return StridedTokens(**fields)

    @property
    def numbers(self) -> list[int]:
        """All fields, in order; not by `astuple`, which torch.compile cannot trace."""
        rows = [self.rows, self.row_step, self.run]
        return [self.start, self.groups, self.group_step, *rows, self.head_step]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> StridedTokens:
        """The tokens with these `numbers`."""
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
        batch, heads, token, *channel_dims = x.stride()
        heads, group, row = (
            base + step * token
            for base, step in ((heads, self.head_step), (0, self.group_step), (0, self.row_step))
        )
        size = (x.shape[0], self.groups, x.shape[1], self.rows, self.run, *x.shape[3:])
        start = x.storage_offset() + self.start * token
        return x.as_strided(size, (batch, group, heads, row, token, *channel_dims), start)

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·G, H, rows·run, …), a view where strides allow."""
        return packed(self.view(x))


def packed(view: Tensor) -> Tensor:
    """(B, G, H, rows, run, …) → (B·G, H, rows·run, …), a view where strides allow."""
    rows, run = view.shape[3:5]
    x = view.flatten(3, 4).flatten(0, 1)
    # rows at distances of a power of two share cache sets, so reading a copy is faster
    return x.contiguous() if run == 1 < rows else x


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pairs (query, key) of the same group, for heads [first, last).

    `causal`: the n-th query reads the keys up to the n-th only. `mask`: True where a query may read a key,
    (queries, keys) or (H, queries or 1, keys); a query may have no key.
    """

    heads: tuple[int, int]
    queries: StridedTokens
    keys: StridedTokens
    causal: bool = False
    mask: Tensor | None = None

    @property
    def pairs(self) -> int:
        """Number of computed pairs: all pairs of a rectangle, also if it has a mask."""
        queries, keys = self.queries.length, self.keys.length
        pairs = queries * (queries + 1) // 2 if self.causal else queries * keys
        return (self.heads[1] - self.heads[0]) * self.queries.groups * pairs

    def pieces(self, size: int) -> list[tuple[StridedTokens, StridedTokens]]:
        """Divide the groups into pieces of about `size` queries or keys, so that temporaries stay small."""
        longer = max(self.queries.length, self.keys.length)
        groups, step = self.queries.groups, max(1, size // longer)
        spans = [(first, min(step, groups - first)) for first in range(0, groups, step)]
        return [(self.queries.piece(*span), self.keys.piece(*span)) for span in spans]

    def bias(self, like: Tensor) -> Tensor | None:
        """The mask as a term that is added to the scores: 0 or −∞, (1, H or 1, queries or 1, keys)."""
        if self.mask is None:
            return None
        bias = torch.zeros(self.mask.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~self.mask, -math.inf)
        return bias.unsqueeze(0) if bias.dim() == 3 else bias.unsqueeze(0).unsqueeze(0)


def piece_size(seq_len: int, device_type: str) -> int:
    """Queries computed at a time: `PIECE`, or more if there would be more than `MOST_PIECES` pieces."""
    return max(PIECE.on(device_type), -(-seq_len // MOST_PIECES))


def flatten_parts(parts: Iterable[Part]) -> tuple[list[Tensor], list[int]]:
    """Convert parts to arguments that an operator of torch accepts: their masks, and integers."""
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


def unflatten_parts(masks: Sequence[Tensor], numbers: Sequence[int]) -> list[Part]:
    """The inverse of `flatten_parts`. Without masks, parts that have one get None."""
    remaining_masks, parts, size = iter(masks), [], len(fields(StridedTokens))
    for at in range(0, len(numbers), 4 + 2 * size):
        first, last, *tokens, causal, masked = numbers[at : at + 4 + 2 * size]
        queries, keys = StridedTokens.of(tokens[:size]), StridedTokens.of(tokens[size:])
        mask = next(remaining_masks, None) if masked else None
        parts.append(Part(heads=(first, last), queries=queries, keys=keys, causal=bool(causal), mask=mask))
    return parts
