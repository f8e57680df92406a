"""Sinkhorn attention against what it reduces to, its normalisation, and a leak that its gate must find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import assert_same, difference, dims_for, feed, make_layer, numbers, oracle, refer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.sinkhorn import Sinkhorn, SinkhornConfig
from variants.base import Context, Workload
from variants.ops.clustering.block_sorting import balanced, mix_past, past_only

SMALL: list[dict[str, Any]] = [{"block": 8}, {"block": 16, "gumbel": True}, {"block": 5, "iterations": 1}]

CPU = torch.device("cpu")


def make(tokens: int, **knobs: Any) -> Sinkhorn:
    layer = make_layer(Sinkhorn, SinkhornConfig(**knobs), dims_for(tokens, 2))
    assert isinstance(layer, Sinkhorn)
    return layer


@pytest.mark.parametrize("tokens", [16, 11])
def test_one_causal_block_is_dense_attention(tokens: int) -> None:
    layer = make(tokens, block=16)
    x = numbers(2, tokens, layer.dims.d_model)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: oracle(layer, x, causal), [x, *layer.parameters()]
    )


def test_the_second_of_two_causal_blocks_reads_the_first_as_in_dense_attention() -> None:
    """It is the only block before it, so it is sorted with the weight 1."""
    tokens = 16
    layer = make(tokens, block=8)
    x = numbers(2, tokens, layer.dims.d_model)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: oracle(layer, x, causal), [x, *layer.parameters()]
    )


@pytest.mark.parametrize("temperature", [1e-4, 0.75])
def test_a_cold_sort_copies_the_block_with_the_highest_score(temperature: float) -> None:
    """Then the keys of one past block are read, at the positions of the block before the queries."""
    tokens, block = 40, 8
    layer = make(tokens, block=block, temperature=temperature)
    x = numbers(2, tokens, layer.dims.d_model).detach()
    q, k, v = layer._split(x)
    _, sorted_v = layer._sorted_past(q, k, v, Context(causal=True))
    sums = torch.stack([part.sum(1) / block**0.5 for part in k.split(block, dim=1)], dim=2)
    copied = []
    for i in range(1, tokens // block):
        summary = q[:, : i * block + 1].sum(1) / (i * block + 1) ** 0.5  # (B, H, D)
        best = torch.einsum("bhd,bhjd->bhj", summary, sums[:, :, :i]).argmax(-1)
        by_block = v.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)  # (B, H, n, b, D)
        copied.append(
            torch.stack([torch.stack([by_block[b, h, best[b, h]] for h in range(2)]) for b in range(2)])
        )
    equal = difference(sorted_v, torch.stack(copied, dim=2)) <= 1e-6
    assert equal == (temperature < 0.1)


def test_balanced_rows_sum_up_to_one_and_columns_in_the_limit() -> None:
    scores = 2 * numbers(2, 3, 6, 6).detach()
    rows = balanced(scores, 3).exp()
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    far, near = ((balanced(scores, n).exp().sum(-2) - 1).abs().max() for n in (2, 200))
    assert near < 1e-6 < far


def test_past_weights_are_strictly_of_the_past() -> None:
    weights = past_only(numbers(1, 2, 5, 5).detach())
    assert torch.equal(weights > 0, torch.ones(5, 5, dtype=torch.bool).tril().expand(1, 2, 5, 5))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 30])
def test_the_mixture_in_pieces_is_one_product(blocks: int) -> None:
    weights = past_only(numbers(2, 2, blocks, blocks)).detach().requires_grad_()
    rows = numbers(2, 2, blocks, 12, seed=3)
    assert_same(lambda: mix_past(weights, rows), lambda: weights.tril() @ rows, [rows])
    (got,) = torch.autograd.grad(mix_past(weights, rows).square().sum(), weights)
    (want,) = torch.autograd.grad((weights.tril() @ rows).square().sum(), weights)
    assert difference(got.tril(), want) <= 1e-12  # above the diagonal there is no weight to change


def test_outputs_do_not_depend_on_the_first_position() -> None:
    layer = make(45, block=8)
    x = numbers(2, 45, layer.dims.d_model)
    for causal in (True, False):
        shifted = Context(causal=causal, positions=torch.arange(1000, 1045))
        y = layer(x, shifted).y
        assert difference(y, layer(x, Context(causal=causal)).y) <= 1e-9
        assert difference(y, layer.reference(x, shifted)) <= 1e-9


class OwnSum(Sinkhorn):
    """A planted leak: the query summary of a block is the sum of its own queries."""

    def _query_summaries(self, q: Tensor) -> Tensor:
        return self._sums(q)[:, :, 1:] * self.config.block**-0.5


class PaperColumns(Sinkhorn):
    """A planted leak: columns of a causal sort are normalised over later blocks too."""

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        scores = super()._scores(queries, keys)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -1e30).log_softmax(-2)


def leak_of(variant: type[Sinkhorn], tokens: int) -> float:
    with torch.random.fork_rng():
        return gates.leak(variant, SinkhornConfig(block=16), dims_for(tokens, 2), 2, CPU)


@pytest.mark.parametrize("tokens", [128, 140])
def test_the_gate_finds_summaries_and_columns_of_later_tokens(tokens: int) -> None:
    assert leak_of(Sinkhorn, tokens) <= gates.LEAK_TOLERANCE
    for planted in (OwnSum, PaperColumns):
        with pytest.raises(GateFailed, match="causality gate"):
            leak_of(planted, tokens)


def test_noise_is_drawn_in_training_only() -> None:
    layer = make(64, block=8, gumbel=True)
    x = numbers(1, 64, layer.dims.d_model).detach()
    assert Sinkhorn.info_for(layer.config).caps.stochastic
    assert not Sinkhorn.info_for(SinkhornConfig()).caps.stochastic
    for causal in (True, False):
        one, other = (feed(layer.train(), x, causal=causal, seed=seed) for seed in (1, 2))
        assert difference(one, other) > 1e-3
        assert difference(one, refer(layer, x, causal=causal, seed=1)) <= 1e-9
        one, other = (feed(layer.eval(), x, causal=causal, seed=seed) for seed in (1, 2))
        assert torch.equal(one, other)


def test_pairs_are_those_of_the_mask() -> None:
    for tokens in (1, 7, 8, 9, 40, 45):
        layer, work = make(tokens, block=8), dims_for(tokens)
        own = sum(t % 8 + 1 for t in range(tokens))
        pairs = own + 8 * sum(t >= 8 for t in range(tokens))
        assert layer.cost(replace(work, causal=True)).parts["attention"] == 4 * work.inner_dim * pairs


@pytest.mark.parametrize("tokens", [4100])
def test_the_overhead_of_blocks_is_a_third(tokens: int) -> None:
    """Of 3b²/2 allowed pairs of a block, 2b² are computed."""
    work = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=64, heads=2)
    layer = Sinkhorn(SinkhornConfig(block=64), work)
    with FakeTensorMode(allow_non_fake_inputs=True), CountFlops() as counter, torch.no_grad():
        layer(torch.empty(1, tokens, 64), Context(causal=True))
    assert 1 < gates.cost_ratio(counter.total, layer.cost(work), layer.flop_overhead_reason) < 1.35


def test_memory_is_that_of_blocks() -> None:
    """A million tokens of one layer need no more than other local layers."""
    dims = Workload(causal=True, batch_size=1, seq_len=2**20, d_model=256, heads=4)
    with FakeTensorMode(), LiveStorage() as storage:
        layer = Sinkhorn(SinkhornConfig(block=512), dims)
        x = torch.randn(1, dims.seq_len, 256, requires_grad=True)
        layer(x, Context(causal=True)).y.sum().backward()
    assert storage.peak < 20 * 2**30
