"""Heads of keys and values that query heads share: multi-query and grouped-query attention.

The oracle is the same layer with as many heads of keys as of queries, and repeated weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.inputs.errors import ConfigError
from bench.measure import gates
from bench.measure.decoding_gate import decoding_error
from bench.measure.flops import CountFlops
from bench.measure.gates import Sizes
from bench.measure.predict import build_model
from bench.model.decode import Decoder, decoding_bytes
from bench.run.cell import Cell
from variants.base import Clock, Context, Dims, SequenceMixer, Workload, scheduled_cost
from variants.input_schedule import NetworkOut
from variants.ops.patterns import masks
from variants.ops.patterns.pair_counts import carried_keys

HEADS = 4
SHARING = [name for name in variants.mixers() if variants.load(name).no_shared_keys is None]
OTHERS = sorted({*variants.mixers()} - {*SHARING})
APART: list[tuple[str, dict[str, Any]]] = [
    ("longformer", {"window": (5,), "dilation": (1, 3)}),
    ("sparse_strided", {"head_mode": "split", "stride": 4}),
    ("sparse_fixed", {"head_mode": "split", "stride": 6, "c": 2}),
    ("sparse_fixed", {"head_mode": "merged", "stride": 6, "c": 2}),
]
"""Rules that differ between heads that share keys."""
SMALL: dict[str, dict[str, Any]] = {
    "longformer": {"window": (5,)},
    "transformer_xl": {"segment": 8, "mem_len": 6},
    "compressive": {"segment": 8, "mem_len": 6, "comp_len": 4, "rate": 2},
    "linformer": {"k": 5},
}
CONFIGURATIONS = [(name, SMALL.get(name, {})) for name in SHARING] + APART


def can_be_decoded(name: str, knobs: dict[str, Any]) -> bool:
    variant = variants.load(name)
    return variant.no_decoding(variant.Config(**knobs)) is None


def dims_of(kv_heads: int | None, seq_len: int = 37) -> Dims:
    return Dims(seq_len=seq_len, d_model=16, heads=HEADS, kv_heads=kv_heads)


def build(name: str, knobs: dict[str, Any], kv_heads: int | None) -> SequenceMixer:
    torch.manual_seed(0)
    variant = variants.load(name)
    assert issubclass(variant, SequenceMixer)
    return variant(variant.Config(**knobs), dims_of(kv_heads)).double().eval()


def with_repeated_weights(name: str, knobs: dict[str, Any], shared: SequenceMixer) -> SequenceMixer:
    """The layer with as many heads of keys as of queries, in which heads of a group have equal weights."""
    full, state = build(name, knobs, None), {}
    rows, times = shared.dims.key_dim, shared.dims.queries_per_key

    def repeated(weight: Tensor) -> Tensor:  # (K·D, C) → (H·D, C)
        return weight.unflatten(0, (shared.dims.key_heads, -1)).repeat_interleave(times, 0).flatten(0, 1)

    for key, weight in shared.state_dict().items():
        if key == "projections.qkv.weight":
            q, k, v = weight.split([weight.shape[0] - 2 * rows, rows, rows])
            state[key] = torch.cat([q, repeated(k), repeated(v)])
        elif key == "kv.weight":
            state[key] = torch.cat([repeated(part) for part in weight.chunk(2)])
        elif key == "landmark.weight":
            state[key] = repeated(weight)
        elif key.endswith("_mixture") and weight.dim() == 3:  # of each head of keys
            state[key] = weight.repeat_interleave(times, 0)
        else:
            state[key] = weight
    full.load_state_dict(state)
    return full


def causal_of(layer: SequenceMixer) -> bool:
    return layer.info.caps.causal


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("name", "knobs"), CONFIGURATIONS)
def test_shared_heads_equal_heads_with_the_same_weights(
    name: str, knobs: dict[str, Any], kv_heads: int
) -> None:
    """Outputs, gradients of inputs, and the reference."""
    shared = build(name, knobs, kv_heads)
    full = with_repeated_weights(name, knobs, shared)
    ctx = Context(causal=causal_of(shared))
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    found = []
    for run in (shared, full, shared.reference):
        leaf = x.clone().requires_grad_()
        out = run(leaf, ctx)
        y = out if isinstance(out, Tensor) else out.y
        y.square().sum().backward()
        assert leaf.grad is not None
        found.append((y.detach(), leaf.grad))
    for y, grad in found[1:]:
        assert torch.allclose(found[0][0], y, atol=1e-9)
        assert torch.allclose(found[0][1], grad, atol=1e-8)


@pytest.mark.parametrize(("name", "knobs"), [c for c in CONFIGURATIONS if can_be_decoded(*c)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_steps_with_shared_heads_equal_one_pass(name: str, knobs: dict[str, Any], kv_heads: int) -> None:
    """Token by token, and with a prompt; what is held is what the formula says, with fewer keys."""
    layer, x = build(name, knobs, kv_heads), torch.randn(2, 37, 16, dtype=torch.float64)
    want = layer.reference(x, Context(causal=True))
    for sizes in ([1] * 37, [17, *[1] * 20], [3, 1, 5, 1, 20, 7]):
        clock = Clock()
        state = layer.init_state(2, 37, clock=clock, dtype=torch.float64)
        found, start = [], 0
        with torch.no_grad():
            for size in sizes:
                found.append(layer.step(x[:, start : start + size], state))
                clock.advance(size)
                start += size
        assert torch.allclose(torch.cat(found, dim=1), want, atol=1e-9)
        work = Workload(**vars(layer.dims), batch_size=2, causal=True, element_bytes=8)
        assert state.nbytes == layer.decoding_bytes(work)
    full = build(name, knobs, None)
    of_all = full.decoding_bytes(replace(work, kv_heads=None))
    assert layer.decoding_bytes(work) < of_all


def test_a_shared_cache_is_smaller_by_the_number_of_queries_per_key() -> None:
    sizes = {}
    for kv_heads in (1, 2, 4):
        layer = build("dense", {}, kv_heads)
        work = Workload(**vars(layer.dims), batch_size=3, causal=True)
        sizes[kv_heads] = layer.decoding_bytes(work)
        assert layer.state_bytes(work) == 2 * 3 * 37 * kv_heads * 4 * 4 == sizes[kv_heads]
    assert sizes[4] == 4 * sizes[1] == 2 * sizes[2]


CLOSED: list[tuple[str, dict[str, Any]]] = [
    ("shifted_windows", {"window": 7}),
    ("image_transformer", {"block": 5, "memory": 3}),
    ("sparse_fixed", {"stride": 6, "c": 2}),
]
"""Variants that count what is kept in closed form."""


@pytest.mark.parametrize(("name", "knobs"), APART + CLOSED)
def test_the_state_holds_what_any_head_of_a_group_reads(name: str, knobs: dict[str, Any]) -> None:
    """Counted from the masks of the heads."""
    layer = build(name, knobs, 2)
    allowed = layer.allowed(80, causal=True).unflatten(0, (2, 2)).any(1)  # type: ignore[operator]
    for tokens in (1, 5, 24, 37):
        later = allowed[:, tokens:, :tokens].any(1)
        work = replace(Workload(**vars(layer.dims), batch_size=1, causal=True), seq_len=tokens)
        assert layer.state_bytes(work) == 2 * int(later.sum()) * 4 * 4


def test_the_union_of_a_group_of_heads() -> None:
    rule = masks.ByHead((masks.Window(3), masks.Window(2, 4))) & masks.causal
    union = masks.AnyOfGroup(rule, 2)
    one, both = masks.by_head(union, 20, 1), masks.by_head(rule, 20, 2)
    assert torch.equal(one[0], both.any(0))
    assert not union.is_common(0)
    assert masks.AnyOfGroup(masks.ByHead((masks.Window(3), masks.Window(3))), 2).is_common(1)
    assert carried_keys(union, 20, 1) == 4


@pytest.mark.parametrize("name", SHARING)
def test_sharing_saves_the_flops_of_the_formula(name: str) -> None:
    """Of those dispatched, exactly."""
    dispatched, formula = [], []
    for kv_heads in (None, 1):
        layer = build(name, SMALL.get(name, {}), kv_heads)
        work = Workload(**vars(layer.dims), batch_size=1, causal=causal_of(layer))

        def network(x: Tensor, state: Any, layer: SequenceMixer = layer) -> NetworkOut:
            out = layer(x, Context(causal=causal_of(layer)), state)
            return NetworkOut(out.y, out.state)

        schedule = layer.input_schedule(layer.config)
        with CountFlops() as counter, torch.no_grad():
            schedule.stream(network, torch.randn(1, 37, 16, dtype=torch.float64), causal=work.causal)
        dispatched.append(counter.total)
        formula.append(scheduled_cost(layer, schedule, work).total)
    assert dispatched[0] - dispatched[1] == formula[0] - formula[1] > 0


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_cannot_share_say_so(name: str) -> None:
    variant = variants.load(name)
    reason = variant.unsupported(variant.Config(), dims_of(2, 64), causal=variant.info.caps.causal)
    assert reason is not None
    assert reason.startswith("kv_heads=2: ")
    assert "\n" not in reason
    assert "allowed is 4" in reason
    assert variant.unsupported(variant.Config(), dims_of(4, 64), causal=variant.info.caps.causal) is None


def test_global_tokens_have_their_own_keys() -> None:
    variant = variants.load("longformer")
    reason = variant.unsupported(variant.Config(global_tokens=2), dims_of(2), causal=False)
    assert reason is not None
    assert "global tokens" in reason


def spec_of(*overrides: str) -> CellSpec:
    usual = ["data=stdlib", "measure=plan", "seq_len=48", "depth=2", "device=cpu"]
    usual += ["model.d_model=16", "model.heads=4"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found: Cell = parse(compose("config", overrides=[*usual, *overrides]))
    return found.spec


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.kv_heads=3"], "kv_heads=3: must divide heads=4; the nearest divisor is 2"),
        (["model.kv_heads=8"], "kv_heads=8: must divide heads=4; the nearest divisor is 4"),
        (["model.kv_heads=0"], "kv_heads"),
        (["model.widen_feed_forward=true"], "widen_feed_forward=true: needs kv_heads"),
    ],
)
def test_impossible_heads_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_of(*overrides)


@pytest.mark.parametrize("feed_forward", ["mlp", "glu"])
@pytest.mark.parametrize("name", ["dense", "transformer_xl"])
def test_a_wider_feed_forward_layer_has_the_parameters_that_sharing_saves(
    name: str, feed_forward: str
) -> None:
    """Up to half of a hidden channel."""
    counts = []
    options = [f"variant={name}", f"feed_forward={feed_forward}"]
    for own in ([], ["model.kv_heads=1"], ["model.kv_heads=1", "model.widen_feed_forward=true"]):
        model = build_model(spec_of(*options, *own))
        counts.append(sum(p.numel() for p in model.parameters()))
    usual, shared, wider = counts
    assert usual - shared == 2 * 2 * 16 * 12
    assert abs(usual - wider) <= 2 * 3 * 16 / 2


def test_the_gates_of_a_model_with_shared_heads(tmp_path: Any) -> None:
    """Leak, reference, and decoding of whole models."""
    for variant in ("dense", "longformer", "variant=hybrid"):
        options = [f"variant={variant}"]
        if "=" in variant:
            options = [variant, "variant.layers=[longformer,dense]"]
        spec = spec_of(*options, "model.kv_heads=2", "objective=clm")
        assert gates.check(spec, tmp_path, "code").leak_max_abs is not None
        decoding_error(spec, Sizes.of(spec).small, 2, torch.device("cpu"))
        model = build_model(spec)
        assert Decoder(model, 3, 48).nbytes == decoding_bytes(model, replace(spec.workload(), batch_size=3))
