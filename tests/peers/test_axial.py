"""Axial attention beside axial-attention, on complete grids without a mask.

Taken away: our rotary positions, its output bias. Theirs attends along rows and along columns in one layer;
a layer here does one of both.
"""

from __future__ import annotations

import pytest
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.axial import Axial, AxialConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("rows", "row"), [(1, 1), (5, 8), (1, 40), (40, 1), (18, 17)])
def test_equals_axial_attention(rows: int, row: int, index: int) -> None:
    package = peer("axial_attention.axial_attention")
    dims = dims_for(rows * row, 2)
    layer = make_layer(Axial, AxialConfig(row=row), dims, index=index)
    assert isinstance(layer, Axial)
    both = package.AxialAttention(dims.d_model, num_dimensions=2, heads=dims.heads).double()
    along_columns, along_rows = both.axial_attentions
    other = along_columns if index == 1 else along_rows
    x = numbers(2, rows * row, dims.d_model)

    def theirs() -> Tensor:
        inner = dims.inner_dim
        q, kv = layer.projections.qkv.weight.split([inner, 2 * inner])
        weights = {
            "fn.to_q.weight": q,
            "fn.to_kv.weight": kv,
            "fn.to_out.weight": layer.projections.out.weight,
            "fn.to_out.bias": x.new_zeros(dims.d_model),
        }
        y: Tensor = functional_call(other, weights, (x.unflatten(1, (rows, row)),))
        return y.flatten(1, 2)

    assert_same(lambda: feed(layer, x, causal=False), theirs, [x, *layer.parameters()])
