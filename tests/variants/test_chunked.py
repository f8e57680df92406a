"""Chunked: each chunk is a sequence of its own, for a layer and for a whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    EXACT,
    assert_same,
    assert_same_layer,
    cost_of,
    difference,
    dims_for,
    drawn,
    feed,
    language_model,
    logits_of,
    make_layer,
    mask_of,
    numbers,
    oracle,
)

from variants.attention.chunked import Chunked, ChunkedConfig
from variants.attention.dense import Dense, DenseConfig

SMALL: list[dict[str, Any]] = [{"chunk": 16}, {"chunk": 7, "impl": "naive"}]

both_directions = pytest.mark.parametrize("causal", [True, False])


@both_directions
@pytest.mark.parametrize("longer", [0, 1, 100])
def test_one_chunk_is_dense(causal: bool, longer: int) -> None:
    chunked = make_layer(Chunked, ChunkedConfig(chunk=50 + longer), dims_for(50))
    dense = make_layer(Dense, DenseConfig(), dims_for(50), seed=1)
    assert_same_layer(chunked, dense, numbers(2, 50, 16), causal=causal)


@both_directions
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 60), chunk=st.integers(1, 30), batch=st.integers(1, 3))
@example(tokens=20, chunk=10, batch=2)
@example(tokens=21, chunk=10, batch=2)
@example(tokens=9, chunk=10, batch=2)
def test_is_dense_on_each_chunk_by_itself(causal: bool, tokens: int, chunk: int, batch: int) -> None:
    """One dense layer, called on one slice after the other: independence and restarted positions at once."""
    chunked = make_layer(Chunked, ChunkedConfig(chunk=chunk), dims_for(tokens))
    x = numbers(batch, tokens, 16)

    def by_hand() -> torch.Tensor:
        pieces = []
        for begin in range(0, tokens, chunk):
            piece = x[:, begin : begin + chunk]
            allowed = drawn(piece.shape[1], lambda i, j: j <= i or not causal)
            pieces.append(oracle(chunked, piece, allowed))
        return torch.cat(pieces, dim=1)

    assert_same(lambda: feed(chunked, x, causal=causal), by_hand, [x, *chunked.parameters()])


@both_directions
def test_positions_restart(causal: bool) -> None:
    """A chunk that occurs twice has the same outputs twice."""
    chunked = make_layer(Chunked, ChunkedConfig(chunk=8), dims_for(24))
    piece, other = numbers(1, 8, 16).detach(), numbers(1, 8, 16, seed=5).detach()
    y = feed(chunked, torch.cat([piece, other, piece], dim=1), causal=causal)
    assert difference(y[:, 16:], y[:, :8]) <= EXACT


@both_directions
@pytest.mark.parametrize(("tokens", "chunk"), [(24, 8), (29, 8), (5, 8)])
def test_a_model_is_the_dense_model_on_each_chunk(causal: bool, tokens: int, chunk: int) -> None:
    """The whole network is cut, not each layer: nothing crosses a boundary at any depth."""
    model = language_model(Chunked, ChunkedConfig(chunk=chunk), tokens)
    dense = language_model(Dense, DenseConfig(), tokens)
    dense.load_state_dict(model.state_dict())
    ids = torch.randint(11, (2, tokens), generator=torch.Generator().manual_seed(0))

    def by_hand() -> torch.Tensor:
        pieces = [ids[:, begin : begin + chunk] for begin in range(0, tokens, chunk)]
        return torch.cat([logits_of(dense, piece, causal=causal) for piece in pieces], dim=1)

    assert_same(
        lambda: logits_of(model, ids, causal=causal), by_hand, [*model.parameters()], [*dense.parameters()]
    )


@both_directions
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 60), chunk=st.integers(1, 30))
def test_pattern_and_flops_follow_the_chunks(causal: bool, tokens: int, chunk: int) -> None:
    layer = make_layer(Chunked, ChunkedConfig(chunk=chunk), dims_for(tokens))
    allowed = drawn(tokens, lambda i, j: i // chunk == j // chunk and (j <= i or not causal))
    assert torch.equal(mask_of(layer, tokens, causal=causal), allowed)
    windows = layer.input_schedule(layer.config).windows(tokens, carried=False)
    assert sum(length * count for length, count in windows) == tokens
    assert cost_of(layer, dims_for(tokens), causal=causal).mixing == 4 * 16 * int(allowed.sum())


@pytest.mark.parametrize("chunk", [0, -3])
def test_impossible_chunk_is_refused_by_name(chunk: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk={chunk}: .*1 or more"):
        ChunkedConfig(chunk=chunk)
