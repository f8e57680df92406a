"""Static patterns beside xformers' attention biases, which say in another way which keys a query may read.

xformers draws them on a CPU too: none of its kernels is needed, only the package.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import variants
from variants.base import Workload, sequence_mask

pytestmark = pytest.mark.peers

LENGTHS = [1, 2, 7, 64, 65, 150]
every_length = pytest.mark.parametrize("tokens", LENGTHS)


@pytest.fixture(scope="module")
def biases() -> Any:
    return pytest.importorskip("xformers.ops.fmha.attn_bias", exc_type=ImportError)


def pattern(name: str, tokens: int, *, causal: bool, **knobs: Any) -> Tensor:
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=8, heads=2)
    layer = variant(variant.Config(**knobs), dims)
    drawn = sequence_mask(layer, layer.input_schedule(layer.config), tokens, causal=causal)
    assert drawn is not None
    return drawn


def drawn(bias: Any, tokens: int) -> Tensor:
    """(T, T) bool: what a bias leaves finite; it is 0 there."""
    values = bias.materialize((tokens, tokens))
    assert set(values.unique().tolist()) <= {0.0, -torch.inf}
    return values == 0


def chunks(tokens: int, chunk: int) -> list[int]:
    """Lengths of the chunks of a sequence."""
    edges = [*range(0, tokens, chunk), tokens]
    return [end - begin for begin, end in pairwise(edges)]


@every_length
def test_dense(biases: Any, tokens: int) -> None:
    assert torch.equal(pattern("dense", tokens, causal=True), drawn(biases.LowerTriangularMask(), tokens))
    bottom_right = biases.LowerTriangularFromBottomRightMask()  # the same where queries are as many as keys
    assert torch.equal(pattern("dense", tokens, causal=True), drawn(bottom_right, tokens))


@every_length
@pytest.mark.parametrize("window", [1, 2, 5, 64, 200])
def test_longformer_causal(biases: Any, tokens: int, window: int) -> None:
    ours = pattern("longformer", tokens, causal=True, window=(window,))
    assert torch.equal(ours, drawn(biases.LowerTriangularFromBottomRightLocalAttentionMask(window), tokens))
    one_sided = biases.LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=0)
    assert torch.equal(ours, drawn(one_sided, tokens))


@every_length
@pytest.mark.parametrize("window", [1, 2, 5, 64, 200])
def test_longformer_bidirectional(biases: Any, tokens: int, window: int) -> None:
    """Its window counts the query itself, xformers' two do not."""
    bias = biases.LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=window - 1)
    ours = pattern("longformer", tokens, causal=False, window=(window,))
    assert torch.equal(ours, drawn(bias, tokens))


@every_length
@pytest.mark.parametrize("chunk", [1, 3, 64, 200])
def test_chunked(biases: Any, tokens: int, chunk: int) -> None:
    lengths = chunks(tokens, chunk)
    both_sides, one_side = (
        getattr(biases, name).from_seqlens(lengths)
        for name in ("BlockDiagonalMask", "BlockDiagonalCausalMask")
    )
    assert torch.equal(pattern("chunked", tokens, causal=False, chunk=chunk), drawn(both_sides, tokens))
    assert torch.equal(pattern("chunked", tokens, causal=True, chunk=chunk), drawn(one_side, tokens))


@every_length
@pytest.mark.parametrize("chunk", [4, 12, 64])
def test_overlapping_causal(biases: Any, tokens: int, chunk: int) -> None:
    """Strips of half a chunk, the first of a whole one, each reading to the start of its own chunk.

    As queries of a strip against the keys of its chunk, causal from the bottom right.
    """
    half = chunk // 2
    ours = pattern("overlapping", tokens, causal=True, chunk=chunk)
    assert torch.equal(ours[:chunk], drawn(biases.LowerTriangularMask(), tokens)[:chunk])
    for begin in range(chunk, tokens, half):
        queries = min(half, tokens - begin)
        keys = half + queries
        bias = biases.BlockDiagonalCausalFromBottomRightMask.from_seqlens([queries], [keys])
        strip = ours[begin : begin + queries]
        assert torch.equal(strip[:, begin - half : begin + queries], bias.materialize((queries, keys)) == 0)
        assert strip.sum() == strip[:, begin - half : begin + queries].sum()


@every_length
@pytest.mark.parametrize(("stride", "c"), [(1, 1), (8, 2), (20, 20)])
def test_factors_of_the_sparse_transformers(biases: Any, tokens: int, stride: int, c: int) -> None:
    """Near factors, alone in the lowest layer: a window of l tokens and itself; blocks of l tokens."""
    near = {"head_mode": "interleaved", "stride": stride}
    window = biases.LowerTriangularFromBottomRightLocalAttentionMask(stride + 1)
    assert torch.equal(pattern("sparse_strided", tokens, causal=True, **near), drawn(window, tokens))
    blocks = biases.BlockDiagonalCausalMask.from_seqlens(chunks(tokens, stride))
    assert torch.equal(pattern("sparse_fixed", tokens, causal=True, c=c, **near), drawn(blocks, tokens))


@every_length
@pytest.mark.parametrize(("chunk", "window"), [(40, 7), (64, 64), (10, 30)])
def test_a_window_within_chunks(biases: Any, tokens: int, chunk: int, window: int) -> None:
    """Patterns compose alike: what two variants both allow is one bias of xformers."""
    lengths = chunks(tokens, chunk)
    bias = biases.BlockDiagonalCausalMask.from_seqlens(lengths).make_local_attention(window)
    ours = pattern("chunked", tokens, causal=True, chunk=chunk) & pattern(
        "longformer", tokens, causal=True, window=(window,)
    )
    assert torch.equal(ours, drawn(bias, tokens))
