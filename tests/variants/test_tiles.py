"""Tiles found from a rule hold each allowed pair once, and pairs are counted as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, difference, numbers, softmax_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from variants.ops.patterns import masks, pair_counts
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.masks import Rule
from variants.ops.patterns.pair_counts import carried_keys, count_pairs
from variants.ops.patterns.rectangles import Rectangle, to_parts
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import Part
from variants.ops.patterns.tiles import rectangles

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scattered(Rule):
    """Pairs without an order, other ones in each head; no period."""

    seed: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """A hash of the three indices."""
        return (i * i * 7 + j * (self.seed + 3) + head * 5 + i * j) % 11 < 4


@dataclass(frozen=True)
class First(Rule):
    """Global tokens: the first n read all and are read by all; no period."""

    n: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Either index."""
        return (i < self.n) | (j < self.n)


def leaves() -> st.SearchStrategy[Rule]:
    return st.one_of(
        st.sampled_from([masks.all_keys, masks.causal]),
        st.builds(masks.Window, st.integers(0, 90), st.integers(1, 5)),
        st.builds(masks.SameBlock, st.integers(1, 70)),
        st.builds(masks.SameResidue, st.integers(1, 40)),
        st.builds(Scattered, st.integers(0, 9)),
        st.builds(First, st.integers(0, 20)),
        st.builds(lambda *rules: masks.ByHead(rules), *[st.builds(masks.Window, st.integers(1, 60))] * 2),
    )


def combined(rules: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    return st.one_of(
        st.builds(lambda a, b: a & b, rules, rules),
        st.builds(lambda a, b: a | b, rules, rules),
        st.builds(lambda a: ~a, rules),
        st.builds(lambda a: a & masks.causal, rules),
    )


rules = st.recursive(leaves(), combined, max_leaves=4)


def parts(region: Region, seq_len: int) -> list[Part]:
    return to_parts(region, rectangles(region, seq_len, "cpu"), CPU)


def covered(region: Region, seq_len: int, heads: int) -> Tensor:
    """(H, T, T) int: in how many rectangles each pair lies."""
    counts = torch.zeros(heads, seq_len, seq_len, dtype=torch.int)
    token = torch.arange(seq_len).view(1, 1, -1, 1).repeat(1, heads, 1, 1)
    for part in parts(region, seq_len):
        of = token[:, slice(*part.heads)]
        q, k = part.queries.gather(of)[..., 0], part.keys.gather(of)[..., 0]  # (G, H, queries), (G, H, keys)
        assert len(k[:, 0].unique()) == k[:, 0].numel(), "groups share keys, whose gradients would be lost"
        allowed = torch.ones(q.shape[-1], k.shape[-1], dtype=torch.bool)
        allowed = allowed.tril() if part.causal else allowed
        allowed = allowed if part.mask is None else allowed & part.mask
        head = torch.arange(*part.heads)[None, :, None, None].expand(*q.shape, k.shape[-1])
        where = (head, q[..., :, None].expand_as(head), k[..., None, :].expand_as(head))
        counts.index_put_(where, allowed.expand_as(head).int(), accumulate=True)
    return counts


def drawn(region: Region, seq_len: int, heads: int) -> Tensor:
    return masks.by_head(region.rule, seq_len, heads).expand(heads, seq_len, seq_len)


def region_of(rule: Rule, step: int, heads: int) -> Region:
    """A region promises that tokens of different residues never meet."""
    return Region(rule=rule & masks.SameResidue(step) if step > 1 else rule, step=step, heads=(0, heads))


@settings(deadline=None, max_examples=150)
@given(
    rule=rules, seq_len=st.integers(1, 300), step=st.sampled_from([1, 1, 2, 7, 64]), heads=st.integers(1, 3)
)
@example(rule=masks.causal, seq_len=1, step=1, heads=1)
@example(rule=masks.Window(16) & masks.causal, seq_len=256, step=1, heads=2)
@example(rule=masks.Window(100), seq_len=257, step=1, heads=2)
@example(rule=masks.SameBlock(48), seq_len=200, step=1, heads=1)
@example(rule=masks.causal & ~masks.Window(9), seq_len=100, step=8, heads=1)
@example(rule=masks.Window(0), seq_len=50, step=1, heads=1)
@example(rule=First(3) | masks.Window(30), seq_len=150, step=1, heads=2)
def test_each_allowed_pair_lies_in_one_rectangle(rule: Rule, seq_len: int, step: int, heads: int) -> None:
    region = region_of(rule, step, heads)
    allowed = drawn(region, seq_len, heads)
    assert torch.equal(covered(region, seq_len, heads), allowed.int())
    assert count_pairs(region, seq_len) == int(allowed.sum())


@settings(deadline=None, max_examples=60)
@given(rule=rules, seq_len=st.integers(1, 150), step=st.sampled_from([1, 3]), heads=st.integers(1, 3))
def test_attention_over_the_tiles_is_the_masked_softmax(
    rule: Rule, seq_len: int, step: int, heads: int
) -> None:
    """In outputs and gradients, by both kernels; a query without a key gives 0."""
    region = region_of(rule, step, heads)
    q, k, v = (numbers(2, seq_len, heads, 8, seed=seed) for seed in range(3))
    allowed = drawn(region, seq_len, heads)
    some = allowed.any(-1).T[None, :, :, None]  # (1, T, H, 1)

    def oracle() -> Tensor:
        return softmax_attention(q, k, v, allowed | ~allowed.any(-1, keepdim=True)) * some

    for impl in ("fused", "plain"):

        def tiled(impl: str = impl) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return union_attention(*heads_first, parts(region, seq_len), impl).transpose(1, 2)

        assert_same(tiled, oracle, [q, k, v])


@settings(deadline=None, max_examples=60)
@given(rule=rules, seq_len=st.integers(1, 60), heads=st.integers(1, 3))
def test_carried_keys_are_those_that_a_later_query_reads(rule: Rule, seq_len: int, heads: int) -> None:
    rule = rule & masks.causal
    later = pair_counts.HORIZON
    allowed = masks.by_head(rule, seq_len + later, heads).expand(heads, -1, -1)
    assert carried_keys(rule, seq_len, heads) == int(allowed[:, seq_len:, :seq_len].any(1).sum())


@settings(deadline=None, max_examples=100)
@given(rule=rules, shift=st.integers(-5, 5), data=st.data())
def test_a_rule_keeps_its_period_and_its_reach(rule: Rule, shift: int, data: st.DataObject) -> None:
    index = torch.arange(-60, 120)
    i, j, head = index[:, None], index[None, :], torch.arange(2)[:, None, None]
    allowed = rule(head, i, j)
    if rule.period is not None:
        assert torch.equal(allowed, rule(head, i + shift * rule.period, j + shift * rule.period))
    if rule.reach is not None:
        assert not bool((allowed & ((i - j).abs() > rule.reach)).any())


def test_padding_is_never_read() -> None:
    """Numbers of tokens that no rectangle holds may be anything: here they are not numbers."""
    region = Region(rule=masks.Window(20) & masks.causal, heads=(0, 2))
    q, k, v = (numbers(1, 2, 150, 8, seed=seed).detach() for seed in range(3))
    poisoned = [torch.full((1, 2, 170, 8), torch.nan, dtype=x.dtype) for x in (q, k, v)]
    for whole, x in zip(poisoned, (q, k, v), strict=True):
        whole[:, :, 10:160] = x
    inside = [whole[:, :, 10:160] for whole in poisoned]
    want = union_attention(q, k, v, parts(region, 150), "fused")
    assert difference(union_attention(*inside, parts(region, 150), "fused"), want) <= EXACT


@pytest.mark.parametrize("tokens", [2**14, 2**20])
@pytest.mark.parametrize(
    ("rule", "step", "most"),
    [
        (masks.Window(128) & masks.causal, 1, 1.5),
        (masks.Window(128), 1, 1.4),
        (masks.causal & masks.SameResidue(128) & ~masks.Window(129), 128, 1.0),
        (masks.causal, 1, 1.0),
        (masks.SameBlock(100) & masks.causal, 1, 1.0),
    ],
)
def test_few_rectangles_compute_few_pairs_in_excess(rule: Rule, step: int, most: float, tokens: int) -> None:
    region = Region(rule=rule, step=step, heads=(0, 4))
    found = rectangles(region, tokens, "cpu")
    assert len(found) <= 16
    assert sum(rectangle.pairs for rectangle in found) <= most * count_pairs(region, tokens)


def test_tiles_are_numbers_also_where_tensors_are_fakes() -> None:
    region = Region(rule=masks.Window(33) & masks.SameBlock(90), heads=(0, 1))
    with FakeTensorMode():
        found = rectangles(region, 211, "cpu")
        count = count_pairs(region, 211)
    rectangles.cache_clear()
    assert found == rectangles(region, 211, "cpu")
    assert count == count_pairs(region, 211)
    assert isinstance(found[0], Rectangle)


def test_tiles_are_found_once_for_equal_rules() -> None:
    first = rectangles(Region(rule=masks.Window(7) & masks.causal, heads=(0, 2)), 99, "cpu")
    assert rectangles(Region(rule=masks.Window(7) & masks.causal, heads=(0, 2)), 99, "cpu") is first
