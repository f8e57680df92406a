"""Accuracy of a model's most likely token on a task's test batches, in total and by distance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Results of one test: nll in nats per scored target, and accuracies as shares of the scored targets.

    `by_distance` has one element per bucket, NaN for a bucket without targets; None without edges.
    """

    nll: float
    accuracy: float
    by_distance: list[float] | None
    tokens: int


@torch.no_grad()
def measure_accuracy(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    causal: bool,
    distance_edges: Sequence[int],
    device: torch.device,
) -> Accuracy:
    """Score every target of the batches. Sums are accumulated in float64 and integers, and divided once.

    Bucket k of `by_distance` contains distances from edge k to below edge k + 1; the last bucket has no upper
    limit. Distances below the first edge are in no bucket.
    """
    model.eval()
    nats = 0.0
    hits: list[torch.Tensor] = []
    distances: list[torch.Tensor] = []
    for batch in batches:
        for segment, out in model.stream(batch.inputs.to(device), causal=causal):
            targets = batch.targets[:, segment]
            scored = targets != IGNORED
            answers = targets[scored].to(device)
            logits = out.logits[scored.to(device)]
            nats += F.cross_entropy(logits, answers, reduction="none").double().sum().item()
            hits.append((logits.argmax(dim=-1) == answers).cpu())
            if batch.distances is not None:
                distances.append(batch.distances[:, segment][scored])
    right = torch.cat(hits).numpy()
    by_distance = None
    if distance_edges:
        buckets = np.digitize(torch.cat(distances).numpy(), distance_edges)
        total, found = (np.bincount(buckets, w, len(distance_edges) + 1)[1:] for w in (None, right))
        by_distance = [float(x) for x in found / np.where(total, total, np.nan)]
    return Accuracy(
        nll=nats / len(right), accuracy=float(right.mean()), by_distance=by_distance, tokens=len(right)
    )
