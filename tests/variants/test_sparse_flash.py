"""Sparse patterns as calls of flash attention, and their parts for an accelerator.

The calls run on the operator's implementation for the CPU, which keeps the contract of the CUDA kernels
(tests/variants/test_flash.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered
from torch import Tensor

from bench.measure.estimate import CARDS
from bench.measure.flops import CountFlops
from bench.tools.launches import accelerator_spec, plan
from variants import load
from variants.base import Context, Workload
from variants.ops.patterns import summary_parts
from variants.ops.patterns.factorised import SparseAttention

NAMES = ("sparse_strided", "sparse_fixed")
MODES = ("merged", "split", "interleaved")
SIZES = [(35, 6, 2), (36, 6, 1), (1, 4, 2), (5, 8, 1), (17, 1, 2), (40, 7, 2), (70, None, 1)]
"""(tokens, stride, batch): a shorter last block, none, shorter than a stride, and a stride of 1."""
HEADS = 3

both_patterns = pytest.mark.parametrize("name", NAMES)
both_directions = pytest.mark.parametrize("causal", [True, False])


def make(
    name: str,
    seq_len: int,
    *,
    layer: int = 0,
    batch: int = 1,
    heads: int = HEADS,
    device_type: str | None = None,
    **knobs: Any,
) -> SparseAttention:
    """A float64 layer; c is 2 unless it is given."""
    if name == "sparse_fixed":
        knobs = {"c": min(2, knobs.get("stride") or 2), **knobs}
    variant = load(name)
    dims = Workload(causal=True, batch_size=batch, seq_len=seq_len, d_model=4 * heads, heads=heads)
    dims = replace(dims, device_type=device_type)
    torch.manual_seed(layer)
    made = variant(variant.Config(**knobs), dims, layer).double()
    assert isinstance(made, SparseAttention)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=(4 * heads) ** -0.5)
    return made


def inputs(layer: SparseAttention, seq_len: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(layer.dims.batch_size, seq_len, layer.dims.d_model).double().requires_grad_()


def assert_equals_the_reference(layer: SparseAttention, seq_len: int, causal: bool) -> None:
    """In outputs and in the gradients of inputs and weights."""
    x, found = inputs(layer, seq_len), []
    for y in (layer(x, Context(causal=causal)).y, layer.reference(x, Context(causal=causal))):
        torch.manual_seed(5)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))])
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "mode", "layer", "size"),
    tiered(
        ((name, mode, layer), pytest.param(name, mode, layer, size))
        for name in NAMES
        for mode in MODES
        for layer in range(1 + (mode == "interleaved"))
        for size in SIZES
    ),
)
@both_directions
def test_flash_equals_the_reference(
    name: str, mode: str, layer: int, size: tuple[int, int | None, int], causal: bool
) -> None:
    seq_len, stride, batch = size
    made = make(name, seq_len, layer=layer, batch=batch, stride=stride, head_mode=mode, impl="flash")
    assert_equals_the_reference(made, seq_len, causal)


@pytest.mark.parametrize("mode", MODES)
@both_directions
@pytest.mark.parametrize(
    "knobs",
    [
        {"stride": 6, "c": 6},
        {"stride": 7, "c": 2, "subblocks": "shared"},
        {"stride": 7, "c": 3},
        {"stride": 4, "c": 1},
    ],
)
def test_every_form_of_summaries(mode: str, causal: bool, knobs: dict[str, Any]) -> None:
    """As long as a block, at its end for all heads, and with offsets that start again: 5 heads."""
    for layer in range(1 + (mode == "interleaved")):
        for seq_len in (31, 30, 28):
            made = make("sparse_fixed", 31, layer=layer, heads=5, head_mode=mode, impl="flash", **knobs)
            assert_equals_the_reference(made, seq_len, causal)


@pytest.mark.slow
@both_patterns
@given(
    mode=st.sampled_from(MODES),
    causal=st.booleans(),
    seq_len=st.integers(1, 60),
    stride=st.integers(1, 20),
    layer=st.integers(0, 1),
    heads=st.integers(2, 4),
)
@settings(max_examples=60, deadline=None)
def test_flash_equals_the_reference_at_any_size(
    name: str, mode: str, causal: bool, seq_len: int, stride: int, layer: int, heads: int
) -> None:
    made = make(name, seq_len, layer=layer, heads=heads, stride=stride, head_mode=mode, impl="flash")
    assert_equals_the_reference(made, seq_len, causal)


@both_patterns
@both_directions
@pytest.mark.parametrize("mode", MODES)
def test_flash_computes_allowed_pairs_only(name: str, causal: bool, mode: str) -> None:
    for layer in range(1 + (mode == "interleaved")):
        made = make(name, 75, layer=layer, stride=8, head_mode=mode, impl="flash")
        x = inputs(made, 75)
        flops = made.cost(replace(made.dims, causal=causal))
        with CountFlops() as forward:
            y = made(x, Context(causal=causal)).y
        assert forward.total == flops.total
        with CountFlops() as backward:
            y.sum().backward()
        assert backward.total == 2 * flops.tokenwise + flops.mixing * 5 // 2


@both_patterns
def test_flash_saves_no_partial_result(name: str) -> None:
    """Of tensors as long as the sequence: q, k, v, y and logsumexp, beside what the projections save."""
    seq_len = 64
    saved: dict[str, int] = {}
    for impl in ("flash", "fused"):
        made, sizes = make(name, seq_len, stride=8, impl=impl), {}
        x = inputs(made, seq_len)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.setdefault(t.untyped_storage().data_ptr(), t) is None or t,
            lambda t: t,
        ):
            made(x, Context(causal=True))
        saved[impl] = sum(t.untyped_storage().nbytes() for t in sizes.values() if seq_len in t.shape)
    assert saved["flash"] <= saved["fused"]


@both_patterns
def test_bfloat16_is_near_float64(name: str) -> None:
    made = make(name, 130, stride=12, impl="flash")
    x = inputs(made, 130)
    want = made(x, Context(causal=True)).y
    (d_want,) = torch.autograd.grad(want, x, torch.ones_like(want))
    with torch.autocast("cpu", torch.bfloat16):
        y = made.float()(x.float(), Context(causal=True)).y
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, atol=0.05, rtol=0.05)
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(d_x, d_want, atol=0.15, rtol=0.05)


@both_patterns
def test_a_machine_without_the_kernel_is_told_so(name: str) -> None:
    made = make(name, 16, impl="flash")
    cpu = torch.device("cpu")
    reason = made.missing(made.config, made.dims, device=cpu, dtype=torch.bfloat16)
    assert reason is not None
    assert reason.startswith("impl=flash needs a CUDA device")
    planned = replace(made.dims, device_type="cuda")
    assert made.missing(made.config, planned, device=cpu, dtype=torch.bfloat16) is None
    assert made.IMPLS["flash"].untried


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.slow
@both_patterns
def test_a_step_at_65536_tokens_takes_90_ms_by_the_law(name: str) -> None:
    planned = plan(accelerator_spec(name, 65536, params={"impl": "flash"}))
    assert planned.seconds(CARDS["h100"]) <= 0.090
    assert planned.figures.bytes_moved_step <= 121 * 2**30


# --- parts for an accelerator, by matrix products -------------------------------------------------


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("seq_len", "stride", "c"), [(131, 4, 1), (128, 4, 2), (90, 5, 5), (61, 3, 1), (7, 9, 2)]
)
def test_halves_of_the_sequence_equal_the_reference(
    levels: int, mode: str, seq_len: int, stride: int, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary_parts, "LEVELS", ((0, levels),))
    for layer in range(1 + (mode == "interleaved")):
        made = make(
            "sparse_fixed",
            seq_len,
            layer=layer,
            batch=2,
            heads=5,
            stride=stride,
            c=c,
            head_mode=mode,
            device_type="cuda",
        )
        assert made.impl == "plain"
        assert_equals_the_reference(made, seq_len, True)
        assert_equals_the_reference(made, seq_len, False)


def test_halves_compute_few_pairs_beside_the_allowed_ones() -> None:
    """With n strips, about 1/n more than the pairs of the summaries."""
    seq_len = 4096
    for pairs_levels, most in (((0, 0), 2.1), ((0, 3), 1.3)):
        made = make("sparse_fixed", seq_len, stride=64, c=8, device_type="cuda")
        positions = made.positions(made.roles[0])  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(summary_parts, "LEVELS", (pairs_levels,))
            parts = summary_parts.earlier_blocks(seq_len, positions, torch.device("cpu"), "cuda")
        allowed = HEADS * 8 * 64 * 64 * 63 // 2
        assert allowed < sum(part.pairs for part in parts) <= most * allowed
