"""What a strategy for activations promises: the same gradients for less memory, for every variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from tiers import representative, slow
from torch import Tensor

import variants
from bench.config.spec import ACTIVATIONS
from bench.measure.step import StepFigures, Subject, predicted
from bench.model import activations as strategies
from bench.model import reversible
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Workload

ON_HOST = [name for name, strategy in strategies.STRATEGIES.items() if not strategy.needs_device]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Largest error of a gradient, relative to the largest entry of any: rounding of the matrix products. Two
neighbours in bfloat16 differ by up to 0.0078."""

REPLAYED = [name for name in ON_HOST if name not in ("keep", "checkpoint", "reversible")]

every_variant = pytest.mark.parametrize("name", variants.mixers())


def model_of(
    name: str,
    activations: str,
    *,
    seq_len: int = 600,
    depth: int = 3,
    knobs: tuple[tuple[str, Any], ...] = (),
    **kwargs: Any,
) -> LanguageModel:
    """A small model; the same seed gives the same weights whatever the strategy."""
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=32, heads=2)
    torch.manual_seed(5)
    options: dict[str, Any] = {"dropout": 0.1, "vocabulary": 17} | kwargs
    mult = options.pop("ff_mult", 2)
    config = variant.Config.of(dict(knobs))
    return LanguageModel(
        ModelSpec.of(variant, config, feed_forward=feed_forward(mult=mult)),
        dims,
        depth=depth,
        activations=activations,
        **options,
    )


def objective(name: str) -> bool:
    return variants.load(name).info.caps.causal


def batch_of(model: LanguageModel, tokens: int) -> Batch:
    source = torch.Generator().manual_seed(7)
    inputs, targets = (torch.randint(model.vocabulary, (2, tokens), generator=source) for _ in range(2))
    return Batch(inputs, targets)


def gradients(model: LanguageModel, tokens: int, *, causal: bool) -> dict[str, Tensor]:
    """Of one training step over two segments or windows at least, dropout on."""
    training_step(
        model.train(), torch.optim.SGD(model.parameters(), lr=0.0), batch_of(model, tokens), causal=causal
    )
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def stepped(model: LanguageModel, tokens: int, *, causal: bool) -> dict[str, Tensor]:
    torch.manual_seed(11)
    return gradients(model, tokens, causal=causal)


@cache
def wanted(name: str, *, two_streams: bool, **options: Any) -> dict[str, Tensor]:
    """The gradients with every activation stored, and one feed-forward piece at a time in two streams."""
    model = model_of(name, "keep", **options)
    if two_streams:
        model.run_blocks = reversible.two_streams
    return stepped(model, 600, causal=objective(name))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert got.keys() == want.keys()
    scale = max(grad.abs().max().item() for grad in want.values())
    assert scale > 0
    worst = {key: (got[key] - want[key]).abs().max().item() / scale for key in want}
    assert max(worst.values()) <= TOLERANCE[dtype], worst


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["checkpoint", "reversible", *slow(*REPLAYED)])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [*((name, ()) for name in variants.mixers()), ("linformer", (("sharing", "layerwise"),))],
    ids=[*variants.mixers(), "linformer layerwise"],
)
def test_gradients_are_those_of_stored_activations(
    name: str, knobs: tuple[tuple[str, Any], ...], activations: str, dtype: torch.dtype
) -> None:
    """With dropout, hashing, random features and carried state replayed, and in bfloat16 autocast too:
    whether a weight was already cast for an earlier window (chunked) or layer (layerwise) must not matter."""
    model = model_of(name, activations, knobs=knobs, dtype=dtype)
    got = stepped(model, 600, causal=objective(name))
    want = wanted(name, two_streams=activations == "reversible", knobs=knobs, dtype=dtype)
    assert_same(got, want, dtype)


@every_variant
@pytest.mark.parametrize("activations", ["keep", "checkpoint", "reversible"])
def test_gradients_with_a_chunked_feed_forward(name: str, activations: str) -> None:
    model = model_of(name, activations, ff_chunks=3)
    got = stepped(model, 600, causal=objective(name))
    assert_same(got, wanted(name, two_streams=activations == "reversible", ff_chunks=3))


@pytest.mark.parametrize("activations", ["checkpoint", "sqrt", "selective", "reversible"])
def test_gradients_with_a_chunked_feed_forward_in_bfloat16(activations: str) -> None:
    """All pieces of the sequence use one cast of a weight, in a window that is not the first either."""
    options: dict[str, Any] = {"ff_chunks": 3, "dtype": torch.bfloat16}
    got = stepped(model_of("overlapping", activations, **options), 600, causal=True)
    two_streams = activations == "reversible"
    assert_same(got, wanted("overlapping", two_streams=two_streams, **options), torch.bfloat16)


def test_rebuilt_activations_drift_little_and_more_further_down() -> None:
    """Floats do not subtract exactly; level 1 is rebuilt last."""
    model = model_of("dense", "reversible", depth=6, dropout=0.0)
    drift: dict[int, float] = {}
    with model.running(partial(reversible.reversible, drift=drift)):
        stepped(model, 200, causal=True)
    assert sorted(drift) == [1, 2, 3, 4, 5, 6]
    assert 0 < drift[6] <= drift[1] < 1e-5


def test_drift_sees_a_branch_that_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fed back differs from what was fed forward, as with randomness that is drawn anew."""
    monkeypatch.setattr(reversible._Replay, "__call__", lambda self: torch.enable_grad())
    model = model_of("dense", "reversible")
    drift: dict[int, float] = {}
    with model.running(partial(reversible.reversible, drift=drift)):
        stepped(model, 200, causal=True)
    assert max(drift.values()) > 1e-2


def test_a_reversible_network_runs_backward_once() -> None:
    """Its streams are overwritten on the way down, so a second pass would give wrong gradients."""
    model = model_of("dense", "reversible")
    loss = model(batch_of(model, 50).inputs, causal=True).logits.square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must run backward once"):
        loss.backward()


def test_evaluation_of_a_reversible_network_is_that_of_its_streams() -> None:
    model = model_of("longformer", "reversible").eval()
    tokens = batch_of(model, 300).inputs
    with torch.no_grad():
        got = model(tokens, causal=True).logits
        with model.running(reversible.two_streams):
            assert torch.equal(got, model(tokens, causal=True).logits)


def test_offloading_needs_a_device() -> None:
    assert strategies.STRATEGIES["offload"].unsupported("cuda") is None
    assert "cpu" in (strategies.STRATEGIES["offload"].unsupported("cpu") or "")
    assert [name for name in ACTIVATIONS if name not in strategies.STRATEGIES] == []
    assert len(ACTIVATIONS) == len(strategies.STRATEGIES)


# --- memory and work by depth -------------------------------------------------------------------


def predicted_for(model: Callable[[], LanguageModel], tokens: int, *, causal: bool) -> StepFigures:
    def make() -> Subject:
        made = model().train()
        return Subject(
            model=made, optimizer=optimizer_for(made, 1e-4), batch=batch_of(made, tokens), causal=causal
        )

    return predicted(make)


def figures_of(activations: str, depth: int, **kwargs: Any) -> StepFigures:
    """Of a dense model without dropout."""
    return predicted_for(
        lambda: model_of("dense", activations, seq_len=256, depth=depth, dropout=0.0, **kwargs),
        256,
        causal=True,
    )


BOUNDARY = 2 * 256 * 32 * 4
"""Bytes of the hidden states between two blocks."""


@pytest.mark.slow
def test_what_each_strategy_stores_by_depth() -> None:
    def stored(activations: str, *depths: int) -> dict[int, int]:
        return {depth: figures_of(activations, depth).activation_bytes for depth in depths}

    keep, checkpoint, reversible = (stored(name, 4, 16) for name in ("keep", "checkpoint", "reversible"))
    sqrt, selective = stored("sqrt", 4, 9, 16), stored("selective", 16)
    assert keep[16] - keep[4] > 12 * 8 * BOUNDARY
    assert (checkpoint[16] - checkpoint[4]) / 12 == pytest.approx(BOUNDARY, rel=0.2)
    # a boundary every ⌈√L⌉ blocks: 2, 3 and 4 of them
    assert sqrt[9] - sqrt[4] == pytest.approx(BOUNDARY, rel=0.2)
    assert sqrt[16] - sqrt[9] == pytest.approx(BOUNDARY, rel=0.2)
    assert reversible[16] <= 1.15 * reversible[4]
    assert checkpoint[16] < selective[16] < keep[16]


def test_reversible_layers_hold_nothing_on_their_way_up_either() -> None:
    """What the forward pass holds at its peak, parameters and their optimiser aside, has no depth in it."""

    def most(depth: int) -> int:
        forward = figures_of("reversible", depth).peaks["forward"]
        return forward["activations"] + forward["workspace"]

    assert most(16) - most(4) < BOUNDARY


@pytest.mark.parametrize("name", representative(variants.mixers()))
@pytest.mark.parametrize("activations", ["reversible", *slow("checkpoint", "sqrt", "selective")])
def test_recomputing_costs_at_most_a_forward_pass(name: str, activations: str) -> None:
    """Executed FLOPs of a step beside those with stored activations: at most 8/6, and what a variant's own
    backward pass computes again anyway. Clusters of queries have no gradient: to find them is nearly all of a
    pass, in the backward pass too."""

    def flops(activations: str) -> int:
        return predicted_for(
            lambda: model_of(name, activations, seq_len=300, depth=4, dropout=0.0),
            300,
            causal=objective(name),
        ).flops_step

    keep = flops("keep")
    assert keep <= flops(activations) <= (1.9 if name == "clustered" else 1.4) * keep


def test_a_chunked_feed_forward_takes_less_room() -> None:
    """Reversible, the intermediate ff_mult·C channels exist for one piece at a time."""
    whole, pieces = (
        figures_of("reversible", 2, ff_mult=16, ff_chunks=chunks).peak_bytes for chunks in (1, 8)
    )
    assert whole - pieces > 2 * 0.8 * (16 - 2) * BOUNDARY
