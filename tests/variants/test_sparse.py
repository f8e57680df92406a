"""What both patterns of Sparse Transformers promise; what is peculiar to one is in its own file."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants import load
from variants.base import Context, Workload
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.factorised import SparseAttention
from variants.ops.patterns.strided_parts import Part, StridedTokens
from variants.ops.projections import masked_attention

NAMES = ("sparse_strided", "sparse_fixed")
MODES = ("merged", "split", "interleaved")
HEADS, D_MODEL = 3, 12

both_patterns = pytest.mark.parametrize("name", NAMES)
both_directions = pytest.mark.parametrize("causal", [True, False])
every_mode = pytest.mark.parametrize("mode", MODES)


def make(
    name: str, seq_len: int, *, layer: int = 0, heads: int = HEADS, batch: int = 1, **knobs: Any
) -> SparseAttention:
    """A float64 layer with weights of order 1/√fan-in; c is 2 unless it is given."""
    if name == "sparse_fixed":
        knobs = {"c": min(2, knobs.get("stride") or 2), **knobs}
    variant = load(name)
    dims = Workload(causal=True, batch_size=batch, seq_len=seq_len, d_model=4 * heads, heads=heads)
    torch.manual_seed(layer)
    made = variant(variant.Config(**knobs), dims, layer).double()
    assert isinstance(made, SparseAttention)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=(4 * heads) ** -0.5)
    return made


def outputs_and_gradients(layer: SparseAttention, y: Tensor, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def inputs(layer: SparseAttention, seq_len: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(
        layer.dims.batch_size, seq_len, layer.dims.d_model, dtype=torch.float64, requires_grad=True
    )


@both_patterns
@both_directions
@every_mode
@pytest.mark.parametrize("impl", ["fused", "plain"])
@pytest.mark.parametrize(
    ("seq_len", "stride", "batch"), [(1, 4, 3), (3, 8, 1), (24, 6, 3), (35, 6, 2), (35, 1, 1), (41, None, 1)]
)
def test_fast_path_equals_reference(
    name: str, causal: bool, mode: str, impl: str, seq_len: int, stride: int | None, batch: int
) -> None:
    for index in range(2 if mode == "interleaved" else 1):
        layer = make(name, seq_len, layer=index, batch=batch, stride=stride, head_mode=mode, impl=impl)
        x = inputs(layer, seq_len)
        fast = outputs_and_gradients(layer, layer(x, Context(causal=causal)).y, x)
        assert_same(fast, outputs_and_gradients(layer, layer.reference(x, Context(causal=causal)), x))


@both_patterns
@both_directions
def test_equals_oracle_under_its_pattern(name: str, causal: bool) -> None:
    layer = make(name, 29, stride=5, batch=2, **({"subblocks": "shared"} if name == "sparse_fixed" else {}))
    x = inputs(layer, 29)
    q, k, v = layer.projections.split(x)
    oracle = layer.projections.merge(masked_attention(q, k, v, layer.attention_mask(29, causal=causal)))
    want = outputs_and_gradients(layer, oracle, x)
    assert_same(outputs_and_gradients(layer, layer(x, Context(causal=causal)).y, x), want)


@both_patterns
@both_directions
@pytest.mark.parametrize("seq_len", [1, 2, 17])
def test_merged_with_a_stride_of_the_whole_sequence_is_dense(name: str, causal: bool, seq_len: int) -> None:
    layer = make(name, seq_len, stride=seq_len)
    dense_type = load("dense")
    dense = dense_type(dense_type.Config(), layer.dims).double()
    dense.load_state_dict(layer.state_dict())
    x = inputs(layer, seq_len)
    got = outputs_and_gradients(layer, layer(x, Context(causal=causal)).y, x)
    torch.manual_seed(5)
    y = dense(x, Context(causal=causal)).y
    assert_same(got, [y, *torch.autograd.grad(y, [x, *dense.parameters()], torch.randn_like(y))])


@both_patterns
@given(
    mode=st.sampled_from(MODES),
    causal=st.booleans(),
    seq_len=st.integers(1, 70),
    stride=st.integers(1, 24),
    index=st.integers(0, 1),
    heads=st.integers(2, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_allowed_pair_is_in_exactly_one_part(
    name: str, causal: bool, mode: str, seq_len: int, stride: int, index: int, heads: int
) -> None:
    layer = make(name, seq_len, layer=index, heads=heads, stride=stride, head_mode=mode)
    counts = torch.zeros(heads, seq_len, seq_len, dtype=torch.int)
    token = torch.arange(seq_len).view(1, 1, -1, 1).repeat(1, heads, 1, 1)
    for part in layer.parts(seq_len, causal=causal, device=torch.device("cpu")):
        of = token[:, slice(*part.heads)]
        q, k = part.queries.gather(of)[..., 0], part.keys.gather(of)[..., 0]  # (G, H, queries), (G, H, keys)
        allowed = torch.ones(q.shape[-1], k.shape[-1], dtype=torch.bool)
        allowed = allowed.tril() if part.causal else allowed
        allowed = allowed if part.mask is None else allowed & part.mask
        head = torch.arange(*part.heads)[None, :, None, None].expand(*q.shape, k.shape[-1])
        where = (head, q[..., :, None].expand_as(head), k[..., None, :].expand_as(head))
        counts.index_put_(where, allowed.expand_as(head).int(), accumulate=True)
    assert torch.equal(counts, layer.allowed(seq_len, causal=causal).int())


@both_patterns
@given(
    mode=st.sampled_from(MODES),
    causal=st.booleans(),
    seq_len=st.integers(1, 300),
    stride=st.integers(1, 40),
    index=st.integers(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_flops_count_allowed_pairs_and_dispatch_explains_the_rest(
    name: str, causal: bool, mode: str, seq_len: int, stride: int, index: int
) -> None:
    layer = make(name, seq_len, layer=index, stride=stride, head_mode=mode)
    flops = layer.cost(replace(layer.dims, causal=causal))
    assert flops.mixing == 4 * 4 * int(layer.allowed(seq_len, causal=causal).sum())
    with CountFlops() as counter:
        layer(torch.zeros(1, seq_len, D_MODEL, dtype=torch.float64), Context(causal=causal))
    if flops.mixing:
        gates.cost_ratio(counter.total, flops, layer.flop_overhead_reason)
    else:
        assert counter.total == flops.tokenwise


@both_patterns
@every_mode
@pytest.mark.parametrize("stride", [None, 40])
def test_causal_form_sees_no_later_token(name: str, mode: str, stride: int | None) -> None:
    variant = load(name)
    dims = Workload(causal=True, batch_size=2, seq_len=140, d_model=32, heads=2)
    config = variant.Config(stride=stride, head_mode=mode)
    assert gates.leak(variant, config, dims, 2, torch.device("cpu")) <= gates.LEAK_TOLERANCE


@both_patterns
@pytest.mark.parametrize("index", [0, 1])
@every_mode
def test_a_prefix_is_read_as_it_is_within_the_whole(name: str, mode: str, index: int) -> None:
    layer = make(name, 100, layer=index, head_mode=mode)
    x = inputs(layer, 100)
    whole = layer(x, Context(causal=True)).y
    for seq_len in (1, 37, 99):
        torch.testing.assert_close(layer(x[:, :seq_len], Context(causal=True)).y, whole[:, :seq_len])


@both_patterns
@both_directions
@every_mode
@pytest.mark.parametrize(("seq_len", "stride"), [(61, 7), (49, 7), (8, 7), (5, 7)])
def test_two_layers_connect_any_two_allowed_positions(
    name: str, causal: bool, mode: str, seq_len: int, stride: int
) -> None:
    lower, upper = (make(name, seq_len, layer=i, stride=stride, head_mode=mode) for i in range(2))
    # a token keeps what it has through the residual stream
    reach = [
        layer.attention_mask(seq_len, causal=causal) | torch.eye(seq_len).bool() for layer in (lower, upper)
    ]
    connected = (reach[1].int() @ reach[0].int()) > 0
    everything = torch.ones(seq_len, seq_len, dtype=torch.bool)
    assert torch.equal(connected, everything.tril() if causal else everything)


@both_patterns
@every_mode
@pytest.mark.parametrize("seq_len", [20, 23])
def test_state_is_what_later_tokens_can_read(name: str, mode: str, seq_len: int) -> None:
    for index in range(2):
        layer = make(name, 80, layer=index, stride=5, head_mode=mode)
        later = layer.allowed(80, causal=True)[:, seq_len:, :seq_len].any(1)
        dims = dataclasses.replace(layer.dims, seq_len=seq_len)
        assert layer.state_bytes(dims) == 2 * int(later.sum()) * dims.head_dim * dims.element_bytes


@pytest.mark.parametrize("impl", ["fused", "plain"])
def test_union_attention_has_the_gradients_of_its_outputs(impl: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    own = StridedTokens(start=0, groups=2, group_step=3, run=3)
    after = StridedTokens(start=3, groups=1, run=4)
    some = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    parts = [
        Part(heads=(0, 2), queries=own, keys=own, causal=True),
        Part(heads=(0, 1), queries=after, keys=StridedTokens(start=0, rows=3, row_step=1), mask=some),
        Part(heads=(1, 2), queries=after, keys=StridedTokens(start=0, run=2)),
    ]
    assert torch.autograd.gradcheck(lambda *qkv: union_attention(*qkv, parts, impl), (q, k, v))
    y = union_attention(q, k, v, parts, impl)
    assert torch.equal(y[:, 1, 6] != 0, torch.ones(1, 2).bool())
    assert torch.count_nonzero(y[:, 0, 6]) == 2
    lonely = union_attention(q, k, v, parts[1:2], impl)  # most queries have no key at all
    assert torch.count_nonzero(lonely[:, 0, :3]) == 0
    assert torch.count_nonzero(lonely[:, 0, 4]) == 0
    assert torch.autograd.gradcheck(lambda *qkv: union_attention(*qkv, parts[1:2], impl), (q, k, v))


@both_patterns
def test_long_sequences_are_predicted_without_memory_for_them(name: str) -> None:
    seq_len = 2**17
    variant = load(name)
    with FakeTensorMode(), LiveStorage() as storage:
        dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=256, heads=4)
        layer = variant(variant.Config(), dims)
        x = torch.empty(1, seq_len, 256, requires_grad=True)
        y = layer(x, Context(causal=True)).y
        y.backward(torch.empty_like(y))
    assert storage.peak <= 14 / 8 * 2**30  # 14 GiB at 2²⁰


@both_patterns
@every_mode
def test_recomputation_gives_the_same_gradients(name: str, mode: str) -> None:
    layer = make(name, 33, head_mode=mode)
    x = inputs(layer, 33)
    kept = outputs_and_gradients(layer, layer(x, Context(causal=True)).y, x)
    again = checkpoint(lambda x: layer(x, Context(causal=True)).y, x, use_reentrant=False)
    assert_same(outputs_and_gradients(layer, again, x), kept, tolerance=0.0)


@both_patterns
@pytest.mark.parametrize("impl", ["fused", "plain"])
def test_bfloat16_is_near_float64(name: str, impl: str) -> None:
    layer = make(name, 130, stride=12, impl=impl)
    x = inputs(layer, 130)
    want = outputs_and_gradients(layer, layer(x, Context(causal=True)).y, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float(), Context(causal=True)).y
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want[0], atol=0.05, rtol=0.05)
    torch.manual_seed(5)
    grad = torch.autograd.grad(y, x, torch.randn_like(want[0]).to(y.dtype))[0]
    torch.testing.assert_close(grad, want[1], atol=0.15, rtol=0.05)


@both_patterns
def test_null_stride_is_near_the_root_of_the_length_and_stays_null_in_the_config(name: str) -> None:
    for seq_len, stride in ((64, 8), (1000, 32), (16384, 128), (2**20, 1024)):
        layer = make(name, seq_len)
        assert layer.stride == stride
        assert layer.config.as_dict()["stride"] is None
    assert make(name, 1).stride <= 2


@both_patterns
@pytest.mark.parametrize("knobs", [{"stride": 0}, {"head_mode": "both"}, {"impl": "naive"}])
def test_bad_knobs_are_refused_by_name(name: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(knobs))}=.*allowed is"):
        load(name).Config(**knobs)


@both_patterns
def test_splitting_one_head_is_unsupported(name: str) -> None:
    variant = load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=16, d_model=8, heads=1)
    assert "heads=1" in str(variant.unsupported(variant.Config(head_mode="split"), dims, causal=True))
    assert variant.unsupported(variant.Config(), dims, causal=True) is None


@both_patterns
def test_the_cpu_kernel_is_not_replaced_in_silence(name: str) -> None:
    layer = make(name, 16, impl="fused").to("meta")
    with pytest.raises(ValueError, match="impl=fused"):
        layer(torch.empty(1, 16, D_MODEL, dtype=torch.float64, device="meta"), Context(causal=True))
    assert make(name, 16).impl == "fused"
    assert make(name, 16).to("meta").impl == "plain"
