"""The linear attention of Based beside the references of fla-core, with the same weights.

Theirs are causal sums of queries, keys and values; the projections are ours. They add 1e-6 to denominators.
"""

from __future__ import annotations

import pytest
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers.test_gated_scan import FLOAT32, naive
from variants.attention.based import Based, BasedConfig
from variants.base import Context

pytestmark = pytest.mark.peers


@pytest.mark.usefixtures("without_rotary")
@pytest.mark.parametrize(("tokens", "form"), [(1, "parallel"), (100, "parallel"), (64, "chunk")])
def test_equals_fla(tokens: int, form: str) -> None:
    """Written as pairs, and as sums of chunks, of which theirs must be whole."""
    layer = make_layer(Based, BasedConfig(feature_channels=4, chunk=16), dims_for(tokens, 2))
    assert isinstance(layer, Based)
    x, package = numbers(2, tokens, 16), naive("based")

    def theirs() -> Tensor:
        q, k = (layer.qk(x).unflatten(-1, (2, 2, -1))[:, :, i].transpose(1, 2) for i in (0, 1))
        v = layer.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
        if form == "parallel":
            y = package.naive_parallel_based(q, k, v)
        else:
            y = package.naive_chunk_based(q, k, v, chunk_size=16)
        merged: Tensor = layer.out(y.transpose(1, 2).flatten(2))
        return merged

    inputs = [x, *layer.parameters()]
    assert_same(lambda: layer(x, Context(causal=True)).y, theirs, inputs, tolerance=FLOAT32)
