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
from variants.base import Context, Workload
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
]
every_kernel = pytest.mark.parametrize(("name", "knobs"), KERNELS)


def dims_or_skip(name: str, knobs: dict[str, Any], tokens: int, head_dim: int = 64) -> Workload:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=4 * head_dim, heads=4)
    variant = variants.load(name)
    device = torch.device("cuda")
    if reason := variant.missing(variant.Config(**knobs), dims, device=device, dtype=torch.float32):
        pytest.skip(reason)
    return dims


@every_kernel
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 100, 128, 777])
def test_a_kernel_equals_the_reference_in_outputs_and_gradients(
    name: str, knobs: dict[str, Any], causal: bool, tokens: int
) -> None:
    dims, variant = dims_or_skip(name, knobs, tokens), variants.load(name)
    for layer in range(2):
        worst = gates.reference_error(
            variant, variant.Config(**knobs), dims, layer, torch.device("cuda"), causal=causal
        )
        assert worst <= gates.REFERENCE_TOLERANCE


@every_kernel
def test_a_kernel_is_counted_forward_and_backward(name: str, knobs: dict[str, Any]) -> None:
    """Compiled or foreign, from its first call on: nothing else is dispatched that would be counted too."""
    tokens = 100
    dims, variant = dims_or_skip(name, knobs, tokens), variants.load(name)
    layer = variant(variant.Config(**knobs), dims).cuda()
    x = torch.randn(2, tokens, dims.d_model, device="cuda", requires_grad=True)
    projections, attention = layer.cost(replace(dims, causal=False))
    with CountFlops() as forward:
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
    with CountFlops():
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
