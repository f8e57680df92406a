"""Linformer against what it reduces to, its reference, its formulas and its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import variants
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from variants.attention.linformer import Linformer, LinformerConfig
from variants.base import Context, Workload
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention

SMALL: list[dict[str, Any]] = [{"k": 8, "sharing": "none"}]

SHARINGS = ["none", "headwise", "kv", "layerwise"]
CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=24, heads=2)


def make(seq_len: int, *, k: int, sharing: str = "kv", layer: int = 0) -> Linformer:
    torch.manual_seed(layer)
    return Linformer(LinformerConfig(k=k, sharing=sharing), dims_of(seq_len), layer)


def results(
    layer: Linformer, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs, gradient of the input, gradients of the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = run(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]


def test_it_is_registered() -> None:
    assert variants.load("linformer") is Linformer


@pytest.mark.parametrize("sharing", SHARINGS)
def test_identity_projections_of_full_length_are_dense_attention(sharing: str) -> None:
    layer = make(33, k=33, sharing=sharing).double()
    with torch.no_grad():
        for mixture in (layer.key_mixture, layer.value_mixture):
            mixture.copy_(torch.eye(33).expand_as(mixture))

    def dense(x: torch.Tensor) -> torch.Tensor:
        q, k, v = layer.projections.split(x)
        everything = masks.matrix(masks.all_keys, 33)
        return layer.projections.merge(masked_attention(q, k, v, everything))

    x = torch.randn(3, 33, 24, dtype=torch.float64).requires_grad_()
    given = [x, *layer.projections.parameters()]
    got, want = layer(x, Context(causal=False)).y, dense(x)
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, given, direction), torch.autograd.grad(want, given, direction)
    )


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("seq_len", "k", "batch"), [(1, 1, 1), (5, 2, 3), (97, 16, 1), (97, 97, 3)])
def test_it_equals_its_reference_in_outputs_and_gradients(
    sharing: str, seq_len: int, k: int, batch: int
) -> None:
    layer = make(seq_len, k=k, sharing=sharing).double()
    x = torch.randn(batch, seq_len, 24, dtype=torch.float64)
    fast = results(layer, lambda x: layer(x, Context(causal=False)).y, x)
    torch.testing.assert_close(fast, results(layer, lambda x: layer.reference(x, Context(causal=False)), x))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_it_passes_the_reference_gate(sharing: str) -> None:
    config = LinformerConfig(k=32, sharing=sharing)
    gates.reference_error(Linformer, config, dims_of(301, 2), 0, CPU, causal=False)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("seq_len", [1, 7, 39])
def test_a_shorter_sequence_reads_the_first_columns(sharing: str, seq_len: int) -> None:
    layer = make(40, k=8, sharing=sharing).double()
    short = copy.deepcopy(layer)
    for name in ("key_mixture", "value_mixture"):
        setattr(short, name, torch.nn.Parameter(getattr(layer, name)[..., :seq_len].detach().clone()))
    x = torch.randn(3, seq_len, 24, dtype=torch.float64)
    got = results(layer, lambda x: layer(x, Context(causal=False)).y, x)
    torch.testing.assert_close(got[:2], results(short, lambda x: short(x, Context(causal=False)).y, x)[:2])
    reference = results(layer, lambda x: layer.reference(x, Context(causal=False)), x)
    torch.testing.assert_close(got, reference)
    assert all(not g[..., seq_len:].any() for g in got if g.shape[-1] == 40)


def test_a_longer_sequence_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"41 tokens.*at most 40"):
        make(40, k=8)(torch.randn(1, 41, 24), Context(causal=False))


def test_causal_is_refused_with_the_reason() -> None:
    reason = Linformer.unsupported(LinformerConfig(k=8), dims_of(40), causal=True)
    assert reason is not None
    assert "mixes all positions" in reason
    with pytest.raises(ValueError, match="causal"):
        make(40, k=8)(torch.randn(1, 40, 24), Context(causal=True))


def test_more_projected_positions_than_tokens_are_refused() -> None:
    config = LinformerConfig(k=41)
    assert Linformer.unsupported(config, dims_of(41), causal=False) is None
    reason = Linformer.unsupported(config, dims_of(40), causal=False)
    assert reason is not None
    assert "k=41" in reason
    assert "40" in reason


@pytest.mark.parametrize(
    ("sharing", "matrices"), [("none", 12), ("headwise", 6), ("kv", 3), ("layerwise", 1)]
)
def test_sharing_decides_how_many_projections_a_network_learns(sharing: str, matrices: int) -> None:
    layers = [make(40, k=8, sharing=sharing, layer=i) for i in range(3)]
    Linformer.tie(layers)
    network = torch.nn.ModuleList(layers)
    learnt = sum(p.numel() for name, p in network.named_parameters() if "mixture" in name)
    assert learnt == matrices * 8 * 40


@pytest.mark.parametrize("sharing", SHARINGS)
def test_mixing_keeps_the_size_of_keys_and_values_at_first(sharing: str) -> None:
    """Rows of E and F have a length near 1, whatever k: a mixture of L unit variances has variance 1."""
    layer = make(500, k=60, sharing=sharing)
    for mixture in (layer.key_mixture, layer.value_mixture):
        torch.testing.assert_close(mixture.square().sum(-1).mean().item(), 1.0, rtol=0.05, atol=0)


@pytest.mark.parametrize("seq_len", [41, 80, 1000])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_no_longer_sequence_is_cut_to_fit(sharing: str, seq_len: int) -> None:
    """Neither path returns a result for a part of it, tied or not."""
    layers = [make(40, k=8, sharing=sharing, layer=i) for i in range(2)]
    Linformer.tie(layers)
    for run in (layers[1].forward, layers[1].reference):
        with pytest.raises(ValueError, match=rf"{seq_len} tokens.*at most 40"):
            run(torch.randn(2, seq_len, 24), Context(causal=False))


def test_a_model_ties_what_layerwise_sharing_asks_for() -> None:
    model = LanguageModel(
        ModelSpec.of(Linformer, LinformerConfig(k=8, sharing="layerwise"), feed_forward=feed_forward(mult=2)),
        dims_of(40),
        depth=3,
        dropout=0.0,
        vocabulary=11,
        activations="keep",
    )
    assert sum(p.numel() for name, p in model.named_parameters() if "mixture" in name) == 8 * 40


def test_tied_layers_sum_their_gradients_in_one_matrix() -> None:
    x = torch.randn(1, 40, 24)

    def gradient(layer: Linformer) -> torch.Tensor:
        (g,) = torch.autograd.grad(layer(x, Context(causal=False)).y.sum(), layer.key_mixture)
        return g

    layers = [make(40, k=8, sharing="layerwise", layer=i) for i in range(2)]
    Linformer.tie(layers)
    separate = gradient(layers[0]) + gradient(layers[1])
    torch.stack([layer(x, Context(causal=False)).y for layer in layers]).sum().backward()
    grad = layers[0].key_mixture.grad
    assert grad is not None
    torch.testing.assert_close(grad, separate)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("seq_len", "batch"), [(256, 1), (301, 3)])
def test_dispatched_flops_are_those_of_the_formula(sharing: str, seq_len: int, batch: int) -> None:
    layer = make(seq_len, k=32, sharing=sharing)
    with CountFlops() as counter:
        layer(torch.randn(batch, seq_len, 24), Context(causal=False))
    flops = layer.cost(replace(dims_of(seq_len, batch), causal=False))
    assert gates.cost_ratio(counter.total, flops, layer.flop_overhead_reason) == pytest.approx(1)


def test_its_state_does_not_grow_with_the_sequence() -> None:
    layer = make(1000, k=16)
    assert layer.state_bytes(dims_of(1000)) == layer.state_bytes(dims_of(500)) == 2 * 16 * 24 * 4


def test_its_pattern_is_every_pair() -> None:
    assert make(40, k=8).attention_mask(9, causal=False).all()


def test_it_runs_on_fake_tensors_at_any_length() -> None:
    with FakeTensorMode():
        layer = make(2**20, k=256)
        x = torch.randn(1, 2**20, 24, requires_grad=True)
        layer(x, Context(causal=False)).y.sum().backward()
        assert x.grad is not None


def test_recomputation_gives_the_same_gradients() -> None:
    layer = make(65, k=16)
    x = torch.randn(2, 65, 24)
    stored = results(layer, lambda x: layer(x, Context(causal=False)).y, x)
    again = results(
        layer, lambda x: checkpoint(lambda x: layer(x, Context(causal=False)).y, x, use_reentrant=False), x
    )
    torch.testing.assert_close(again, stored, rtol=0, atol=0)


@pytest.mark.parametrize(("knob", "value"), [("k", 0), ("k", -1), ("sharing", "all")])
def test_impossible_knobs_are_refused_by_name(knob: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{knob}={value!r}: allowed is"):
        LinformerConfig(**{knob: value})  # type: ignore[arg-type]
