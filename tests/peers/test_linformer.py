"""Linformer beside the package linformer. Taken away: our rotary positions, its output bias."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.linformer import Linformer, LinformerConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize("sharing", ["headwise", "kv"])
@pytest.mark.parametrize(("tokens", "longest", "k"), [(40, 40, 7), (31, 40, 40), (1, 40, 1)])
def test_equals_linformer(sharing: str, tokens: int, longest: int, k: int) -> None:
    """Its `share_kv` also shares the projections of keys and values; sharing=kv is one matrix given twice."""
    linformer = peer("linformer.linformer")
    dims = dims_for(longest, 2)
    layer = make_layer(Linformer, LinformerConfig(k=k, sharing=sharing), dims)
    assert isinstance(layer, Linformer)
    other = linformer.LinformerSelfAttention(dims.d_model, longest, k=k, heads=dims.heads).double()
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        qkv = layer.projections.qkv.weight.chunk(3)
        weights = {f"{name}.weight": w for name, w in zip(("to_q", "to_k", "to_v"), qkv, strict=True)}
        weights |= {"proj_k": layer.key_mixture.T, "proj_v": layer.value_mixture.T}
        weights |= {
            "to_out.weight": layer.projections.out.weight,
            "to_out.bias": torch.zeros(dims.d_model, dtype=x.dtype),
        }
        y: Tensor = functional_call(other, weights, (x,))
        return y

    assert_same(lambda: feed(layer, x, causal=False), theirs, [x, *layer.parameters()])
