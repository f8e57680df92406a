"""BigBird reads what loops over its blocks read, and its random blocks are what they claim to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, assert_same_layer, difference, feed, make_layer, numbers, oracle
from torch import Tensor

from bench.measure import gates
from bench.measure.memory import LiveStorage
from variants.attention.bigbird import BigBird, BigBirdConfig
from variants.attention.dense import Dense, DenseConfig
from variants.base import Clock, Workload
from variants.ops.patterns.masks import Rule
from variants.ops.patterns.random_blocks import BlockRule, mixed

SMALL: list[dict[str, Any]] = [
    {"block": 4, "global_blocks": 2, "random_blocks": 2},
    {"block": 3, "global_blocks": 1, "random_blocks": 4, "window_blocks": 1, "seed": 5},
    {"block": 5, "global_blocks": 0, "random_blocks": 0},
    {"block": 7, "global_blocks": 3, "random_blocks": 1, "window_blocks": 5, "impl": "plain"},
]

HEADS = 3
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS)


def random_blocks(rule: BlockRule, rows: int) -> Tensor:
    """(H, rows, r): −1 for none."""
    picks = rule.picks(torch.arange(HEADS)[:, None], torch.arange(rows))
    return torch.stack(picks, dim=-1) if picks else torch.empty(HEADS, rows, 0, dtype=torch.int64)


def drawn_by_block(layer: BigBird, tokens: int, *, causal: bool) -> Tensor:
    """(H, T, T) bool, written down block by block from the paper; only the random blocks are the layer's."""
    config, rows = layer.config, -(-tokens // layer.config.block)
    picks = random_blocks(layer.rule(tokens, causal=causal), rows).tolist()
    first = config.global_blocks if causal else -(-config.global_blocks // 2)
    last = 0 if causal else config.global_blocks // 2
    everywhere = {*range(min(rows, first)), *range(max(first, rows - last), rows)}
    allowed = torch.zeros(HEADS, tokens, tokens, dtype=torch.bool)
    for head in range(HEADS):
        for row in range(rows):
            near = {n for n in range(rows) if abs(n - row) <= config.window_blocks // 2}
            read = everywhere | near | {pick for pick in picks[head][row] if pick >= 0}
            if row in everywhere and not causal:
                read = {*range(rows)}
            for block in read:
                queries, keys = (slice(n * config.block, (n + 1) * config.block) for n in (row, block))
                allowed[head, queries, keys] = True
    return allowed.tril() if causal else allowed


@both_directions
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(1, 70),
    block=st.integers(1, 9),
    window=st.sampled_from([1, 3, 5]),
    n_global=st.integers(0, 4),
    n_random=st.integers(0, 4),
    batch=st.integers(1, 2),
    index=st.integers(0, 2),
    impl=st.sampled_from(["fused", "plain"]),
)
@example(tokens=1, block=4, window=3, n_global=2, n_random=3, batch=1, index=0, impl="fused")
@example(tokens=64, block=4, window=3, n_global=2, n_random=3, batch=2, index=1, impl="fused")
@example(tokens=65, block=4, window=1, n_global=0, n_random=0, batch=1, index=0, impl="fused")
def test_equals_loops_over_the_blocks(
    causal: bool,
    tokens: int,
    block: int,
    window: int,
    n_global: int,
    n_random: int,
    batch: int,
    index: int,
    impl: Any,
) -> None:
    config = BigBirdConfig(
        block=block, window_blocks=window, global_blocks=n_global, random_blocks=n_random, impl=impl
    )
    layer = make_layer(BigBird, config, dims_of(tokens), index=index)
    assert isinstance(layer, BigBird)
    x = numbers(batch, tokens, 12)
    allowed = drawn_by_block(layer, tokens, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )
    assert torch.equal(layer.allowed(tokens, causal=causal), allowed)
    flops = layer.cost(replace(dims_of(tokens, batch), causal=causal))
    assert flops.mixing == batch * 4 * 4 * int(allowed.sum())


@both_directions
def test_a_window_of_the_whole_sequence_is_dense(causal: bool) -> None:
    config = BigBirdConfig(block=8, window_blocks=11, global_blocks=0, random_blocks=0)
    layer = make_layer(BigBird, config, dims_of(43))
    assert_same_layer(
        layer, make_layer(Dense, DenseConfig(), dims_of(43), seed=1), numbers(2, 43, 12), causal=causal
    )


@both_directions
@pytest.mark.parametrize("n_global", [0, 1, 2, 5])
def test_random_blocks_are_distinct_and_neither_global_nor_near(causal: bool, n_global: int) -> None:
    """As many as asked for, or all that there are."""
    tokens, rows, n_random = 4 * 40 - 1, 40, 5
    config = BigBirdConfig(block=4, global_blocks=n_global, random_blocks=n_random)
    rule = make_layer(BigBird, config, dims_of(tokens)).rule(tokens, causal=causal)
    found = random_blocks(rule, rows).tolist()
    first, last = rule.globals_first, rows - rule.globals_last
    for head in range(HEADS):
        for row in range(first, last):
            candidates = {
                n
                for n in range(first, row if causal else min(last, rows - 1))  # the last block is shorter
                if abs(n - row) > 1
            }
            picks = [pick for pick in found[head][row] if pick >= 0]
            assert len(picks) == len({*picks}) == min(n_random, len(candidates))
            assert {*picks} <= candidates


def test_random_blocks_are_uniform_and_differ_by_seed_layer_and_head() -> None:
    """Every candidate of a row is chosen equally often, within five standard deviations."""
    rule = BlockRule(block=1, neighbours=1, globals_first=2, random=3, seed=0, layer=0)
    head, row = torch.arange(4000)[:, None], torch.tensor([23])
    picks = torch.stack(rule.picks(head, row), dim=-1)
    counts = torch.bincount(picks.flatten(), minlength=24)[2:22]  # 20 candidates: 2 … 21
    assert counts.sum() == 12_000
    assert (counts - 600).abs().max() < 5 * (4000 * 3 / 20 * 17 / 20) ** 0.5
    first = torch.stack(rule.picks(torch.arange(4)[:, None], torch.arange(100, 200)), dim=-1)
    for other in (replace(rule, seed=1), replace(rule, layer=1)):
        again = torch.stack(other.picks(torch.arange(4)[:, None], torch.arange(100, 200)), dim=-1)
        assert (again == first).float().mean() < 0.1
    assert (first[0] == first[1]).float().mean() < 0.1
    assert len(mixed(torch.arange(2**16)).unique()) == 2**16


def test_a_prefix_is_read_as_in_the_complete_sequence() -> None:
    """Of a causal model, whatever the longest sequence of the layer."""
    config = BigBirdConfig(block=4)
    long, short = (make_layer(BigBird, config, dims_of(n)) for n in (200, 90))
    assert torch.equal(long.allowed(200, causal=True)[:, :90, :90], short.allowed(90, causal=True))


@dataclass(frozen=True)
class Ahead(Rule):
    """The first n tokens read all tokens."""

    n: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < self.n) & (j >= 0)


@torch.no_grad()
@pytest.mark.parametrize("n_random", [0, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_decoding_gathers_the_blocks_that_are_read(n_random: int, window: int) -> None:
    """Token by token, with a cache in which all other keys and values are NaN."""
    config = BigBirdConfig(block=4, window_blocks=window, global_blocks=1, random_blocks=n_random)
    tokens = 61
    layer = make_layer(BigBird, config, dims_of(tokens)).eval()
    assert isinstance(layer, BigBird)
    x = numbers(2, tokens, 12).detach()
    want = feed(layer, x, causal=True)
    allowed = layer.allowed(tokens, causal=True)
    clock = Clock()
    state = layer.init_state(2, tokens, clock=clock, dtype=torch.float64)
    gathered = layer.rule(tokens, causal=True).dense_rows(tokens) * config.block
    for position in range(tokens):
        (group,) = state.groups
        kept = [group.summary_keys.clone(), group.summary_values.clone()]
        if position >= gathered:
            for part in (group.summary_keys, group.summary_values):
                part.masked_fill_(~allowed[None, :, position, :, None], torch.nan)
        y = layer.step(x[:, position : position + 1], state)
        assert difference(y, want[:, position : position + 1]) <= EXACT
        for part, before in zip((group.summary_keys, group.summary_values), kept, strict=True):
            part[:, :, :position] = before[:, :, :position]
        clock.advance(1)


class GlobalsReadAhead(BigBird):
    """Its global tokens read all tokens, also in a causal model."""

    def mask(self, seq_len: int, *, causal: bool) -> Rule:
        return super().mask(seq_len, causal=causal) | Ahead(self.config.block * self.config.global_blocks)


def test_the_gate_sees_global_tokens_that_read_ahead() -> None:
    """Also where the token itself is not global: it reads them in the next layer."""
    dims, config = replace(dims_of(96, 2), d_model=24), BigBirdConfig(block=4, impl="dense")
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(BigBird, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(GlobalsReadAhead, config, *given)


def test_memory_grows_with_the_sequence_not_with_the_gathered_keys() -> None:
    """Twice the tokens need at most twice the memory, and less than the gathered keys of all rows."""
    peaks = []
    for tokens in (4096, 8192):
        layer = BigBird(BigBirdConfig(block=16), dims_of(tokens))
        x = torch.randn(1, tokens, 12, requires_grad=True)
        with LiveStorage() as storage:
            feed(layer, x, causal=True).sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] <= 2.1 * peaks[0]
