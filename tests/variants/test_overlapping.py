"""Overlapping chunks: every token is predicted once, from the chunk that shows it most context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    assert_same,
    assert_same_layer,
    dims_for,
    everything,
    feed,
    language_model,
    logits_of,
    make_layer,
    mask_of,
    numbers,
    oracle,
)
from torch import Tensor

from variants.attention.dense import Dense, DenseConfig
from variants.attention.overlapping import Overlapping, OverlappingConfig
from variants.input_schedule import NetworkOut

SMALL: list[dict[str, Any]] = [{"chunk": 16}, {"chunk": 4, "impl": "naive"}]

both_directions = pytest.mark.parametrize("causal", [True, False])
sizes = given(tokens=st.integers(1, 70), quarter=st.integers(1, 6), batch=st.integers(1, 3))


def chunks(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """[begin, end) of each: one every chunk/2 until the end of the sequence is covered."""
    found = [(0, min(chunk, tokens))]
    while found[-1][1] < tokens:
        begin = found[-1][0] + chunk // 2
        found.append((begin, min(begin + chunk, tokens)))
    return found


def best_chunk(token: int, tokens: int, chunk: int, *, causal: bool) -> tuple[int, int]:
    """The chunk in which the token sees the most: history if causal, else on its shorter side.

    At the ends of the sequence nothing is missing on that side, so it never is the shorter one.
    """

    def context(bounds: tuple[int, int]) -> float:
        begin, end = bounds
        before = token - begin if begin else float("inf")
        after = end - 1 - token if end < tokens else float("inf")
        return before if causal else min(before, after)

    return max((b for b in chunks(tokens, chunk) if b[0] <= token < b[1]), key=context)


def token_by_token(network: Any, x: Tensor, chunk: int, *, causal: bool) -> Tensor:
    """`network` is run on every chunk; of each token, the output of its best chunk is taken."""
    tokens = x.shape[1]
    outputs = {bounds: network(x[:, slice(*bounds)]) for bounds in chunks(tokens, chunk)}
    best = [best_chunk(token, tokens, chunk, causal=causal) for token in range(tokens)]
    return torch.stack([outputs[b][:, token - b[0]] for token, b in enumerate(best)], dim=1)


@both_directions
@pytest.mark.parametrize("longer", [0, 4, 100])
def test_one_chunk_is_dense(causal: bool, longer: int) -> None:
    overlapping = make_layer(Overlapping, OverlappingConfig(chunk=48 + longer), dims_for(48))
    dense = make_layer(Dense, DenseConfig(), dims_for(48), seed=1)
    assert_same_layer(overlapping, dense, numbers(2, 48, 16), causal=causal)


@both_directions
@settings(deadline=None, max_examples=20)
@sizes
@example(tokens=24, quarter=2, batch=2)
@example(tokens=25, quarter=2, batch=2)
@example(tokens=16, quarter=4, batch=2)
@example(tokens=17, quarter=4, batch=2)
@example(tokens=3, quarter=1, batch=1)
def test_every_token_comes_from_the_chunk_that_shows_it_most(
    causal: bool, tokens: int, quarter: int, batch: int
) -> None:
    """A dense layer on every chunk by itself, and one of its outputs chosen for each token in a loop."""
    chunk = 4 * quarter
    layer = make_layer(Overlapping, OverlappingConfig(chunk=chunk), dims_for(tokens))
    x = numbers(batch, tokens, 16)

    def network(piece: Tensor) -> Tensor:
        return oracle(layer, piece, everything(piece.shape[1], causal=causal))

    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: token_by_token(network, x, chunk, causal=causal),
        [x, *layer.parameters()],
    )


@both_directions
@settings(deadline=None, max_examples=40)
@sizes
def test_each_token_has_at_least_its_share_of_context(
    causal: bool, tokens: int, quarter: int, batch: int
) -> None:
    """clm: half a chunk of history. mlm: a quarter on each side. Less only where the sequence has no more."""
    chunk = 4 * quarter
    layer = make_layer(Overlapping, OverlappingConfig(chunk=chunk), dims_for(tokens))
    schedule, seen = layer.input_schedule(layer.config), 0

    def network(windows: Tensor, _: Any) -> NetworkOut:
        """Where a token was, in place of its hidden state: (token, first, last token of its window)."""
        nonlocal seen
        seen += windows.shape[0] * windows.shape[1]
        first, last = (windows[:, [at]].expand_as(windows) for at in (0, -1))
        return NetworkOut(torch.stack([windows, first, last], dim=-1))

    ids = torch.arange(tokens).expand(batch, -1)
    where = schedule.apply(network, ids, causal=causal).y
    assert torch.equal(where[..., 0], ids), "each token once, in order"
    for token, first, last in where[0].tolist():
        if causal:
            assert token - first >= min(token, chunk // 2)
        else:
            assert token - first >= min(token, chunk // 4)
            assert last - token >= min(tokens - 1 - token, chunk // 4 - 1)
            assert first == 0 or last == tokens - 1 or chunk // 4 <= token - first < 3 * chunk // 4
    assert seen == batch * sum(length * count for length, count in schedule.windows(tokens, carried=False))
    assert seen == batch * sum(end - begin for begin, end in chunks(tokens, chunk))


@both_directions
@settings(deadline=None, max_examples=20)
@sizes
def test_pattern_is_the_best_chunk(causal: bool, tokens: int, quarter: int, batch: int) -> None:
    chunk = 4 * quarter
    layer = make_layer(Overlapping, OverlappingConfig(chunk=chunk), dims_for(tokens))
    allowed = everything(tokens, causal=causal)
    for token in range(tokens):
        begin, end = best_chunk(token, tokens, chunk, causal=causal)
        allowed[token, :begin] = False
        allowed[token, end:] = False
    assert torch.equal(mask_of(layer, tokens, causal=causal), allowed)


@both_directions
@pytest.mark.parametrize(("tokens", "chunk"), [(24, 8), (29, 8), (5, 8), (18, 12)])
def test_a_model_is_the_dense_model_on_each_chunk(causal: bool, tokens: int, chunk: int) -> None:
    """The whole network runs on a chunk before its outputs are chosen: depth does not widen the view."""
    model = language_model(Overlapping, OverlappingConfig(chunk=chunk), tokens)
    dense = language_model(Dense, DenseConfig(), tokens)
    dense.load_state_dict(model.state_dict())
    ids = torch.randint(11, (2, tokens), generator=torch.Generator().manual_seed(0))

    def network(piece: Tensor) -> Tensor:
        return logits_of(dense, piece, causal=causal)

    assert_same(
        lambda: logits_of(model, ids, causal=causal),
        lambda: token_by_token(network, ids, chunk, causal=causal),
        [*model.parameters()],
        [*dense.parameters()],
    )


@pytest.mark.parametrize("chunk", [0, 2, 6, -4])
def test_impossible_chunk_is_refused_by_name(chunk: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk={chunk}: .*multiple of 4"):
        OverlappingConfig(chunk=chunk)
