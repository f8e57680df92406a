"""Locality-sensitive hashing for attention: hash, sort, and attend within windows of the sorted order.

Shapes: B batch, T tokens, H heads, D head_dim, R rounds of hashing, N = H·B sequences to sort. A token of
a head is a *row* (b·T + t)·H + h of the (B, T, H, D) tensors, so nothing is transposed before it is
gathered. In sorted order a piece is n blocks of b queries, and L keys, of which each block sees K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from variants._pieces import Sizes
from variants._repeats import repeatable

UNIT_EPSILON = 1e-6
"""Added in quadrature to the length of a vector before dividing by it, so that 0 has a gradient."""
ONE_ROTATION = 64
"""Most buckets that one rotation gives; more are the product of two rotations (see `factors`)."""
MOST_PIECES = 16
"""Pieces of a round at most: tiles outgrow the cache rather than a pass its thousands of calls."""
TILE = Sizes(cpu=2**18, accelerator=2**23)
"""(query, key) pairs of a piece where the round is small enough: a tile of them stays in the cache."""
HASH_TILE = Sizes(cpu=2**21, accelerator=2**24)
"""Numbers that a piece of hashing projects to, likewise."""
FORBIDDEN = 1e20
"""Taken off the score of a forbidden pair."""
FLOOR = -1e10
"""Maximum of no scores: far below a score, far above a forbidden one."""
SMALLEST = -60.0
"""Exponents are raised to this. e⁻⁶⁰ is far under the rounding of the 1 that each sum holds, and far
enough above the smallest normal number that its products with gradients are normal too: a training
step took six times as long where they were not, and the vector exp 35 times over what underflows."""
EXACT_FLOAT32 = 2**24


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / √(‖x‖² + ε²) over the last dimension, and the factor 1 / √(…) with that dimension kept."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = (length.square() + UNIT_EPSILON**2).rsqrt()
    return x * inverse, inverse


# ---------------------------------------------------------------------------------------- hashing


def factors(n_buckets: int) -> tuple[int, ...]:
    """Buckets of each rotation, all even, with product n_buckets; () for a single bucket.

    One rotation to n buckets costs T·D·n/2; the product of two, to √n each, far less.
    Raises ValueError where n_buckets is no such product.
    """
    if n_buckets == 1:
        return ()
    if n_buckets < 1 or n_buckets % 2:
        raise ValueError(f"n_buckets={n_buckets}: a rotation gives an even number of buckets")
    if n_buckets <= ONE_ROTATION:
        return (n_buckets,)
    if n_buckets % 4:
        raise ValueError(
            f"n_buckets={n_buckets}: over {ONE_ROTATION} it is two even factors: a multiple of 4"
        )
    half = n_buckets // 4
    small = next(f for f in range(math.isqrt(half), 0, -1) if half % f == 0)
    return 2 * small, 2 * (half // small)


def rotations(
    heads: int, head_dim: int, rounds: int, sizes: tuple[int, ...], device: torch.device
) -> list[Tensor]:
    """A random (H, D, R·f/2) for each factor f: normal, float32, from the global generator."""
    return [
        torch.randn(heads, head_dim, rounds * (size // 2), dtype=torch.float32, device=device)
        for size in sizes
    ]


@torch.no_grad()
@repeatable
def hash_rows(x: Tensor, given: list[Tensor], rounds: int) -> Tensor:
    """(B, T, H, D) → bucket of every token in every round, (R, N, T) int64 with N = (H, B).

    h(x) = argmax [xR; −xR] (Andoni 2015, arXiv:1509.02897), computed as the first of the largest |xR|
    and its sign, where 0 counts as positive. Float32 whatever the dtype of x: in half precision nearby
    projections tie and the bucket depends on the kernel. In pieces over the tokens, because the
    projections are T × R × buckets numbers.
    """
    batch, seq_len, heads, _ = x.shape
    buckets = torch.zeros(rounds, heads, batch * seq_len, dtype=torch.int64, device=x.device)
    if given:
        by_head = x.flatten(0, 1).transpose(0, 1)  # (H, BT, D)
        width = heads * sum(r.shape[-1] for r in given)
        step = max(HASH_TILE.on(x.device) // width, -(-batch * seq_len // MOST_PIECES), 1)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, batch * seq_len, step):
                piece = by_head[:, start : start + step].float()
                found = buckets[:, :, start : start + step]
                for rotation in given:
                    half = rotation.shape[-1] // rounds
                    y = torch.bmm(piece, rotation).unflatten(-1, (rounds, half))  # (H, n, R, f/2)
                    best = y.abs().argmax(dim=-1, keepdim=True)
                    side = (y.gather(-1, best) < 0).long()
                    found.mul_(2 * half).add_((best + half * side).squeeze(-1).permute(2, 0, 1))
    return buckets.view(rounds, heads * batch, seq_len)


# ---------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Window:
    """Which keys a query computes with, in sorted order: its block of `block`, `back` before, `ahead` after.

    `band`: the `reach` tokens of its bucket before it in position (and after it, where not causal).
    Otherwise its chunk of `reach` tokens of the sorted order and the chunk before.
    """

    seq_len: int
    reach: int
    band: bool
    causal: bool
    block: int
    back: int
    ahead: int

    @classmethod
    def choose(cls, seq_len: int, chunk: int, *, band: bool, causal: bool) -> Window:
        """The cheapest blocks. Small ones waste fewer keys; the products of large ones run faster."""
        reach = min(chunk, seq_len)

        def made(block: int, back: int, ahead: int) -> Window:
            return cls(seq_len, reach, band, causal, block, back, ahead)

        if not band:
            return made(reach, reach if reach < seq_len else 0, 0)
        shares = (2,) if seq_len >= 4 * reach else (2, 4, 8)
        local = [made(-(-reach // share), reach, 0 if causal else reach) for share in shares]
        best = made(seq_len, 0, 0)
        for window in local:
            if window.computed < best.computed:
                best = window
        return best

    @property
    def keys(self) -> int:
        """Keys of a block of queries."""
        return self.back + self.block + self.ahead

    @property
    def padded(self) -> int:
        """Tokens of a sequence, rounded up to whole blocks."""
        return -(-self.seq_len // self.block) * self.block

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
        alone = 1 if self.causal or total == 1 else 0  # the first token reads itself
        return pairs + alone

    @property
    def same(self) -> tuple[float, float]:
        """(shift, most): a round reads a pair where |code(query) − code(key) − shift| ≤ most.

        Of a pair that another round reads, that is: which of two tokens of a bucket is the earlier is
        the same in every round.
        """
        return (0.0, float(self.reach)) if self.band else (0.5, 0.5)

    def forbidden(self, like: Tensor) -> Tensor:
        """(block, keys): 0 where a query may read a key of its bucket by place alone, else FORBIDDEN."""
        query = torch.arange(self.block, device=like.device)[:, None] + self.back
        distance = query - torch.arange(self.keys, device=like.device)
        allowed = distance > 0 if self.causal else distance != 0
        if self.band:
            allowed = allowed & (distance.abs() <= self.reach)
        return torch.where(allowed, 0.0, FORBIDDEN).to(like.dtype)

    def pieces(self, sequences: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """(first query, number of blocks) of each piece of a round, in sorted order."""
        blocks = sequences * self.padded // self.block
        step = max(TILE.on(device) // (self.block * self.keys), -(-blocks // MOST_PIECES), 1)
        for first in range(0, blocks, step):
            yield first * self.block, min(step, blocks - first)


class Rounds(NamedTuple):
    """What hashing decided. P = back + N·padded + ahead places of the sorted order, padding included."""

    order: Tensor
    """(R, P) int64: the row at each place; rows (one past the last row) at padding."""
    bucket: Tensor
    """(R, P): its bucket, told apart from those of the neighbouring sequences; −1 at padding."""
    code: Tensor
    """(R, rows): what tells whether a pair is read in that round, by subtraction (see `Window.same`)."""


@torch.no_grad()
@repeatable
def sort_rows(buckets: Tensor, window: Window, heads: int, n_buckets: int) -> Rounds:
    """Sort every sequence by (bucket, position), in every round; buckets (R, N, T)."""
    rounds, sequences, seq_len = buckets.shape
    batch, rows, device = sequences // heads, sequences * seq_len, buckets.device
    sequence = torch.arange(sequences, device=device)[:, None]
    head, item = sequence // batch, sequence % batch
    rank = torch.arange(seq_len, device=device)
    # Codes leave a gap between buckets, so that one subtraction tells both bucket and distance.
    gap = window.reach + 1 if window.band else 2
    exact = torch.float32 if seq_len + gap * n_buckets < EXACT_FLOAT32 else torch.float64
    order = torch.full((rounds, window.back + sequences * window.padded + window.ahead), rows, device=device)
    bucket = torch.full(order.shape, -1.0, device=device, dtype=torch.float32)
    code = torch.empty(rounds, rows, device=device, dtype=exact)
    for r in range(rounds):
        found, place = buckets[r].sort(dim=-1, stable=True)
        row = (item * seq_len + place) * heads + head
        code[r, row] = ((rank if window.band else rank // window.reach) + gap * found).to(exact)
        inner = slice(window.back, window.back + sequences * window.padded)
        order[r, inner].view(sequences, -1)[:, :seq_len] = row
        bucket[r, inner].view(sequences, -1)[:, :seq_len] = (found + n_buckets * (sequence % 2)).float()
    return Rounds(order, bucket, code)
