"""FlexAttention and xformers as an `impl`: the pattern they are given, the reason where they cannot run.

On a CPU, FlexAttention has a forward pass that computes all T × T scores, which is enough to check
masks; xformers is stood in for by a small module. What needs the real kernels is in tests/test_cuda.py.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, feed, make_layer, numbers, refer
from tiers import tiered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure.flops import CountFlops
from variants.attention.dense import Dense, DenseConfig
from variants.attention.longformer import Longformer, LongformerConfig
from variants.attention.streaming_llm import StreamingLLM, StreamingLLMConfig
from variants.base import Context, Dims, Workload
from variants.ops.fused import backends
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import MaskedAttention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLEX: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("chunked", {"chunk": 130}),
    ("overlapping", {"chunk": 132}),
    ("longformer", {"window": (30,)}),
    ("longformer", {"window": (20,), "dilation": (1, 4)}),
    ("sparse_strided", {"stride": 10}),
    ("sparse_strided", {"stride": 9, "head_mode": "split"}),
    ("sparse_strided", {"stride": 9, "head_mode": "interleaved"}),
    ("sparse_fixed", {"stride": 12, "c": 2}),
    ("sparse_fixed", {"stride": 9, "c": 4, "head_mode": "split"}),
    ("sparse_fixed", {"stride": 140, "c": 3, "head_mode": "interleaved", "subblocks": "shared"}),
    ("axial", {"row": 14}),
    ("bigbird", {"block": 12, "global_blocks": 2, "random_blocks": 2}),
    ("bigbird", {"block": 40, "global_blocks": 1, "random_blocks": 1, "window_blocks": 1}),
    ("block_recurrent", {"window": 50, "states": 3}),
    ("image_transformer", {"block": 20, "memory": 30}),
    ("image_transformer", {"dims": 2, "row": 20, "block_rows": 2, "block_columns": 5}),
    ("shifted_windows", {"window": 70}),
    ("streaming_llm", {"window": 40, "sinks": 3, "positions": "text"}),
]
LAYERWISE = ("interleaved", "axial", "shifted_windows")
"""Variants, and values of head_mode, whose second layer has another mask."""
every_flex = pytest.mark.parametrize(
    ("name", "knobs"), FLEX, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
both_directions = pytest.mark.parametrize("causal", [True, False])


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """Compiled graphs and masks of one test are not another's."""
    yield
    backends._mask.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def flex_layer(
    name: str, knobs: dict[str, Any], dims: Dims, *, index: int = 0, causal: bool = True
) -> MaskedAttention:
    """Skips if the variant has no form for the objective."""
    variant = variants.load(name)
    if reason := variant.no_form(variant.Config(impl="flex", **knobs), causal=causal):
        pytest.skip(f"{name} {reason}")
    return make_layer(variant, variant.Config(impl="flex", **knobs), dims, index=index)


# --- FlexAttention: the mathematics ---------------------------------------------------------------


CASES = [(*case, 301) for case in FLEX] + [
    (*case, n) for case in (FLEX[0], FLEX[4], FLEX[-1]) for n in (1, 7)
]
"""By default, one of each variant."""


@pytest.mark.parametrize(
    ("name", "knobs", "tokens"), tiered((case[0], pytest.param(*case)) for case in CASES)
)
@both_directions
def test_flex_equals_the_reference(name: str, knobs: dict[str, Any], causal: bool, tokens: int) -> None:
    for index in range(2 if {name, knobs.get("head_mode")} & {*LAYERWISE} else 1):
        layer = flex_layer(name, knobs, dims_for(tokens, 2), index=index, causal=causal)
        x = numbers(2, tokens, layer.dims.d_model).detach()
        with torch.no_grad():
            got, want = feed(layer, x, causal=causal), refer(layer, x, causal=causal)
        assert difference(got, want) <= EXACT


@both_directions
def test_flex_reads_as_the_fast_path_does(causal: bool) -> None:
    """Heads that differ: the same as the parts that are the variant's own, which share no rule."""
    layer = flex_layer("sparse_fixed", {"stride": 12, "c": 3, "head_mode": "split"}, dims_for(150))
    parts = make_layer(type(layer), type(layer).Config(stride=12, c=3, head_mode="split"), layer.dims)
    x = numbers(1, 150, layer.dims.d_model).detach()
    with torch.no_grad():
        assert difference(feed(layer, x, causal=causal), feed(parts, x, causal=causal)) <= EXACT


def test_too_many_graphs_are_an_error_and_not_a_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "GRAPHS", 2)
    x = torch.zeros(1, 1, 5, 16)
    rule = masks.causal
    for tokens in (1, 2):
        backends.flex(*[x[:, :, :tokens]] * 3, rule)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        backends.flex(*[x[:, :, :3]] * 3, rule)


def test_gradients_on_a_cpu_are_refused_by_name() -> None:
    layer = flex_layer("dense", {}, dims_for(9))
    with pytest.raises(NotImplementedError, match="impl=flex needs a CUDA device"):
        layer(numbers(1, 9, 16), Context(causal=True))


# --- FlexAttention: what it computes --------------------------------------------------------------


def tiles(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(H, T, T) bool → (H, n, n) bool: tiles with a pair in them, and those with nothing else."""
    block, tokens = backends.BLOCK, allowed.shape[-1]
    grid = range(0, tokens, block)
    cells = [[allowed[:, i : i + block, j : j + block] for j in grid] for i in grid]
    some = [torch.stack([cell.any((1, 2)) for cell in row], -1) for row in cells]
    full = [torch.stack([cell.sum((1, 2)) == block * block for cell in row], -1) for row in cells]
    return torch.stack(some, 1), torch.stack(full, 1)


def read(layer: MaskedAttention, tokens: int, causal: bool) -> Tensor:
    """(H or 1, T, T) bool."""
    return masks.by_head(rule_of(layer, tokens, causal), tokens, layer.dims.heads)


def rule_of(layer: MaskedAttention, tokens: int, causal: bool) -> masks.Rule:
    return layer.mask(tokens, causal=causal)


@every_flex
@both_directions
@pytest.mark.parametrize("tokens", [1, 128, 520])
def test_a_mask_holds_the_patterns_tiles(name: str, knobs: dict[str, Any], causal: bool, tokens: int) -> None:
    """Empty tiles are left out, and full ones are not cut."""
    if name in ("chunked", "overlapping"):
        knobs = {"chunk": 600}  # a layer is given one chunk at a time
    layer = flex_layer(name, knobs, dims_for(tokens), causal=causal)
    allowed, rule = read(layer, tokens, causal), rule_of(layer, tokens, causal)
    some, full = tiles(allowed)
    block_mask, pairs = backends._mask(rule, len(allowed), tokens, CPU)
    assert torch.equal(block_mask.to_dense()[0].bool(), some)
    assert torch.equal(block_mask.full_kv_num_blocks[0], full.sum(-1))
    assert pairs == 128 * 128 * int(some.sum())


@both_directions
@pytest.mark.parametrize("name", ["dense", "sparse_fixed"])
def test_flops_of_flex_are_those_of_its_tiles(name: str, causal: bool) -> None:
    """Whole, in each head, and on top of the projections."""
    layer = flex_layer(name, {}, dims_for(300, 3))
    with torch.no_grad(), CountFlops() as counter:
        layer(numbers(3, 300, 16), Context(causal=causal))
    some, _ = tiles(read(layer, 300, causal).expand(2, -1, -1))
    attention = counter.total - layer.cost(replace(layer.dims, causal=causal)).tokenwise
    assert attention == 3 * 2 * 2 * layer.dims.head_dim * 128 * 128 * int(some.sum())
    assert layer.flop_overhead_reason is not None
    assert not layer.overhead_is_bounded


def test_masks_are_found_again_and_not_without_end() -> None:
    rule = masks.causal
    first = backends._mask(rule, 1, 40, CPU)
    assert backends._mask(masks.causal, 1, 40, CPU) is first
    dims = dims_for(40)
    one, two = (flex_layer("sparse_strided", {"stride": 5}, dims, index=index) for index in range(2))
    assert rule_of(one, 40, True) == rule_of(two, 40, True)
    assert rule_of(one, 40, True) != rule_of(one, 40, False)
    x = torch.zeros(1, 2, 40, 8)
    before = backends._mask.cache_info().hits
    for index in range(2):  # each layer's own, equal rule
        backends.flex(x, x, x, rule_of(flex_layer("longformer", {}, dims, index=index), 40, True))
    assert backends._mask.cache_info().hits == before + 1
    for tokens in range(1, 2 * backends.MASKS):
        backends._mask(rule, 1, tokens, CPU)
    assert backends._mask.cache_info().currsize == backends.MASKS


def test_each_pass_is_noted_when_it_happens() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    z = x * 2
    with CountFlops() as forward:
        y = backends.note_passes(z, (x, x), 10, backward_products=7)
    assert forward.counts == (20, 1, 3 * 24 + 12)  # two inputs, y, and float32 for each of three rows
    y.sum().backward(retain_graph=True)
    assert forward.total == 20
    with CountFlops() as backward:
        y.sum().backward()
    assert backward.total == 70
    with torch.no_grad(), CountFlops() as alone:
        backends.note_passes(z, (x, x), 10, backward_products=7)
    assert alone.total == 20


def test_noted_work_is_counted_by_every_counter_around_it_also_on_fakes() -> None:
    with FakeTensorMode(), CountFlops() as outer:
        with CountFlops() as inner:
            backends.note_work(5, 1, 300)
        backends.note_work(2, 3, 10)
    assert (inner.counts, outer.counts) == ((5, 1, 300), (7, 4, 310))


# --- xformers -------------------------------------------------------------------------------------

STAND_IN = '''
"""Stands in for xformers: the same mathematics, and what it was given."""
import torch

calls = []


class LowerTriangularMask:
    pass


def _allowed(query, attn_bias):
    everything = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool)
    if attn_bias is None:
        return everything
    assert isinstance(attn_bias, LowerTriangularMask)
    return everything.tril()


def _scores(query, key, attn_bias, scale):
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    return scores.masked_fill(~_allowed(query, attn_bias), -torch.inf)


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    calls.append({"shape": tuple(query.shape), "bias": attn_bias, "p": p, "scale": scale})
    if query.shape[-1] % 2:
        raise NotImplementedError("No operator found:\\n  `one` is not supported because:\\n    odd heads")
    scores = _scores(query, key, attn_bias, scale)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value), scores.logsumexp(-1)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    weights = (_scores(query, key, attn_bias, scale) - lse[..., None]).exp()
    share = torch.einsum("bihd,bihd->bhi", grad, output)[..., None]
    d_scores = weights * (torch.einsum("bihd,bjhd->bhij", grad, value) - share) * scale
    return (
        torch.einsum("bhij,bjhd->bihd", d_scores, key),
        torch.einsum("bhij,bihd->bjhd", d_scores, query),
        torch.einsum("bhij,bihd->bjhd", weights, grad),
    )
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`xformers.ops`, from a package on the path."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").write_text("")
    (tmp_path / "xformers/ops.py").write_text(STAND_IN)
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("xformers.ops")
    for name in ("xformers", "xformers.ops"):  # forgotten again after the test
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module


@both_directions
@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (13, 1), (20, 4)])
def test_xformers_is_given_what_it_takes(stand_in: ModuleType, causal: bool, tokens: int, heads: int) -> None:
    dims = Workload(causal=True, batch_size=3, seq_len=tokens, d_model=24, heads=heads)
    layer = make_layer(Dense, DenseConfig(impl="xformers"), dims)
    x = numbers(3, tokens, 24)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: refer(layer, x, causal=causal),
        [x, *layer.parameters()],
    )
    (call,) = stand_in.calls
    assert call["shape"] == (3, tokens, heads, 24 // heads)  # (B, T, H, D)
    assert call["scale"] == pytest.approx((24 / heads) ** -0.5)
    assert call["p"] == 0
    assert isinstance(call["bias"], stand_in.LowerTriangularMask) == causal
    assert (call["bias"] is None) != causal


@pytest.mark.usefixtures("stand_in")
@both_directions
def test_xformers_counts_the_pairs(causal: bool) -> None:
    dims = dims_for(21, 2)
    layer = make_layer(Dense, DenseConfig(impl="xformers"), dims)
    cost, x = layer.cost(replace(dims, causal=causal)), numbers(2, 21, 16)
    with CountFlops() as forward:
        y = feed(layer, x, causal=causal)
    with CountFlops() as backward:
        y.sum().backward()
    assert forward.total == cost.total
    assert backward.total == 2 * cost.tokenwise + cost.mixing * 5 // 2
    assert layer.flop_overhead_reason is None


@pytest.mark.usefixtures("stand_in")
def test_xformers_is_asked_whether_it_has_a_kernel() -> None:
    assert backends._refused_by_xformers(CPU, 16, torch.float32) is None
    reason = backends._refused_by_xformers(CPU, 15, torch.bfloat16)
    assert reason is not None
    assert "heads of 15 channels in bfloat16" in reason
    assert "`one` is not supported because:; odd heads" in reason
    assert "\n" not in reason


# --- where they cannot run ------------------------------------------------------------------------

EVERYWHERE = ["dense", "chunked", "overlapping"]


def reason_of(name: str, impl: str, device: torch.device, *, head_dim: int = 64) -> str | None:
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=64, d_model=2 * head_dim, heads=2)
    return variant.missing(variant.Config(impl=impl), dims, device=device, dtype=torch.float32)


@pytest.mark.parametrize("name", sorted({name for name, _ in FLEX}))
def test_flex_is_missing_where_it_cannot_train(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "impl=flex needs a CUDA device: FlexAttention has no backward pass on cpu"
    assert reason_of(name, "flex", CPU) == expected
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert "needs Triton" in str(reason_of(name, "flex", CUDA))
    triton = ModuleType("triton")
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert reason_of(name, "flex", CUDA) is None
    assert "16 channels or more, not 8" in str(reason_of(name, "flex", CUDA, head_dim=8))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_xformers_is_missing_where_it_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "impl=xformers needs a CUDA device" in str(reason_of(name, "xformers", CPU))
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert "the package xformers, which is not installed" in str(reason_of(name, "xformers", CUDA))


def test_flex_has_one_position_for_a_query() -> None:
    config = StreamingLLMConfig(impl="flex")
    reason = StreamingLLM.unsupported(config, dims_for(9), causal=True)
    assert reason == "positions=cache: not supported by impl=flex, use positions=text or impl=auto"
    assert StreamingLLM.IMPLS["flex"].untried


def test_flex_has_no_global_tokens() -> None:
    config = LongformerConfig(impl="flex", global_tokens=3)
    reason = Longformer.unsupported(config, dims_for(9), causal=False)
    assert reason is not None
    assert "global_tokens=3: not supported by impl=flex" in reason


@pytest.mark.parametrize("name", ["sparse_strided", "sparse_fixed"])
def test_the_cpus_kernel_is_missing_elsewhere(name: str) -> None:
    assert reason_of(name, "fused", CPU) is None
    assert "impl=fused: runs on the CPU only; on cuda" in str(reason_of(name, "fused", CUDA))


@pytest.mark.parametrize("name", variants.mixers())
def test_defaults_run_on_a_cpu(name: str) -> None:
    variant = variants.load(name)
    assert variant.missing(variant.Config(), dims_for(64), device=CPU, dtype=torch.float32) is None


def test_variants_load_no_kernel_library(tmp_path: Path) -> None:
    """Nor does building one; a library that breaks when it is imported breaks who asks for it alone."""
    (tmp_path / "xformers.py").write_text("raise RuntimeError('imported')\n")
    code = f"""
import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(variants.__file__).parents[1])!r}]
import torch, variants
before = {{*sys.modules}}
for name in variants.mixers():
    variants.load(name)
from variants.base import Context, Dims
from variants.attention.dense import Dense, DenseConfig
dims = Dims(seq_len=4, d_model=32, heads=2)
Dense(DenseConfig(impl="xformers"), dims)
Dense(DenseConfig(), dims)(torch.zeros(1, 4, 32), Context(causal=True))
loaded = {{*sys.modules}} - before
found = loaded & {{"xformers", "torch.nn.attention.flex_attention"}}
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
