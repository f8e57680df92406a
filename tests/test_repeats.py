"""Functions that a plan runs once, and repeats afterwards."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiers import slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.measure import predict, step
from bench.measure.flops import CountFlops
from bench.measure.memoize import MemoizingStorage
from bench.measure.memory import LiveStorage
from variants.ops.memoizable import repeatable

SOME = ("compressive", "performer")
"""One with segments and one with pieces, by default."""
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def spec_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["measure=plan", *overrides])).spec


@pytest.mark.parametrize("activations", ["reversible", *slow("selective")])
@pytest.mark.parametrize("variant", [*SOME, *slow(*(v for v in variants.names() if v not in SOME))])
def test_a_plan_is_the_same_as_without(
    variant: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure, each phase's peak and its split among them."""
    spec = spec_of(f"variant={variant}", f"activations={activations}", "seq_len=400", "depth=2")
    got = predict.Prediction(spec).predict()
    monkeypatch.setattr(step, "MemoizingStorage", LiveStorage)
    assert got == predict.Prediction(spec).predict()


def operations(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """How many a plan dispatches."""
    dispatch, count = LiveStorage.__torch_dispatch__, itertools.count()

    def counted(*args: Any, **options: Any) -> Any:
        next(count)
        return dispatch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LiveStorage, "__torch_dispatch__", counted)
        predict.Prediction(spec_of(*overrides)).predict()
    return next(count)


@pytest.mark.parametrize("variant", ["reformer", *slow("performer", "routing", "sparse_fixed")])
@pytest.mark.slow
def test_layers_after_the_first_cost_a_plan_little(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These dispatch hundreds to thousands of operations a layer, in pieces."""
    two, ten = (operations(monkeypatch, f"variant={variant}", "seq_len=8192", f"depth={n}") for n in (2, 10))
    assert ten < 3.5 * two


@pytest.mark.parametrize("variant", [*SOME, *slow(*(v for v in variants.mixers() if v not in SOME))])
@pytest.mark.slow
def test_length_does_not_cost_a_plan_more(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces grow with the sequence, and of segments a few tell what all would take."""
    given = f"variant={variant}", "depth=1"
    short, long = (operations(monkeypatch, *given, f"seq_len={n}") for n in (2**16, 2**20))
    assert long <= 1.5 * short
    assert long <= 20_000


# --- one piece of work -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Knobs:
    width: int
    mask: Tensor


CALLS: list[str] = []


@repeatable
def work(x: Tensor, knobs: _Knobs, *, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Temporaries, a product, a view of an argument, an argument, a view of what it made, and a number."""
    CALLS.append("work")
    large = x[:, None] * torch.ones(knobs.width, 1, dtype=x.dtype)
    made = (large.sum(1) @ x.T) * scale
    return made, x[1:], x, made.T[1:], scale


def test_work_is_done_once_and_played_back() -> None:
    CALLS.clear()
    with FakeTensorMode(), MemoizingStorage() as storage, CountFlops() as counter:
        x, knobs = torch.empty(8, 4)[2:], _Knobs(16, torch.empty(3))
        results, figures, splits = [], [], []
        for _ in range(3):
            storage.reset_peak()
            before, seen, workspace = storage.live, storage.seen, storage.labelled["workspace"]
            results.append(work(x, knobs, scale=2.0))
            storage.label_since(seen, "activations")
            figures.append((storage.peak - before, storage.live - before))
            splits.append(storage.at_peak["workspace"] - workspace)
            storage.label(results[-1][0], "gradients")
        assert CALLS == ["work"]
        assert counter.total == 3 * 2 * 6 * 6 * 4
        large, product = 4 * 6 * 16 * 4, 4 * 6 * 6  # the product and its multiple, at the end
        assert figures == [(large + 2 * product, product)] * 3
        assert splits == [splits[0]] * 3
        for again in results[1:]:
            for a, b in zip(results[0][:-1], again[:-1], strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert a.storage_offset() == b.storage_offset()
            made, view, itself, made_view, scale = again
            assert itself is x
            assert view.untyped_storage() is x.untyped_storage()
            assert made_view.untyped_storage() is made.untyped_storage()
            assert scale == 2.0
        before = storage.live
        del results, again, made, view, made_view, a, b
        assert before - storage.live == 3 * product


@pytest.mark.parametrize(
    "other",
    [
        (torch.Size([6, 4]), torch.float64, 16, 3),
        (torch.Size([7, 4]), torch.float32, 16, 3),
        (torch.Size([6, 4]), torch.float32, 17, 3),
        (torch.Size([6, 4]), torch.float32, 16, 5),
    ],
    ids=["dtype", "shape", "value in a dataclass", "shape in a dataclass"],
)
def test_other_arguments_are_other_work(other: tuple[torch.Size, torch.dtype, int, int]) -> None:
    CALLS.clear()
    shape, dtype, width, masked = other
    with FakeTensorMode(), MemoizingStorage():
        work(torch.empty(6, 4), _Knobs(16, torch.empty(3)), scale=2.0)
        work(torch.empty(shape, dtype=dtype), _Knobs(width, torch.empty(masked)), scale=2.0)
    assert CALLS == ["work", "work"]


def test_work_inside_work_is_played_back_too() -> None:
    @repeatable
    def outer(x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = work(x, _Knobs(16, x), scale=2.0)[0] @ x
        return x

    with FakeTensorMode(), MemoizingStorage(), CountFlops() as counter:
        CALLS.clear()
        outer(torch.empty(6, 4), 3)
        assert CALLS == ["work"]
        outer(torch.empty(6, 4), 3)
        assert counter.total == 2 * 3 * (2 * 6 * 6 * 4 + 2 * 6 * 6 * 4)


def test_work_that_keeps_tensors_elsewhere_is_refused() -> None:
    kept = []

    @repeatable
    def hoards(x: Tensor) -> Tensor:
        kept.append(x + 1)
        return x * 2

    message = re.escape("hoards is not repeatable: it stores 1 tensors elsewhere")
    with (
        FakeTensorMode(),
        MemoizingStorage(),
        pytest.raises(RuntimeError, match=message),
    ):
        hoards(torch.empty(3))


@repeatable
class _Halves(torch.autograd.Function):
    """The first half of x, doubled, and the second, which has no gradient; an attribute beside tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        CALLS.append("forward")
        first, second = (half.clone() for half in x.chunk(2))
        ctx.save_for_backward(second)
        ctx.times = 2.0
        ctx.mark_non_differentiable(second)
        return first * ctx.times, second

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        CALLS.append("backward")
        (second,) = ctx.saved_tensors
        return torch.cat([grad * ctx.times, torch.zeros_like(second)])


def test_a_function_that_is_played_back_says_which_outputs_have_a_gradient() -> None:
    CALLS.clear()
    with FakeTensorMode(), MemoizingStorage():
        for _ in range(2):
            x = torch.empty(6, requires_grad=True)
            first, second = _Halves.apply(x)
            assert first.requires_grad
            assert not second.requires_grad
            first.sum().backward()
            assert x.grad is not None
    assert CALLS == ["forward", "backward"]


def test_without_a_memoizer_nothing_changes() -> None:
    CALLS.clear()
    x = torch.rand(6, 4)
    for _ in range(2):
        made = work(x, _Knobs(16, x), scale=2.0)[0]
    torch.testing.assert_close(made, 32 * x @ x.T)
    assert CALLS == ["work", "work"]
