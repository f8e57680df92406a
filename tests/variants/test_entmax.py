"""Entmax attention against exact algorithms by sorting, softmax in the limit, and finite differences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import difference, dims_for, everything, feed, make_layer, numbers, oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.entmax import Entmax, EntmaxConfig
from variants.base import Context, Workload
from variants.ops import entmax as ops
from variants.ops.entmax import entmax, entmax_attention, threshold
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [
    {"learn_alpha": True, "alpha": 1.3},
    {"alpha": 2},
    {"alpha": 1.9},
    {"alpha": 1.05},
]

CPU = torch.device("cpu")


def make(tokens: int, **knobs: Any) -> Entmax:
    layer = make_layer(Entmax, EntmaxConfig(**knobs), dims_for(tokens, 2))
    assert isinstance(layer, Entmax)
    return layer


def sparsemax(scores: Tensor) -> Tensor:
    """The Euclidean projection onto the simplex, by sorting (Martins 2016, arXiv:1602.02068, Algorithm 1)."""
    ordered = scores.sort(-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1)
    sums = ordered.cumsum(-1)
    size = (1 + rank * ordered > sums).sum(-1, keepdim=True)
    return (scores - (sums.gather(-1, size - 1) - 1) / size).clamp(min=0)


def entmax15(scores: Tensor) -> Tensor:
    """Exact 1.5-entmax by sorting (Peters 2019, Algorithm 2)."""
    ordered = (scores / 2).sort(-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1)
    mean, square = ordered.cumsum(-1) / rank, ordered.square().cumsum(-1) / rank
    tau = mean - ((1 - rank * (square - mean.square())) / rank).clamp(min=0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (scores / 2 - tau.gather(-1, size - 1)).clamp(min=0).square()


@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_weights_are_those_of_the_exact_algorithms(spread: float) -> None:
    scores = spread * numbers(3, 2, 7, 50).detach()
    for alpha, exact in ((2.0, sparsemax), (1.5, entmax15)):
        weights = exact(scores)
        assert difference(entmax(scores, alpha), weights) <= 1e-12
        assert difference(entmax(scores, torch.full((2, 1, 1), alpha, dtype=scores.dtype)), weights) <= 1e-12
        assert (weights == 0).any()


def test_the_projection_onto_the_simplex_is_the_nearest_point() -> None:
    scores = numbers(40, 5).detach()
    nearest = (entmax(scores, 2.0) - scores).square().sum(-1)
    for seed in range(20):
        other = numbers(40, 5, seed=seed).detach().abs()
        assert (nearest <= (other / other.sum(-1, keepdim=True) - scores).square().sum(-1)).all()


@pytest.mark.parametrize("alpha", [1.001, 1.1, 1.5, 1.75, 2.0])
def test_the_threshold_is_exact_for_any_scores(alpha: float) -> None:
    """Also for equal ones, for two clusters, and for scores that are near the largest at all scales."""
    far = -torch.logspace(-6, 1, 4000, dtype=torch.float64)
    rows = [
        torch.zeros(4000, dtype=torch.float64),
        far,
        far * 1e4,
        torch.where(far < -1, -0.5, 0.0),
        *(numbers(4000, seed=seed).detach() * spread for seed, spread in enumerate((0.01, 0.3, 1, 100))),
    ]
    z = torch.stack(rows)
    z = z - z.amax(-1, keepdim=True)
    m = 1 / (alpha - 1)
    total = (z - threshold(z, alpha)).clamp(min=0).pow(m).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-8 * m, atol=0)


def test_it_approaches_softmax() -> None:
    tokens = 40
    x = numbers(2, tokens, 16)
    errors = []
    for alpha in (1.5, 1.1, 1.01):
        layer = make(tokens, alpha=alpha)
        dense = oracle(layer, x, everything(tokens, causal=True))
        errors.append(difference(feed(layer, x, causal=True), dense))
    assert all(b < a / 3 for a, b in pairwise(errors))
    scores = numbers(20, 30).detach()
    assert difference(entmax(scores, 1.0001), scores.softmax(-1)) < 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
def test_gradients_are_finite_differences(learnt: bool, causal: bool) -> None:
    q, k, v = (numbers(2, 2, 9, 4, seed=seed) for seed in (1, 2, 3))
    alpha = torch.tensor([1.2, 1.7], dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return entmax_attention(q, k, v, alpha if learnt else 1.5, causal=causal, device_type="cpu")

    given = [q, k, v, alpha if learnt else alpha.detach()]
    assert torch.autograd.gradcheck(attend, given)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.5, 2.0, None])
def test_pieces_give_what_one_piece_gives(
    monkeypatch: pytest.MonkeyPatch, alpha: float | None, causal: bool
) -> None:
    q, k, v = (numbers(2, 3, 45, 4, seed=seed) for seed in (1, 2, 3))
    by_head = torch.tensor([1.1, 1.5, 1.9], dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        y = entmax_attention(q, k, v, alpha or by_head, causal=causal, device_type="cpu")
        given = [q, k, v] if alpha else [q, k, v, by_head]
        return [y, *torch.autograd.grad(y, given, numbers(*y.shape, seed=4).detach())]

    whole = run()
    monkeypatch.setattr(ops, "FEWEST_QUERIES", 4)
    monkeypatch.setattr(ops, "PIECE", Sizes(200, 200))
    for got, want in zip(run(), whole, strict=True):
        assert difference(got, want) <= 1e-12


def test_heads_learn_their_alpha_and_begin_with_that_of_the_knob() -> None:
    layer = make(30, learn_alpha=True, alpha=1.3)
    torch.testing.assert_close(layer.alpha, torch.full((2,), 1.3, dtype=torch.float64))
    same = make(30, alpha=1.3)
    x = numbers(2, 30, layer.dims.d_model)
    assert difference(feed(layer, x, causal=True), feed(same, x, causal=True)) <= 1e-6
    feed(layer, x, causal=True).square().sum().backward()
    assert layer.alpha_logits.grad is not None
    assert layer.alpha_logits.grad.unique().numel() == 2
    with pytest.raises(
        ValueError, match=r"^alpha=2: allowed is above 1.01 and below 2 with learn_alpha=true$"
    ):
        EntmaxConfig(alpha=2, learn_alpha=True)


def test_most_weights_are_zero() -> None:
    """And a value with the weight 0 has no gradient."""
    v = numbers(1, 1, 300, 4)
    q, k = (3 * numbers(1, 1, 300, 4, seed=seed).detach() for seed in (2, 3))
    y = entmax_attention(q, k, v, 1.5, causal=False, device_type="cpu")
    (grad,) = torch.autograd.grad(y[:, :, 0].sum(), v)
    assert 0 < (grad != 0).any(-1).sum() < 100


class MaskedLate(Entmax):
    """A planted leak: later scores are removed after the threshold was computed from all of them."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> Any:
        q, k, v = self.projections.split(x, ctx.positions)
        weights = entmax(q @ k.mT * q.shape[-1] ** -0.5, 1.5).tril()
        return super().forward(x, ctx)._replace(y=self.projections.merge(weights @ v))


def leak_of(variant: type[Entmax]) -> float:
    with torch.random.fork_rng():
        return gates.leak(variant, EntmaxConfig(), dims_for(90, 2), 2, CPU)


def test_the_gate_finds_a_mask_after_the_threshold() -> None:
    assert leak_of(Entmax) <= gates.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        leak_of(MaskedLate)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear(causal: bool) -> None:
    peaks = []
    for tokens in (2**11, 2**13):
        dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=16, heads=1)
        with FakeTensorMode(), LiveStorage() as storage:
            layer = Entmax(EntmaxConfig(), dims)
            x = torch.randn(1, tokens, 16, requires_grad=True)
            layer(x, Context(causal=causal)).y.sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] < 2**13 * 2**13 * 4 / 4  # a quarter of the bytes of one matrix of weights
