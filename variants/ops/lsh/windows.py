"""The sorted order of hashed attention: where each token stands, and which keys are computed with it.

Shapes: B batch, T tokens, H heads, R rounds of hashing, N = H·B sequences. A token of a head is a *row*
(b·T + t)·H + h of the (B, T, H, D) tensors, so nothing is transposed before it is gathered. In sorted
order a piece is n blocks of b queries and the L keys under them, of which each block sees K.

A later token must not change any bit of an earlier output: in the next layer one bit can move a token to
another bucket. The last bits of a sum depend on the order of its terms and of the zeros among them, and
so on where keys stand in their block. With the `band` neighbourhood, every bucket therefore begins a new
block: a token's place in its block, and the places of the keys that it reads, follow from how many
tokens of its bucket came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

MOST_PIECES = 16
"""Pieces of a round at most: tiles outgrow the cache rather than a pass its thousands of calls."""
TILE = Sizes(cpu=2**18, accelerator=2**23)
"""(query, key) pairs of a piece where the round is small enough: a tile of them stays in the cache."""
FORBIDDEN = 1e20
"""Taken off the score of a forbidden pair, once for its place and once or more for its bucket."""
EXACT_FLOAT32 = 2**24
SMALL_BLOCK = 2
"""A block of b queries takes as long a pair as one of many queries times 1 + SMALL_BLOCK / b."""


@dataclass(frozen=True)
class Window:
    """Which keys a query computes with, in sorted order: its block of `block`, `back` before, `ahead` after.

    `band`: it reads the `reach` tokens of its bucket before it in position (and after it, where not
    causal). Otherwise those of its bucket in its chunk of `reach` tokens of the sorted order and in the
    chunk before.
    """

    seq_len: int
    n_buckets: int
    reach: int
    band: bool
    causal: bool
    block: int
    back: int
    ahead: int
    scores: int = TILE.cpu
    """Scores that are worked on at a time."""

    @classmethod
    def choose(
        cls,
        seq_len: int,
        n_buckets: int,
        chunk: int,
        *,
        band: bool,
        causal: bool,
        device_type: str = "cpu",
    ) -> Window:
        """The cheapest blocks. Small ones waste fewer keys; the products of large ones run faster."""
        reach, scores = min(chunk, seq_len), TILE.on(device_type)

        def made(block: int, back: int, ahead: int) -> Window:
            return cls(seq_len, n_buckets, reach, band, causal, block, back, ahead, scores)

        if not band:
            return made(reach, reach if reach < seq_len else 0, 0)
        windows = [made(1 << k, reach, 0 if causal else reach) for k in range(reach.bit_length())]
        if n_buckets == 1:
            windows.append(made(seq_len, 0, 0))
        costs = [window.computed * (1 + SMALL_BLOCK / window.block) for window in windows]
        return windows[costs.index(min(costs))]  # not `min` with a key, which torch.compile cannot trace

    @property
    def numbers(self) -> list[int]:
        """The fields in order, as an operator takes them."""
        shape = [self.seq_len, self.n_buckets, self.reach, int(self.band), int(self.causal)]
        return [*shape, self.block, self.back, self.ahead, self.scores]

    @property
    def keys(self) -> int:
        """Keys of a block of queries."""
        return self.back + self.block + self.ahead

    @property
    def padded(self) -> int:
        """Places of a sequence: enough whole blocks for its tokens, however they fall into buckets."""
        begun = min(self.n_buckets, self.seq_len) if self.band else 1
        return (self.seq_len + begun * (self.block - 1)) // self.block * self.block

    @property
    def computed(self) -> int:
        """Pairs that a round computes for a sequence."""
        return self.padded * self.keys

    @property
    def admitted(self) -> int:
        """Pairs that a round allows a sequence at most: were all tokens of a window in one bucket."""
        total, reach = self.seq_len, self.reach
        if self.band:
            one_sided = reach * (reach - 1) // 2 + (total - reach) * reach
            pairs = one_sided if self.causal else 2 * one_sided
        else:
            full, rest = divmod(total, reach)
            sizes = [reach] * full + [rest] * (rest > 0)
            pairs = sum(n * (n - 1) // (2 if self.causal else 1) for n in sizes)
            pairs += sum(n * reach for n in sizes[1:])
        first_is_alone = self.causal or total == 1 or (reach == 1 and not self.band)
        return pairs + first_is_alone  # which then reads itself

    @property
    def same(self) -> tuple[float, float]:
        """(shift, most): a round reads a pair where |code(query) − code(key) − shift| ≤ most.

        Of a pair that another round reads, that is: which of two tokens of a bucket is the earlier is
        the same in every round.
        """
        return (0.0, float(self.reach)) if self.band else (0.5, 0.5)

    def code(self, rank: Tensor) -> Tensor:
        """What `same` compares within a bucket, of the token at each rank of the sorted order."""
        return rank if self.band else rank // self.reach

    @property
    def gap(self) -> int:
        """What a code adds from bucket to bucket, so that one subtraction tells both bucket and distance."""
        return self.reach + 1 if self.band else 2

    def span(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks [lo, hi) of the sorted order that hold what the token at a rank reads, and itself: of
        them it reads those of its bucket."""
        if self.band:
            lo, hi = rank - self.reach, rank + self.reach + 1
        else:
            chunk = rank // self.reach
            lo, hi = (chunk - 1) * self.reach, (chunk + 1) * self.reach
        return lo, rank + 1 if self.causal else hi

    def forbidden(self, like: Tensor) -> Tensor:
        """(block, keys): 0 where a query may read a key of its bucket by place alone, else −FORBIDDEN."""
        query = torch.arange(self.block, device=like.device)[:, None] + self.back
        distance = query - torch.arange(self.keys, device=like.device)
        allowed = distance > 0 if self.causal else distance != 0
        if self.band:
            allowed = allowed & (distance.abs() <= self.reach)
        return torch.where(allowed, 0.0, -FORBIDDEN).to(like.dtype)

    def pieces(self, sequences: int) -> Iterator[tuple[int, int]]:
        """(first query, number of blocks) of each piece of a round, in sorted order."""
        blocks = sequences * self.padded // self.block
        step = max(self.scores // (self.block * self.keys), -(-blocks // MOST_PIECES), 1)
        for first in range(0, blocks, step):
            yield first * self.block, min(step, blocks - first)


class Rounds(NamedTuple):
    """What hashing decided. P = back + N·padded + ahead places of the sorted order, padding included."""

    order: Tensor
    """(R, P) int64: the row at each place; rows (one past the last row) at padding."""
    bucket: Tensor
    """(R, P): its bucket, told apart from those of the neighbouring sequences; −1 at padding."""
    code: Tensor
    """(R, rows + 1): what tells whether a pair is read in that round, by subtraction (see `Window.same`)."""
    alone: Tensor
    """(rows + 1,) bool: which rows have no other to read in any round."""
    marked: Tensor
    """(rows + 1,) bool: which rows are marked, or read one that is."""


@torch.no_grad()
@repeatable
def sort_rows(buckets: Tensor, window: Window, heads: int, mark: Tensor) -> Rounds:
    """Sort every sequence by (bucket, position), in every round; buckets (R, N, T), mark (rows + 1,) bool."""
    rounds, sequences, seq_len = buckets.shape
    batch, rows, device = sequences // heads, sequences * seq_len, buckets.device
    sequence = torch.arange(sequences, device=device)[:, None]
    head, item = sequence // batch, sequence % batch
    rank = torch.arange(seq_len, device=device).expand(sequences, -1)
    exact = torch.float32 if seq_len + window.gap * window.n_buckets < EXACT_FLOAT32 else torch.float64
    order = torch.full((rounds, window.back + sequences * window.padded + window.ahead), rows, device=device)
    bucket = torch.full(order.shape, -1.0, device=device, dtype=torch.float32)
    code = torch.zeros(rounds, rows + 1, device=device, dtype=exact)
    alone, marked = torch.ones_like(mark), mark.clone()
    for r in range(rounds):
        found, position = buckets[r].sort(dim=-1, stable=True)
        row = (item * seq_len + position) * heads + head
        size = torch.zeros(sequences, window.n_buckets, device=device, dtype=torch.int64)
        size.scatter_add_(1, found, torch.ones_like(found))
        end = size.cumsum(1)
        # Ranks of the sorted order that a token reads: those of its span in its bucket.
        lo, hi = window.span(rank)
        lo, hi = torch.maximum(lo, (end - size).gather(1, found)), torch.minimum(hi, end.gather(1, found))
        before = torch.nn.functional.pad(mark[row].cumsum(1), (1, 0))  # marked rows before each rank
        alone[row] &= hi - lo == 1
        marked[row] |= before.gather(1, hi) > before.gather(1, lo)
        code[r, row] = (window.code(rank) + window.gap * found).to(exact)
        place = rank
        if window.band:  # each bucket begins a block
            blocks = (size + window.block - 1) // window.block
            shift = (blocks.cumsum(1) - blocks) * window.block - (end - size)
            place = rank + shift.gather(1, found)
        place = place + window.padded * sequence + window.back
        order[r, place] = row
        bucket[r, place] = (found + window.n_buckets * (sequence % 2)).float()
    return Rounds(order, bucket, code, alone, marked)
