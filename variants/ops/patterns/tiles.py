"""Division of a mask into rectangles that cover its allowed pairs, without computing the mask.

A region is divided into tiles, in the order of its tokens. Empty tiles are left out, and full tiles need no
mask. Runs of neighbouring tiles become `Rectangle`s; rectangles that repeat along the sequence are groups of
one. The result consists of plain numbers and is cached by region, length and type of device.

The time is linear in the length, and small: a window of 512 tokens takes 0.01, 0.03 and 0.08 CPU seconds at
65,536, 262,144 and 1,048,576 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.ops.patterns.masks import Rule
from variants.ops.patterns.pair_counts import count_sequence
from variants.ops.patterns.rectangles import Rectangle
from variants.ops.patterns.regions import Region, Residue, head_groups, local_period, residues

TILES = (8, 16, 32, 64, 128, 256)
"""Sides of tiles, in tokens; the cheapest side is used."""
MORE_THAN_FEWEST, MORE_THAN_ALLOWED = 1.25, 1.4
"""A cover may compute at most this multiple of the fewest pairs of any cover, or of the allowed pairs."""
SMALL, PLAIN_TILE = 512, 64
"""For a rule without a period and a sequence longer than SMALL tokens, only tiles of PLAIN_TILE are tried."""
MERGE_COST = 40
"""Cost for a query of merging one more partial softmax, in pairs of this query. Measured on a CPU, with heads
of 64 channels."""
GROUP_COST = 512
"""Cost of one more group, in pairs of a head."""
CALL_COST = {"cpu": 2**13}
"""Cost of one more rectangle, in pairs of a head. On an accelerator few and large rectangles are faster."""
CALL_COST_ELSEWHERE = 2**20
CLOSE = 1.1
"""Of all covers that cost up to this multiple of the cheapest, the one with the fewest rectangles is used,
because a plan processes each rectangle."""
STRIP = 2**22
"""Pairs for which a rule is evaluated at a time."""
CACHED = 128
"""Number of cached results of `rectangles`."""


@lru_cache(maxsize=CACHED)
def rectangles(region: Region, seq_len: int, device_type: str) -> tuple[Rectangle, ...]:
    """Rectangles that contain each allowed pair of a region exactly once, for one type of device."""
    call_cost = CALL_COST.get(device_type, CALL_COST_ELSEWHERE)
    with _disable_current_modes():  # real tensors, and not counted, also within a plan
        cover: list[Rectangle] = []
        for heads in head_groups(region.rule, *region.heads):
            for residue in residues(region, seq_len):
                covers = [*_covers(region.rule, heads, residue)]
                if len(covers) == 1:
                    cover += covers[0]
                    continue
                sequences = residue.width * (heads[1] - heads[0])
                allowed = sequences * count_sequence(region.rule, heads[0], residue)
                cover += _cheapest(covers, allowed, call_cost)
    return tuple(cover)


# --- tiles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Neighbouring tiles of a row of tiles, which are all full or all partial.

    The run extends from the tile on the diagonal plus `first` to the tile on the diagonal plus `last`. It
    occurs in rows `row`, row + `apart`, row + 2 · `apart`, …
    """

    row: int
    apart: int
    first: int
    last: int
    full: bool

    def split(self) -> list[_Run]:
        """Separate the tile on the diagonal, which for a causal rule is a triangle that kernels support."""
        if self.full or not self.first <= 0 <= self.last or self.first == self.last:
            return [self]
        edges = [(self.first, -1), (0, 0), (1, self.last)]
        return [replace(self, first=first, last=last) for first, last in edges if first <= last]


def _covers(rule: Rule, heads: tuple[int, int], residue: Residue) -> Iterator[list[Rectangle]]:
    """Yield one or more alternative lists of rectangles that cover the sequences of a residue."""
    if (single := _single_rectangle(rule, heads, residue)) is not None:
        yield single
        return
    period = local_period(rule, residue.step)
    sides: tuple[int, ...] = TILES
    if period is None:  # the rule is evaluated for every pair
        sides = TILES if residue.length <= SMALL else (PLAIN_TILE,)
    elif period in range(TILES[0], 2 * TILES[-1]):
        sides = (*TILES, period)
    if rule.reach is not None and (width := rule.reach // residue.step + 1) < TILES[0]:
        sides = (*sides, width)  # for a window that is narrower than all tiles
    for side in sorted({min(side, residue.length) for side in sides}):
        sequences = [residue] if side == residue.length else list(residue.sequences())
        runs = [(sequence, [*_runs(rule, heads[0], sequence, side)]) for sequence in sequences]
        split = [(sequence, [part for run in row for part in run.split()]) for sequence, row in runs]
        for alternative in [runs] if runs == split else [runs, split]:
            yield [
                rectangle
                for sequence, row in alternative
                for run in row
                for rectangle in _rectangles_of(rule, heads, sequence, side, run)
            ]


def _cheapest(covers: list[list[Rectangle]], allowed: int, call_cost: int) -> list[Rectangle]:
    """The cheapest of the covers that compute few pairs."""
    pairs = [sum(rectangle.pairs for rectangle in cover) for cover in covers]
    most = max(MORE_THAN_FEWEST * min(pairs), MORE_THAN_ALLOWED * allowed)
    few = [cover for cover, computed in zip(covers, pairs, strict=True) if computed <= most]
    costs = [_cost(cover, call_cost) for cover in few]
    close = [(len(c), cost, c) for c, cost in zip(few, costs, strict=True) if cost <= CLOSE * min(costs)]
    return min(close, key=lambda candidate: candidate[:2])[2]


def _cost(cover: Sequence[Rectangle], call_cost: int) -> int:
    """The cost of a cover in pairs: computed pairs, merging, groups and calls."""
    return sum(
        r.pairs
        + (r.heads[1] - r.heads[0]) * r.queries.groups * (MERGE_COST * r.queries.length + GROUP_COST)
        + call_cost
        for r in cover
    )


def _single_rectangle(rule: Rule, heads: tuple[int, int], residue: Residue) -> list[Rectangle] | None:
    """A cover for a rule that allows all distances, or all distances from a minimum on; None for other rules.

    It consists of one rectangle, or of none if no pair is allowed.
    """
    if rule.period != 1:
        return None
    length = residue.length
    distances = torch.arange(1 - length, length, device="cpu")
    zero = torch.full_like(distances, length)
    allowed = residue.allows(rule, heads[0], zero + distances, zero)
    count = int(allowed.sum())
    if not count:
        return []
    least = length - count
    if not bool(allowed[-count:].all()) or (least < 0 and count < len(allowed)):
        return None
    start, every = (0, True) if least < 0 else (least, False)
    if length - start == 1:
        every = True
    cuts = residue.cut(start, length - start), residue.cut(0, length - start)
    return [Rectangle(heads=heads, queries=cuts[0], keys=cuts[1], causal=not every, masked=False)]


def _runs(rule: Rule, head: int, residue: Residue, side: int) -> Iterator[_Run]:
    """Yield the runs of tiles that contain allowed pairs; rows that repeat are one run."""
    rows, period = -(-residue.length // side), local_period(rule, residue.step)
    apart = rows if period is None else min(rows, math.lcm(period, side) // side)
    repeats = period is not None and apart < rows
    reach = rows - 1
    if rule.reach is not None:
        reach = min(reach, -(-(rule.reach // residue.step) // side))
    for row in range(apart):
        # a repeated row may read at all distances that any of its repetitions can read
        steps = (-reach, reach) if repeats else (max(-reach, -row), min(reach, rows - 1 - row))
        some, full = _tiles(rule, head, residue, side, row + (rows * apart if repeats else 0), steps, repeats)
        kinds = (some.int() + full.int()).tolist()
        start = 0
        for at in range(1, len(kinds) + 1):
            if at == len(kinds) or kinds[at] != kinds[start]:
                if kinds[start]:
                    first, last = steps[0] + start, steps[0] + at - 1
                    yield _Run(row=row, apart=apart, first=first, last=last, full=kinds[start] == 2)
                start = at


def _tiles(
    rule: Rule,
    head: int,
    residue: Residue,
    side: int,
    row: int,
    steps: tuple[int, int],
    endless: bool,
) -> tuple[Tensor, Tensor]:
    """For the tiles at offsets `steps` from the diagonal of a row: whether some pair is allowed, and whether
    all pairs are. With `endless`, the ends of the sequence are ignored."""
    first, last = steps
    begin = (row + first) * side
    if endless and rule.period == 1:
        # a tile contains the distances that differ by less than `side` from the distance between the tiles
        distance = torch.arange((1 - last) * side - 2 * side + 1, (1 - first) * side, device="cpu")
        zero = torch.full_like(distance, row * side)
        counts = residue.allows(rule, head, zero + distance, zero).cumsum(0)
        ends = torch.arange(last - first, -1, -1, device="cpu") * side + 2 * side - 2
        before = ends - (2 * side - 1)
        held = counts[ends] - torch.where(before < 0, 0, counts[before.clamp(min=0)])
        return held > 0, held == 2 * side - 1
    stop = (row + last + 1) * side
    i = torch.arange(row * side, (row + 1) * side, device="cpu")
    if not endless:
        i, stop = i[i < residue.length], min(stop, residue.length)
    some, full = [], []
    for j in torch.arange(begin, stop, device="cpu").split(side * max(1, STRIP // side**2)):
        allowed = residue.allows(rule, head, i[:, None], j).expand(len(i), len(j))
        padding = (0, -len(j) % side)  # the last tile may be short
        some.append(F.pad(allowed, padding, value=False).unflatten(1, (-1, side)).any(2).any(0))
        full.append(F.pad(allowed, padding, value=True).unflatten(1, (-1, side)).all(2).all(0))
    return torch.cat(some), torch.cat(full)


def _rectangles_of(
    rule: Rule, heads: tuple[int, int], residue: Residue, side: int, run: _Run
) -> Iterator[Rectangle]:
    """Yield the rectangles of a run: groups for rows that contain the complete run, and single rectangles for
    rows at the ends of the sequence.

    The groups of a rectangle have no common key, so their gradients can be added in one operation.
    """
    length = residue.length
    rows, full_rows = -(-length // side), length // side
    first = max(run.row, run.row + -(-(-run.first - run.row) // run.apart) * run.apart)
    stop = min(full_rows, full_rows - run.last)  # lower rows contain all tiles of the run, none shortened
    inner = range(first, stop, run.apart)
    apart = run.apart * -(-(run.last - run.first + 1) // run.apart)
    for start in inner[: apart // run.apart]:
        yield from _trimmed(rule, heads, residue, side, run, start, len(range(start, stop, apart)), apart)
    begin, end = max(0, -run.last), min(rows, rows - run.first)  # rows that contain some tile of the run
    after = first + len(inner) * run.apart if inner else first
    for row in (*range(run.row, first, run.apart), *range(after, rows, run.apart)):
        if begin <= row < end:
            yield from _trimmed(rule, heads, residue, side, run, row, 1, 0)


def _trimmed(
    rule: Rule,
    heads: tuple[int, int],
    residue: Residue,
    side: int,
    run: _Run,
    row: int,
    groups: int,
    apart: int,
) -> Iterator[Rectangle]:
    """Yield the rectangle of a run from one row on, reduced to the queries and keys that have a pair."""
    length = residue.length
    start, stop = row * side, min((row + 1) * side, length)
    low, high = max(0, row + run.first) * side, min((row + run.last + 1) * side, length)
    causal = masked = False
    if not run.full:
        i, j = torch.arange(start, stop, device="cpu"), torch.arange(low, high, device="cpu")
        allowed = residue.allows(rule, heads[0], i[:, None], j).expand(len(i), len(j))
        queries, keys = allowed.any(1).nonzero()[:, 0].tolist(), allowed.any(0).nonzero()[:, 0].tolist()
        if not queries:
            return
        allowed = allowed[queries[0] : queries[-1] + 1, keys[0] : keys[-1] + 1]
        start, stop = start + queries[0], start + queries[-1] + 1
        low, high = low + keys[0], low + keys[-1] + 1
        masked = not bool(allowed.all())
        causal = (
            masked
            and stop - start == high - low
            and torch.equal(allowed, allowed.new_ones(()).expand_as(allowed).tril())
        )
        masked = masked and not causal
    queries_cut = residue.cut(start, stop - start, groups, apart * side)
    keys_cut = residue.cut(low, high - low, groups, apart * side)
    yield Rectangle(heads=heads, queries=queries_cut, keys=keys_cut, causal=causal, masked=masked)
