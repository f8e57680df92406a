"""Accuracy of a model on test batches, against the same counted target by target."""

from __future__ import annotations

import math

import pytest
import torch

import variants
from bench.evaluate.accuracy import Accuracy, measure_accuracy
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import IGNORED, Batch
from variants.base import Workload

CPU = torch.device("cpu")
VOCABULARY = 11


def model_of(name: str = "dense", **knobs: object) -> LanguageModel:
    variant = variants.load(name)
    torch.manual_seed(0)
    dims = Workload(causal=True, batch_size=1, seq_len=12, d_model=16, heads=2)
    return LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=2)),
        dims,
        depth=2,
        dropout=0.5,
        vocabulary=VOCABULARY,
        activations="keep",
    )


def batch_of(seed: int, rows: int = 5) -> Batch:
    """About a third of the positions are scored, with distances from 1 to 9."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randint(VOCABULARY, (rows, 12), generator=source)
    targets = torch.randint(VOCABULARY, (rows, 12), generator=source)
    targets[torch.rand(rows, 12, generator=source) < 0.66] = IGNORED
    return Batch(inputs, targets, torch.randint(1, 10, (rows, 12), generator=source))


BATCHES = [batch_of(1), batch_of(2), batch_of(3, rows=2)]
EDGES = (1, 2, 4, 8, 16)


def measured(model: LanguageModel, batches: list[Batch], *, edges: tuple[int, ...] = EDGES) -> Accuracy:
    return measure_accuracy(model, batches, causal=True, distance_edges=edges, device=CPU)


def by_hand(model: LanguageModel) -> list[tuple[int, bool, float]]:
    """(distance, whether the first choice is right, −ln p) of every scored target."""
    found = []
    for inputs, targets, distances in BATCHES:
        assert distances is not None
        with torch.no_grad():
            logits = torch.cat([out.logits for _, out in model.eval().stream(inputs, causal=True)], dim=1)
        for at in (targets != IGNORED).nonzero().tolist():
            row, t = at
            target, scores = int(targets[row, t]), logits[row, t].double()
            nats = (scores.logsumexp(0) - scores[target]).item()
            found.append((int(distances[row, t]), int(scores.argmax()) == target, nats))
    return found


@pytest.mark.parametrize(
    "model", [model_of(), model_of("transformer_xl", segment=5, mem_len=5)], ids=["whole", "segments"]
)
def test_every_figure_follows_from_the_logits(model: LanguageModel) -> None:
    found, wanted = measured(model, BATCHES), by_hand(model)
    assert found.tokens == len(wanted)
    assert found.accuracy == pytest.approx(sum(right for _, right, _ in wanted) / len(wanted))
    assert found.nll == pytest.approx(sum(nats for *_, nats in wanted) / len(wanted), abs=1e-6)
    assert found.by_distance is not None
    ends = (*EDGES[1:], 10**9)
    for share, low, high in zip(found.by_distance, EDGES, ends, strict=True):
        hits = [right for distance, right, _ in wanted if low <= distance < high]
        assert share == pytest.approx(sum(hits) / len(hits)) if hits else math.isnan(share)
    assert math.isnan(found.by_distance[-1]), "no target lies 16 tokens back"
    assert 0 < found.accuracy < 1, "or the test shows little"


def test_batches_may_be_dealt_anyhow() -> None:
    model = model_of()
    rows = [Batch(*(part[i : i + 1] for part in b)) for b in BATCHES for i in range(len(b.inputs))]  # type: ignore[index]
    a, b = measured(model, BATCHES), measured(model, rows)
    assert (a.accuracy, a.by_distance[:-1]) == (b.accuracy, b.by_distance[:-1])  # type: ignore[index]
    assert a.nll == pytest.approx(b.nll, rel=1e-6)


def test_a_task_without_distances_has_no_buckets() -> None:
    plain = [batch._replace(distances=None) for batch in BATCHES]
    found = measured(model_of(), plain, edges=())
    assert found.by_distance is None
    assert found.accuracy == measured(model_of(), BATCHES).accuracy
