"""Gated linear attention beside the recurrent reference of fla-core, with the same weights.

Theirs is the sum before norm, gate and output projection, which are ours here.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers.test_gated_scan import FLOAT32, naive
from variants.attention.gla import Gla, GlaConfig
from variants.base import Context

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_equals_fla(tokens: int) -> None:
    """In float32, in which theirs computes."""
    layer = make_layer(Gla, GlaConfig(chunk=16, temperature=4.0), dims_for(tokens, 2)).float()
    assert isinstance(layer, Gla)
    x = numbers(2, tokens, 16).detach().float().requires_grad_()
    recurrent = naive("gla").naive_recurrent_gla

    def theirs() -> Tensor:
        parts = [*layer.qkv(x).split([8, 8, 16], -1), F.logsigmoid(layer.decay(layer.low(x))) / 4]
        y, _ = recurrent(*(part.unflatten(-1, (2, -1)) for part in parts))
        y = F.rms_norm(y, y.shape[-1:], layer.scale, eps=1e-5).flatten(2)
        merged: Tensor = layer.out(F.silu(layer.gate(x)) * y)
        return merged

    inputs = [x, *layer.parameters()]
    # the norm of a first token divides what may be nearly 0, and its rounding errors
    assert_same(lambda: layer(x, Context(causal=True)).y, theirs, inputs, tolerance=20 * FLOAT32)
