"""Numbers of allowed pairs and of keys to keep, counted from a rule without computing the mask.

A rule with a period is evaluated once for each distance and each query of one period, any other rule once for
each pair.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.ops.patterns.masks import Rule
from variants.ops.patterns.regions import Region, Residue, head_groups, local_period, residues

STRIP = 2**22
"""Pairs for which a rule is evaluated at a time."""
HORIZON = 1024
"""Minimum number of later queries that are examined for a rule of unlimited reach."""
CACHED = 128
"""Number of cached counts."""


@lru_cache(maxsize=CACHED)
def count_pairs(region: Region, seq_len: int) -> int:
    """The number of allowed pairs of a region, summed over its heads."""
    with _disable_current_modes():
        return sum(
            residue.width * (heads[1] - heads[0]) * count_sequence(region.rule, heads[0], residue)
            for heads in head_groups(region.rule, *region.heads)
            for residue in residues(region, seq_len)
        )


def carried_keys(rule: Rule, seq_len: int, heads: int) -> int:
    """The number of pairs (head, key) among the first `seq_len` tokens that a later query may read.

    Later queries are those within the reach of the rule. If it is unlimited, `seq_len` queries are examined,
    and at least `HORIZON`.
    """
    reach = rule.reach
    first = 0 if reach is None else max(0, seq_len - reach)
    later = max(seq_len, HORIZON) if reach is None else reach
    with _disable_current_modes():
        head = torch.arange(heads, device="cpu")[:, None, None]
        if rule.period == 1:  # a key is read if the distance of any later query is allowed
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
    """The number of allowed pairs of a sequence: by distance if the rule has a period, else pair by pair."""
    length, period = residue.length, local_period(rule, residue.step)
    index = torch.arange(length, device="cpu")
    if period is None or period >= length:
        strips = index.split(_rows(length))
        return sum(int(residue.allows(rule, head, strip[:, None], index).sum()) for strip in strips)
    reach = length - 1 if rule.reach is None else min(length - 1, rule.reach // residue.step)
    distances = torch.arange(-reach, reach + 1, device="cpu")
    total = 0
    for strip in torch.arange(period, device="cpu").split(_rows(len(distances))):
        query = strip[:, None]
        # number of queries i = query + n·period whose key at this distance lies in the sequence
        low, high = distances.clamp(min=0), (length + distances).clamp(max=length)
        queries = (high - 1 - query).div(period, rounding_mode="floor") - (low - 1 - query).div(
            period, rounding_mode="floor"
        )
        shifted = query + period * length  # so that no index is below 0
        total += int((residue.allows(rule, head, shifted, shifted - distances) * queries).sum())
    return total


def window_pairs(seq_len: int, size: int, *, is_causal: bool) -> int:
    """The number of (query, key) pairs that an undilated window of `size` allows, in closed form."""
    reach = min(size, seq_len)
    one_sided = reach * (reach + 1) // 2 + (seq_len - reach) * reach
    return one_sided if is_causal else 2 * one_sided - seq_len
