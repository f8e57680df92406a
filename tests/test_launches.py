"""Kernels launched and bytes moved: by operation, on fake tensors as on real ones, and for every variant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiers import representative, slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.measure import predict, step
from bench.measure.flops import CountFlops
from bench.measure.launches import Counts, is_kernel, tensor_bytes
from bench.measure.step import StepFigures
from bench.tasks.base import Batch
from variants.ops import operators
from variants.ops.clustering import kmeans_attention, kmeans_flash
from variants.ops.lsh import attention as lsh_attention
from variants.ops.lsh import hashing, windows
from variants.ops.lsh import merged as lsh_merged
from variants.ops.patterns import block_sparse, summary_calls
from variants.ops.patterns.strided_parts import Part, StridedTokens, flatten_parts
from variants.ops.segments import relative_attention

TABLE = Path(__file__).parent / "data" / "launches.json"
SMALL = {
    "compressive": ["variant.segment=64", "variant.mem_len=64"],
    "transformer_xl": ["variant.segment=64", "variant.mem_len=64"],
}
"""Knobs at which a few hundred tokens are several segments."""
SEGMENTS = tuple(SMALL)
SHORT = ("dense", "longformer", *SEGMENTS)
"""Variants of the short tier."""


def spec_of(name: str, *overrides: str) -> CellSpec:
    knobs = [f"variant={name}", "measure=plan", "device=cpu", "seq_len=300", "depth=2", *SMALL.get(name, [])]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=[*knobs, *overrides])).spec


def counted(work: Callable[[], Any]) -> Counts:
    with CountFlops() as counter:
        work()
    return counter.counts


# --- single operations ----------------------------------------------------------------------------


INDEX = torch.zeros(1, dtype=torch.int64)
PLACES = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("work", "launches", "bytes_moved"),
    [
        (lambda x, row: x.view(16).unsqueeze(0).expand(3, -1)[:, ::2], 0, 0),
        (lambda x, row: torch.empty_like(x), 0, 0),
        (lambda x, row: x.detach(), 0, 0),
        (lambda x, row: x + 1.0, 1, 64 + 64),
        (lambda x, row: x.add_(row), 1, 64 + 64 + 16),
        (lambda x, row: x.copy_(row), 1, 64 + 16),
        (lambda x, row: row.expand(4, -1) * x, 1, 16 + 64 + 64),
        (lambda x, row: x.zero_(), 1, 64),
        (lambda x, row: torch.mul(x, row, out=torch.empty_like(x)), 1, 64 + 16 + 64),
        (lambda x, row: x.view(16).unfold(0, 4, 2) * 1.0, 1, 64 + 4 * 28),
        (lambda x, row: x.index_select(0, INDEX), 1, 8 + 16 + 16),
        (lambda x, row: x.index_add_(0, INDEX, row), 1, 8 + 2 * 16 + 16),
        (lambda x, row: x.scatter_(0, PLACES, 1.0), 1, 16 + 2 * 8),
        (lambda x, row: torch._foreach_mul_([x, row], 2.0), 1, 2 * (64 + 16)),
        (lambda x, row: torch.stack([x, x]), 1, 2 * 64 + 128),
    ],
)
def test_what_an_operation_launches_and_moves(
    work: Callable[[Tensor, Tensor], Any], launches: int, bytes_moved: int, fake: bool
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        x, row = torch.ones(4, 4), torch.ones(1, 4)
        assert counted(lambda: work(x, row))[1:] == (launches, bytes_moved)


def test_a_product_counts_all_three() -> None:
    x = torch.ones(4, 8)
    assert counted(lambda: x @ x.T) == (2 * 4 * 4 * 8, 1, 2 * 128 + 64)


def test_bytes_of_a_view_are_those_that_differ() -> None:
    x = torch.zeros(2, 64, 8)
    assert tensor_bytes(x[:, ::2]) == 2 * 32 * 8 * 4
    assert tensor_bytes(x.transpose(0, 1)) == 2 * 64 * 8 * 4
    assert tensor_bytes(x.unfold(1, 16, 8)) == 2 * 64 * 8 * 4
    assert tensor_bytes(x[:, :, :1].expand(-1, -1, 100)) == 2 * 64 * 4
    assert tensor_bytes([x[:0], None, 3]) == 0


def test_metadata_is_no_kernel() -> None:
    assert not is_kernel(torch.ops.aten.sym_size.int)
    assert not is_kernel(torch.ops.prim.device.default)
    assert is_kernel(torch.ops.aten._fused_adamw_.default)


# --- operators of this project ----------------------------------------------------------------------


def _union() -> tuple[Callable[[], Any], Callable[[], Any]]:
    q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
    part = Part(
        heads=(0, 2), queries=StridedTokens(start=0, run=32), keys=StridedTokens(start=0, run=32), causal=True
    )
    masks, numbers = flatten_parts([part])
    given = q, k, v, masks, numbers, "plain", 16
    return lambda: block_sparse._forward_operator(*given), lambda: block_sparse._forward(
        q, k, v, [part], "plain", 16
    )


def _relative() -> tuple[Callable[[], Any], Callable[[], Any]]:
    q, kv, r = torch.randn(2, 1, 16, 8), torch.randn(2, 2, 1, 32, 8), torch.randn(2, 8, 33)
    u, v = torch.randn(2, 8), torch.randn(2, 8)
    given = q, kv, r, u, v, False, 8
    return lambda: relative_attention._forward_operator(*given), lambda: relative_attention._forward(*given)


def _slots() -> tuple[Callable[[], Any], Callable[[], Any]]:
    cluster = torch.zeros(1, 2, 64, dtype=torch.int64)
    tiles = kmeans_attention._tiles(cluster, 4, 8, is_causal=True, device_type="cpu")
    return (
        lambda: kmeans_attention._slots_operator(cluster, 4, list(tiles)),
        lambda: kmeans_attention._slots(cluster, 4, tiles),
    )


def _chunks() -> tuple[Callable[[], Any], Callable[[], Any]]:
    cluster = torch.zeros(1, 2, 64, dtype=torch.int64)
    bounds = kmeans_flash.bounds_of(2, 64, 4, 8)
    return (
        lambda: kmeans_flash._layout_operator(cluster, 4, list(bounds)),
        lambda: kmeans_flash._lay_out(cluster, 4, bounds),
    )


def _normal() -> tuple[Callable[[], Any], Callable[[], Any]]:
    given = (4, 4), 0, torch.device("cpu")
    return lambda: hashing.seeded_normal(*given), lambda: hashing._seeded_normal(*given)


def _lsh() -> tuple[Callable[[], Any], Callable[[], Any]]:
    qk, value = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8)
    buckets = torch.zeros(2, 2, 64, dtype=torch.int64)
    window = windows.Window.choose(64, 2, 8, band=True, causal=True)
    given = qk, value, buckets, window.numbers
    return lambda: lsh_attention._forward_operator(*given), lambda: lsh_attention._forward(*given)


def _merged() -> tuple[Callable[[], Any], Callable[[], Any]]:
    qk, value = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8)
    window = windows.Window.choose(64, 2, 8, band=True, causal=True).in_whole_blocks()
    given = qk, value, torch.zeros(2, 2, 64, dtype=torch.int64), window.numbers, "merged"
    return lambda: lsh_merged._forward_operator(*given), lambda: lsh_merged._forward(*given)


OPERATORS = {
    "union_attention": _union,
    "relative_attention": _relative,
    "cluster_slots": _slots,
    "cluster_chunks": _chunks,
    "seeded_normal": _normal,
    "lsh_attention": _lsh,
    "merged_rounds": _merged,
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_counts_as_what_it_dispatches(name: str, fake: bool) -> None:
    """Not as one launch, and also where its fake would give only shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), torch.no_grad():
        whole, inside = OPERATORS[name]()
        assert counted(whole) == counted(inside)
        assert name == "seeded_normal" or counted(whole).launches > 3


def test_every_operator_with_a_backward_pass_is_looked_into() -> None:
    """One that is not is a kernel of another library, which is one launch, or notes work."""
    for name in ("performer", "gla"):  # their modules register the kernels of fla-core
        variants.load(name)
    prefix = "longctx_bench::"
    names = {n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    ours = {name: getattr(torch.ops.longctx_bench, name).default for name in names}
    whole = {name for name, operator in ours.items() if not operators.implementation(operator)}
    of_fla = {name for name in whole if name.startswith("gla_")}
    kernels = {"xformers", "xformers_backward", "flash", "flash_backward"}
    kernels |= {"flex_rounds", "flex_rounds_backward", "bmm_float32", "fla_scan", "fla_scan_backward"}
    kernels |= {"expert_linear", "expert_outer"}  # products whose sizes depend on content; they note launches
    assert len(of_fla) == 5
    assert whole - of_fla == {"note_work", summary_calls.summary_tables._name, *kernels}


# --- steps --------------------------------------------------------------------------------------------


def real_figures(spec: CellSpec) -> StepFigures:
    """A step that runs on the CPU."""

    def batch() -> Batch:
        tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.int64)
        return Batch(tokens, tokens.clone())

    return step.on_host(lambda: predict.subject(spec, batch, torch.device("cpu")))[1]


@pytest.mark.parametrize("activations", ["keep", *slow("checkpoint", "selective", "reversible")])
@pytest.mark.parametrize("name", [*SHORT, *slow(*(n for n in variants.names() if n not in SHORT))])
def test_a_prediction_counts_what_a_step_dispatches(name: str, activations: str) -> None:
    """Repeated work that is not run again and segments that are left out are counted too."""
    spec = spec_of(name, f"activations={activations}")
    predicted, real = predict.Prediction(spec).predict(), real_figures(spec)
    assert predicted.launches_step == real.launches_step
    assert predicted.bytes_moved_step == real.bytes_moved_step
    assert predicted.flops_step == real.flops_step
    assert real.launches_step > 100
    assert real.bytes_moved_step > 3 * real.param_bytes


@pytest.mark.parametrize("name", SEGMENTS)
def test_launches_of_segments_add_up(name: str) -> None:
    """After the first few, each segment adds as many."""
    found = [
        predict.Prediction(spec_of(name, f"seq_len={64 * segments}")).predict() for segments in (12, 20, 28)
    ]
    for figure in ("launches_step", "bytes_moved_step"):
        one, two, three = (getattr(figures, figure) for figures in found)
        assert two - one == three - two > 0


def table() -> dict[str, dict[str, int]]:
    """Variant → what a small step on a CPU launches and moves."""
    found = {}
    for name in variants.names():
        figures = predict.Prediction(spec_of(name)).predict()
        found[name] = {"launches_step": figures.launches_step, "bytes_moved_step": figures.bytes_moved_step}
    return found


@pytest.mark.parametrize("name", representative(variants.names()))
def test_launches_are_those_of_the_table(name: str) -> None:
    """`python tests/test_launches.py` writes the table anew; a change says in the changelog why it moved."""
    figures = predict.Prediction(spec_of(name)).predict()
    want = json.loads(TABLE.read_text())[name]
    assert {key: getattr(figures, key) for key in want} == want


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
    print(TABLE.read_text(), file=sys.stderr)
