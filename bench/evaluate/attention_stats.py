"""Statistics of a trained model's attention: the distribution of its weights, and the error of softmax
estimates.

Shapes: B batch, T tokens of a window of the input schedule, H heads, D channels of a head; N = B · H maps of
T × T weights, K clusters.

Both are computed on the layer inputs of held-out text. On random inputs the weights are nearly uniform, and
any method estimates nearly uniform weights well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evaluate.nll import evaluating
from bench.model.language_model import LanguageModel
from bench.tasks.base import Batch
from variants.base import Context, EstimatesSoftmax, ExposesScores, SequenceMixer

KMEANS_STEPS = 10
SINKS = 4
"""First tokens of a window whose share is `sink_mass`: Xiao 2023, arXiv:2309.17453, §3.2, keeps 4."""


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """Means over windows, layers and heads, by record key; None for figures that a variant does not support.

    Statistics of weights only include rows that may read more than half of the window's tokens, because the
    first rows of a causal window have few, large weights.
    """

    attention_mass: list[float] | None = None
    """Share of a row's mass in its 2^k largest weights, k = 0, 1, … up to half of the window."""
    attention_mass_uniform: list[float] | None = None
    """The same for rows with uniform weights."""
    attention_rank_error: list[float] | None = None
    """‖A − A_r‖ / ‖A‖ (Frobenius norm) for the weights A and the nearest matrix A_r of rank r = 2^k,
    k = 0, 1, …"""
    cluster_mass: float | None = None
    """Share of a row's mass on the keys of the query's own cluster: see `clusters`."""
    cluster_mass_uniform: float | None = None
    """The same for rows with uniform weights: the share of the keys that are in the query's cluster."""
    cluster_mass_best: float | None = None
    """Share of a row's mass in equally many of its largest weights:
    the maximum over all choices of that many keys."""
    sink_mass: float | None = None
    """Share of a row's mass on the first `SINKS` tokens of the window."""
    sink_mass_uniform: float | None = None
    """The same for rows with uniform weights."""
    softmax_error: float | None = None
    """‖Y − Y*‖ / ‖Y*‖ (Frobenius norm) for a layer's outputs Y and the outputs Y* of the full softmax
    attention that it estimates, over all windows; the mean over layers."""


class _Recorded(NamedTuple):
    """The inputs and outputs of a layer, each (B, T, C)."""

    layer: SequenceMixer
    x: Tensor
    y: Tensor


@contextmanager
def _recording(layers: Iterable[SequenceMixer]) -> Iterator[list[_Recorded]]:
    """Record the inputs and outputs of the layers inside the context."""
    seen: list[_Recorded] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: seen.append(_Recorded(layer, given[0], out.y)))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def measure_attention(
    model: LanguageModel, batches: Iterable[Batch], *, causal: bool, device: torch.device
) -> AttentionStats:
    """Run the model on the batches and compute the statistics of each layer's attention.

    It needs O(T²) memory. If the input schedule has windows of several lengths, only the longest are
    included.
    """
    spread: list[_MapSums] = []
    errors = {layer: [0.0, 0.0] for layer in model.layers}
    ctx = Context(causal=causal)
    with evaluating(model):
        for batch in batches:
            with _recording(model.layers) as seen:
                model(batch.inputs.to(device), causal=causal)
            for layer, x, y in seen:
                target = layer.softmax_target(x, ctx) if isinstance(layer, EstimatesSoftmax) else None
                if target is not None:
                    for place, t in enumerate((y - target, target)):
                        errors[layer][place] += float(t.double().square().sum())
                if isinstance(layer, ExposesScores):
                    q, k = (t.flatten(0, 1).float() for t in layer.queries_keys(x, ctx))
                    spread.append(_map_sums(q, k, causal=causal))
    off = [math.sqrt(wrong / whole) for wrong, whole in errors.values() if whole]
    error = sum(off) / len(off) if off else None
    found: dict[str, Any] = _means(spread)
    return AttentionStats(softmax_error=error, **found)


class _MapSums(NamedTuple):
    """For one layer and batch: the window's length, the number of maps, and sums over the maps."""

    tokens: int
    maps: int
    sums: dict[str, Tensor]


def _means(spread: list[_MapSums]) -> dict[str, Any]:
    if not spread:
        return {}
    longest = max(one.tokens for one in spread)
    taken = [one for one in spread if one.tokens == longest]
    count = sum(one.maps for one in taken)
    total = {key: torch.stack([one.sums[key] for one in taken]).sum(dim=0) for key in taken[0].sums}
    return {key: (sums / count).tolist() for key, sums in total.items()}


def _map_sums(q: Tensor, k: Tensor, *, causal: bool) -> _MapSums:
    """q, k (N, T, D) of one layer → statistics, summed over the maps."""
    maps, tokens, _ = q.shape
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril()
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    weights = scores.double().softmax(dim=-1)  # (N, T, T)
    values = torch.linalg.svdvals(weights)
    rows = slice(tokens // 2, None) if causal else slice(None)
    terms = allowed[rows].sum(dim=-1).double()  # (R,)
    # (N, R, T + 1): element n is the mass of the n largest
    mass = F.pad(weights[:, rows].sort(dim=-1, descending=True).values.cumsum(dim=-1), (1, 0))
    few = _powers(max(1, tokens // 2), q.device)
    of_query, of_key = clusters(q, k)
    own = (of_query[:, rows, None] == of_key[:, None, :]) & allowed[rows]  # (N, R, T)
    members = own.sum(dim=-1, keepdim=True)
    sinks = min(SINKS, tokens)
    found = {
        "attention_mass": mass[..., few].mean(dim=1),
        "attention_mass_uniform": (few / terms[:, None]).clamp(max=1).mean(dim=0).expand(maps, -1),
        "attention_rank_error": rank_errors(values),
        "cluster_mass": (weights[:, rows] * own).sum(dim=-1).mean(dim=1),
        "cluster_mass_uniform": (members[..., 0] / terms).mean(dim=1),
        "cluster_mass_best": mass.gather(-1, members)[..., 0].mean(dim=1),
        "sink_mass": weights[:, rows, :sinks].sum(dim=-1).mean(dim=1),
        "sink_mass_uniform": (sinks / terms).clamp(max=1).mean().expand(maps),
    }
    return _MapSums(tokens, maps, {key: value.sum(dim=0) for key, value in found.items()})


def _powers(most: int, device: torch.device) -> Tensor:
    """1, 2, 4, … up to the largest power of two that is at most `most`."""
    return 2 ** torch.arange(most.bit_length(), device=device)


def rank_errors(values: Tensor) -> Tensor:
    """Descending singular values (N, T) → relative errors (N, n) of the nearest matrices of rank 1, 2, 4, …
    up to T (Eckart and Young 1936)."""
    squares = values.square()
    left = F.pad(squares.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))  # (N, T + 1): from the r-th on
    return (left[:, _powers(values.shape[-1], values.device)] / left[:, :1]).sqrt()


def clusters(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cluster of each query and of each key of a map: (N, T, D) each → (N, T) each.

    As in the Routing Transformer (Roy 2020, arXiv:2003.05997, §4.1): √T clusters by spherical k-means over
    queries and keys together, each normalised by layer normalisation. Unlike in the paper, which learns
    centroids during training, the centroids come from Lloyd iterations on the window itself, starting from
    evenly spaced keys.
    """
    tokens = q.shape[1]
    count = max(1, round(math.sqrt(tokens)))
    points = F.layer_norm(torch.cat([q, k], dim=1), q.shape[-1:])  # (N, 2T, D)
    centroids = points[:, tokens + torch.arange(count, device=q.device) * tokens // count]
    for _ in range(KMEANS_STEPS):
        nearest = (points @ F.normalize(centroids, dim=-1).mT).argmax(dim=-1)
        sums = torch.zeros_like(centroids).scatter_add_(1, nearest[..., None].expand_as(points), points)
        empty = (sums == 0).all(dim=-1, keepdim=True)
        centroids = torch.where(empty, centroids, sums)
    nearest = (points @ F.normalize(centroids, dim=-1).mT).argmax(dim=-1)
    of_query, of_key = nearest.split(tokens, dim=1)
    return of_query, of_key
