"""The fixed pattern against its definition, pair by pair, and its own knobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from variants.attention.sparse_fixed import SparseFixed, SparseFixedConfig
from variants.base import Context, Workload

SMALL: list[dict[str, Any]] = [
    {"stride": 6, "c": 2},
    {"stride": 7, "c": 3, "head_mode": "split", "impl": "plain"},
]


def make(seq_len: int, heads: int = 4, index: int = 0, **knobs: Any) -> SparseFixed:
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=4 * heads, heads=heads)
    return SparseFixed(SparseFixedConfig(**knobs), dims, index)


def keys(layer: SparseFixed, seq_len: int, head: int, query: int, *, causal: bool = True) -> set[int]:
    allowed = layer.allowed(seq_len, causal=causal)
    return set(allowed[head, query].nonzero().flatten().tolist())


def test_the_papers_example() -> None:
    """ "If the stride is 128 and c = 8", the last 8 of every block are read by all that follow."""
    layer = make(512, index=1, stride=128, c=8, head_mode="interleaved", subblocks="shared")
    assert keys(layer, 512, 0, 128) == set(range(120, 128))
    assert keys(layer, 512, 3, 300) == {*range(120, 128), *range(248, 256)}
    assert keys(layer, 512, 3, 381) == {*range(120, 128), *range(248, 256), 376, 377, 378, 379, 380, 381}
    assert keys(layer, 512, 0, 119) == set()


@pytest.mark.parametrize(("seq_len", "stride", "c"), [(31, 7, 2), (24, 6, 6), (5, 9, 3)])
def test_shared_pattern_is_the_papers(seq_len: int, stride: int, c: int) -> None:
    layer = make(seq_len, stride=stride, c=c, subblocks="shared")
    for query in range(seq_len):
        near = {key for key in range(query + 1) if key // stride == query // stride}
        far = {key for key in range(query + 1) if key % stride >= stride - c}
        assert keys(layer, seq_len, 0, query) == near | far


def test_heads_have_summaries_of_their_own_from_the_end_of_a_block() -> None:
    layer = make(16, heads=4, index=1, stride=8, c=2, head_mode="interleaved")
    found = [keys(layer, 16, head, 10) for head in range(4)]
    assert found == [{0, 1, 8, 9}, {2, 3, 10}, {4, 5}, {6, 7}]


def test_summaries_start_again_from_the_end_where_a_block_is_used_up() -> None:
    layer = make(16, heads=5, index=1, stride=8, c=3, head_mode="interleaved")
    assert [keys(layer, 16, head, 8) for head in range(5)] == [
        {5, 6, 7},
        {2, 3, 4},
        {5, 6, 7},
        {2, 3, 4},
        {5, 6, 7},
    ]


def test_far_heads_of_a_split_share_out_the_summaries_among_themselves() -> None:
    layer = make(16, heads=4, stride=8, c=2, head_mode="split")
    assert [keys(layer, 16, head, 8) for head in range(4)] == [{8}, {8}, {4, 5}, {6, 7}]


def test_bidirectionally_a_block_cut_short_is_summarised_by_its_end() -> None:
    layer = make(21, heads=2, index=1, stride=8, c=2, head_mode="interleaved")
    for query in (0, 20):
        assert keys(layer, 21, 0, query, causal=False) == {4, 5, 12, 13, 19, 20}
        assert keys(layer, 21, 1, query, causal=False) == {6, 7, 14, 15, 19, 20}


def test_a_token_with_no_summary_before_it_gets_nothing() -> None:
    layer = make(20, index=1, stride=8, c=2, head_mode="interleaved", subblocks="shared")
    y = layer(torch.randn(1, 20, 16), Context(causal=True)).y
    assert torch.count_nonzero(y[:, :6]) == 0
    assert torch.count_nonzero(y[:, 6:]) == y[:, 6:].numel()


def test_many_blocks_a_strip_have_a_staircase() -> None:
    """More than 32 blocks: several share a strip, and a mask keeps each to the blocks before it."""
    layer = make(150, heads=2, stride=4, c=1).double()
    for seq_len in (150, 148, 133):
        x = torch.randn(1, seq_len, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x, Context(causal=True)).y, layer.reference(x, Context(causal=True)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"c": 0}, "c=0"),
        ({"c": 9, "stride": 8}, "c=9.*stride=8"),
        ({"subblocks": "same"}, "subblocks='same'"),
    ],
)
def test_bad_knobs_are_refused_by_name(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFixedConfig(**knobs)


def test_null_stride_holds_the_summaries() -> None:
    assert make(16, c=32).stride == 32
