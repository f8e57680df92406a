"""Longformer equals loops over each head's own keys, whatever its length, window, dilation and globals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    EXACT,
    assert_same,
    assert_same_layer,
    difference,
    drawn,
    feed,
    make_layer,
    numbers,
    oracle,
    rotated,
    softmax_attention,
)
from torch import Tensor, einsum
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants.attention.dense import Dense, DenseConfig
from variants.attention.longformer import Longformer, LongformerConfig
from variants.base import Context, Workload
from variants.ops.fused import flash_operators

SMALL: list[dict[str, Any]] = [
    {"window": (8, 3), "dilation": (1, 3)},
    {"window": (1,), "dilation": (2,)},
    {"window": (6,), "dilation": (1, 3), "global_tokens": 5},
    {"window": (9, 1), "global_tokens": 1},
]

HEADS = 3
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS)


def windows(tokens: int, window: int, dilation: tuple[int, ...], *, causal: bool) -> Tensor:
    """(H, T, T) bool: each query's keys listed one by one, `dilation` apart, `window` − 1 on a side."""
    allowed = torch.zeros(HEADS, tokens, tokens, dtype=torch.bool)
    for head in range(HEADS):
        step = dilation[head % len(dilation)]
        for query in range(tokens):
            for neighbour in range(-(window - 1), 1 if causal else window):
                key = query + neighbour * step
                if 0 <= key < tokens:
                    allowed[head, query, key] = True
    return allowed


@both_directions
@pytest.mark.parametrize("longer", [0, 1, 500])
def test_window_of_the_whole_sequence_is_dense(causal: bool, longer: int) -> None:
    longformer = make_layer(Longformer, LongformerConfig(window=(40 + longer,)), dims_of(40))
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    assert_same_layer(longformer, dense, numbers(2, 40, 12), causal=causal)


@both_directions
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    window=st.integers(1, 24),
    dilation=st.lists(st.integers(1, 6), min_size=1, max_size=HEADS).map(tuple),
    batch=st.integers(1, 3),
)
@example(tokens=1, window=1, dilation=(1,), batch=1)
@example(tokens=64, window=16, dilation=(1,), batch=2)
@example(tokens=65, window=16, dilation=(1, 2, 4), batch=2)
@example(tokens=4, window=2, dilation=(6, 1), batch=1)
def test_equals_loops_over_the_keys(
    causal: bool, tokens: int, window: int, dilation: tuple[int, ...], batch: int
) -> None:
    config = LongformerConfig(window=(window,), dilation=dilation)
    layer = make_layer(Longformer, config, dims_of(tokens))
    x = numbers(batch, tokens, 12)
    allowed = windows(tokens, window, dilation, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )
    assert torch.equal(layer.attention_mask(tokens, causal=causal), allowed.any(dim=0))
    flops = layer.cost(replace(dims_of(tokens, batch), causal=causal))
    assert flops.mixing == batch * 4 * 4 * int(allowed.sum())  # two products of D = 4 channels a pair
    assert flops.tokenwise == batch * 8 * tokens * 12**2


def with_globals(layer: Longformer, x: Tensor, allowed: Tensor, n: int) -> Tensor:
    """The oracle on `allowed` (H, T, T), but the first n queries read everything by their own projections."""
    weights = layer.get_parameter("global_qkv.weight").chunk(3)
    shape = (*x.shape[:2], HEADS, -1)
    q, k, v = (einsum("btc,dc->btd", x, weight).reshape(shape) for weight in weights)
    everything = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool)
    y = softmax_attention(rotated(q), rotated(k), v, everything).reshape(x.shape)
    y = einsum("btc,dc->btd", y, layer.get_parameter("projections.out.weight"))
    return torch.cat([y[:, :n], oracle(layer, x, allowed)[:, n:]], dim=1)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 70),
    n=st.integers(1, 24),
    windows_by_layer=st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple),
    dilation=st.lists(st.integers(1, 6), min_size=1, max_size=HEADS).map(tuple),
    batch=st.integers(1, 3),
    index=st.integers(0, 2),
)
@example(tokens=1, n=1, windows_by_layer=(4,), dilation=(1,), batch=1, index=0)
@example(tokens=1, n=9, windows_by_layer=(4,), dilation=(1,), batch=2, index=0)
@example(tokens=7, n=6, windows_by_layer=(1,), dilation=(2,), batch=1, index=0)
@example(tokens=64, n=16, windows_by_layer=(17,), dilation=(1,), batch=2, index=0)
@example(tokens=65, n=1, windows_by_layer=(3, 16), dilation=(1, 2, 4), batch=2, index=1)
@example(tokens=70, n=3, windows_by_layer=(500,), dilation=(2, 2, 1), batch=1, index=0)
def test_global_tokens_read_and_are_read_by_all(
    tokens: int,
    n: int,
    windows_by_layer: tuple[int, ...],
    dilation: tuple[int, ...],
    batch: int,
    index: int,
) -> None:
    config = LongformerConfig(window=windows_by_layer, dilation=dilation, global_tokens=n)
    layer = make_layer(Longformer, config, dims_of(tokens), index=index)
    x = numbers(batch, tokens, 12)
    window = windows_by_layer[min(index, len(windows_by_layer) - 1)]
    allowed = windows(tokens, window, dilation, causal=False)
    allowed[:, :, :n] = allowed[:, :n] = True
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: with_globals(layer, x, allowed, n),
        [x, *layer.parameters()],
    )
    assert torch.equal(layer.attention_mask(tokens, causal=False), allowed.any(dim=0))
    flops = layer.cost(replace(dims_of(tokens, batch), causal=False))
    assert flops.mixing == batch * 4 * 4 * int(allowed.sum())
    # four projections of every token, the globals' own keys and values, and queries for themselves
    assert flops.tokenwise == batch * 2 * (6 * tokens + min(n, tokens)) * 12**2


@pytest.mark.parametrize("n", [40, 41, 500])
@pytest.mark.parametrize("window", [1, 8, 100])
def test_all_tokens_global_is_dense_by_the_global_projections(n: int, window: int) -> None:
    longformer = make_layer(Longformer, LongformerConfig(window=(window,), global_tokens=n), dims_of(40))
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    names = {
        "projections.qkv.weight": "global_qkv.weight",
        "projections.out.weight": "projections.out.weight",
    }
    dense.load_state_dict({name: longformer.get_parameter(mine) for name, mine in names.items()})
    x = numbers(2, 40, 12)
    assert_same(
        lambda: feed(longformer, x, causal=False),
        lambda: feed(dense, x, causal=False),
        [x, *(longformer.get_parameter(mine) for mine in names.values())],
        [x, *(dense.get_parameter(name) for name in names)],
    )


def test_equal_projections_and_a_wide_window_are_dense() -> None:
    """A global key inside a window counts once; who is global then shows nowhere."""
    longformer = make_layer(Longformer, LongformerConfig(window=(40,), global_tokens=7), dims_of(40))
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    with torch.no_grad():
        longformer.get_parameter("global_qkv.weight").copy_(
            longformer.get_parameter("projections.qkv.weight")
        )
    dense.load_state_dict({k: v for k, v in longformer.state_dict().items() if "global" not in k})
    x = numbers(2, 40, 12)
    assert_same(lambda: feed(longformer, x, causal=False), lambda: feed(dense, x, causal=False), [x])


@both_directions
@pytest.mark.parametrize("tokens", [1, 2, 17, 61])
@pytest.mark.parametrize("dilation", [(1,), (3,), (1, 3, 1), (4, 1, 2)])
def test_flash_equals_the_reference(tokens: int, dilation: tuple[int, ...], causal: bool) -> None:
    """The operator's oracle stands in for the kernel, which `missing` demands of a cell."""
    config = LongformerConfig(window=(6,), dilation=dilation, impl="flash")
    layer, x = make_layer(Longformer, config, dims_of(tokens)), numbers(2, tokens, 12)
    ctx = Context(causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: layer.reference(x, ctx), [x, *layer.parameters()]
    )


@pytest.mark.parametrize("dilation", [(1,), (2,), (1, 3, 1)])
def test_flash_computes_the_pairs_of_the_formula_in_a_launch_for_each_dilation(
    dilation: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, forward = [], flash_operators.forward

    def noted(*arguments: Any) -> Any:
        launches.append(arguments)
        return forward(*arguments)

    monkeypatch.setattr(flash_operators, "forward", noted)
    work = dims_of(61, batch=2)
    layer = make_layer(Longformer, LongformerConfig(window=(6,), dilation=dilation, impl="flash"), work)
    with CountFlops() as counted:
        feed(layer, numbers(2, 61, 12), causal=True)
    assert counted.total == layer.cost(work).total
    assert len(launches) == len(set(dilation))


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("impl", ["plain", "dense", "blocks", "flash"])
def test_every_implementation_agrees(impl: str, n: int) -> None:
    config = LongformerConfig(window=(6,), dilation=(1, 1, 3), global_tokens=n)
    other = replace(config, impl=impl)
    if reason := Longformer.unsupported(other, dims_of(61), causal=False):
        assert impl in ("blocks", "flash")
        assert f"global_tokens={n}: not supported by impl={impl}" in reason
        return
    layer = make_layer(Longformer, config, dims_of(61))
    x = numbers(2, 61, 12)
    assert layer.impl == "fused"
    fused = feed(layer, x, causal=False)
    layer = make_layer(Longformer, other, dims_of(61))
    assert layer.impl == impl
    assert_same(lambda: feed(layer, x, causal=False), lambda: layer.reference(x, Context(causal=False)), [x])
    assert difference(feed(layer, x, causal=False), fused) <= EXACT


def test_recomputation_with_global_tokens_gives_the_same_gradients() -> None:
    layer = make_layer(Longformer, LongformerConfig(window=(6,), global_tokens=4), dims_of(50))
    x = numbers(2, 50, 12)
    assert_same(
        lambda: checkpoint(lambda x: layer(x, Context(causal=False)).y, x, use_reentrant=False),
        lambda: layer(x, Context(causal=False)).y,
        [x, *layer.parameters()],
    )


@pytest.mark.slow
def test_global_tokens_cost_memory_linear_in_the_length() -> None:
    def peak(tokens: int) -> int:
        with FakeTensorMode(), LiveStorage() as storage:
            dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=256, heads=4)
            layer = Longformer(LongformerConfig(global_tokens=64), dims)
            x = torch.empty(1, tokens, 256, requires_grad=True)
            y = layer(x, Context(causal=False)).y
            y.backward(torch.empty_like(y))
        return storage.peak

    assert peak(2**17) <= 14 / 8 * 2**30  # 14 GiB at 2²⁰
    assert peak(2**18) <= 2.01 * peak(2**17)


def test_without_global_tokens_there_is_nothing_of_them() -> None:
    plain, some = (Longformer(LongformerConfig(global_tokens=n), dims_of(9)) for n in (0, 2))
    assert {name for name, _ in plain.named_parameters()} == {
        "projections.qkv.weight",
        "projections.out.weight",
    }
    assert plain.impl == "fused"
    extra = {name: p.numel() for name, p in some.named_parameters() if "projections" not in name}
    assert extra == {"global_qkv.weight": 3 * 12**2}


def test_global_tokens_have_no_causal_form() -> None:
    config = LongformerConfig(global_tokens=2)
    reason = Longformer.unsupported(config, dims_of(9), causal=True)
    assert reason is not None
    assert reason.startswith("global_tokens=2: ")
    assert Longformer.unsupported(config, dims_of(9), causal=False) is None
    with pytest.raises(ValueError, match=r"^Longformer with causal=True: global_tokens=2: "):
        Longformer(config, dims_of(9))(torch.zeros(1, 9, 12), Context(causal=True))
    with pytest.raises(ValueError, match=r"^global_tokens=-1"):
        LongformerConfig(global_tokens=-1)


@both_directions
@pytest.mark.parametrize(("index", "window"), [(0, 3), (1, 7), (2, 15), (3, 15), (9, 15)])
def test_each_layer_has_its_own_window(causal: bool, index: int, window: int) -> None:
    """The entries go from the bottom up; layers above the last repeat it."""
    layer = make_layer(Longformer, LongformerConfig(window=(3, 7, 15)), dims_of(50), index=index)
    x = numbers(1, 50, 12)
    allowed = drawn(50, lambda i, j: abs(i - j) < window and (j <= i or not causal))
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )


@both_directions
def test_heads_read_apart(causal: bool) -> None:
    """Each head follows its own dilation: with values in one head alone, its keys show."""
    layer = make_layer(Longformer, LongformerConfig(window=(3,), dilation=(1, 4, 9)), dims_of(40))
    qkv = layer.get_parameter("projections.qkv.weight")
    for head, step in enumerate((1, 4, 9)):
        with torch.no_grad():
            values = qkv[24:].clone()
            qkv[24:] = 0
            qkv[24 + 4 * head : 24 + 4 * (head + 1)] = values[4 * head : 4 * (head + 1)]
        x = numbers(1, 40, 12)
        (gradient,) = torch.autograd.grad(feed(layer, x, causal=causal)[0, 20].sum(), x)
        read = {int(j) for j in gradient[0].abs().amax(-1).nonzero()[:, 0]}
        sides = range(-2, 1) if causal else range(-2, 3)
        assert read == {20 + n * step for n in sides}
        with torch.no_grad():
            qkv[24:] = values


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 60),
    window=st.integers(2, 20),
    dilation=st.lists(st.integers(1, 5), min_size=1, max_size=HEADS).map(tuple),
    n=st.integers(0, 12),
)
def test_state_is_what_a_later_query_reads(
    tokens: int, window: int, dilation: tuple[int, ...], n: int
) -> None:
    """The tokens that any later query of a head reaches; the query's own may be counted too."""
    config = LongformerConfig(window=(window,), dilation=dilation, global_tokens=n)
    layer = make_layer(Longformer, config, dims_of(tokens))
    later = windows(tokens + window * max(dilation), window, dilation, causal=True)[:, tokens:, :tokens]
    later[:, :, :n] = True
    needed = int(later.any(dim=1).sum())  # (head, key) pairs
    stored = layer.state_bytes(dims_of(tokens, batch=2)) / (2 * 2 * 4 * 4)  # K and V, batch, D, bytes
    assert needed <= stored <= needed + HEADS


@pytest.mark.parametrize("knob", ["window", "dilation"])
@pytest.mark.parametrize("value", [(), (0,), (4, -1)])
def test_impossible_knob_is_refused_by_name(knob: str, value: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{knob}="):
        LongformerConfig(**{knob: value})
