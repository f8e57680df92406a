"""The strided pattern against its definition, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from variants.attention.sparse_strided import SparseStrided, SparseStridedConfig
from variants.base import Workload

SMALL: list[dict[str, Any]] = [{"stride": 6}, {"stride": 6, "head_mode": "split", "impl": "plain"}]


def factors(query: int, stride: int) -> tuple[set[int], set[int]]:
    """A⁽¹⁾ and A⁽²⁾ of §4.3."""
    near = set(range(max(0, query - stride), query + 1))
    return near, {key for key in range(query + 1) if (query - key) % stride == 0}


@pytest.mark.parametrize(("seq_len", "stride"), [(30, 4), (31, 7), (6, 9)])
@pytest.mark.parametrize("mode", ["merged", "split", "interleaved"])
def test_pattern_is_the_papers(seq_len: int, stride: int, mode: str) -> None:
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=16, heads=4)
    config = SparseStridedConfig(stride=stride, head_mode=mode)
    layers = [SparseStrided(config, dims, index).allowed(seq_len, causal=True) for index in range(2)]
    for query in range(seq_len):
        near, far = factors(query, stride)
        for index in range(2):
            want = {
                "merged": [near | far] * 4,
                "split": [near, near, far, far],
                "interleaved": [(near, far)[index]] * 4,
            }[mode]
            for head in range(4):
                assert set(layers[index][head, query].nonzero().flatten().tolist()) == want[head]


@pytest.mark.parametrize("mode", ["merged", "split", "interleaved"])
def test_bidirectional_pattern_is_symmetric_and_causal_below_its_diagonal(mode: str) -> None:
    dims = Workload(causal=True, batch_size=1, seq_len=45, d_model=8, heads=2)
    for index in range(2):
        layer = SparseStrided(SparseStridedConfig(stride=6, head_mode=mode), dims, index)
        both = layer.allowed(45, causal=False)
        assert torch.equal(both, both.transpose(1, 2))
        assert torch.equal(both.tril(), layer.allowed(45, causal=True))
