"""Gated recurrences by fla-core's kernels: the operators and their layers, by a stand-in of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fla_scan_stand_in
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure import gates
from bench.measure.flops import CountFlops
from variants.base import Context, Workload
from variants.ops.recurrences import fla_scans
from variants.ops.recurrences.channel_scan import channel_recurrence
from variants.ops.recurrences.delta_rule import recurrence
from variants.ops.recurrences.fla_kernels import KERNELS
from variants.ops.recurrences.fla_scans import missing_scan, scan

CPU = torch.device("cpu")
LAYERS = {"gla": "gla", "delta_net": "delta_rule", "gated_delta_net": "gated_delta_rule", "kda": "kda"}
"""Variant → its kernel."""
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fla_scan_stand_in.install(monkeypatch)


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def numbers(
    kernel: str, seq_len: int, dtype: torch.dtype = torch.float32, keys: int = 5, values: int = 7
) -> list[Tensor | None]:
    """q, k, v, β and the logarithms of the decays; queries and keys are in float32."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, seq_len, keys) for _ in range(2))
    v = torch.randn(2, 3, seq_len, values).to(dtype)
    beta = None if kernel == "gla" else torch.rand(2, 3, seq_len, 1)
    channels = {"delta_rule": 0, "gated_delta_rule": 1}.get(kernel, keys)
    logs = -torch.rand(2, 3, seq_len, channels) if channels else None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, beta, logs)]


def gradients(y: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    """Outputs, and gradients of the inputs."""
    torch.manual_seed(1)
    given = [x for x in inputs if x is not None]
    return [y, *torch.autograd.grad(y, given, torch.randn(y.shape).to(y.dtype))]


@every_kernel
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("seq_len", [1, 70])
def test_an_operator_is_the_recurrence(kernel: str, unit: bool, seq_len: int) -> None:
    inputs = numbers(kernel, seq_len)
    with torch.no_grad():
        for x in inputs[:2]:
            assert x is not None
            x.mul_(0.5)  # writes do not overshoot
    q, k, v, beta, logs = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    got = scan(kernel, q, k, v, beta, logs, chunk=64, dtype=torch.float32, unit=unit)
    if unit:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if beta is None:
        assert logs is not None
        want = channel_recurrence(q, k, v, logs)
    else:
        want = recurrence(q, k, v, beta, logs)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 2), (70, 1)])
def test_a_layer_equals_its_reference(name: str, seq_len: int, batch: int) -> None:
    torch.manual_seed(0)
    variant = variants.load_mixer(name)
    layer = variant(variant.Config(impl="fla"), dims_of(seq_len, batch))
    x, ctx = torch.randn(batch, seq_len, 16, requires_grad=True), Context(causal=True)
    parameters: list[Tensor | None] = [x, *layer.parameters()]
    got, want = (gradients(y, parameters) for y in (layer(x, ctx).y, layer.reference(x, ctx)))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@every_layer
def test_the_gates_pass(name: str) -> None:
    variant = variants.load_mixer(name)
    config = variant.Config(impl="fla")
    gates.reference_error(variant, config, dims_of(75, 2), 0, CPU, causal=True)
    assert gates.leak(variant, config, dims_of(75, 2), 2, CPU) == 0


def test_a_leak_of_a_kernel_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are those of the next token."""
    forward = KERNELS["gla"].forward

    def shifted(*args: Any) -> Tensor:
        return forward(*args).roll(-1, 1)

    monkeypatch.setitem(KERNELS, "gla", KERNELS["gla"]._replace(forward=shifted))
    variant = variants.load_mixer("gla")
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(variant, variant.Config(impl="fla"), dims_of(75, 2), 2, CPU)


@every_layer
def test_products_have_the_dtype_of_the_projections(name: str) -> None:
    """The stand-in demands that queries, keys and values have one dtype, and others float32."""
    torch.manual_seed(0)
    variant = variants.load_mixer(name)
    layer = variant(variant.Config(impl="fla"), dims_of(20))
    x, ctx = torch.randn(1, 20, 16), Context(causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, ctx).y
    assert y.dtype == torch.bfloat16
    want = layer.reference(x, ctx)
    assert (y.float() - want).norm() < 2**-4 * want.norm()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# --- what a planner sees ------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("unit", [False, True])
def test_shape_functions_agree_with_the_kernels(kernel: str, unit: bool) -> None:
    def call() -> list[Tensor]:
        q, k, v, beta, logs = (None if x is None else x.detach() for x in numbers(kernel, 40))
        assert q is not None
        assert k is not None
        assert v is not None
        q, k, v = (x.transpose(1, 2).bfloat16().contiguous() for x in (q, k, v))
        if unit:
            q, k = q.float(), k.float()
        beta = None if beta is None else beta[..., 0].transpose(1, 2).contiguous()
        if logs is not None:
            logs = logs.transpose(1, 2).contiguous()
            logs = logs[..., 0].contiguous() if kernel == "gated_delta_rule" else logs
        options = beta, logs, kernel, 64, unit
        return [
            fla_scans._scan(q, k, v, *options),
            *fla_scans._scan_backward(torch.ones_like(v), q, k, v, *options),
        ]

    real = call()
    with FakeTensorMode():
        fake = call()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def planned(kernel: str, seq_len: int) -> CountFlops:
    with FakeTensorMode(), CountFlops() as counter:
        q, k, v, beta, logs = numbers(kernel, seq_len, torch.bfloat16, 32, 64)
        assert q is not None
        assert k is not None
        assert v is not None
        y = scan(kernel, q, k, v, beta, logs, chunk=64, dtype=torch.bfloat16, unit=kernel != "gla")
        y.sum().backward()
    return counter


@every_kernel
def test_a_plan_has_few_launches_and_linear_work(kernel: str) -> None:
    short, long = (planned(kernel, n).counts for n in (2**14, 2**20))
    assert short.launches == long.launches < 60
    assert long.flops == 64 * short.flops
    assert long.bytes_moved == pytest.approx(64 * short.bytes_moved, rel=0.02)


C, K, V = 64, 32, 24
"""Tokens, channels of keys and of values of the one chunk whose products are counted."""


def blocks(a: Tensor, b: Tensor) -> None:
    """Products of the rows of a with those rows of b that are in the same block of 16 or an earlier one."""
    for end in range(16, C + 1, 16):
        _ = a[end - 16 : end] @ b[:end].mT


def inverse(of: Tensor) -> None:
    """Of a triangular matrix of four blocks, whose diagonal ones are inverted elementwise: a block below is
    −A_ii⁻¹ (Σ A_ij A_jk⁻¹)."""
    block = of[:16, :16]
    for distance in (1, 2, 3):
        for _ in range(4 - distance):
            for _ in range(distance + 1):
                _ = block @ block


def gla_passes(
    keys: Tensor, values: Tensor, pairs: Tensor, state: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What runs forward and backward."""

    def forward() -> None:
        _ = keys.mT @ values  # states
        blocks(keys, keys)  # weights
        _ = keys @ state, pairs @ values

    def backward() -> None:
        _ = keys.mT @ values
        blocks(keys, keys)
        _ = keys.mT @ values  # gradients of the states
        _ = keys @ state, pairs.mT @ values  # of the values
        _ = values @ values.mT  # of the weights
        blocks(keys, keys)  # of queries and keys
        blocks(keys, keys)
        _ = values @ state.mT, values @ state.mT

    return forward, backward


def systems(kernel: str, keys: Tensor, values: Tensor, pairs: Tensor) -> None:
    """Overlaps of keys, the inverse, and the differences to be written."""
    if kernel == "kda":
        blocks(keys, keys)  # weights, which are kept
    if kernel == "delta_rule":
        _ = keys @ keys.mT
    else:
        blocks(keys, keys)
    inverse(pairs)
    _ = pairs @ keys, pairs @ values


def delta_passes(
    kernel: str, keys: Tensor, values: Tensor, pairs: Tensor, state: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What runs forward and backward."""
    whole = [] if kernel == "kda" else [1]  # weights of all pairs, computed where they are needed

    def forward() -> None:
        systems(kernel, keys, values, pairs)
        _ = keys @ state, keys.mT @ values  # states
        _ = keys @ state, pairs @ values, [keys @ keys.mT for _ in whole]  # outputs

    def backward() -> None:
        systems(kernel, keys, values, pairs)
        _ = pairs @ keys, pairs @ values  # the differences again
        _ = keys @ state, keys.mT @ values
        _ = [keys @ keys.mT for _ in whole], pairs.mT @ values, values @ values.mT  # values, weights
        _ = keys @ state, keys.mT @ values, keys.mT @ values  # gradients of the states
        _ = values @ state.mT, values @ state.mT, values @ state.mT  # of queries, keys and differences
        _ = values @ values.mT, pairs.mT @ values, keys @ keys.mT, pairs.mT @ keys  # of the inverse
        _ = pairs @ pairs, pairs @ pairs
        if kernel == "kda":
            for _ in range(4):
                blocks(keys, keys)  # queries and keys of the weights, and of the overlaps
        else:
            _ = pairs @ keys, pairs.mT @ keys  # queries and keys of the weights
            _ = pairs @ keys, pairs.mT @ keys  # keys of the overlaps
        if kernel == "gated_delta_rule":
            _ = keys @ keys.mT  # decays of the overlaps

    return forward, backward


@every_kernel
def test_flops_are_those_of_the_products_of_a_chunk(kernel: str) -> None:
    found = []
    with FakeTensorMode():
        keys, values, pairs, state = (torch.randn(shape) for shape in ((C, K), (C, V), (C, C), (K, V)))
        given = keys.view(1, C, 1, K), keys.view(1, C, 1, K), values.view(1, C, 1, V)
        options = None, None, kernel, C, False
        runs: tuple[Callable[[], Any], ...] = (
            lambda: fla_scans._scan(*given, *options),
            lambda: fla_scans._scan_backward(given[2], *given, *options),
        )
        for run in runs:
            with CountFlops() as counter:
                run()
            found.append(counter.total)
        shapes = keys, values, pairs, state
        want = []
        for count in gla_passes(*shapes) if kernel == "gla" else delta_passes(kernel, *shapes):
            with CountFlops() as counter:
                count()
            want.append(counter.total)
    assert found == want


# --- knobs --------------------------------------------------------------------------------------------


@every_layer
def test_auto_is_never_untried(name: str) -> None:
    variant = variants.load_mixer(name)
    assert variant.IMPLS["fla"].untried
    for device in ("cpu", "cuda"):
        assert variant.resolve_impl(variant.Config(), device) == "plain"


@every_layer
def test_chunks_that_the_kernels_lack_are_refused(name: str) -> None:
    config = variants.load_mixer(name).Config
    for chunk in KERNELS[LAYERS[name]].chunks:
        config(impl="fla", chunk=chunk)
    for chunk in (8, 128):
        config(chunk=chunk)
        with pytest.raises(ValueError, match=f"chunk={chunk}: allowed is .*64 with impl=fla"):
            config(impl="fla", chunk=chunk)


def test_a_machine_without_the_kernels_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert "needs a CUDA device" in str(missing_scan("gla", CPU, half, 32, 64))
    found = {"fla-core": "0.6.2", "triton": "3.7.0"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", found.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing_scan("gla", cuda, half, 32, 64) is None
    assert "needs bfloat16 or float16, not float32" in str(missing_scan("gla", cuda, torch.float32, 32, 64))
    assert "at least 16 channels" in str(missing_scan("gla", cuda, half, 8, 16))
    assert missing_scan("gla", cuda, half, 512, 1024) is None
    assert "at most 256 channels" in str(missing_scan("kda", cuda, half, 512, 512))
    assert missing_scan("delta_rule", cuda, half, 64, 64) is None
    assert missing_scan("kda", cuda, half, 64, 64) is None
    gated = missing_scan("gated_delta_rule", cuda, half, 64, 64)
    assert gated is not None
    assert gated.endswith("on Hopper: the gradients of gated_delta_rule are wrong with 3.7.0")
    found["triton"] = "3.7.1"
    assert missing_scan("gated_delta_rule", cuda, half, 64, 64) is None
    found["triton"] = "3.7.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert missing_scan("gated_delta_rule", cuda, half, 64, 64) is None


def test_keys_of_gla_have_half_as_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_scans, "missing_fla", lambda device: None)
    layer = variants.load_mixer("gla")
    missing = layer.IMPLS["fla"].missing
    assert missing(torch.device("cuda"), torch.bfloat16, 32) is None
    assert "at least 16 channels" in str(missing(torch.device("cuda"), torch.bfloat16, 16))
