"""The fixed pattern (Child 2019, arXiv:1904.10509, §4.3) as few calls of flash attention.

*Untried*: no device has run the CUDA kernels from here yet.

Shapes: B batch, T tokens, H heads; l the length of a block (the stride), c summary positions of a block.

A query reads its block and the summaries of other blocks. How many these are depends on the block, so a mask
of all summaries would be a staircase, which the kernel does not have. Therefore summaries are copied: about
√(T/l) neighbouring blocks form a *strip*. In one call a block is a sequence, whose keys are the summaries of
the other blocks of its strip, followed by the block itself; aligned bottom right, a causal mask allows all of
the summaries. In a second call a strip is a sequence, whose keys are the summaries of the other strips. For
l = √T the copies are about c/√l keys a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.ops.fused.flash import Packing
from variants.ops.fused.flash_union import Packed, Union
from variants.ops.patterns.summaries import Positions
from variants.ops.patterns.summary_blocks import Blocks

FACTORS = ("local", "long_range", "merged")
KEPT = 64
"""Number of unions whose tables are kept: one for each length, pattern and device."""


def summary_union(q: Tensor, seq_len: int, positions: Positions, factor: str, causal: bool) -> Union:
    """The calls for the heads of `positions`, which become heads 0, 1, … of q, k and v; tables on the device
    of q. `factor` is one of `FACTORS`."""
    numbers = (seq_len, *astuple(positions), FACTORS.index(factor), causal)
    numbers = tuple(int(number) for number in numbers)
    like = q.new_empty(0)  # only its device counts
    tables = torch.ops.longctx_bench.summary_tables(like, numbers)
    return _with_tables(_union(numbers), tables)


@torch.library.custom_op(
    "longctx_bench::summary_tables",
    mutates_args=(),
    schema="(Tensor like, int[] numbers) -> Tensor[]",
)
def summary_tables(like: Tensor, numbers: list[int]) -> list[Tensor]:
    """The indices of a union, on the device of `like`. An operator, so that plans need only their shapes."""
    return _moved(tuple(numbers), like.device)


@summary_tables.register_fake
def _(like: Tensor, numbers: list[int]) -> list[Tensor]:
    return [like.new_empty(table.shape, dtype=table.dtype) for table in _tables(_union(tuple(numbers)))]


@lru_cache(maxsize=KEPT)
def _moved(numbers: tuple[int, ...], device: torch.device) -> list[Tensor]:
    return [table.to(device) for table in _tables(_union(numbers))]


@lru_cache(maxsize=KEPT)
def _union(numbers: tuple[int, ...]) -> Union:
    """The union with tables on the CPU."""
    seq_len, stride, c, first, last, shared, factor, causal = numbers
    positions = Positions(stride=stride, c=c, first=first, last=last, shared=bool(shared))
    with _disable_current_modes():  # real tensors, also within a plan
        blocks = Blocks(seq_len, positions, bool(causal))
        name = FACTORS[factor]
        if name == "local":
            return Union((_blocks_alone(blocks),))
        if name == "merged":
            calls = [_blocks_and_neighbours(blocks), _other_strips(blocks)]
        elif causal:
            calls = [_other_strips(blocks), *_own_summaries(blocks)]
        else:
            calls = [_all_summaries(blocks)]
        return Union(tuple(call for call in calls if sum(call.packing.keys)), blocks.pairs)


def _fields(call: Packed) -> dict[str, tuple[Tensor, ...]]:
    """The tables of a call, by field."""
    found = {}
    for name in ("queries", "keys", "own", "copies", "copy_of"):
        if (value := getattr(call, name)) is not None:
            found[name] = value if isinstance(value, tuple) else (value,)
    return found


def _packed_calls(union: Union) -> list[Packed]:
    return [call for call in union.calls if isinstance(call, Packed)]


def _tables(union: Union) -> list[Tensor]:
    """All tables of a union, in order."""
    tables = [t for call in _packed_calls(union) for some in _fields(call).values() for t in some]
    return [*tables, *(union.copied or ())]


def _with_tables(union: Union, tables: Iterable[Tensor]) -> Union:
    """The union with other tables, in the order of `_tables`."""
    remaining = iter(tables)
    calls = []
    for call in _packed_calls(union):
        taken = {name: tuple(next(remaining) for _ in some) for name, some in _fields(call).items()}
        single = {name: some if name in ("queries", "keys") else some[0] for name, some in taken.items()}
        calls.append(replace(call, **single))  # type: ignore[arg-type]
    return Union(tuple(calls), union.copied and (next(remaining), next(remaining)))


# --- the calls ------------------------------------------------------------------------------------


def _blocks_alone(blocks: Blocks) -> Packed:
    """Each block reads itself."""
    lengths = [blocks.length(block) for block in range(len(blocks.ends))]
    return Packed(packing=Packing.of(lengths), causal=blocks.causal, whole=True)


def _blocks_and_neighbours(blocks: Blocks) -> Packed:
    """Each block reads itself, and the summaries of the other (causal: earlier) blocks of its strip."""
    heads = torch.arange(len(blocks.offsets))
    tokens, own, copies, numbers, lengths = [], [], [], [], []
    row = 0
    for strip in blocks.strips:
        for block in strip:
            later = range(block + 1, block + 1 if blocks.causal else strip.stop)
            ids = torch.cat([blocks.ids(range(strip.start, block)), blocks.ids(later)])
            inside = torch.arange(blocks.begin(block), blocks.ends[block])
            tokens += [blocks.tokens[ids], inside[:, None].expand(-1, len(heads))]
            copies.append(torch.arange(row, row + len(ids)))
            own.append(torch.arange(row + len(ids), row + len(ids) + len(inside)))
            numbers.append(ids[:, None] * len(heads) + heads)
            lengths.append(len(ids) + len(inside))
            row += lengths[-1]
    queries = _blocks_alone(blocks).packing.queries
    return Packed(
        packing=Packing(queries, tuple(lengths)),
        causal=blocks.causal,
        keys=(torch.cat(tokens), heads[None]),
        own=torch.cat(own),
        copies=torch.cat(copies),
        copy_of=torch.cat(numbers),
        whole=True,
    )


def _copies(blocks: Blocks, queries: Sequence[int], ids: Sequence[Tensor], whole: bool = False) -> Packed:
    """Sequences of all tokens, which read copies of summaries."""
    rows, heads = torch.cat([*ids]), torch.arange(len(blocks.offsets))
    return Packed(
        packing=Packing(tuple(queries), tuple(map(len, ids))),
        causal=False,
        keys=(blocks.tokens[rows], heads[None]),
        copy_of=rows[:, None] * len(heads) + heads,
        whole=whole,
    )


def _other_strips(blocks: Blocks) -> Packed:
    """Each strip reads the summaries of the other strips; causal: of earlier ones."""
    queries = [blocks.ends[strip[-1]] - blocks.begin(strip[0]) for strip in blocks.strips]
    count = len(blocks.ends)
    ids = [
        torch.cat(
            [
                blocks.ids(range(strip.start)),
                blocks.ids(range(strip.stop, strip.stop if blocks.causal else count)),
            ]
        )
        for strip in blocks.strips
    ]
    return _copies(blocks, queries, ids)


def _all_summaries(blocks: Blocks) -> Packed:
    """Each token reads all summaries."""
    return _copies(blocks, [blocks.seq_len], [blocks.ids(range(len(blocks.ends)))], whole=True)


def _own_summaries(blocks: Blocks) -> list[Packed]:
    """Causal, without the other tokens of the block: the summaries of earlier blocks of the strip, and those
    of the own block up to the token itself.

    How many queries of a block come after its summaries depends on the head, so each head of a block is a
    sequence of its own, of one head. The first call has all complete sets of summaries, the second call the
    summaries among themselves.
    """
    heads, c = range(len(blocks.offsets)), blocks.positions.c
    queries, keys, among, triangles = [], [], [], []
    for head in heads:
        for strip in blocks.strips:
            for block in strip:
                before = blocks.ids(range(strip.start, block)) * len(heads) + head
                own = blocks.own_numbers(block, head)
                up_to = min(int(blocks.offsets[head]) + c, blocks.length(block))
                queries += [up_to, blocks.length(block) - up_to]
                keys += [before, torch.cat([before, own])]
                among.append(own)
                triangles.append(len(own))
    some = [n for n, length in enumerate(queries) if length]  # without sequences of no queries
    packing = Packing(tuple(queries[n] for n in some), tuple(len(keys[n]) for n in some))
    by_head = torch.arange(len(heads)).repeat_interleave(blocks.seq_len)
    rows = torch.arange(blocks.seq_len).repeat(len(heads)), by_head
    calls = [_one_head(blocks, packing, rows, torch.cat([keys[n] for n in some]), causal=False)]
    if any(triangles):
        numbers = torch.cat(among)
        rows = blocks.pairs[0][numbers], blocks.pairs[1][numbers]
        calls.append(_one_head(blocks, Packing.of([n for n in triangles if n]), rows, numbers, causal=True))
    return calls


def _one_head(
    blocks: Blocks, packing: Packing, rows: tuple[Tensor, Tensor], numbers: Tensor, causal: bool
) -> Packed:
    """Sequences of one head. `rows`: token and head of the queries; `numbers`: of the keys among `pairs`."""
    tokens, of_head = blocks.pairs
    return Packed(
        packing=packing,
        causal=causal,
        queries=(rows[0][:, None], rows[1][:, None]),
        keys=(tokens[numbers][:, None], of_head[numbers][:, None]),
        copy_of=numbers[:, None],
    )
