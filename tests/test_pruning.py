"""Pruning after training: which heads and visits are removed, and what the model is without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import variants
from bench.evaluate import pruning
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import IGNORED, Batch
from variants.base import Dims
from variants.ops.projections import Projections

T, VOCABULARY, HEADS = 12, 11, 4
SIZES = Dims(seq_len=T, d_model=16, heads=HEADS)
CPU = torch.device("cpu")


def model_of(
    variant: str = "dense", stack: str = "stack", depth: int = 3, knobs: Mapping[str, Any] | None = None
) -> LanguageModel:
    torch.manual_seed(0)
    layer = variants.load(variant)
    spec = ModelSpec.of(
        layer, layer.Config.of(knobs or {}), feed_forward=feed_forward(mult=2), depth=depth_schedule(stack)
    )
    return LanguageModel(
        spec, SIZES, depth=depth, dropout=0.0, vocabulary=VOCABULARY, activations="keep"
    ).double()


def batch() -> Batch:
    source = torch.Generator().manual_seed(0)
    inputs, targets, scored = torch.randint(VOCABULARY, (3, 3, T), generator=source)
    targets = targets.where(scored > 4, IGNORED)
    targets[1] = IGNORED
    return Batch(inputs, targets)


def importances(model: LanguageModel, sequences: int = 3) -> dict[Projections, Tensor]:
    return pruning.importance(model, [batch()], sequences=sequences, causal=True, device=CPU)


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.eval().stream(batch().inputs, causal=True)], 1)


@pytest.mark.parametrize(("variant", "knobs"), [("dense", {}), ("chunked", {"chunk": 5})])
@pytest.mark.parametrize("stack", ["stack", "universal"])
def test_importance_is_the_gradient_by_a_scale_of_each_head(
    variant: str, knobs: dict[str, Any], stack: str
) -> None:
    """The same scale on the columns of the output projection, whose gradient is a sum of products. A sequence
    without a target has no gradient, and none counts."""
    model = model_of(variant, stack, knobs=knobs).eval()
    layers = pruning.heads_of(model)
    assert len(layers) == (3 if stack == "stack" else 1)
    sums = [torch.zeros(HEADS, dtype=torch.float64) for _ in layers]
    for row in (0, 2):
        model.zero_grad()
        targets = batch().targets[row]
        for segment, out in model.stream(batch().inputs[row : row + 1], causal=True):
            nll = (
                F.cross_entropy(out.logits[0], targets[segment], ignore_index=IGNORED, reduction="sum")
                / (targets != IGNORED).sum()
            )
            nll.backward()
        for total, layer in zip(sums, layers, strict=True):
            assert layer.out.weight.grad is not None
            total += (layer.out.weight * layer.out.weight.grad).sum(0).unflatten(0, (HEADS, -1)).sum(1).abs()
    got = importances(model)
    for total, layer in zip(sums, layers, strict=True):
        torch.testing.assert_close(got[layer], (total / total.norm()).detach(), rtol=1e-5, atol=1e-8)
    first = importances(model, 1)
    assert not torch.allclose(first[layers[0]], got[layers[0]])


def test_removed_heads_are_columns_of_zeros() -> None:
    model, pruned = model_of(), model_of()
    found = importances(model)
    flat = torch.cat([*found.values()])
    for count in (1, 5, 11, 12):
        kept = pruning.kept_heads(found, count)
        lowest = {int(n) for n in flat.argsort()[: 12 - count]}
        for layer, (own, scale) in enumerate(zip(pruning.heads_of(pruned), kept.values(), strict=True)):
            removed = {int(n) + layer * HEADS for n in (scale == 0).nonzero()[:, 0]}
            assert removed == {n for n in lowest if n // HEADS == layer}
            with torch.no_grad():
                own.out.weight.copy_(pruning.heads_of(model)[layer].out.weight * scale.repeat_interleave(4))
        with pruning.scaled_heads(kept):
            torch.testing.assert_close(logits(model), logits(pruned))
    assert torch.equal(logits(model), logits(model_of())), "nothing is left of it"


def test_equal_heads_are_removed_from_the_lowest_layer_on() -> None:
    layers = pruning.heads_of(model_of())
    kept = pruning.kept_heads({layer: torch.zeros(HEADS) for layer in layers}, 5)
    assert torch.cat([*kept.values()]).tolist() == [0.0] * 7 + [1.0] * 5


def test_losses_with_fewer_heads_begin_with_that_of_all() -> None:
    model, seen = model_of(), []

    def score() -> float:
        seen.append(logits(model))
        return float(len(seen))

    found = pruning.prune_heads(importances(model), score, 7.0)
    assert found == {"heads_kept": [12, 10, 7, 5, 2], "nll_heads_kept": [7.0, 1.0, 2.0, 3.0, 4.0]}
    assert not any(torch.equal(each, logits(model)) for each in seen)
    one = {pruning.heads_of(model)[0]: torch.ones(1)}
    assert pruning.prune_heads(one, score, 7.0) == {"heads_kept": [1], "nll_heads_kept": [7.0]}


@pytest.mark.parametrize("variant", ["reformer", "transformer_xl", "luna"])
def test_layers_without_common_heads_say_so(variant: str) -> None:
    reason = pruning.no_heads(model_of(variant))
    assert reason == f"{variant} does not merge heads by the output projection that other variants share"
    assert pruning.no_heads(model_of()) is None


def test_every_fourth_and_every_second_visit_is_left_out() -> None:
    assert [*pruning.kept_visits(8, 4)] == [0, 1, 2, 4, 5, 6]
    assert [*pruning.kept_visits(8, 2)] == [0, 2, 4, 6]
    model, seen = model_of(stack="layer_drop", depth=8), []

    def score() -> float:
        seen.append(logits(model))
        return float(len(seen))

    found = pruning.prune_visits(model, score, 7.0)
    assert found == {"visits_kept": [8, 6, 4], "nll_visits_kept": [7.0, 1.0, 2.0]}
    for places, got in zip(([0, 1, 2, 4, 5, 6], [0, 2, 4, 6]), seen, strict=True):
        smaller = model_of(depth=len(places))
        for block, place in zip(smaller.blocks, places, strict=True):
            block.load_state_dict(model.blocks[place].state_dict())
        for name in ("embedding", "norm", "head"):
            getattr(smaller, name).load_state_dict(getattr(model, name).state_dict())
        assert torch.equal(got, logits(smaller))
    assert torch.equal(logits(model), logits(model_of(stack="layer_drop", depth=8))), "it is whole again"


def test_one_visit_cannot_be_left_out_of_one() -> None:
    model = model_of(stack="layer_drop", depth=1)
    assert pruning.prune_visits(model, lambda: 1.0, 7.0) == {"visits_kept": [1], "nll_visits_kept": [7.0]}
