"""Infini-attention beside infini-transformer-pytorch, segment by segment.

Taken away: positions, on both sides; their normalisation before attention. Their gate is the share of the
segment, ours that of the memory. Their first segment is not multiplied by it, so it gets a memory of zeros.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor, nn

from peers import peer
from variants.attention.infini import Infini, InfiniConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize(("tokens", "segment"), [(40, 8), (21, 4), (7, 9)])
def test_equals_infini_transformer_pytorch(
    tokens: int, segment: int, update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = peer("infini_transformer_pytorch.infini_transformer")
    dims = dims_for(tokens, 2)
    layer = make_layer(Infini, InfiniConfig(segment=segment, update=update), dims)
    assert isinstance(layer, Infini)
    other = package.CausalAttention(
        dims.d_model, dim_head=dims.head_dim, heads=dims.heads, use_mem_delta_rule=update == "delta"
    ).double()
    other.norm = nn.Identity()
    monkeypatch.setattr(other.rotary_emb, "rotate_queries_with_cached_keys", lambda q, k: (q, k))
    with torch.no_grad():
        layer.mix.copy_(numbers(dims.heads))
        other.to_qkv.weight.copy_(layer.projections.qkv.weight)
        other.to_out.weight.copy_(layer.projections.out.weight)
        other.fastweight_mem.head_gates.copy_(-layer.mix)
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        channels = 2, dims.heads, dims.head_dim
        memory = package.Memories(x.new_zeros(*channels, dims.head_dim), x.new_zeros(channels))
        outputs = []
        for part in x.split(segment, dim=1):
            y, _, memory = other(part, past_memories=memory, return_new_memories=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    assert_same(lambda: feed(layer, x, causal=True), theirs, [x])
