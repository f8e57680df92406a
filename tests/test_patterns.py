"""Patterns are what their names say, pair by pair, and compose as logic does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from variants.ops.patterns import masks
from variants.ops.patterns.pair_counts import window_pairs

lengths = st.integers(1, 24)


def drawn(seq_len: int, may_read: Callable[[int, int], bool]) -> Tensor:
    """(T, T) bool, pair by pair."""
    return torch.tensor([[may_read(i, j) for j in range(seq_len)] for i in range(seq_len)])


def assert_is(rule: masks.Rule, seq_len: int, may_read: Callable[[int, int], bool]) -> None:
    found = masks.matrix(rule, seq_len)
    assert found.dtype == torch.bool
    assert torch.equal(found, drawn(seq_len, may_read))


def rules() -> st.SearchStrategy[masks.Rule]:
    """Any of the basic rules."""
    return st.one_of(
        st.sampled_from([masks.all_keys, masks.causal]),
        st.builds(masks.Window, st.integers(1, 8), st.integers(1, 3)),
        st.builds(masks.SameBlock, st.integers(1, 8)),
        st.builds(masks.SameResidue, st.integers(1, 8)),
    )


@given(seq_len=lengths)
def test_anything_and_causal(seq_len: int) -> None:
    assert_is(masks.all_keys, seq_len, lambda i, j: True)
    assert_is(masks.causal, seq_len, lambda i, j: j <= i)


@given(seq_len=lengths, size=st.integers(1, 30), dilation=st.integers(1, 6))
def test_window_lists_its_neighbours(seq_len: int, size: int, dilation: int) -> None:
    offsets = {n * dilation for n in range(-(size - 1), size)}
    assert_is(masks.Window(size, dilation), seq_len, lambda i, j: j - i in offsets)


@given(seq_len=lengths, size=st.integers(1, 30))
def test_same_group(seq_len: int, size: int) -> None:
    assert_is(masks.SameBlock(size), seq_len, lambda i, j: i // size == j // size)
    assert_is(masks.SameResidue(size), seq_len, lambda i, j: (i - j) % size == 0)


@given(seq_len=lengths, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), at=st.integers(0, 4))
def test_heads_follow_their_own_rules(seq_len: int, sizes: list[int], at: int) -> None:
    windows = tuple(masks.Window(size) for size in sizes)
    found = masks.by_head(masks.ByHead(windows), seq_len, 5).expand(5, -1, -1)
    split = masks.by_head(masks.HeadSplit(at, windows[0], windows[-1]), seq_len, 5)
    for head in range(5):
        assert torch.equal(found[head], masks.matrix(windows[head % len(windows)], seq_len))
        assert torch.equal(split[head], masks.matrix(windows[0 if head < at else -1], seq_len))
    assert masks.depends_on_head(masks.HeadSplit(at, windows[0], windows[-1]))
    assert not masks.depends_on_head(windows[0])


@given(seq_len=lengths, some=st.lists(rules(), min_size=1, max_size=4))
def test_composition_is_logic(seq_len: int, some: list[masks.Rule]) -> None:
    drawings = torch.stack([masks.matrix(rule, seq_len) for rule in some])
    every, any_of = some[0], some[0]
    for rule in some[1:]:
        every, any_of = every & rule, any_of | rule
    assert torch.equal(masks.matrix(every, seq_len), drawings.all(dim=0))
    assert torch.equal(masks.matrix(any_of, seq_len), drawings.any(dim=0))
    first, last = some[0], some[-1]
    assert torch.equal(masks.matrix(~first, seq_len), ~drawings[0])
    assert torch.equal(masks.matrix(first - last, seq_len), drawings[0] & ~drawings[-1])


@given(seq_len=lengths, rule=rules(), data=st.data())
def test_a_rule_is_pure_in_its_indices(seq_len: int, rule: masks.Rule, data: st.DataObject) -> None:
    """A part of a pattern is the rule of those indices: it may be drawn in tiles of any shape."""
    some = st.lists(st.integers(0, seq_len - 1), min_size=1, max_size=6).map(torch.tensor)
    i, j = data.draw(some), data.draw(some)
    tile = rule(torch.tensor(0), i[:, None], j[None, :])
    assert torch.equal(tile, masks.matrix(rule, seq_len)[i][:, j])


@given(seq_len=st.integers(1, 60), size=st.integers(1, 80), is_causal=st.booleans())
@example(seq_len=1, size=1, is_causal=False)
@example(seq_len=9, size=9, is_causal=True)
@example(seq_len=9, size=10, is_causal=False)
def test_window_pairs_counts_the_matrix(seq_len: int, size: int, is_causal: bool) -> None:
    rule = masks.Window(size)
    drawing = masks.matrix(rule & masks.causal if is_causal else rule, seq_len)
    assert window_pairs(seq_len, size, is_causal=is_causal) == int(drawing.sum())


@pytest.mark.parametrize("is_causal", [True, False])
def test_window_pairs_of_nothing(is_causal: bool) -> None:
    assert window_pairs(0, 5, is_causal=is_causal) == 0


@given(seq_len=st.integers(1, 12), layers=st.lists(rules(), min_size=1, max_size=4))
def test_composed_follows_paths(seq_len: int, layers: list[masks.Rule]) -> None:
    """An output depends on what a path of reads, or of staying, leads to, from the highest layer down."""
    drawings = [masks.matrix(rule, seq_len) for rule in layers]
    expected = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    for i in range(seq_len):
        held = {i}
        for drawing in reversed(drawings):
            held |= {j for k in held for j in range(seq_len) if drawing[k, j]}
        expected[i, list(held)] = True
    assert torch.equal(masks.composed(drawings), expected)
