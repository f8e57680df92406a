"""A trained model's attention, looked at: how its weights are spread, and how far an estimate of them is off.

Shapes: B batch, T tokens of a window of the plan, H heads, D channels of a head; N = B · H maps of T × T
weights, K clusters.

Both are taken over held-out text on the inputs that each layer gets there, because weights of random inputs
are nearly uniform, and those any method estimates well.
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
from variants.base import Attention

KMEANS_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Means over windows, layers and heads, under the record's names; None for what a variant cannot say.

    Of weights, only rows that may read more than half of the window's tokens count: the first rows of a
    causal window read few, and those are large.
    """

    attention_mass: list[float] | None = None
    """Share of a row's mass in its 2^k largest terms, k = 0, 1, … up to half of the window."""
    attention_mass_uniform: list[float] | None = None
    """The same of rows whose terms are all equal."""
    attention_rank_error: list[float] | None = None
    """‖A − A_r‖ / ‖A‖ (Frobenius) of the weights and the nearest matrix of rank r = 2^k, k = 0, 1, …"""
    cluster_mass: float | None = None
    """Share of a row's mass on the keys of the query's own cluster: see `clusters`."""
    cluster_mass_uniform: float | None = None
    """The same of rows whose terms are all equal: the share of the keys that are in the query's cluster."""
    cluster_mass_best: float | None = None
    """Share of a row's mass in as many of its largest terms: what no choice of so many keys exceeds."""
    softmax_error: float | None = None
    """‖Y − Y*‖ / ‖Y*‖ (Frobenius) of a layer's outputs Y and those of the full softmax attention that it
    estimates, Y*, over all windows; the mean over layers."""


class _Seen(NamedTuple):
    """What went into a layer and what came out, each (B, T, C)."""

    layer: Attention
    x: Tensor
    y: Tensor


@contextmanager
def _watching(layers: Iterable[Attention]) -> Iterator[list[_Seen]]:
    """What goes through the layers while inside."""
    seen: list[_Seen] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: seen.append(_Seen(layer, given[0], out.y)))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def look(model: LanguageModel, batches: Iterable[Batch], *, causal: bool, device: torch.device) -> Looks:
    """Run the model over the batches and look at each layer's attention.

    It takes O(T²) memory. Of a plan that cuts a sequence into windows of several lengths, the longest count.
    """
    spread: list[_Spread] = []
    errors = {layer: [0.0, 0.0] for layer in model.layers}
    with evaluating(model):
        for batch in batches:
            with _watching(model.layers) as seen:
                model(batch.inputs.to(device), causal=causal)
            for layer, x, y in seen:
                want = layer.estimated(x, causal=causal)
                if want is not None:
                    for place, t in enumerate((y - want, want)):
                        errors[layer][place] += float(t.double().square().sum())
                read = layer.queries_keys(x)
                if read is not None:
                    spread.append(_spread(*(t.flatten(0, 1).float() for t in read), causal=causal))
    off = [math.sqrt(wrong / whole) for wrong, whole in errors.values() if whole]
    error = sum(off) / len(off) if off else None
    found: dict[str, Any] = _means(spread)
    return Looks(softmax_error=error, **found)


class _Spread(NamedTuple):
    """Of the maps of one layer and batch: the window's length, the maps, and what is averaged over maps."""

    tokens: int
    maps: int
    sums: dict[str, Tensor]


def _means(spread: list[_Spread]) -> dict[str, Any]:
    if not spread:
        return {}
    longest = max(one.tokens for one in spread)
    taken = [one for one in spread if one.tokens == longest]
    count = sum(one.maps for one in taken)
    total = {key: torch.stack([one.sums[key] for one in taken]).sum(dim=0) for key in taken[0].sums}
    return {key: (sums / count).tolist() for key, sums in total.items()}


def _spread(q: Tensor, k: Tensor, *, causal: bool) -> _Spread:
    """q, k (N, T, D) of one layer → figures summed over the maps."""
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
    found = {
        "attention_mass": mass[..., few].mean(dim=1),
        "attention_mass_uniform": (few / terms[:, None]).clamp(max=1).mean(dim=0).expand(maps, -1),
        "attention_rank_error": rank_errors(values),
        "cluster_mass": (weights[:, rows] * own).sum(dim=-1).mean(dim=1),
        "cluster_mass_uniform": (members[..., 0] / terms).mean(dim=1),
        "cluster_mass_best": mass.gather(-1, members)[..., 0].mean(dim=1),
    }
    return _Spread(tokens, maps, {key: value.sum(dim=0) for key, value in found.items()})


def _powers(most: int, device: torch.device) -> Tensor:
    """1, 2, 4, … up to the largest power of two that is at most `most`."""
    return 2 ** torch.arange(most.bit_length(), device=device)


def rank_errors(values: Tensor) -> Tensor:
    """Singular values (N, T), largest first, → relative errors (N, n) of the nearest matrices of rank 1, 2,
    4, … up to T (Eckart and Young 1936)."""
    squares = values.square()
    left = F.pad(squares.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))  # (N, T + 1): from the r-th on
    return (left[:, _powers(values.shape[-1], values.device)] / left[:, :1]).sqrt()


def clusters(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each query and of each key of a map: (N, T, D) each → (N, T) each.

    As the Routing Transformer (Roy 2020, arXiv:2003.05997, §4.1) makes them: √T clusters by spherical k-means
    over queries and keys together, each normalised as by layer normalisation; but by Lloyd's steps on the
    window itself, from evenly spaced keys, where the paper learns centroids over the training.
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
