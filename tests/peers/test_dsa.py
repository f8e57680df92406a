"""DeepSeek sparse attention beside the readable form in flash-linear-attention, which computes in float32."""

from __future__ import annotations

import pytest
from oracles import assert_same, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.dsa import DSA, DSAConfig
from variants.base import Context, Dims

pytestmark = pytest.mark.peers


@pytest.mark.filterwarnings("ignore::ImportWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as it is imported
@pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning")
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_equals_flash_linear_attention(kv_heads: int, tokens: int) -> None:
    """Outputs, gradients and chosen keys. With 32 heads of the indexer no score is exactly 0."""
    naive = peer("fla.ops.dsa.naive")
    config = DSAConfig(top_k=9, index_heads=32, index_dim=4)
    layer = make_layer(DSA, config, Dims(seq_len=tokens, d_model=32, heads=4, kv_heads=kv_heads))
    assert isinstance(layer, DSA)
    x, chosen = numbers(2, tokens, 32), []

    def theirs() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in layer.projections.split_shared(x))
        q_index, k_index, w = layer._index(x, None)
        y, picks = naive.naive_dsa(q, k, v, q_index, k_index, w, topk=9, return_indices=True)
        chosen[:] = [picks]
        return layer.projections.merge(y.transpose(1, 2))

    trained = [x, *layer.projections.parameters()]
    assert_same(lambda: feed(layer, x, causal=True), theirs, trained, tolerance=2e-5)
    ours = layer.choices(x, Context(causal=True))
    for sequence in range(2):
        for token in range(tokens):
            read = {key for key in ours[sequence, token].tolist() if key <= token}
            assert read == {*chosen[0][sequence, token].tolist()} - {-1}
