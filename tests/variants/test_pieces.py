"""Work cut as for an accelerator, on this machine's CPU: the same results from other pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import cost_of

import variants
from bench.measure import gates
from bench.measure.flops import CountFlops
from variants.base import Context, Dims, Workload
from variants.input_schedule import NetworkOut
from variants.ops.tile_size import Sizes

CPU = torch.device("cpu")


def test_a_size_is_that_of_the_type_of_device() -> None:
    sizes = Sizes(cpu=1, accelerator=2)
    assert [sizes.on(kind) for kind in ("cpu", "cuda", "meta")] == [1, 2, 2]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_layer_is_cut_for_the_device_that_it_is_told_or_that_it_is_on(kind: str) -> None:
    dims = Dims(seq_len=40, d_model=16, heads=2, device_type=kind)
    variant = variants.load("sparse_strided")
    (slot,) = variant.mixers(variant.Config())
    assert slot.layer(slot.config, dims).device_type == kind
    assert slot.layer(slot.config, replace(dims, device_type=None)).to("meta").device_type == "meta"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        pairs = [
            (name, causal)
            for name in variants.mixers()
            for causal in (True, False)
            if getattr(variants.load(name).info.caps, "causal" if causal else "bidirectional")
        ]
        metafunc.parametrize(("name", "causal"), pairs)


def dims_or_skip(name: str, tokens: int, causal: bool) -> Workload:
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=64, heads=2, device_type="cuda")
    variant = variants.load(name)
    if reason := variant.unsupported(variant.Config(), dims, causal=causal):
        pytest.skip(reason)
    return dims


def test_the_fast_path_equals_the_reference(name: str, causal: bool) -> None:
    dims, variant = dims_or_skip(name, 1111, causal), variants.load(name)
    with torch.random.fork_rng():
        worst = gates.reference_error(variant, variant.Config(), dims, 0, CPU, causal=causal)
    assert worst <= gates.REFERENCE_TOLERANCE


def test_the_cost_stays_within_its_bound(name: str, causal: bool) -> None:
    dims, variant = dims_or_skip(name, 2048, causal), variants.load(name)
    layer = variant(variant.Config(), dims).eval()
    x = torch.randn(2, dims.seq_len, dims.d_model)
    network = lambda window, state: NetworkOut(*layer(window, Context(causal=causal), state)[:2])  # noqa: E731
    with torch.no_grad(), CountFlops() as counter:
        layer.input_schedule(layer.config).stream(network, x, causal=causal)
    cost = cost_of(
        layer, Workload(causal=causal, batch_size=2, seq_len=dims.seq_len, d_model=64, heads=2), causal=causal
    )
    gates.cost_ratio(counter.total, cost, layer.flop_overhead_reason, bounded=layer.overhead_is_bounded)
