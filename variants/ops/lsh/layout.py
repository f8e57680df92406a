"""The sorted orders of all rounds of hashing at once: which row lies at each position, and who reads whom.

Shapes: T tokens, R rounds of hashing, N = H·B sequences, P positions of a sequence in a sorted order, padding
included, L = N·R·P + 2·margin. Here a token of a sequence is the *row* n·T + t: the rows of a sequence are
contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.lsh.windows import Window
from variants.ops.memoizable import repeatable

EXACT_INT32 = 2**27
"""Codes below this number leave room in int32 for the codes of padding and of other sequences."""


class Layout(NamedTuple):
    """The sorted orders of all rounds, those of a sequence side by side, with a margin at both ends."""

    order: Tensor
    """(L,) int32: the row at each position; the number of rows at padding and for excluded rows."""
    place: Tensor
    """(N, R, T) int32: the position of each token, counted through all orders, without the margin."""
    code: Tensor
    """(R, rows + 1): a round reads a pair if the difference of the codes is in `Window.read`, and the order
    of the tokens is allowed. The last entry, of padding, is far from all others."""
    own: Tensor
    """(L,): the codes of the rows in the round of the position, far from those of the orders before and
    after."""
    isolated: Tensor
    """(rows,) bool: rows that read no other row in any round."""
    marked: Tensor
    """(rows,) bool: rows that are excluded or read an excluded row."""

    @property
    def orders(self) -> tuple[int, int]:
        """N, R."""
        return self.place.shape[0], self.place.shape[1]

    def positions(self, window: Window) -> int:
        """P."""
        sequences, rounds = self.orders
        return (len(self.order) - 2 * margin(window)) // (sequences * rounds)


def margin(window: Window) -> int:
    """Padding at each end of all orders, so that the keys of every block of queries have positions."""
    return max(window.back, window.ahead)


@torch.no_grad()
@repeatable
def lay_out(buckets: Tensor, window: Window, excluded: Tensor, multiple: int = 1) -> Layout:
    """Sort each sequence by (bucket, position) in each round.

    buckets (R, N, T) are those of `hash_rows`; excluded (rows,) bool. P is rounded up to this multiple. With
    the `band` neighbourhood each bucket begins a block of the window, as in `windows.sort_rows`.
    """
    rounds, sequences, seq_len = buckets.shape
    rows, device = sequences * seq_len, buckets.device
    positions = -(-window.padded // multiple) * multiple
    by_bucket, token = buckets.transpose(0, 1).sort(dim=-1, stable=True)  # (N, R, T)
    rank = torch.arange(seq_len, device=device).expand_as(token)
    size = torch.zeros(sequences, rounds, window.n_buckets, device=device, dtype=torch.int64)
    size.scatter_add_(-1, by_bucket, torch.ones_like(by_bucket))
    end = size.cumsum(-1)
    begin = end - size
    # ranks that a token reads: the part of its span that lies in its bucket
    lo, hi = window.span(rank)
    lo = torch.maximum(lo, begin.gather(-1, by_bucket))
    if not window.causal:  # a causal span ends with the token itself
        hi = torch.minimum(hi, end.gather(-1, by_bucket))
    sequence = torch.arange(sequences, device=device)[:, None, None]
    row = token + seq_len * sequence
    lost = excluded[row]
    before = torch.nn.functional.pad(lost.cumsum(-1), (1, 0))  # excluded rows before each rank
    alone, reads_excluded = hi - lo == 1, before.gather(-1, hi) > before.gather(-1, lo)
    where = rank
    if window.band:  # each bucket begins a block
        blocks = (size + (window.block - 1)) // window.block
        shift = (blocks.cumsum(-1) - blocks) * window.block - begin
        where = rank + shift.gather(-1, by_bucket)
    orders = torch.arange(sequences * rounds, device=device).view(sequences, rounds, 1)
    where = where + positions * orders
    place = torch.empty_like(token, dtype=torch.int32).scatter_(-1, token, where.int())
    where = where.flatten() + margin(window)
    order = torch.full(
        (orders.numel() * positions + 2 * margin(window),), rows, device=device, dtype=torch.int32
    )
    order[where] = row.masked_fill(lost, rows).flatten().int()
    exact = torch.int32 if seq_len + window.gap * window.n_buckets < EXACT_INT32 else torch.int64
    numbers = torch.iinfo(exact)
    code = window.code(rank) + window.gap * by_bucket
    codes = torch.full((rounds, rows + 1), numbers.min // 2, device=device, dtype=exact)
    codes[:, :-1].view(rounds, sequences, seq_len).transpose(0, 1).scatter_(-1, token, code.to(exact))
    own = torch.full(order.shape, numbers.min // 2, device=device, dtype=exact)
    own[where] = torch.add(code, orders % 2, alpha=numbers.max // 4).flatten().to(exact)
    isolated = torch.empty_like(alone).scatter_(-1, token, alone).all(1).flatten()
    marked = torch.empty_like(alone).scatter_(-1, token, reads_excluded).any(1).flatten()
    return Layout(order, place, codes, own, isolated, marked.logical_or_(excluded))
