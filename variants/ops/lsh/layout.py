"""The sorted orders of all rounds of hashing at once: which row lies at each position, and who reads whom.

Shapes: T tokens, R rounds of hashing, N = H·B sequences, P positions of a sequence in a sorted order, padding
included. Here a token of a sequence is the *row* n·T + t, so that the rows of a sequence are contiguous.
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
    """The sorted orders of all rounds."""

    order: Tensor
    """(N, R, P) int32: the row at each position; the number of rows at padding and for excluded rows."""
    place: Tensor
    """(N, R, T) int32: the position of each token, counted through the orders of all sequences."""
    code: Tensor
    """(R, rows + 1): a round reads a pair if the difference of the codes is in `Window.read`, and the order of
    the tokens is allowed. The last entry, of padding, is far from all others."""
    own: Tensor
    """(N, R, P): the codes of the rows in the round of the position, far from those of the orders before and
    after."""
    isolated: Tensor
    """(rows,) bool: rows that read no other row in any round."""
    marked: Tensor
    """(rows,) bool: rows that are excluded or read an excluded row."""


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
    # ranks that a token reads: the part of its span that lies in its bucket
    lo, hi = window.span(rank)
    lo = torch.maximum(lo, (end - size).gather(-1, by_bucket))
    hi = torch.minimum(hi, end.gather(-1, by_bucket))
    sequence = torch.arange(sequences, device=device)[:, None, None]
    row = token + seq_len * sequence
    lost = excluded[row]
    before = torch.nn.functional.pad(lost.cumsum(-1), (1, 0))  # excluded rows before each rank
    alone, reads_excluded = hi - lo == 1, before.gather(-1, hi) > before.gather(-1, lo)
    where = rank
    if window.band:  # each bucket begins a block
        blocks = (size + window.block - 1) // window.block
        shift = (blocks.cumsum(-1) - blocks) * window.block - (end - size)
        where = rank + shift.gather(-1, by_bucket)
    order = torch.full((sequences, rounds, positions), rows, device=device, dtype=torch.int32)
    order.scatter_(-1, where, row.masked_fill(lost, rows).int())
    sequence_round = torch.arange(sequences * rounds, device=device).view(sequences, rounds, 1)
    place = torch.empty_like(token, dtype=torch.int32)
    place.scatter_(-1, token, (where + positions * sequence_round).int())
    exact = torch.int32 if seq_len + window.gap * window.n_buckets < EXACT_INT32 else torch.int64
    numbers = torch.iinfo(exact)
    code = (window.code(rank) + window.gap * by_bucket).to(exact)
    codes = torch.full((rounds, rows + 1), numbers.min // 2, device=device, dtype=exact)
    codes[:, :-1].view(rounds, sequences, seq_len).transpose(0, 1).scatter_(-1, token, code)
    own = torch.full(order.shape, numbers.min // 2, device=device, dtype=exact)
    own.scatter_(-1, where, code + (sequence_round % 2 * (numbers.max // 4)).to(exact))
    isolated = torch.empty_like(alone).scatter_(-1, token, alone).all(1).flatten()
    marked = torch.empty_like(alone).scatter_(-1, token, reads_excluded).any(1).flatten()
    return Layout(order, place, codes, own, isolated, marked.logical_or_(excluded))
