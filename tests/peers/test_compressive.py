"""Compressive Transformer beside compressive-transformer-pytorch, with segments as long as the memory.

Taken away: our u and v, which theirs lacks, and its biases. Its positions are learnt, so it reads ours. It
reconstructs attention to the whole memory, which is what falls out where a segment is as long.
"""

from __future__ import annotations

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.compressive import Compressive, CompressiveConfig
from variants.base import Context
from variants.ops.segments.relative_attention import sinusoids

pytestmark = pytest.mark.peers

SEGMENT, RATE, COMP_LEN, SEGMENTS = 8, 4, 3, 5


def test_equals_compressive_transformer_pytorch() -> None:
    package = peer("compressive_transformer_pytorch.compressive_transformer_pytorch")
    dims = dims_for(SEGMENT * SEGMENTS, 2)
    config = CompressiveConfig(
        segment=SEGMENT, mem_len=SEGMENT, comp_len=COMP_LEN, rate=RATE, compression="conv"
    )
    layer = make_layer(Compressive, config, dims)
    assert isinstance(layer, Compressive)
    with torch.no_grad():
        layer.u.zero_()
        layer.v.zero_()
    other = package.SelfAttention(
        dims.d_model, SEGMENT, SEGMENT, COMP_LEN, cmem_ratio=RATE, heads=dims.heads
    ).double()

    def weights() -> dict[str, Tensor]:
        """Their convolution is (C, C, taps); ours is one matrix over the taps side by side."""
        pool = layer.get_parameter("compressor.pool.weight")
        return {
            "compress_mem_fn.conv.weight": pool.unflatten(1, (RATE, -1)).transpose(1, 2),
            "compress_mem_fn.conv.bias": pool.new_zeros(dims.d_model),
            "to_q.weight": layer.q.weight,
            # while it trains, theirs detaches what it is given here, in place
            "to_kv.weight": layer.kv.weight.detach() if other.training else layer.kv.weight,
            "to_out.weight": layer.out.weight,
            "to_out.bias": pool.new_zeros(dims.d_model),
        }

    x = numbers(2, dims.seq_len, dims.d_model)

    def ours() -> tuple[Tensor, list[Tensor]]:
        state, ys, losses = None, [], []
        for segment in x.split(SEGMENT, dim=1):
            y, state, loss = layer(segment, Context(causal=True), state=state)
            ys.append(y)
            losses += [] if loss is None else [loss]
        return torch.cat(ys, dim=1), losses

    def theirs() -> tuple[Tensor, list[Tensor]]:
        memories, ys, losses = None, [], []
        for segment in x.split(SEGMENT, dim=1):
            keys = segment.shape[1] + (0 if memories is None else sum(m.shape[1] for m in memories))
            distances = sinusoids(keys, dims.d_model, x)[1:]  # keys − 1, …, 0
            r = (distances @ layer.r.weight.T).unflatten(-1, (dims.heads, -1)).transpose(0, 1)
            y, memories, loss = functional_call(other, weights(), (segment, memories, r))
            memories = [m.detach() for m in memories]
            ys.append(y)
            losses += [loss] if loss.any() else []
        return torch.cat(ys, dim=1), losses

    task = [p for name, p in layer.named_parameters() if "compressor" not in name and name not in ("u", "v")]
    other.eval()
    assert_same(lambda: ours()[0], lambda: theirs()[0], [x, *task])

    other.train()
    pool = layer.get_parameter("compressor.pool.weight")
    (y, losses), (y_want, losses_want) = ours(), theirs()
    assert difference(y.detach(), y_want.detach()) <= EXACT
    assert len(losses) == len(losses_want) == SEGMENTS - 1
    for loss, want in zip(losses, losses_want, strict=True):
        assert difference(loss.detach(), want.detach().squeeze()) <= EXACT
    got, wanted = (torch.autograd.grad(sum(found), pool)[0] for found in (losses, losses_want))
    assert difference(got, wanted) <= EXACT
