"""Which tiles of a mask hold allowed pairs, found from its rule without drawing the mask.

In the order of its tokens a region is cut into tiles: empty ones are left out, full ones need no mask, and
runs of neighbouring tiles become `Rectangle`s, those that repeat along the sequence as one. This is done once
for a region, a length and a type of device, and gives plain numbers.
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

from variants.ops.masks import Rule
from variants.ops.pair_counts import count_sequence
from variants.ops.rectangles import Rectangle
from variants.ops.regions import Region, Residue, alike_heads, local_period, residues

TILES = (8, 16, 32, 64, 128, 256)
"""Tokens a side of a tile: the side is taken that costs least."""
MORE_THAN_FEWEST, MORE_THAN_ALLOWED = 1.25, 1.4
"""Tiles may compute this multiple of the fewest pairs of any tiles, or that multiple of the allowed pairs."""
SMALL, PLAIN_TILE = 512, 64
"""A sequence longer than the first, and a rule without a period: tiles of this side alone are tried."""
MERGE_COST = 40
"""What merging one more partial softmax costs a query, in pairs of that query: measured on a CPU, with 64
channels a head."""
GROUP_COST = 512
"""What one more group costs, in pairs of a head."""
CALL_COST = {"cpu": 2**13}
"""What one more rectangle costs, in pairs of a head. An accelerator is given few and large ones."""
CALL_COST_ELSEWHERE = 2**20
CLOSE = 1.1
"""Of covers that cost up to this multiple of the best one, that with the fewest rectangles is taken: a plan
goes through each."""
STRIP = 2**22
"""Pairs of a rule that are evaluated at a time."""
CACHED = 128
"""Regions whose rectangles are kept."""


@lru_cache(maxsize=CACHED)
def rectangles(region: Region, seq_len: int, device_type: str) -> tuple[Rectangle, ...]:
    """Rectangles in which each allowed pair of a region lies once, for work on one type of device."""
    call_cost = CALL_COST.get(device_type, CALL_COST_ELSEWHERE)
    with _disable_current_modes():  # numbers, whatever a planner or a counter makes of tensors
        found: list[Rectangle] = []
        for heads in alike_heads(region.rule, *region.heads):
            for residue in residues(region, seq_len):
                covers = [*_covers(region.rule, heads, residue)]
                if len(covers) == 1:
                    found += covers[0]
                    continue
                sequences = residue.width * (heads[1] - heads[0])
                allowed = sequences * count_sequence(region.rule, heads[0], residue)
                found += _cheapest(covers, allowed, call_cost)
    return tuple(found)


# --- tiles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Tiles of a row, from the row's own tile plus `first` to it plus `last`, all full or all cut.

    It stands in rows `row`, row + `apart`, row + 2 · `apart`, …
    """

    row: int
    apart: int
    first: int
    last: int
    full: bool

    def split(self) -> list[_Run]:
        """A row's own tile apart, of which a causal rule leaves the triangle that the kernels know."""
        if self.full or not self.first <= 0 <= self.last or self.first == self.last:
            return [self]
        edges = [(self.first, -1), (0, 0), (1, self.last)]
        return [replace(self, first=first, last=last) for first, last in edges if first <= last]


def _covers(rule: Rule, heads: tuple[int, int], residue: Residue) -> Iterator[list[Rectangle]]:
    """Several ways of covering a region's sequences with rectangles; at least one."""
    if (whole := _whole(rule, heads, residue)) is not None:
        yield whole
        return
    period = local_period(rule, residue.step)
    sides: tuple[int, ...] = TILES
    if period is None:  # every pair is asked for
        sides = TILES if residue.length <= SMALL else (PLAIN_TILE,)
    elif period in range(TILES[0], 2 * TILES[-1]):
        sides = (*TILES, period)
    if rule.reach is not None and (near := rule.reach // residue.step + 1) < TILES[0]:
        sides = (*sides, near)  # a window narrower than any tile
    for side in sorted({min(side, residue.length) for side in sides}):
        alone = [residue] if side == residue.length else list(residue.each())
        runs = [(sequence, [*_runs(rule, heads[0], sequence, side)]) for sequence in alone]
        apart = [(sequence, [part for run in some for part in run.split()]) for sequence, some in runs]
        for ways in [runs] if runs == apart else [runs, apart]:
            yield [
                rectangle
                for sequence, some in ways
                for run in some
                for rectangle in _placed(rule, heads, sequence, side, run)
            ]


def _cheapest(covers: list[list[Rectangle]], allowed: int, call_cost: int) -> list[Rectangle]:
    """The cover that costs least, of those that compute few pairs."""
    pairs = [sum(rectangle.pairs for rectangle in cover) for cover in covers]
    most = max(MORE_THAN_FEWEST * min(pairs), MORE_THAN_ALLOWED * allowed)
    few = [cover for cover, computed in zip(covers, pairs, strict=True) if computed <= most]
    costs = [_cost(cover, call_cost) for cover in few]
    close = [(len(c), cost, c) for c, cost in zip(few, costs, strict=True) if cost <= CLOSE * min(costs)]
    return min(close, key=lambda found: found[:2])[2]


def _cost(cover: Sequence[Rectangle], call_cost: int) -> int:
    """Pairs computed, and what else a rectangle costs, in pairs."""
    return sum(
        r.pairs
        + (r.heads[1] - r.heads[0]) * r.queries.groups * (MERGE_COST * r.queries.length + GROUP_COST)
        + call_cost
        for r in cover
    )


def _whole(rule: Rule, heads: tuple[int, int], residue: Residue) -> list[Rectangle] | None:
    """One rectangle for a rule that allows every distance, or every one of `least` or more; no pair: none."""
    if rule.period != 1:
        return None
    length = residue.length
    distances = torch.arange(1 - length, length, device="cpu")
    zero = torch.full_like(distances, length)
    allowed = residue.asks(rule, heads[0], zero + distances, zero)
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
    """The runs of tiles that hold pairs, rows that repeat as one."""
    rows, period = -(-residue.length // side), local_period(rule, residue.step)
    apart = rows if period is None else min(rows, math.lcm(period, side) // side)
    repeats = period is not None and apart < rows
    reach = rows - 1
    if rule.reach is not None:
        reach = min(reach, -(-(rule.reach // residue.step) // side))
    for row in range(apart):
        # what a repeated row reads lies at any distance that some row can read
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
    """For the tiles `steps` from a row's own: whether any pair is allowed, and whether all are."""
    first, last = steps
    begin = (row + first) * side
    if endless and rule.period == 1:
        # a tile holds the distances less than `side` from the one between the tiles
        distance = torch.arange((1 - last) * side - 2 * side + 1, (1 - first) * side, device="cpu")
        zero = torch.full_like(distance, row * side)
        counts = residue.asks(rule, head, zero + distance, zero).cumsum(0)
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
        allowed = residue.asks(rule, head, i[:, None], j).expand(len(i), len(j))
        padding = (0, -len(j) % side)  # the last tile may be short
        some.append(F.pad(allowed, padding, value=False).unflatten(1, (-1, side)).any(2).any(0))
        full.append(F.pad(allowed, padding, value=True).unflatten(1, (-1, side)).all(2).all(0))
    return torch.cat(some), torch.cat(full)


def _placed(
    rule: Rule, heads: tuple[int, int], residue: Residue, side: int, run: _Run
) -> Iterator[Rectangle]:
    """A run's rectangles: rows that have the whole run in groups, those at the ends of the sequence alone.

    Groups have no key in common, so that their gradients can be added at once.
    """
    length = residue.length
    rows, whole = -(-length // side), length // side
    first = max(run.row, run.row + -(-(-run.first - run.row) // run.apart) * run.apart)
    stop = min(whole, whole - run.last)  # rows below it have all their tiles, none cut short
    inner = range(first, stop, run.apart)
    apart = run.apart * -(-(run.last - run.first + 1) // run.apart)
    for start in inner[: apart // run.apart]:
        yield from _trimmed(rule, heads, residue, side, run, start, len(range(start, stop, apart)), apart)
    begin, end = max(0, -run.last), min(rows, rows - run.first)  # rows that have any tile of the run
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
    """A run from one row on, without the queries and keys at its edges that have no pair."""
    length = residue.length
    start, stop = row * side, min((row + 1) * side, length)
    low, high = max(0, row + run.first) * side, min((row + run.last + 1) * side, length)
    causal = masked = False
    if not run.full:
        i, j = torch.arange(start, stop, device="cpu"), torch.arange(low, high, device="cpu")
        allowed = residue.asks(rule, heads[0], i[:, None], j).expand(len(i), len(j))
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
