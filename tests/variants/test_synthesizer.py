"""Synthesised attention against scores written out, what it reduces to, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, everything, feed, make_layer, numbers
from torch import Tensor, einsum

from bench.measure import causality_gate
from bench.measure.gate_failed import GateFailed
from variants.attention.synthesizer import Synthesizer, SynthesizerConfig
from variants.base import Clock, Context
from variants.ops import learnt_weights
from variants.ops.learnt_weights import mixed

SMALL: list[dict[str, Any]] = [
    {"kind": "factorised", "rank": 3},
    {"kind": "random"},
]
KINDS = ("dense", "random", "factorised")


def layer_of(tokens: int, **knobs: Any) -> Synthesizer:
    layer = make_layer(Synthesizer, SynthesizerConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, Synthesizer)
    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "longest"), [(1, 5), (7, 7), (20, 31)])
def test_weights_are_the_softmax_of_the_scores(kind: str, tokens: int, longest: int, causal: bool) -> None:
    layer, x = layer_of(longest, kind=kind, rank=3), numbers(2, tokens, 16)

    def by_hand() -> Tensor:
        values = einsum("btc,dc->btd", x, layer.value.weight).unflatten(-1, (2, -1))
        rows = []
        for i in range(tokens):
            if kind == "dense":
                hidden = einsum("bc,dc->bd", x[:, i], layer.hidden.weight).clamp(min=0).unflatten(-1, (2, -1))
                scores = einsum("bhd,hjd->bhj", hidden, layer.scores)
            elif kind == "random":
                scores = layer.scores[None, :, i]
            else:
                scores = einsum("hk,hjk->hj", layer.rows[:, i], layer.columns)[None]
            read = range(i + 1) if causal else range(tokens)
            weights = scores[:, :, : len(read)].exp()
            weights = (weights / weights.sum(-1, keepdim=True)).expand(2, -1, -1)
            rows.append(einsum("bhj,bjhd->bhd", weights, values[:, : len(read)]).flatten(1))
        return einsum("btc,dc->btd", torch.stack(rows, dim=1), layer.out.weight)

    assert_same(lambda: feed(layer, x, causal=causal), by_hand, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_scores_that_are_equal_give_the_mean(causal: bool) -> None:
    for kind in KINDS:
        layer = layer_of(9, kind=kind)
        with torch.no_grad():
            for name in ("scores", "rows"):
                if hasattr(layer, name):
                    getattr(layer, name).zero_()
        x = numbers(2, 9, 16).detach()
        weights = everything(9, causal=causal).double()
        mean = (weights / weights.sum(-1, keepdim=True)) @ x
        assert difference(feed(layer, x, causal=causal), layer.out(layer.value(mean))) <= EXACT


def test_random_scores_of_full_rank_can_be_factorised() -> None:
    random, factorised = layer_of(8, kind="random"), layer_of(8, kind="factorised", rank=8)
    with torch.no_grad():
        factorised.rows.copy_(random.scores)
        factorised.columns.copy_(torch.eye(8).expand(2, 8, 8))
        factorised.value.load_state_dict(random.value.state_dict())
        factorised.out.load_state_dict(random.out.state_dict())
    x = numbers(2, 8, 16).detach()
    assert difference(feed(factorised, x, causal=True), feed(random, x, causal=True)) <= EXACT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("factorised", [True, False])
def test_pieces_do_not_change_the_result(
    factorised: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, left = numbers(2, 3, 37, 4), numbers(3, 40, 2 if factorised else 40, seed=2)
    right = numbers(3, 40, 2, seed=3) if factorised else None
    given = [t for t in (v, left, right) if t is not None]

    def run() -> Tensor:
        return mixed(v, left, right, is_causal=causal, device_type="cpu")

    whole = [run()]
    whole += torch.autograd.grad(whole[0].square().sum(), given)
    monkeypatch.setattr(learnt_weights, "MOST_PIECES", 100)
    monkeypatch.setattr(learnt_weights, "SCORES", type("Sizes", (), {"on": lambda self, _: 37 * 5})())
    pieces = [run()]
    pieces += torch.autograd.grad(pieces[0].square().sum(), given)
    for got, want in zip(pieces, whole, strict=True):
        assert difference(got, want) <= EXACT


class SoftmaxBeforeMask(Synthesizer):
    """The mask is applied after the softmax, whose sum then contains the scores of later keys."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> Any:
        hidden = self._by_head(x, self.hidden.weight).relu()
        keys = self._by_head(x, self.hidden.weight) if x.shape[1] > 1 else self.scores[:, :1]
        weights = (hidden @ keys.mT).softmax(-1).tril()
        y = weights @ self._by_head(x, self.value.weight)
        return super().forward(x, ctx)._replace(y=self.out(y.transpose(1, 2).flatten(2)))


def test_the_gate_finds_a_sum_over_later_keys() -> None:
    config, cpu = SynthesizerConfig(), torch.device("cpu")
    for kind in KINDS:
        knobs = SynthesizerConfig.of({"kind": kind})
        assert (
            causality_gate.leak(Synthesizer, knobs, dims_for(60, 2), 2, cpu) <= causality_gate.LEAK_TOLERANCE
        )
    with pytest.raises(GateFailed, match="causality gate"):
        causality_gate.leak(SoftmaxBeforeMask, config, dims_for(60, 2), 2, cpu)


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_sequence_is_refused_with_both_lengths(kind: str) -> None:
    layer, x = layer_of(40, kind=kind), torch.zeros(1, 41, 16).double()
    for run in (layer.forward, layer.reference):
        with pytest.raises(ValueError, match=r"41 tokens.*at most 40"):
            run(x, Context(causal=True))
    with pytest.raises(ValueError, match=r"41 tokens.*at most 40"):
        layer.init_state(1, 41, clock=Clock(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "grown"), [("dense", 40 * 16), ("random", 2 * 40**2), ("factorised", 2 * 2 * 40 * 8)]
)
def test_parameters_grow_with_the_longest_sequence(kind: str, grown: int) -> None:
    layer = layer_of(40, kind=kind)
    fixed = (3 if kind == "dense" else 2) * 16**2
    assert sum(p.numel() for p in layer.parameters()) == fixed + grown


@pytest.mark.parametrize("kind", ["random", "factorised"])
def test_weights_of_random_scores_ignore_the_tokens(kind: str) -> None:
    """The layer is linear in its input."""
    layer = layer_of(12, kind=kind)
    a, b = numbers(1, 12, 16).detach(), numbers(1, 12, 16, seed=2).detach()
    summed = feed(layer, a, causal=True) + feed(layer, b, causal=True)
    assert difference(feed(layer, a + b, causal=True), summed) <= EXACT
