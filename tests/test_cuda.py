"""What can only be seen on a CUDA device: `make test-cuda` there."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HANG_SECONDS
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure import gates, nvml
from bench.measure.flops import CountFlops
from bench.measure.reference_gate import dtype_reference_errors
from bench.measure.timing import ACCELERATOR_SAMPLES
from variants.base import Context, Dims, Workload
from variants.input_schedule import NetworkOut

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("default"),  # compiling warns of deprecations within torch and Triton
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", variants.mixers())
def test_a_cell_runs_gated_and_its_predicted_peak_is_near_the_allocator_s(
    variant: str, dtype: str, tmp_path: Path
) -> None:
    cell = [f"variant={variant}", f"dtype={dtype}", "device=cuda", "seq_len=1024", "model=small"]
    command = [sys.executable, "-m", "bench", *cell, "data=stdlib", "measure=quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    if record["status"] == "unsupported":
        assert record["reason"]
        return
    assert record["status"] == "ok", record["reason"]
    assert record["peak_bytes_source"] == "cuda_allocated"
    assert record["reference_max_abs"] is not None
    # the prediction takes the CPU's kernels and knows no library's workspaces
    peak = record["peak_bytes"] - record["library_bytes"]
    assert record["peak_bytes_predicted"] == pytest.approx(peak, rel=0.05)
    assert record["energy_joules_per_token"] or "energy_joules_per_token: " in record["gpu_reason"]
    assert record["device_leftover_bytes"] is not None


@pytest.mark.parametrize("how", ["block", "model"])
def test_a_compiled_cell_is_gated_and_measured_by_the_allocator(how: str, tmp_path: Path) -> None:
    cell = ["variant=dense", f"compile={how}", "device=cuda", "dtype=bfloat16", "seq_len=1024", "model=small"]
    command = [sys.executable, "-m", "bench", *cell, "data=stdlib", "measure=quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok", record["reason"] + done.stderr
    assert record["peak_bytes_source"] == "cuda_allocated"
    assert 0 < record["activation_bytes"] < record["peak_bytes"]
    assert (record["graph_breaks"], record["recompiles"]) == (0, 0)
    assert record["compile_seconds"] > 0


def test_the_driver_tells_of_the_device_and_of_this_process() -> None:
    held = torch.ones(2**20, device="cuda")
    found = nvml.read(held.device)
    assert found != nvml.UNKNOWN_STATE
    assert found.nvml_process_bytes is None or found.nvml_process_bytes >= held.nbytes


HELD = """
import torch
from bench.run import devices, memory_limit
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes

spec = CellSpec(
    variant="dense", variant_params={}, seq_len=8, depth=1, batch_size=1, replicate=0, objective="clm",
    device="cuda", dtype="float32", activations="keep", model=ModelSizes(), data=DataSpec(),
    measure=MeasureSpec(),
)
first = devices.devices_of("cuda")[0]
free = memory_limit.memory_bytes(spec, first)
assert 2**30 < free <= torch.cuda.get_device_properties(0).total_memory
assert 0 < free - memory_limit.after_context(spec, free) < 2**31, "a context and two workspaces"
memory_limit.enforce(spec, 2**30)
kept = torch.empty(2**29, dtype=torch.uint8, device="cuda")
try:
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("refused")
"""


def test_a_process_is_held_to_its_share_of_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["sdpa", "flash", "cudnn", "efficient", "math"])
def test_a_forced_backend_runs_alone_and_equals_the_reference_in_bfloat16(
    impl: str, causal: bool, head_dim: int
) -> None:
    """At the heads of a real model. The kernel that ran is the one that was asked for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, half = torch.device("cuda"), torch.bfloat16
    dims = Dims(seq_len=777, d_model=4 * head_dim, heads=4)
    dense = variants.load("dense")
    config = dense.Config(impl=impl)
    if reason := dense.missing(config, dims, device=device, dtype=half):
        pytest.skip(reason)
    dtype_reference_errors(dense, config, dims, 0, device, half, causal=causal)
    layer = dense(config, dims).cuda()
    x = torch.randn(2, 777, dims.d_model, device=device, requires_grad=True)
    with CountFlops() as counted, torch.autocast("cuda", half):
        layer(x, Context(causal=causal)).y.sum().backward()
    assert counted.attention_kernels == (impl,) or impl == "sdpa"
    assert len(counted.attention_kernels) == 1
    assert "math" not in counted.attention_kernels or impl == "math"


def test_a_cell_records_the_settings_of_the_device(tmp_path: Path) -> None:
    cell = ["variant=dense", "dtype=bfloat16", "device=cuda", "seq_len=512", "model=small"]
    command = [sys.executable, "-m", "bench", *cell, "data=stdlib", "measure=quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok", record["reason"]
    settings = ("cudnn_version", "tf32", "device_allocator", "deterministic", "attention_kernels")
    assert None not in [record[key] for key in settings]
    assert record["dtype_reference_rms"] > 0
    assert len(record["step_seconds_samples"]) >= ACCELERATOR_SAMPLES


KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"impl": "flex"}),
    ("dense", {"impl": "xformers"}),
    ("chunked", {"impl": "flex", "chunk": 200}),
    ("overlapping", {"impl": "flex", "chunk": 200}),
    ("longformer", {"impl": "flex", "window": (40,)}),
    ("longformer", {"impl": "flex", "window": (20,), "dilation": (1, 3)}),
    ("sparse_strided", {"impl": "flex", "stride": 30}),
    ("sparse_strided", {"impl": "flex", "stride": 30, "head_mode": "split"}),
    ("sparse_fixed", {"impl": "flex", "stride": 30, "c": 4}),
    ("sparse_fixed", {"impl": "flex", "stride": 30, "c": 4, "head_mode": "interleaved"}),
    ("longformer", {"impl": "flash", "window": (40,)}),
    ("longformer", {"impl": "flash", "window": (20,), "dilation": (1, 3)}),
    ("routing", {"impl": "flash", "window": 40}),
    ("routing", {"impl": "flash", "selection": "topk"}),
    ("sparse_strided", {"impl": "flash", "stride": 30}),
    ("sparse_strided", {"impl": "flash", "stride": 30, "head_mode": "split"}),
    ("sparse_fixed", {"impl": "flash", "stride": 30, "c": 4}),
    ("sparse_fixed", {"impl": "flash", "stride": 30, "c": 4, "head_mode": "interleaved"}),
]
HALF_ONLY = ("flash", "fla")
"""Implementations whose kernels have no float32, or multiply it as TF32. They run under autocast, as in a
cell in bfloat16."""
every_kernel = pytest.mark.parametrize(("name", "knobs"), KERNELS)


def dtype_of(knobs: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if knobs["impl"] in HALF_ONLY else torch.float32


def autocast(knobs: dict[str, Any]) -> torch.autocast:
    dtype = dtype_of(knobs)
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


def dims_or_skip(name: str, knobs: dict[str, Any], tokens: int, head_dim: int = 64) -> Workload:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=4 * head_dim, heads=4)
    variant = variants.load(name)
    device = torch.device("cuda")
    if reason := variant.missing(variant.Config(**knobs), dims, device=device, dtype=dtype_of(knobs)):
        pytest.skip(reason)
    return dims


def half_precision_error(
    name: str, knobs: dict[str, Any], dims: Workload, index: int, *, causal: bool
) -> float:
    """The largest difference to the implementation of auto in the same dtype, in outputs and gradients,
    relative to the norm of the tensor. That one equals the reference in float32; a reference in float64 would
    choose other clusters than half precision does."""
    variant = variants.load(name)
    results = []
    for impl in (knobs["impl"], "auto"):
        torch.manual_seed(index)
        layer = variant(variant.Config(**{**knobs, "impl": impl}), dims, index).cuda()
        x = torch.randn(2, dims.seq_len, dims.d_model, device="cuda", requires_grad=True)
        with autocast(knobs):
            y = layer(x, Context(causal=causal)).y
        roots = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        grads = torch.autograd.grad(y, roots, torch.randn_like(y), materialize_grads=True)
        results.append([t.float() for t in (y, *grads)])
    return max(
        ((one - other).norm() / other.norm().clamp(min=1e-3)).item()
        for one, other in zip(*results, strict=True)
    )


@every_kernel
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 100, 128, 777])
def test_a_kernel_equals_the_reference_in_outputs_and_gradients(
    name: str, knobs: dict[str, Any], causal: bool, tokens: int
) -> None:
    dims, variant = dims_or_skip(name, knobs, tokens), variants.load(name)
    for layer in range(2):
        if knobs["impl"] in HALF_ONLY:
            error = half_precision_error(name, knobs, dims, layer, causal=causal)
            assert error <= 4 * torch.finfo(dtype_of(knobs)).eps
            continue
        worst = gates.reference_error(
            variant, variant.Config(**knobs), dims, layer, torch.device("cuda"), causal=causal
        )
        assert worst <= gates.REFERENCE_TOLERANCE


@pytest.mark.parametrize(("name", "knobs"), [kernel for kernel in KERNELS if kernel[0] != "routing"])
def test_a_kernel_is_counted_forward_and_backward(name: str, knobs: dict[str, Any]) -> None:
    """Compiled or foreign, from its first call on: nothing else is dispatched that would be counted too."""
    tokens = 100
    dims, variant = dims_or_skip(name, knobs, tokens), variants.load(name)
    layer = variant(variant.Config(**knobs), dims).cuda()
    x = torch.randn(2, tokens, dims.d_model, device="cuda", requires_grad=True)
    cost = layer.cost(replace(dims, causal=False))
    projections, attention = cost.tokenwise, cost.parts["attention"]
    with CountFlops() as forward, autocast(knobs):
        y = layer(x, Context(causal=False)).y
    with CountFlops() as backward:
        y.sum().backward()
    flex = knobs["impl"] == "flex"
    attention = 2 * 4 * dims.head_dim * 2 * 2 * 128 * 128 if flex else attention  # one tile of each head
    assert forward.total == projections + attention
    assert backward.total == 2 * projections + attention * (7 if flex else 5) // 2


@every_kernel
def test_a_kernel_stores_no_square_matrix(name: str, knobs: dict[str, Any]) -> None:
    """Nor under the counter, where a compiled kernel would fall back to T × T scores."""
    tokens = 16_384
    dims, variant = dims_or_skip(name, knobs, tokens), variants.load(name)
    layer = variant(variant.Config(**knobs), dims).cuda()
    x = torch.randn(2, tokens, dims.d_model, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with CountFlops(), autocast(knobs):
        feed = layer.input_schedule(layer.config).apply
        feed(lambda w, _: NetworkOut(layer(w, Context(causal=True)).y), x, causal=True).y.sum().backward()
    scores = 4 * 2 * dims.heads * tokens**2
    assert torch.cuda.max_memory_allocated() - before < scores / 8


@pytest.mark.parametrize(("name", "knobs"), KERNELS[:4])
def test_a_cell_runs_with_the_kernel_and_names_it(name: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    dims_or_skip(name, knobs, 1024)
    cell = [f"variant={name}", *(f"variant.{knob}={value}" for knob, value in knobs.items())]
    cell += ["device=cuda", "seq_len=1024", "model=small", "data=stdlib", "measure=quick"]
    command = [sys.executable, "-m", "bench", *cell]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["impl"]) == ("ok", knobs["impl"]), record["reason"]
    assert record["peak_bytes_predicted"] is None  # a prediction runs on the CPU
    assert (record["cost_ratio_reason"] is None) == (knobs["impl"] == "xformers")


FAVOR: list[dict[str, Any]] = [
    {"impl": "chunked"},
    {"impl": "chunked", "features": "relu"},
    {"impl": "fla"},
    {"impl": "fla", "features": "relu"},
]


@pytest.mark.parametrize("knobs", FAVOR)
@pytest.mark.parametrize("tokens", [1, 100, 777])
def test_causal_sums_of_performer_equal_the_reference(knobs: dict[str, Any], tokens: int) -> None:
    dims, variant = dims_or_skip("performer", knobs, tokens), variants.load("performer")
    config, device = variant.Config(**knobs), torch.device("cuda")
    # a card multiplies float32 in Triton's kernels as TF32
    if knobs["impl"] == "chunked":
        gates.reference_error(variant, config, dims, 0, device, causal=True)
        assert gates.leak(variant, config, dims, 2, device) == 0
    layer = variant(config, dims).to(device)
    slow = variant(variant.Config(**{**knobs, "impl": "plain"}), dims).to(device).double()
    slow.load_state_dict(layer.state_dict())
    x = torch.randn(2, tokens, dims.d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x, Context(causal=True)).y
    y64 = slow.reference(x64, Context(causal=True))
    direction = torch.randn_like(y64)
    (got,), (want,) = (torch.autograd.grad(a, b, direction.to(a)) for a, b in ((y, x), (y64, x64)))
    for a, b in ((y, y64), (got, want)):
        assert (a.double() - b).norm() <= 2**-5 * b.norm()


def test_a_cell_of_performer_with_fla_runs_and_names_it(tmp_path: Path) -> None:
    dims_or_skip("performer", {"impl": "fla"}, 1024)
    cell = ["variant=performer", "variant.impl=fla", "device=cuda", "dtype=bfloat16", "seq_len=1024"]
    command = [sys.executable, "-m", "bench", *cell, "model=small", "data=stdlib", "measure=quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results/adhoc/records").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["impl"]) == ("ok", "fla"), record["reason"]


@pytest.mark.parametrize("name", ["gla", "delta_net", "gated_delta_net", "kda"])
@pytest.mark.parametrize("tokens", [100, 777])
def test_gated_recurrences_by_fla_equal_those_of_auto(name: str, tokens: int) -> None:
    dims = dims_or_skip(name, {"impl": "fla"}, tokens)
    assert half_precision_error(name, {"impl": "fla"}, dims, 0, causal=True) < 2**-4


REFORMER: list[dict[str, Any]] = [
    {"impl": "merged"},
    {"impl": "flex"},
    {"impl": "flex", "chunk": 20, "n_buckets": 8, "n_hashes": 2},
    {"impl": "flex", "neighbourhood": "chunk", "chunk": 100},
]
every_reformer = pytest.mark.parametrize("knobs", REFORMER, ids=str)


@every_reformer
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 128, 777])
def test_all_rounds_at_once_equal_the_reference(knobs: dict[str, Any], causal: bool, tokens: int) -> None:
    knobs = {**knobs, "n_buckets": min(knobs["n_buckets"], tokens)} if "n_buckets" in knobs else knobs
    dims, variant = dims_or_skip("reformer", knobs, tokens), variants.load("reformer")
    worst = gates.reference_error(
        variant, variant.Config(**knobs), dims, 0, torch.device("cuda"), causal=causal
    )
    assert worst <= gates.REFERENCE_TOLERANCE


@every_reformer
def test_all_rounds_at_once_in_half_precision_are_near_the_plain_form(knobs: dict[str, Any]) -> None:
    """Products of bfloat16 with sums in float32: `torch.bmm(out_dtype=)`, and FlexAttention."""
    tokens = 777
    dims, variant = dims_or_skip("reformer", knobs, tokens), variants.load("reformer")
    results = []
    for impl in (knobs["impl"], "plain"):
        torch.manual_seed(0)
        layer = variant(variant.Config(**{**knobs, "impl": impl}), dims).cuda().eval()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=dims.d_model**-0.5)
        x = torch.randn(2, tokens, dims.d_model, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x, Context(causal=True)).y
        roots = [x, *layer.parameters()]
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), roots)])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("impl", ["merged", "flex"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_of_reformer_depends_on_a_later_token(impl: str, dtype: str) -> None:
    """Several layers deep: a bit can change a bucket."""
    dims, variant = dims_or_skip("reformer", {"impl": impl}, 1000), variants.load("reformer")
    worst = gates.leak(
        variant, variant.Config(impl=impl), dims, 4, torch.device("cuda"), getattr(torch, dtype)
    )
    assert worst == 0


@every_reformer
def test_all_rounds_at_once_are_counted_as_planned(knobs: dict[str, Any]) -> None:
    """Forward and backward: a plan on fake tensors of the CPU counts what the device runs."""
    tokens = 500
    dims, variant = dims_or_skip("reformer", knobs, tokens), variants.load("reformer")
    found = []
    for device, mode in (("cuda", nullcontext()), ("cpu", FakeTensorMode())):
        with mode:
            layer = variant(variant.Config(**knobs), replace(dims, device_type="cuda")).to(device)
            x = torch.randn(2, tokens, dims.d_model, device=device, requires_grad=True)
            with CountFlops() as counter:
                layer(x, Context(causal=True)).y.sum().backward()
        found.append(counter.counts)
    assert found[0] == found[1]


@every_reformer
def test_all_rounds_at_once_keep_no_square_matrix(knobs: dict[str, Any]) -> None:
    tokens = 16_384
    dims, variant = dims_or_skip("reformer", knobs, tokens), variants.load("reformer")
    layer = variant(variant.Config(**knobs), dims).cuda()
    x = torch.randn(1, tokens, dims.d_model, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with CountFlops():
        layer(x, Context(causal=True)).y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * dims.heads * tokens**2 / 2
