"""Performer's causal sums in large matrix products: chunks of torch, and fla-core's kernels by a stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fla_stand_in
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants.attention.performer import Performer, PerformerConfig
from variants.base import Context, Workload
from variants.ops.features import linear_products, scaled_linear_attention
from variants.ops.features.causal_linear_attention import causal_favor
from variants.ops.features.scaled_features import ScaledFeatures
from variants.ops.features.scaled_linear_attention import chunked_favor
from variants.ops.recurrences import fla_products
from variants.ops.recurrences.fla_products import fla_favor
from variants.ops.tile_size import Sizes

CPU = torch.device("cpu")
FEATURES = ("softmax", "relu")
IMPLS: dict[str, Callable[..., Tensor]] = {"chunked": chunked_favor, "fla": fla_favor}
every_impl = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fla_stand_in.install(monkeypatch)


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=32, heads=2)


def results(
    layer: Performer, run: Callable[[Tensor], Tensor], x: Tensor, seed: int = 7
) -> tuple[Tensor, ...]:
    """Outputs, gradient of the input, gradients of the parameters."""
    x = x.clone().requires_grad_()
    y = run(x)
    torch.manual_seed(seed)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y.double()).to(y))


def assert_equals_reference(seq_len: int, batch: int, dtype: torch.dtype, **knobs: Any) -> None:
    torch.manual_seed(0)
    config = PerformerConfig(**{"n_features": 12, "chunk": 16, **knobs})
    layer = Performer(config, dims_of(seq_len, batch)).to(dtype)
    x, ctx = torch.randn(batch, seq_len, 32, dtype=dtype), Context(causal=True)
    got = results(layer, lambda x: layer(x, ctx).y, x)
    wide = layer.double()
    want = results(wide, lambda x: wide.reference(x, ctx), x.double())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 3), (15, 1), (16, 1), (17, 2), (70, 3)])
@pytest.mark.parametrize("segment", [40, 4096])
def test_chunks_equal_the_quadratic_form(
    features: str, seq_len: int, batch: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_linear_attention, "SEGMENT", Sizes(segment, segment))
    assert_equals_reference(seq_len, batch, torch.float64, features=features, impl="chunked")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 3), (15, 1), (16, 1), (17, 2), (70, 3)])
@pytest.mark.parametrize("segment", [40, 4096])
def test_kernels_of_fla_s_contract_equal_the_quadratic_form(
    features: str, seq_len: int, batch: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_linear_attention, "SEGMENT", Sizes(segment, segment))
    assert_equals_reference(seq_len, batch, torch.float32, features=features, impl="fla")


@settings(max_examples=15, deadline=None)
@given(seq_len=st.integers(1, 50), chunk=st.integers(1, 12), m=st.integers(1, 20), group=st.integers(1, 4))
def test_no_length_chunk_or_group_of_chunks_is_special(seq_len: int, chunk: int, m: int, group: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_products, "GROUP", group)
        assert_equals_reference(seq_len, 2, torch.float64, chunk=chunk, n_features=m, impl="chunked")


@pytest.mark.parametrize("seq_len", [1, 100, 128, 300])
def test_the_pieces_of_an_accelerator_equal_the_quadratic_form(seq_len: int) -> None:
    """All that is chosen for another device, run on the CPU."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, seq_len, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    directions, g = torch.randn(6, 8, dtype=torch.float64), torch.randn(2, 2, seq_len, 8, dtype=torch.float64)
    found = [
        torch.autograd.grad(run(*inputs, directions, True, 64, device), inputs, g)
        for run, device in ((chunked_favor, "cuda"), (causal_favor, "cpu"))
    ]
    torch.testing.assert_close(*found)


@every_impl
@pytest.mark.parametrize("features", FEATURES)
def test_the_gates_pass(impl: str, features: str) -> None:
    config = PerformerConfig(features=features, n_features=64, chunk=32, impl=impl)  # type: ignore[arg-type]
    gates.reference_error(Performer, config, dims_of(301, 2), 0, CPU, causal=True)
    assert gates.leak(Performer, config, dims_of(301, 2), 2, CPU) == 0


def attend(
    run: Callable[..., Tensor], dtype: torch.dtype, softmax: bool, norm: float = 8.0, tokens: int = 200
) -> list[Tensor]:
    """Outputs and gradients for heads of 64 channels, from numbers that bfloat16 represents."""
    source = torch.Generator().manual_seed(3)
    directions = torch.randn(128, 64, generator=source) * 64**-0.25
    q, k, v, g = (torch.randn(1, 2, tokens, 64, generator=source) for _ in range(4))
    q, k = (norm * torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
    y = run(*inputs, directions.to(torch.promote_types(dtype, torch.float32)), softmax, 16)
    return [y, *torch.autograd.grad(y, inputs, g.bfloat16().to(dtype))]


@every_impl
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("norm", [1.0, 8.0, 20.0])
def test_bfloat16_features_are_as_exact_as_their_dtype(impl: str, softmax: bool, norm: float) -> None:
    """Relative error of a whole tensor; bfloat16 rounds by up to 2^-9, and a gradient is a difference."""
    got = attend(IMPLS[impl], torch.bfloat16, softmax, norm)
    want = attend(causal_favor, torch.float64, softmax, norm)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert all(a.dtype == torch.bfloat16 for a in got)
    assert errors[0] < 2**-7
    assert max(errors) < (2**-5 if norm < 20 else 2**-4), errors


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [0.0, 32.0])
def test_norms_beyond_the_range_of_the_papers_features_are_exact(
    impl: str, dtype: torch.dtype, norm: float
) -> None:
    """At |k| = 32 the factor exp(−|k|²/2√D) of Lemma 1 is e^-64, for queries too."""
    got, *grads = attend(IMPLS[impl], dtype, True, norm)
    want, *_ = attend(causal_favor, torch.float64, True, norm)
    tolerance = 2**-5 if dtype == torch.bfloat16 else 1e-4
    assert (got.double() - want).norm() <= tolerance * want.norm()
    assert all(g.isfinite().all() for g in grads)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_beyond_the_limit_give_nan_and_no_wrong_number(impl: str, dtype: torch.dtype) -> None:
    lost = []
    for norm in (34.0, 36.0, 38.0, 40.0, 44.0, 50.0, 100.0, 1000.0):
        got, *_ = attend(IMPLS[impl], dtype, True, norm)
        want, *_ = attend(causal_favor, torch.float64, True, norm)
        exact = got.isfinite()
        lost.append(int((~exact).sum()))
        tolerance = 2**-4 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(got.double()[exact], want[exact], rtol=tolerance, atol=4 * tolerance)
    assert lost == sorted(lost)
    assert lost[-1] == got.numel()


@every_impl
@pytest.mark.parametrize("features", FEATURES)
def test_in_bfloat16_no_later_token_moves_an_earlier_output(impl: str, features: str) -> None:
    torch.manual_seed(0)
    config = PerformerConfig(features=features, n_features=12, chunk=16, impl=impl)  # type: ignore[arg-type]
    layers = [Performer(config, dims_of(150, 2)) for _ in range(3)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                x = x + layer(x, Context(causal=True)).y
        return x

    x = torch.randn(2, 150, 32)
    before = run(x)
    for cut in (1, 2, 15, 16, 17, 75, 149):
        changed = x.clone()
        changed[:, cut:] = 10 * torch.randn_like(changed[:, cut:])
        assert torch.equal(run(changed)[:, :cut], before[:, :cut])


@pytest.mark.parametrize("norm", [0.5, 8.0, 10.0, 12.0, 24.0, 40.0])
def test_features_and_weights_are_the_papers(norm: float) -> None:
    """φ(k) · weight = exp(ω·k − |k|²/2√D), below and above the bend of the level."""
    torch.manual_seed(0)
    directions = torch.randn(32, 16, dtype=torch.float64) * 16**-0.25
    k = norm * torch.nn.functional.normalize(torch.randn(3, 5, 16, dtype=torch.float64), dim=-1)
    features = ScaledFeatures.of_dtype(directions, True, torch.float64)
    found = torch.empty(3, 5, 32, dtype=torch.float64)
    weights = features.put(found, k, weighted=True)
    assert weights is not None
    want = (k @ directions.mT - k.square().sum(-1, keepdim=True) / (2 * 16**0.5)).exp()
    torch.testing.assert_close(found * weights, want)
    if norm / 16**0.25 < 2 * math.sqrt(2 * math.log(32)):
        torch.testing.assert_close(weights, torch.ones_like(weights))
    assert (weights <= 1 + 1e-12).all()


# --- what a planner sees ------------------------------------------------------------------------------


def planned(impl: str, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> CountFlops:
    with FakeTensorMode(), CountFlops() as counter:
        q, k, v = (torch.randn(1, 4, seq_len, 64, dtype=dtype, requires_grad=True) for _ in range(3))
        IMPLS[impl](q, k, v, torch.randn(128, 64), True, 64, "cuda").sum().backward()
    return counter


@every_impl
def test_launches_do_not_depend_on_the_length(impl: str) -> None:
    assert planned(impl, 2**13).counts.launches == planned(impl, 2**18).counts.launches


@every_impl
def test_work_and_traffic_grow_with_the_length(impl: str) -> None:
    short, long = (planned(impl, n).counts for n in (2**14, 2**17))
    assert long.flops == pytest.approx(8 * short.flops, rel=0.02)
    assert long.bytes_moved == pytest.approx(8 * short.bytes_moved, rel=0.02)


def test_memory_is_that_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer sequence than a segment adds its own tensors, and no features."""
    monkeypatch.setattr(scaled_linear_attention, "SEGMENT", Sizes(2**15, 2**15))
    peaks = []
    for seq_len in (2**15, 2**17):
        with FakeTensorMode(), LiveStorage() as storage:
            q, k, v = (torch.randn(1, 1, seq_len, 64, requires_grad=True) for _ in range(3))
            chunked_favor(q, k, v, torch.randn(256, 64), True, 64, "cuda").sum().backward()
        peaks.append(storage.peak - 8 * 4 * seq_len * 64)
    features = 4 * 2**15 * 256
    assert peaks[1] - peaks[0] < features / 2


SHAPES: dict[str, Callable[[], Any]] = {
    "states": lambda: fla_products._states(k(), v(), state(), 16),
    "outputs": lambda: fla_products._outputs(q(), k(), v(), states(), 16),
    "states_backward": lambda: fla_products._states_backward(v(), state(), q(), 16),
    "features_backward": lambda: fla_products._features_backward(v(), q(), k(), v(), states(), states(), 16),
    "values_backward": lambda: fla_products._values_backward(v(), q(), k(), states(), 16),
}


def k() -> Tensor:
    return torch.randn(2, 40, 3, 6, dtype=torch.bfloat16)


def v() -> Tensor:
    return torch.randn(2, 40, 3, 10, dtype=torch.bfloat16)


def state() -> Tensor:
    return torch.randn(2, 3, 6, 10)


def states() -> Tensor:
    return torch.randn(2, 3, 3, 6, 10, dtype=torch.bfloat16)


q = k


@pytest.mark.parametrize("operator", SHAPES)
def test_a_shape_function_agrees_with_its_kernel(operator: str) -> None:
    real = SHAPES[operator]()
    with FakeTensorMode():
        fake = SHAPES[operator]()
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_flops_of_the_kernels_are_those_of_the_same_products_of_torch() -> None:
    """One chunk of all tokens, no sums before it: what is left are the products that both have."""
    tokens, features, channels = 64, 32, 24
    with FakeTensorMode(), CountFlops() as kernels:
        q, k = (torch.randn(1, tokens, 1, features) for _ in range(2))
        v, before = torch.randn(1, tokens, 1, channels), torch.randn(1, 1, 1, features, channels)
        fla_products._states(k, v, before[0], tokens)
        fla_products._outputs(q, k, v, before, tokens)
        fla_products._states_backward(v, before[0], q, tokens)
        fla_products._features_backward(v, q, k, v, before, before, tokens)
        fla_products._values_backward(v, q, k, before, tokens)
    with FakeTensorMode(), CountFlops() as products:
        q, k, v, h = (torch.randn(*s) for s in ((64, 32), (64, 32), (64, 24), (32, 24)))
        _ = k.T @ v  # the states
        _ = q @ h + (q @ k.T) @ v  # the outputs
        _ = q.T @ v  # the gradients of the states
        _ = v @ h.T + (v @ v.T) @ k, v @ h.T + v.new_ones(64, 64) @ q  # those of the features
        _ = k @ h + (k @ q.T) @ v  # those of the values
    assert kernels.total == products.total


# --- knobs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["chunked", "fla"])
def test_there_is_no_bidirectional_form(impl: str) -> None:
    config = PerformerConfig(impl=impl)  # type: ignore[arg-type]
    reason = Performer.unsupported(config, dims_of(64), causal=False)
    assert reason == f"impl={impl} has no bidirectional form"
    assert Performer.unsupported(config, dims_of(64), causal=True) is None
    assert Performer.unsupported(PerformerConfig(), dims_of(64), causal=False) is None


def test_auto_is_plain_on_a_cpu_and_never_untried() -> None:
    assert Performer.resolve_impl(PerformerConfig(), "cpu") == "plain"
    assert Performer.resolve_impl(PerformerConfig(), "cuda") == "chunked"
    assert Performer.IMPLS["fla"].untried


@pytest.mark.parametrize(("knob", "value"), [("chunk", 8), ("chunk", 128), ("n_features", 33)])
def test_sizes_that_the_kernels_lack_are_refused(knob: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{knob}={value}: allowed is .* with impl=fla"):
        PerformerConfig(impl="fla", **{knob: value})
    PerformerConfig(**{knob: value})


def test_a_machine_without_the_kernels_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA device" in str(fla_products.missing_fla(CPU))
    cuda = torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "fla-core" in str(fla_products.missing_fla(cuda))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.1")
    assert fla_products.missing_fla(cuda) == "impl=fla needs fla-core 0.6, not 0.5.1"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.2")
    assert fla_products.missing_fla(cuda) is None
