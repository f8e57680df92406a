"""Performer against the quadratic form of its features, softmax, its formulas and its limits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import variants
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import optimizer_for, training_step
from variants.attention.performer import Performer, PerformerConfig
from variants.base import Context, Workload
from variants.ops.features import causal_linear_attention, linear_attention
from variants.ops.recurrences import feature_sums
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [{"features": "relu", "n_features": 24, "chunk": 32, "redraw": 1}]

CPU = torch.device("cpu")
FEATURES = ("softmax", "relu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int = 64, **knobs: object) -> Performer:
    torch.manual_seed(0)
    return Performer(PerformerConfig(**{"n_features": 12, "chunk": 8, **knobs}), dims_of(seq_len))  # type: ignore[arg-type]


def results(
    layer: Performer, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs, gradient of the input, gradients of the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = run(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]


def assert_equals_reference(layer: Performer, x: torch.Tensor, causal: bool) -> None:
    fast = results(layer, lambda x: layer(x, Context(causal=causal)).y, x)
    torch.testing.assert_close(fast, results(layer, lambda x: layer.reference(x, Context(causal=causal)), x))


def test_it_is_registered() -> None:
    assert variants.load("performer") is Performer


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 1), (1, 3), (5, 1), (8, 1), (8, 3), (67, 3)])
@pytest.mark.parametrize("segment", [16, 4096])
def test_it_equals_the_quadratic_form_in_outputs_and_gradients(
    features: str, causal: bool, seq_len: int, batch: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sums, "SEGMENT", Sizes(segment, segment))
    x = torch.randn(batch, seq_len, 16, dtype=torch.float64)
    assert_equals_reference(make(seq_len, features=features).double(), x, causal)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("chunks", [2, 3, 5, 7, 8])
def test_running_sums_do_not_depend_on_the_number_of_chunks(features: str, chunks: int) -> None:
    x = torch.randn(2, 4 * chunks - 1, 16, dtype=torch.float64)  # all in one segment
    assert_equals_reference(make(x.shape[1], features=features, chunk=4).double(), x, causal=True)


def test_the_running_sums_cost_no_more_a_token_in_a_long_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sums, "SEGMENT", Sizes(2**20, 2**20))
    dispatched = []
    for seq_len in (2**14, 2**17):
        with FakeTensorMode(), CountFlops() as counter:
            layer = make(seq_len)
            layer(torch.randn(1, seq_len, 16, requires_grad=True), Context(causal=True)).y.sum().backward()
        dispatched.append(counter.total / seq_len)
    assert dispatched[1] == pytest.approx(dispatched[0], rel=0.01)


def test_relu_features_are_the_papers() -> None:
    """Query by query, with nothing of ours but the weights: max(ω·x, 0) + 0.001 and no other constant."""
    layer, x = make(9, features="relu").double(), torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = layer.projections.split(x)
    omega = layer.directions.double()
    outputs = torch.zeros(1, 9, 2, 8, dtype=torch.float64)
    for h, i in itertools.product(range(2), range(9)):
        phi_q, phi_k = ((omega @ t / 8**0.25).clamp(min=0) + 0.001 for t in (q[0, h, i], k[0, h, : i + 1].T))
        weights = phi_q @ phi_k
        outputs[0, i, h] = weights @ v[0, h, : i + 1] / weights.sum()
    want = layer.projections.merge(outputs.transpose(1, 2))
    torch.testing.assert_close(layer(x, Context(causal=True)).y, want)


@settings(max_examples=15, deadline=None)
@given(
    seq_len=st.integers(1, 50),
    chunk=st.integers(1, 64),
    m=st.integers(1, 20),
    causal=st.booleans(),
)
def test_no_length_chunk_or_number_of_features_is_special(
    seq_len: int, chunk: int, m: int, causal: bool
) -> None:
    x = torch.randn(2, seq_len, 16, dtype=torch.float64)
    assert_equals_reference(make(seq_len, chunk=chunk, n_features=m).double(), x, causal)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_gates_pass(features: str, causal: bool) -> None:
    config = PerformerConfig(features=features, n_features=64, chunk=32)
    gates.reference_error(Performer, config, dims_of(301, 2), 0, CPU, causal=causal)
    if causal:
        assert gates.leak(Performer, config, dims_of(301, 2), 2, CPU) == 0


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(
    softmax: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sums, "SEGMENT", Sizes(4, 4))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    directions = torch.randn(4, 3, dtype=torch.float64)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if causal:
            return causal_linear_attention.causal_favor(q, k, v, directions, softmax, 2)
        return linear_attention.full_favor(q, k, v, directions, softmax)

    assert torch.autograd.gradcheck(run, (q, k, v))


def log_space(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, directions: torch.Tensor, causal: bool
) -> torch.Tensor:
    """The oracle: logarithms of all weights in float64, one feature and pair at a time."""
    h_q, h_k = (t @ directions.double().mT for t in (q, k))
    h_k = h_k - k.square().sum(-1, keepdim=True) / (2 * q.shape[-1] ** 0.5)
    pairs = (h_q[..., :, None, :] + h_k[..., None, :, :]).logsumexp(-1)
    if causal:
        pairs = pairs.masked_fill(~torch.ones_like(pairs, dtype=torch.bool).tril(), float("-inf"))
    return pairs.softmax(-1) @ v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("spread", ["equal", "mixed"])
@pytest.mark.parametrize("norm", [1.0, 10.0, 48.0, 100.0, 300.0, 1000.0])
def test_no_query_is_lost_whatever_the_norms(norm: float, spread: str, head_dim: int, causal: bool) -> None:
    """Weights of each query by themselves far below float32's range; only their ratios matter."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, head_dim) for _ in range(3))
    q, k = (norm * torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    if spread == "mixed":
        k *= torch.rand(50, 1)  # e^(−|k|²/2√D) spans thousands of powers of e
        q[..., 1::2, :] *= torch.rand(25, 1)
        k[..., 0, :] *= norm / k[..., 0, :].norm(dim=-1, keepdim=True)  # all the first query has to read
    inputs = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    directions = torch.randn(32, head_dim) * head_dim**-0.25
    if causal:
        got = causal_linear_attention.causal_favor(*inputs, directions, True, 8)
    else:
        got = linear_attention.full_favor(*inputs, directions, True)
    want = log_space(*wide, directions, causal)
    # an exponent of order e is rounded to about e · 2^-24, and the weights by as much
    exponents = norm * norm / (2 * head_dim**0.5) + 2 * norm * directions.norm(dim=-1).max().item()
    tolerance = 1e-5 + 4 * exponents * 2**-24
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2 * tolerance)
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, inputs, upstream)
    for grad, exact in zip(grads, torch.autograd.grad(want, wide, upstream.double()), strict=True):
        scale = max(1.0, exact.abs().max().item())  # a query that reads one key has no gradient to speak of
        torch.testing.assert_close(grad.double(), exact, rtol=0, atol=4 * tolerance * scale)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [1e24, float("inf"), float("-inf"), float("nan")])
def test_what_is_wrong_with_one_row_reaches_no_other(features: str, causal: bool, poison: float) -> None:
    layer = make(61, features=features)
    clean = torch.randn(3, 61, 16)
    bad = clean.clone()
    bad[1] *= poison
    kept = [0, 2]

    def found(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = layer(x, Context(causal=causal)).y[kept]
        torch.manual_seed(1)
        return y, torch.autograd.grad(y, x, torch.randn_like(y))[0][kept]

    for got, want in zip(found(bad), found(clean), strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("place", [0, 1, 5, 8, 39, 60])
@pytest.mark.parametrize("poison", [1e4, 1e24, float("inf"), float("-inf"), float("nan")])
def test_what_is_wrong_with_a_token_reaches_no_earlier_one(features: str, place: int, poison: float) -> None:
    """Within its chunk, its pair and its segment."""
    layer, x = make(61, features=features), torch.randn(2, 61, 16)
    want = layer(x, Context(causal=True)).y[:, :place]
    x[:, place] *= poison
    assert torch.equal(layer(x, Context(causal=True)).y[:, :place], want)


@pytest.mark.parametrize("features", FEATURES)
def test_a_huge_later_token_changes_no_gradient_of_earlier_ones(features: str) -> None:
    layer, x, found = make(61, features=features), torch.randn(2, 61, 16), []
    for size in (1.0, 1e6):
        changed = x.clone()
        changed[:, 39] *= size
        changed.requires_grad_()
        y = layer(changed, Context(causal=True)).y[:, :39]
        found.append(torch.autograd.grad(y, changed, torch.ones_like(y))[0][:, :39])
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("features", FEATURES)
def test_in_bfloat16_no_later_token_moves_an_earlier_output_of_four_layers(features: str) -> None:
    torch.manual_seed(0)
    layers = [make(150, features=features, chunk=16) for _ in range(4)]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                x = x + layer(x, Context(causal=True)).y
        return x

    x = 3 * torch.randn(2, 150, 16)
    before = run(x)
    for cut in (1, 2, 15, 16, 17, 75, 149):
        changed = x.clone()
        changed[:, cut:] = 100 * torch.randn_like(changed[:, cut:])
        assert torch.equal(run(changed)[:, :cut], before[:, :cut])


@pytest.mark.slow  # the contract compiles both kinds of features
# the tracer makes an instance of each autograd.Function, of which torch warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_it_compiles_in_one_graph(features: str, causal: bool) -> None:
    torch._dynamo.reset()
    layer, x = make(61, features=features), torch.randn(2, 61, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = results(layer, lambda x: layer(x, Context(causal=causal)).y, x)
    torch.testing.assert_close(results(layer, lambda x: compiled(x, Context(causal=causal)).y, x), want)


def test_a_later_key_changes_no_bit_of_an_earlier_output() -> None:
    """Within a chunk, across chunks, and however much higher its features are."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    k[..., :21, :] *= 12  # levels far below the next key's
    directions = torch.randn(32, 16) * 16**-0.25
    before = causal_linear_attention.causal_favor(q, k, v, directions, True, 8)
    for later in (0.0, 1.0, 100.0):
        k[..., 21:, :] = later
        after = causal_linear_attention.causal_favor(q, k, v, directions, True, 8)
        assert torch.equal(after[..., :21, :], before[..., :21, :])
        assert after.isfinite().all()


def estimate_error(m: int, orthogonal: bool, draws: int) -> float:
    """Root mean square error of the attention output against softmax over draws of the directions."""
    torch.manual_seed(0)
    q, k, v = (0.35 * torch.randn(1, 1, 64, 16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for seed in range(draws):
        torch.manual_seed(seed)
        config = PerformerConfig(n_features=m, orthogonal=orthogonal)
        layer = Performer(config, Workload(causal=True, batch_size=1, seq_len=64, d_model=16, heads=1))
        y = linear_attention.full_favor(q, k, v, layer.directions * 16**-0.25, True)
        errors.append((y - exact).square().mean())
    return torch.stack(errors).mean().sqrt().item()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_error_to_softmax_falls_with_the_root_of_the_features(orthogonal: bool) -> None:
    sizes = torch.tensor([32.0, 128, 512, 2048])
    errors = torch.tensor([estimate_error(int(m), orthogonal, draws=60) for m in sizes])
    x, y = sizes.log(), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_nears_dense_attention_with_the_same_projections(causal: bool) -> None:
    """Scale, positions and all: with 64 times the features a few times closer (on average eight)."""
    dims = Workload(causal=True, batch_size=1, seq_len=40, d_model=32, heads=2)
    torch.manual_seed(0)
    dense = variants.load("dense")(variants.load("dense").Config(), dims).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    want, errors = dense(x, Context(causal=causal)).y, []
    for m in (64, 4096):
        error = 0.0
        for seed in range(8):
            torch.manual_seed(seed)
            layer = Performer(PerformerConfig(n_features=m), dims).double()
            layer.projections.load_state_dict(dense.get_submodule("projections").state_dict())
            error += (layer(x, Context(causal=causal)).y - want).square().mean().item() / 8
        errors.append(error**0.5)
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("m", [16, 64])
def test_orthogonal_directions_beat_independent_ones_on_average(m: int) -> None:
    assert estimate_error(m, True, draws=100) < 0.97 * estimate_error(m, False, draws=100)


def test_orthogonal_directions_are_so_in_groups_and_as_long_as_gaussian_ones() -> None:
    directions = make(n_features=8 * 500 + 3).directions
    assert directions.shape == (4003, 8)
    assert directions.dtype == torch.float32
    groups = directions[:4000].view(500, 8, 8)
    products = groups @ groups.mT
    off_diagonal = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4
    assert directions.square().sum(-1).mean().item() == pytest.approx(8, rel=0.05)
    # |ω|² of a Gaussian vector has the variance 2·D; directions of one length would be biased
    assert directions.square().sum(-1).var().item() == pytest.approx(16, rel=0.2)
    assert directions.mean(0).abs().max() < 0.1  # no preferred sign


def test_directions_are_drawn_anew_after_every_redraw_steps_and_never_in_a_forward_pass() -> None:
    layer, fixed = make(redraw=2), make(redraw=0)
    first = layer.directions.clone()
    layer(torch.randn(1, 20, 16), Context(causal=True))
    layer.after_step()
    assert torch.equal(layer.directions, first)
    layer.after_step()
    second = layer.directions.clone()
    assert not torch.equal(second, first)
    layer.after_step()
    assert torch.equal(layer.directions, second)
    for _ in range(5):
        fixed.after_step()
    assert torch.equal(fixed.directions, first)


def test_a_redraw_is_as_random_as_the_first_draw() -> None:
    """From the global generator: another seed, other directions; and the generator moves on."""
    found = []
    for seed in (1, 2):
        layer = make(redraw=1)
        torch.manual_seed(seed)
        layer.after_step()
        found.append(layer.directions.clone())
        found.append(torch.randn(3))
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])


def test_redraw_counts_optimiser_steps_even_where_a_forward_pass_runs_twice() -> None:
    for activations in ("keep", "checkpoint"):
        torch.manual_seed(0)
        model = LanguageModel(
            ModelSpec.of(
                Performer, PerformerConfig(n_features=12, redraw=3), feed_forward=feed_forward(mult=2)
            ),
            dims_of(20, 2),
            depth=1,
            dropout=0.0,
            vocabulary=11,
            activations=activations,
        ).train()
        optimizer, tokens = optimizer_for(model, 1e-3), torch.randint(11, (2, 21))
        drawn = [model.layers[0].get_buffer("directions").clone()]
        for _ in range(6):
            training_step(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:]), causal=True)
            drawn.append(model.layers[0].get_buffer("directions").clone())
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(drawn)]
        assert moved == [False, False, True] * 2


def test_a_checkpoint_restores_directions_and_count() -> None:
    layer, other = make(redraw=3), make(redraw=3)
    for _ in range(4):
        layer.after_step()
    other.load_state_dict(layer.state_dict())
    assert other.steps == 4
    assert torch.equal(other.directions, layer.directions)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "batch", "chunk"),
    [(256, 1, 32), (301, 3, 32), (20, 2, 128), (100, 1, 100), (77, 2, 11), (69, 1, 23)],
)
def test_dispatched_flops_are_those_of_the_formula_or_explained(
    causal: bool, seq_len: int, batch: int, chunk: int
) -> None:
    layer = make(seq_len, chunk=chunk, n_features=32)
    with CountFlops() as counter:
        layer(torch.randn(batch, seq_len, 16), Context(causal=causal))
    flops = layer.cost(replace(dims_of(seq_len, batch), causal=causal))
    ratio = gates.cost_ratio(counter.total, flops, layer.flop_overhead_reason)
    if not causal:
        assert ratio == pytest.approx(1)


def test_nothing_is_padded_at_the_default_size() -> None:
    dims = Workload(causal=True, batch_size=1, seq_len=2**14, d_model=256, heads=4)
    with FakeTensorMode():
        layer = Performer(PerformerConfig(), dims)
        with CountFlops() as counter:
            layer(torch.randn(1, 2**14, 256), Context(causal=True))
    assert counter.total == layer.cost(replace(dims, causal=True)).total


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("n_features", [1, 12, 40])
@pytest.mark.parametrize("seq_len", [1, 2, 9, 30])
def test_its_state_is_all_that_the_next_tokens_need(features: str, n_features: int, seq_len: int) -> None:
    """Tokens one by one from nothing but the state's tensors: the outputs of one pass, and its bytes."""
    layer, x = make(40, features=features, n_features=n_features), torch.randn(2, 40, 16)
    q, k, v = layer.projections.split(x)
    h_q, h_k = (t @ layer.directions.mT * 8**-0.25 for t in (q, k))
    if features == "softmax":
        h_k = h_k - k.square().sum(-1, keepdim=True) / (2 * 8**0.5)
        levels = h_k.cummax(2).values  # (B, H, T, m): the state's at each token
        level = levels[:, :, seq_len - 1]
        phi_k = (h_k[:, :, :seq_len] - level[:, :, None]).exp()
    else:
        phi_k = h_k[:, :, :seq_len].relu() + 1e-3
    state = {"values": phi_k.mT @ v[:, :, :seq_len], "norms": phi_k.sum(2)}
    if features == "softmax":
        state["level"] = level
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert held == layer.state_bytes(dims_of(seq_len, 2))

    outputs = []
    for t in range(seq_len, 40):
        if features == "softmax":
            level = torch.maximum(state["level"], h_k[:, :, t])
            ageing, new = (state["level"] - level).exp(), (h_k[:, :, t] - level).exp()
            read = (h_q[:, :, t] + level).softmax(-1)
            state["level"] = level
        else:
            ageing, new = torch.ones_like(state["norms"]), h_k[:, :, t].relu() + 1e-3
            read = h_q[:, :, t].relu() + 1e-3
        state["values"] = ageing[..., None] * state["values"] + new[..., None] * v[:, :, t, None]
        state["norms"] = ageing * state["norms"] + new
        outputs.append(
            (read[:, :, None] @ state["values"])[:, :, 0] / (read * state["norms"]).sum(-1, keepdim=True)
        )
    got = layer.projections.merge(torch.stack(outputs, dim=2))
    torch.testing.assert_close(got, layer(x, Context(causal=True)).y[:, seq_len:], rtol=1e-4, atol=1e-5)


def test_its_pattern_is_every_pair_allowed() -> None:
    assert make().attention_mask(9, causal=False).all()
    assert torch.equal(make().attention_mask(9, causal=True), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("causal", [True, False])
def test_features_of_a_long_sequence_are_never_all_held(causal: bool) -> None:
    seq_len, m = 2**15, 256
    with FakeTensorMode(), LiveStorage() as storage:
        layer = make(seq_len, n_features=m, chunk=128, redraw=1)
        x = torch.randn(1, seq_len, 16, requires_grad=True)
        layer(x, Context(causal=causal)).y.sum().backward()
        layer.after_step()
    assert (
        storage.peak < 4 * 2 * seq_len * m
    )  # one head's queries' and keys' features, or two heads' queries'


@pytest.mark.parametrize("chunk", [1, 64, 128])
@pytest.mark.parametrize("seq_len", [1, 63, 2**11 + 5, 2**24 + 1])
def test_segments_cover_the_sequence_in_few_whole_chunks(seq_len: int, chunk: int) -> None:
    """Few, because planning a length dispatches every operation on fake tensors."""
    token = torch.arange(seq_len)
    segments = feature_sums.split_segments(
        feature_sums.SEGMENT.cpu, chunk, token.expand(1, 4, -1), -token.expand(1, 4, -1)
    )
    assert len(segments) <= feature_sums.SEGMENTS
    torch.testing.assert_close(torch.cat([x[0, 0] for x, _ in segments]), token)
    assert all(torch.equal(x, -negated) for x, negated in segments)
    assert all(x.shape[2] % chunk == 0 for x, _ in segments[:-1])


@pytest.mark.parametrize("causal", [True, False])
def test_recomputation_gives_the_same_gradients(causal: bool) -> None:
    layer = make()
    x = torch.randn(2, 61, 16)
    stored = results(layer, lambda x: layer(x, Context(causal=causal)).y, x)
    again = results(
        layer, lambda x: checkpoint(lambda x: layer(x, Context(causal=causal)).y, x, use_reentrant=False), x
    )
    torch.testing.assert_close(again, stored, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_sums_stay_float32_under_autocast(causal: bool) -> None:
    """What is left of bfloat16 is the projections' rounding, however many keys are summed."""
    layer = make(n_features=32)
    wide = copy.deepcopy(layer).double()
    x = torch.randn(1, 1500, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, Context(causal=causal)).y
    y.float().sum().backward()
    want = wide.reference(x.double(), Context(causal=causal))
    assert (y - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize(
    ("knob", "value"), [("features", "elu"), ("n_features", 0), ("redraw", -1), ("chunk", 0)]
)
def test_impossible_knobs_are_refused_by_name(knob: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{knob}={value!r}: allowed is"):
        PerformerConfig(**{knob: value})  # type: ignore[arg-type]
