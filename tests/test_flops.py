"""The counter sees every product of a training step, and counts each as arithmetic on paper does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import variants
from bench.measure.flops import CountFlops, attention_formulas, formulas
from bench.measure.step import Subject
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks import text
from variants.base import Workload
from variants.input_schedule import NetworkOut

FF_MULT = 4
CPU = torch.device("cpu")
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def dims(seq_len: int, batch_size: int = 2, d_model: int = 32, heads: int = 2) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=d_model, heads=heads)


def model_of(
    name: str, sizes: Workload, *, depth: int = 2, activations: str = "keep", **knobs: Any
) -> LanguageModel:
    variant = variants.load(name)
    return LanguageModel(
        ModelSpec.of(variant, variant.Config(**knobs), feed_forward=feed_forward(mult=FF_MULT)),
        sizes,
        depth=depth,
        dropout=0.0,
        vocabulary=text.VOCABULARY,
        activations=activations,
    )


def subject_of(model: LanguageModel, sizes: Workload, *, causal: bool) -> Subject:
    tokens = torch.randint(0, 256, (sizes.batch_size, sizes.seq_len))
    return Subject.make(
        lambda: model,
        lambda: text.Batch(tokens, tokens.clone()),
        causal=causal,
        device=CPU,
    )


def dispatched(model: LanguageModel, sizes: Workload, *, causal: bool) -> int:
    subject = subject_of(model, sizes, causal=causal)
    with CountFlops() as counter:
        subject.step()
    return counter.total


def sizes_for(name: str, *, causal: bool) -> Workload:
    """Past every default window and chunk, and a multiple of none of them."""
    sizes, variant = dims(601, batch_size=1), variants.load(name)
    if reason := variant.unsupported(variant.Config(), sizes, causal=causal):
        pytest.skip(f"{name}: {reason}")
    return sizes


def step_on_paper(sizes: Workload, depth: int, *, causal: bool) -> int:
    """A dense training step, product by product. Linear layers: the output, and the gradients of the
    input and of the weight. Attention: QKᵀ and PV; then QKᵀ again, and the gradients of V, P, Q and K."""
    b, t, c = sizes.batch_size, sizes.seq_len, sizes.d_model
    linear = sum(2 * b * t * rows * columns for rows, columns in [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)])
    head = 2 * b * t * c * text.VOCABULARY
    pairs = sum(range(1, t + 1)) if causal else t * t
    product = sizes.heads * 2 * b * pairs * (c // sizes.heads)
    return 3 * (depth * linear + head) + depth * (2 + 5) * product


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "depth"), [(129, 1), (257, 2)])
def test_executed_step_of_dense_attention_is_the_sum_of_its_products(
    seq_len: int, depth: int, causal: bool
) -> None:
    sizes = dims(seq_len)
    counted = dispatched(model_of("dense", sizes, depth=depth), sizes, causal=causal)
    assert counted == step_on_paper(sizes, depth, causal=causal)


def test_torchs_own_counter_sees_no_attention_on_the_cpu() -> None:
    """Why `CountFlops` exists. Where this fails, torch has learnt it, and our formulas may go."""
    q = torch.randn(1, 2, 64, 16)
    with FlopCounterMode(display=False) as theirs, CountFlops() as ours:
        F.scaled_dot_product_attention(q, q, q)
    assert theirs.get_total_flops() == 0
    assert ours.total == 2 * 2 * 2 * 64 * 64 * 16


class Ops(TorchDispatchMode):
    """Every operation dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(getattr(func, "overloadpacket", func))
        return func(*args, **(kwargs or {}))


# products, but neither cummax nor lgamma nor convert_element_type
PRODUCT = re.compile(r"attention|(?<!cu)(?<!ga)mm|conv(?!ert)")


@pytest.mark.parametrize("name", variants.mixers())
def test_every_product_of_a_step_has_a_formula(name: str) -> None:
    causal = variants.load(name).info.caps.causal
    sizes = sizes_for(name, causal=causal)
    subject = subject_of(model_of(name, sizes), sizes, causal=causal)
    with Ops() as ops:
        subject.step()
    products = {op for op in ops.seen if PRODUCT.search(str(op))}
    assert products, "a step without a product is no step"
    uncounted = products - set(formulas())
    assert not uncounted, f"{name} dispatches {uncounted}, which count 0"


def test_every_fused_attention_kernel_of_this_torch_has_a_formula() -> None:
    """The math kernel is a composite of counted products; `overrideable` and `mps` are other devices'."""
    prefix = "aten::_scaled_dot_product_"
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    elsewhere = re.compile(r"_math|_mps|overrideable")
    fused = {name.removeprefix("aten::") for name in names if not elsewhere.search(name)}
    assert fused >= {f"{FUSED.__name__}{end}" for end in ("", "_backward")}
    assert fused == {packet.__name__ for packet in attention_formulas()}
    assert set(attention_formulas()) <= set(formulas())


@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_sums_of_rows_are_products(weighted: bool) -> None:
    """5 bags of 4 rows of 8 channels; a sum without weights multiplies nothing."""
    table = torch.randn(20, 8, requires_grad=True)
    weights = torch.rand(5, 4, requires_grad=True) if weighted else None
    chosen, products = torch.randint(20, (5, 4)), 2 * 5 * 4 * 8 * weighted
    with CountFlops() as counter:
        y = F.embedding_bag(chosen, table, per_sample_weights=weights, mode="sum")
        assert counter.total == products
        y.sum().backward()
    assert counter.total == 3 * products
    with CountFlops() as counter, torch.no_grad():
        F.embedding_bag(chosen, table, per_sample_weights=weights, mode="sum")
    assert counter.total == products


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_kernel_counts_the_pairs_it_computes(queries: int, keys: int, causal: bool) -> None:
    """Pairs counted one by one; a causal kernel lets query i read keys 0 … i."""
    q, k = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8)
    with CountFlops() as counter:
        F.scaled_dot_product_attention(q, k, k, is_causal=causal)
    pairs = sum(j <= i or not causal for i in range(queries) for j in range(keys))
    assert counter.total == 2 * 2 * (2 * 3) * pairs * 8


def test_a_mask_given_as_a_tensor_saves_nothing() -> None:
    q = torch.randn(1, 2, 64, 16)
    with CountFlops() as counter:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(64, 64, dtype=torch.bool).tril())
    assert counter.total == 2 * 2 * 2 * 64 * 64 * 16


def test_compiled_code_is_counted_as_it_is_uncompiled() -> None:
    """It runs compiled from the first call on, and compiling, the backward pass lazily, counts nothing."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def work(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).relu() @ w

    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(work, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    totals = []
    for function in (work, compiled, compiled):
        with CountFlops() as counter:
            function(x, w).sum().backward()
        totals.append(counter.total)
    assert totals == [2 * 3 * 2 * 4 * 8 * 8] * 3
    assert len(graphs) == 2  # forward, backward


def test_an_operation_that_hides_others_is_refused() -> None:
    x, chosen = torch.randn(4, 4), torch.tensor(True)
    with pytest.raises(NotImplementedError, match="cannot count cond"), CountFlops(), torch.no_grad():
        torch.ops.higher_order.cond(chosen, lambda a: (a @ a,), lambda a: (a,), (x,))


def test_recompute_is_executed_and_not_algorithmic() -> None:
    """Checkpointing runs every block's forward pass again, its last product at most left out."""
    sizes, depth = dims(257), 3
    kept, recomputed = (
        model_of("dense", sizes, depth=depth, activations=how) for how in ("keep", "checkpoint")
    )
    assert kept.cost(replace(sizes, causal=True)) == recomputed.cost(replace(sizes, causal=True))
    extra = dispatched(recomputed, sizes, causal=True) - dispatched(kept, sizes, causal=True)
    b, t, c = sizes.batch_size, sizes.seq_len, sizes.d_model
    last = 2 * b * t * FF_MULT * c * c
    block = 8 * b * t * c * c + 2 * last + 4 * b * c * t * (t + 1) // 2
    assert depth * (block - last) <= extra <= depth * block


def windows_of(model: LanguageModel, sizes: Workload, *, causal: bool) -> list[int]:
    """Lengths of the windows that the network is really given."""
    lengths: list[int] = []

    def network(x: torch.Tensor, _: Any) -> NetworkOut:
        lengths.extend([x.shape[1]] * x.shape[0])
        return NetworkOut(x)

    model.input_schedule.apply(network, torch.zeros(1, sizes.seq_len, 1), causal=causal)
    return lengths


PLAIN = {
    "dense": {},
    "chunked": {},
    "overlapping": {},
    "longformer": {"window": (8, 100)},
    "sparse_strided": {"stride": 10},
}
"""Variants that are softmax over a pattern and nothing else, some knobs away from their defaults."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_algorithmic_attention_is_the_pairs_of_the_pattern(name: str, causal: bool) -> None:
    """Two products of 2·C for every pair of every window."""
    sizes = sizes_for(name, causal=causal)
    model = model_of(name, sizes, **PLAIN[name])
    pairs = 0
    for length in windows_of(model, sizes, causal=causal):
        patterns = [layer.attention_mask(length, causal=causal) for layer in model.layers]
        pairs += sum(int(pattern.sum()) for pattern in patterns if pattern is not None)
    assert model.cost(replace(sizes, causal=causal)).mixing == 4 * sizes.d_model * pairs


@pytest.mark.parametrize("name", PLAIN)
def test_algorithmic_linear_part_is_the_products_of_every_window(name: str) -> None:
    sizes = dims(601, batch_size=3)
    model = model_of(name, sizes, depth=2)
    c = sizes.d_model
    tokens = sizes.batch_size * sum(windows_of(model, sizes, causal=True))
    linear = 2 * 2 * tokens * (3 * c * c + c * c + 2 * FF_MULT * c * c)
    head = 2 * sizes.batch_size * sizes.seq_len * c * text.VOCABULARY
    assert model.cost(replace(sizes, causal=True)).tokenwise == linear + head


@pytest.mark.parametrize(
    "write",
    [
        lambda a, b: torch.zeros(2, 3, 5).baddbmm_(a, b),
        lambda a, b: torch.baddbmm(torch.zeros(2, 3, 5), a, b, out=torch.zeros(2, 3, 5)),
        lambda a, b: torch.bmm(a, b, out=torch.zeros(2, 3, 5)),
        lambda a, b: [torch.zeros(3, 5).addmm_(a[i], b[i]) for i in range(2)],
    ],
    ids=["baddbmm_", "baddbmm out", "bmm out", "addmm_"],
)
def test_a_product_that_is_written_in_place_counts(write: Any) -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with CountFlops() as counter:
        write(a, b)
    assert counter.counts.flops == 2 * 2 * 3 * 4 * 5
