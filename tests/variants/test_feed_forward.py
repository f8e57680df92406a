"""What every feed-forward layer promises. Nothing here names one but the last test."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch
from oracles import D_MODEL, EXACT, assert_same, difference, numbers

from bench.measure import gates
from bench.measure.flops import CountFlops
from variants import feed_forward
from variants.base import Cost, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.feed_forward.mlp import MLP, MLPConfig


def layers() -> list[type[FeedForward]]:
    """The one class of every module of `variants.feed_forward`."""
    found = []
    for info in pkgutil.iter_modules(feed_forward.__path__):
        module = importlib.import_module(f"{feed_forward.__name__}.{info.name}")
        (layer,) = (
            thing
            for thing in vars(module).values()
            if inspect.isclass(thing)
            and issubclass(thing, FeedForward)
            and thing.__module__ == module.__name__
        )
        found.append(layer)
    return found


every_layer = pytest.mark.parametrize("layer", layers())


def made(layer: type[FeedForward]) -> FeedForward:
    torch.manual_seed(0)
    return layer(layer.Config(), D_MODEL).double()


@every_layer
def test_config_is_frozen_and_says_its_paper(layer: type[FeedForward]) -> None:
    assert issubclass(layer.Config, FeedForwardConfig)
    assert layer.Config.__dataclass_params__.frozen
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(layer.Config))
    assert layer.paper.strip()
    assert (layer.__doc__ or "").strip()
    assert layer.unsupported(layer.Config(), D_MODEL) is None


@every_layer
def test_forward_is_the_reference(layer: type[FeedForward]) -> None:
    one, x = made(layer), numbers(2, 9, D_MODEL)
    out = one(x)
    assert isinstance(out, FFOut)
    assert_same(lambda: one(x).y, lambda: one.reference(x), [x, *one.parameters()])
    assert gates.feed_forward_error(layer, layer.Config(), D_MODEL, torch.device("cpu")) < 1e-5


@every_layer
def test_every_token_goes_through_by_itself(layer: type[FeedForward]) -> None:
    one, x = made(layer).eval(), numbers(2, 9, D_MODEL).detach()
    parts = torch.cat([one(x[:, t : t + 1]).y for t in range(9)], dim=1)
    assert difference(one(x).y, parts) <= EXACT


@every_layer
def test_dispatched_flops_are_those_of_the_formula(layer: type[FeedForward]) -> None:
    with CountFlops() as counter, torch.no_grad():
        made(layer)(numbers(3, 9, D_MODEL))
    work = Workload(batch_size=3, seq_len=9, d_model=D_MODEL, heads=1, causal=True)
    cost = layer(layer.Config(), D_MODEL).cost(work)
    assert counter.total == cost.total
    assert cost.mixing == 0, "no token reads another"


def test_the_mlp_costs_two_products() -> None:
    work = Workload(batch_size=1, seq_len=5, d_model=4, heads=1, causal=True)
    assert MLP(MLPConfig(mult=3), 4).cost(work) == Cost({"feed_forward": 5 * 2 * 2 * 3 * 4 * 4})
    with pytest.raises(ValueError, match=r"^mult=0: allowed is "):
        MLPConfig(mult=0)


def test_a_gate_finds_a_wrong_layer() -> None:
    class Wrong(MLP):
        def forward(self, x: torch.Tensor) -> FFOut:
            return FFOut(super().forward(x).y * 1.001)

    with pytest.raises(gates.GateFailed, match="feed-forward"):
        gates.feed_forward_error(Wrong, MLPConfig(), D_MODEL, torch.device("cpu"))
