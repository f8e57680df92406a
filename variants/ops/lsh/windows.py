"""The sorted order of hashed attention: the position of each token in it, and the keys that it reads.

Shapes: B batch, T tokens, H heads, R rounds of hashing, N = H·B sequences. A token of a head is a *row*
(b·T + t)·H + h of the (B, T, H, D) tensors, so tensors are gathered without a transposition. A piece consists
of n blocks of b queries in sorted order and the L keys at the same positions, of which each block reads K.

A later token must not change any bit of an earlier output, because one bit can move a token to another bucket
in the next layer. The last bits of a sum depend on the order of its terms, including zeros, and therefore on
the positions of the keys in their block. With the `band` neighbourhood every bucket therefore begins a new
block. The position of a token in its block, and the positions of the keys that it reads, then depend only on
the number of earlier tokens in its bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

MOST_PIECES = 16
"""Maximum number of pieces of a round; beyond it the pieces grow, which bounds the number of operations."""
TILE = Sizes(cpu=2**18, accelerator=2**25)
"""Pairs (query, key) of a piece, unless `MOST_PIECES` asks for more. The CPU's value keeps them in cache."""
FORBIDDEN = 1e20
"""Subtracted from the score of a forbidden pair: once for its position, and once or more for its bucket."""
EXACT_FLOAT32 = 2**24
"""float32 represents all smaller integers exactly."""
SMALL_BLOCK = 2
"""Relative time for each pair in blocks of b queries: 1 + SMALL_BLOCK / b."""

Rank = TypeVar("Rank", int, Tensor)


@dataclass(frozen=True)
class Window:
    """The keys of a block of queries in sorted order: the block itself, `back` keys before, `ahead` after it.

    With `band`, a token reads the `reach` tokens of its bucket that precede it (and, if not causal, that
    follow it). Otherwise it reads the tokens of its bucket in its own chunk of `reach` tokens of the sorted
    order and in the chunk before.
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
    """Scores computed at a time."""

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
        """Choose the cheapest block size: small blocks waste fewer keys, large blocks run faster."""
        reach, scores = min(chunk, seq_len), TILE.on(device_type)

        def window(block: int, back: int, ahead: int) -> Window:
            return cls(seq_len, n_buckets, reach, band, causal, block, back, ahead, scores)

        if not band:
            return window(reach, reach if reach < seq_len else 0, 0)
        windows = [window(1 << k, reach, 0 if causal else reach) for k in range(reach.bit_length())]
        if n_buckets == 1:
            windows.append(window(seq_len, 0, 0))
        costs = [window.computed * (1 + SMALL_BLOCK / window.block) for window in windows]
        return windows[costs.index(min(costs))]  # torch.compile cannot trace `min` with a key

    def in_blocks(self, block: int) -> Window:
        """The same with blocks of another size and without keys beside them, for kernels that find the keys
        by `span`. With chunks of the sorted order, no bucket begins a block."""
        return replace(self, block=block if self.band else 1, back=0, ahead=0)

    def in_whole_blocks(self) -> Window:
        """The same with `back` and `ahead` rounded up to whole blocks."""
        back, ahead = (-(-keys // self.block) * self.block for keys in (self.back, self.ahead))
        return replace(self, back=back, ahead=ahead)

    @property
    def numbers(self) -> list[int]:
        """The fields in order, as arguments of an operator."""
        shape = [self.seq_len, self.n_buckets, self.reach, int(self.band), int(self.causal)]
        return [*shape, self.block, self.back, self.ahead, self.scores]

    @property
    def keys(self) -> int:
        """Number of keys of a block of queries."""
        return self.back + self.block + self.ahead

    @property
    def padded(self) -> int:
        """Positions of a sequence in the sorted order, padding included: enough for any sizes of buckets."""
        begun = min(self.n_buckets, self.seq_len) if self.band else 1
        return (self.seq_len + begun * (self.block - 1)) // self.block * self.block

    @property
    def computed(self) -> int:
        """Pairs that a round computes for one sequence."""
        return self.padded * self.keys

    @property
    def admitted(self) -> int:
        """Upper bound on the pairs that a round allows for one sequence: each window lies in one bucket."""
        total, reach = self.seq_len, self.reach
        if self.band:
            one_sided = reach * (reach - 1) // 2 + (total - reach) * reach
            pairs = one_sided if self.causal else 2 * one_sided
        else:
            full, remainder = divmod(total, reach)
            sizes = [reach] * full + [remainder] * (remainder > 0)
            pairs = sum(n * (n - 1) // (2 if self.causal else 1) for n in sizes)
            pairs += sum(n * reach for n in sizes[1:])
        first_is_alone = self.causal or total == 1 or (reach == 1 and not self.band)
        return pairs + first_is_alone  # it reads itself

    @property
    def same(self) -> tuple[float, float]:
        """(shift, most): a round reads a pair if |code(query) − code(key) − shift| ≤ most.

        This holds only for pairs that another round reads. Their order is then known to be allowed, because
        the order of two tokens in a bucket is the same in every round.
        """
        return (0.0, float(self.reach)) if self.band else (0.5, 0.5)

    @property
    def read(self) -> tuple[int, int]:
        """(low, high): as `same`, for integers: low ≤ code(query) − code(key) ≤ high."""
        return (0 if self.causal else -self.reach, self.reach) if self.band else (0, 1)

    def code(self, rank: Tensor) -> Tensor:
        """The code of the token at each rank of the sorted order, which `same` compares within a bucket."""
        return rank if self.band else rank // self.reach

    @property
    def gap(self) -> int:
        """Distance between the codes of two buckets, so that one subtraction compares bucket and rank."""
        return self.reach + 1 if self.band else 2

    def span(self, rank: Rank) -> tuple[Rank, Rank]:
        """The ranks [lo, hi) of the sorted order that a token at a rank may read if they are in its bucket.

        They include the token itself.
        """
        if self.band:
            lo, hi = rank - self.reach, rank + (self.reach + 1)
        else:
            chunk = rank // self.reach
            lo, hi = (chunk - 1) * self.reach, (chunk + 1) * self.reach
        return lo, rank + 1 if self.causal else hi

    def forbidden(self, like: Tensor) -> Tensor:
        """(block, keys): 0 where the positions in the block allow the pair, else −FORBIDDEN."""
        query = torch.arange(self.block, device=like.device)[:, None] + self.back
        distance = query - torch.arange(self.keys, device=like.device)
        allowed = distance > 0 if self.causal else distance != 0
        if self.band:
            allowed = allowed & (distance.abs() <= self.reach)
        return torch.where(allowed, 0.0, -FORBIDDEN).to(like.dtype)

    def pieces(self, sequences: int) -> Iterator[tuple[int, int]]:
        """Yield (first query, number of blocks) of each piece of a round, in sorted order."""
        blocks = sequences * self.padded // self.block
        step = max(self.scores // (self.block * self.keys), -(-blocks // MOST_PIECES), 1)
        for first in range(0, blocks, step):
            yield first * self.block, min(step, blocks - first)


class Rounds(NamedTuple):
    """The sorted orders of all rounds. Each has P = back + N·padded + ahead positions, padding included."""

    order: Tensor
    """(R, P) int64: the row at each position; the number of rows at padding."""
    bucket: Tensor
    """(R, P): the bucket of the row, different from the buckets of neighbouring sequences; −1 at padding."""
    code: Tensor
    """(R, rows + 1): the difference of two codes decides whether a round reads a pair (see `Window.same`)."""
    isolated: Tensor
    """(rows + 1,) bool: rows that read no other row in any round."""
    marked: Tensor
    """(rows + 1,) bool: rows that are marked or read a marked row."""


@torch.no_grad()
@repeatable
def sort_rows(buckets: Tensor, window: Window, heads: int, mark: Tensor) -> Rounds:
    """Sort each sequence by (bucket, position) in each round.

    buckets (R, N, T) are those of `hash_rows`; mark (rows + 1,) bool marks rows for `Rounds.marked`.
    """
    rounds, sequences, seq_len = buckets.shape
    batch, rows, device = sequences // heads, sequences * seq_len, buckets.device
    sequence = torch.arange(sequences, device=device)[:, None]
    head, item = sequence // batch, sequence % batch
    rank = torch.arange(seq_len, device=device).expand(sequences, -1)
    exact = torch.float32 if seq_len + window.gap * window.n_buckets < EXACT_FLOAT32 else torch.float64
    order = torch.full((rounds, window.back + sequences * window.padded + window.ahead), rows, device=device)
    bucket = torch.full(order.shape, -1.0, device=device, dtype=torch.float32)
    code = torch.zeros(rounds, rows + 1, device=device, dtype=exact)
    isolated, marked = torch.ones_like(mark), mark.clone()
    for r in range(rounds):
        by_bucket, position = buckets[r].sort(dim=-1, stable=True)
        row = (item * seq_len + position) * heads + head
        size = torch.zeros(sequences, window.n_buckets, device=device, dtype=torch.int64)
        size.scatter_add_(1, by_bucket, torch.ones_like(by_bucket))
        end = size.cumsum(1)
        # ranks that a token reads: the part of its span that lies in its bucket
        lo, hi = window.span(rank)
        lo, hi = (
            torch.maximum(lo, (end - size).gather(1, by_bucket)),
            torch.minimum(hi, end.gather(1, by_bucket)),
        )
        before = torch.nn.functional.pad(mark[row].cumsum(1), (1, 0))  # marked rows before each rank
        isolated[row] &= hi - lo == 1
        marked[row] |= before.gather(1, hi) > before.gather(1, lo)
        code[r, row] = (window.code(rank) + window.gap * by_bucket).to(exact)
        where = rank
        if window.band:  # each bucket begins a block
            blocks = (size + window.block - 1) // window.block
            shift = (blocks.cumsum(1) - blocks) * window.block - (end - size)
            where = rank + shift.gather(1, by_bucket)
        where = where + window.padded * sequence + window.back
        order[r, where] = row
        bucket[r, where] = (by_bucket + window.n_buckets * (sequence % 2)).float()
    return Rounds(order, bucket, code, isolated, marked)
