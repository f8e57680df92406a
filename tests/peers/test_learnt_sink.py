"""Learnt sinks beside transformers' gpt-oss, projections included, and beside fla-core's formula.

transformers: its rotary angles are given to it in float64, and its projections have no biases here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.learnt_sink import LearntSink, LearntSinkConfig
from variants.ops.projections import ROTARY_BASE, rotary_table

pytestmark = pytest.mark.peers


def make(tokens: int, window: int) -> LearntSink:
    layer = make_layer(LearntSink, LearntSinkConfig(window=window), dims_for(tokens, 2))
    assert isinstance(layer, LearntSink)
    with torch.no_grad():
        layer.sink.copy_(torch.tensor([0.7, -1.2]))
    return layer


def bias(tokens: int, window: int) -> Tensor:
    """0 for a key that a query reads, −∞ for another."""
    index = torch.arange(tokens)
    distance = index[:, None] - index
    forbidden = (distance < 0) | (distance >= (window or tokens))
    return torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(forbidden, -torch.inf)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("tokens", [1, 33])
def test_equals_gpt_oss(tokens: int, window: int) -> None:
    transformers = peer("transformers")
    gpt_oss = peer("transformers.models.gpt_oss.modeling_gpt_oss")
    layer, x = make(tokens, window), numbers(2, tokens, 16)
    config = transformers.GptOssConfig(
        **sizes(layer.dims),
        num_key_value_heads=layer.dims.heads,
        head_dim=layer.dims.head_dim,
        attention_bias=False,
        attn_implementation="eager",
    )
    other = gpt_oss.GptOssAttention(config, 0).double()
    positions = [table[None] for table in rotary_table(tokens, layer.dims.head_dim, x, ROTARY_BASE)]
    names = ("q_proj", "k_proj", "v_proj")
    qkv = layer.get_parameter("projections.qkv.weight").chunk(3)
    weights = {f"{name}.weight": w for name, w in zip(names, qkv, strict=True)}
    weights |= {"o_proj.weight": layer.get_parameter("projections.out.weight"), "sinks": layer.sink}
    given = x, positions, bias(tokens, window)[None, None]
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: functional_call(other, weights, given)[0],
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("window", [0, 6])
def test_equals_fla_core(window: int) -> None:
    """Its file alone, because the package needs an accelerator."""
    tokens = 33
    path = Path(str(peer_file("fla"))).parent / "ops/attn/naive.py"
    spec = importlib.util.spec_from_file_location("naive_attn", path)
    assert spec is not None
    assert spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    layer, x = make(tokens, window), numbers(2, tokens, 16)

    def theirs() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in layer.projections.split(x))
        y, _ = naive.naive_parallel_attn(q, k, v, window_size=window or None, sink_bias=layer.sink)
        return layer.projections.merge(y.transpose(1, 2))

    assert_same(lambda: feed(layer, x, causal=True), theirs, [x, *layer.parameters()])


def peer_file(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: `make test-peers` does it")
    return spec.origin
