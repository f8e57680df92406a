"""Native sparse attention beside the readable form in flash-linear-attention.

Theirs pools keys by their means, over the blocks that it selects, and computes in float32. Its window needs a
kernel for CUDA, so the window's gate is closed here.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.nsa import NSA, NSAConfig
from variants.base import Context, Dims

pytestmark = pytest.mark.peers
BLOCK = 8


@pytest.mark.filterwarnings("ignore::ImportWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as it is imported
@pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 7, 50, 93])
def test_equals_flash_linear_attention(kv_heads: int, tokens: int) -> None:
    naive = peer("fla.ops.nsa.naive")
    group = 4 // kv_heads
    config = NSAConfig(compress=BLOCK, stride=BLOCK, block=BLOCK, blocks=5, window=BLOCK, group=group)
    layer = make_layer(NSA, config, Dims(seq_len=tokens, d_model=32, heads=4, kv_heads=kv_heads))
    assert isinstance(layer, NSA)
    with torch.no_grad():
        layer.gate.weight[8:, 0] = -1e4  # of the window: the first channel of every token is 1
    x = numbers(2, tokens, 32)
    with torch.no_grad():
        x[..., 0] = 1
    scale, picks = layer.dims.head_dim**-0.5, []

    def theirs() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in layer.projections.split_shared(x))
        full = tokens // BLOCK * BLOCK
        pools = [t[:, :full].unflatten(1, (-1, BLOCK)).mean(2) if full else t[:, :0] for t in (k, v)]
        gates = layer.gate(x).sigmoid().unflatten(-1, (3, -1))[..., None]
        compressed, _ = naive.naive_nsa_compression(q, *pools, BLOCK, scale)
        ranked = [torch.cat([t, t.new_zeros(2, 1, *t.shape[2:])], dim=1) for t in pools]  # the open block
        picks[:] = [naive.naive_nsa_topk(q, ranked[0], 5, BLOCK, scale)]
        selected = naive.naive_nsa_selection(q, k, v, picks[0], BLOCK, scale)
        y = gates[:, :, 0] * compressed + gates[:, :, 1] * selected
        return layer.projections.merge(y.transpose(1, 2))

    trained = [x, *layer.projections.parameters(), layer.gate.weight]
    assert_same(lambda: feed(layer, x, causal=True), theirs, trained, tolerance=2e-5)
    ours, block = layer.choices(x, Context(causal=True)), torch.arange(tokens) // BLOCK
    for sequence, head, token in [
        (b, h, t) for b in range(2) for h in range(kv_heads) for t in range(tokens)
    ]:
        own = int(block[token])
        chosen = {*ours[sequence, head, token, : max(0, own - 2)].tolist(), 0, max(0, own - 1), own}
        assert chosen == {*picks[0][sequence, token, head].tolist()} - {-1}
