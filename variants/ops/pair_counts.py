"""Numbers of pairs and of keys that follow from a rule, counted without drawing the mask.

A rule with a period is asked once for each distance and each query of a period, any other once for each pair.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.ops.masks import Rule
from variants.ops.regions import Region, Residue, alike_heads, local_period, residues

STRIP = 2**22
"""Pairs of a rule that are evaluated at a time."""
HORIZON = 1024
"""Least number of later queries that decide what a rule of unlimited reach carries."""
CACHED = 128
"""Counts that are kept."""


@lru_cache(maxsize=CACHED)
def count_pairs(region: Region, seq_len: int) -> int:
    """Allowed pairs of a region, all its heads together."""
    with _disable_current_modes():
        return sum(
            residue.width * (heads[1] - heads[0]) * count_sequence(region.rule, heads[0], residue)
            for heads in alike_heads(region.rule, *region.heads)
            for residue in residues(region, seq_len)
        )


def carried_keys(rule: Rule, seq_len: int, heads: int) -> int:
    """(head, key) pairs among the first `seq_len` tokens that a later query may read.

    Later queries are those within the rule's reach or, where that is unlimited, as many as there were tokens,
    and at least `HORIZON`.
    """
    reach = rule.reach
    first = 0 if reach is None else max(0, seq_len - reach)
    later = max(seq_len, HORIZON) if reach is None else reach
    with _disable_current_modes():
        head = torch.arange(heads, device="cpu")[:, None, None]
        if rule.period == 1:  # a key is read where any distance from it to a later query is
            distances = torch.arange(1, max(1, seq_len - first + later), device="cpu")
            allowed = _broadcast(rule, head, distances[:, None], distances.new_zeros(1, 1))[..., 0]
            farthest = (allowed * distances).amax(-1) if len(distances) else distances.new_zeros(heads)
            return int(farthest.clamp(max=seq_len).sum())
        read = torch.zeros(heads, seq_len - first, dtype=torch.bool, device="cpu")
        keys = torch.arange(first, seq_len, device="cpu")
        for queries in torch.arange(seq_len, seq_len + later, device="cpu").split(_rows(seq_len - first)):
            read |= _broadcast(rule, head, queries[:, None], keys).any(1)
        return int(read.sum())


def _rows(columns: int) -> int:
    return max(1, STRIP // max(1, columns))


def _broadcast(rule: Rule, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    allowed = rule(head, i, j)
    return allowed.expand(len(head), *torch.broadcast_shapes(i.shape, j.shape))


def count_sequence(rule: Rule, head: int, residue: Residue) -> int:
    """Allowed pairs of one sequence: by distance where the rule repeats, pair by pair elsewhere."""
    length, period = residue.length, local_period(rule, residue.step)
    index = torch.arange(length, device="cpu")
    if period is None or period >= length:
        strips = index.split(_rows(length))
        return sum(int(residue.asks(rule, head, strip[:, None], index).sum()) for strip in strips)
    reach = length - 1 if rule.reach is None else min(length - 1, rule.reach // residue.step)
    distances = torch.arange(-reach, reach + 1, device="cpu")
    total = 0
    for strip in torch.arange(period, device="cpu").split(_rows(len(distances))):
        query = strip[:, None]
        # queries of this class whose key at that distance lies in the sequence: i = query + n·period
        low, high = distances.clamp(min=0), (length + distances).clamp(max=length)
        queries = (high - 1 - query).div(period, rounding_mode="floor") - (low - 1 - query).div(
            period, rounding_mode="floor"
        )
        far = query + period * length  # no index below 0
        total += int((residue.asks(rule, head, far, far - distances) * queries).sum())
    return total
