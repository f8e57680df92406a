"""Retention beside the reference of fla-core, with the same weights.

Theirs is the sum before norm, gate and output projection, which are ours here; rotary positions are ours too.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers.test_gated_scan import FLOAT32, naive
from variants.attention.retnet import Retnet, RetnetConfig
from variants.base import Context

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_equals_fla(tokens: int) -> None:
    """In float32, in which theirs computes."""
    layer = make_layer(Retnet, RetnetConfig(chunk=16), dims_for(tokens, 2)).float()
    assert isinstance(layer, Retnet)
    x = numbers(2, tokens, 16).detach().float().requires_grad_()
    retention = naive("retention").naive_retention

    def theirs() -> Tensor:
        y = retention(*layer.projections.split(x)).transpose(1, 2)
        y = F.layer_norm(y, y.shape[-1:]).flatten(2)
        merged: Tensor = layer.projections.out(F.silu(layer.gate(x)) * y)
        return merged

    inputs = [x, *layer.parameters()]
    # the norm of a first token divides what may be nearly 0, and its rounding errors
    assert_same(lambda: layer(x, Context(causal=True)).y, theirs, inputs, tolerance=20 * FLOAT32)
