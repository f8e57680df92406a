"""Pruning after training: the loss of a trained model with fewer attention heads, or with fewer visits.

Shapes: H heads of a layer, T tokens.

Heads (Michel 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, §2.3 and §4). The output of
head h is multiplied by ξ_h = 1 before the output projection. The importance of a head is the mean over
sequences of |∂L / ∂ξ_h|, for the mean loss L of a sequence, divided by the ℓ2 norm of the importances of its
layer. Heads with the lowest importance in the whole model are removed first (ξ_h = 0), in one order for all
sizes. A layer may lose all heads. A block that is visited several times has one ξ for all its visits. A head
is an equal part of the channels that the output projection reads; of a layer whose heads work in pairs, half
the output of a pair.

Visits (Fan 2019, LayerDrop, arXiv:1909.11556, §3.2, "every other"): to remove a share of 1 / n, every n-th
visit is left out.

Nothing is trained again, and nothing is saved in time: what is removed is multiplied by 0, or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch
from variants.ops.projections import Projections

KEPT = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Shares of the heads that are kept."""
LEFT_OUT = (4, 2)
"""Every so many visits, one is left out."""


def no_heads(model: LanguageModel) -> str | None:
    """Return why the heads of a model cannot be removed, or None."""
    for name, layer in model.distinct_layers():
        if not any(isinstance(module, Projections) for module in layer.modules()):
            return f"{name} does not merge heads by the output projection that other variants share"
    return None


def heads_of(model: LanguageModel) -> list[Projections]:
    """Return the projections of all layers, each once."""
    modules = dict.fromkeys(module for layer in model.layers for module in layer.modules())
    return [module for module in modules if isinstance(module, Projections)]


@contextmanager
def scaled_heads(scales: Mapping[Projections, Tensor]) -> Iterator[None]:
    """Multiply the outputs of heads by scales (H,), before the output projection, inside the context."""

    def hook(scale: Tensor) -> Callable[[nn.Module, Any], Any]:
        def scaled(projection: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            (y,) = given  # (…, H · D)
            return (y * scale.to(y.dtype).repeat_interleave(y.shape[-1] // len(scale)),)

        return scaled

    hooks = [each.out.register_forward_pre_hook(hook(scale)) for each, scale in scales.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def importance(
    model: LanguageModel, batches: Iterable[Batch], *, sequences: int, causal: bool, device: torch.device
) -> dict[Projections, Tensor]:
    """Return the importance (H,) of the heads of each layer, from the first sequences of the batches.

    A sequence with segments has the sum of their gradients, as its loss is their sum. Each sequence is
    processed by itself, so that its gradient is its own.
    """
    layers = heads_of(model)
    sums = {layer: torch.zeros(layer.heads, device=device, dtype=torch.float64) for layer in layers}
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random features and hashes as in every evaluation
        for inputs, targets in islice(_rows(batches), sequences):
            scales = {layer: torch.ones(layer.heads, device=device, requires_grad=True) for layer in layers}
            gradients = {layer: torch.zeros_like(sums[layer]) for layer in layers}
            scored = (targets != IGNORED).sum()
            with torch.enable_grad(), scaled_heads(scales):
                for segment, out in model.stream(inputs.to(device), causal=causal):
                    own = targets[:, segment].flatten().to(device)
                    nll = F.cross_entropy(
                        out.logits.flatten(0, 1), own, ignore_index=IGNORED, reduction="sum"
                    )
                    found = torch.autograd.grad(nll / scored, [*scales.values()], allow_unused=True)
                    for layer, gradient in zip(layers, found, strict=True):
                        if gradient is not None:
                            gradients[layer] += gradient
            for layer in layers:
                sums[layer] += gradients[layer].abs()
    return {layer: each / each.norm().clamp_min(torch.finfo(each.dtype).tiny) for layer, each in sums.items()}


def _rows(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (1, T) of the sequences with a scored target."""
    for batch in batches:
        for inputs, targets in zip(batch.inputs.split(1), batch.targets.split(1), strict=True):
            if bool((targets != IGNORED).any()):
                yield inputs, targets


def kept_heads(importances: Mapping[Projections, Tensor], count: int) -> dict[Projections, Tensor]:
    """Return scales (H,) of 1 for the `count` heads of the highest importance, and 0 for the others. Of equal
    ones, that of the lower layer is removed first."""
    flat = torch.cat([*importances.values()])
    scale = torch.zeros_like(flat)
    scale[flat.argsort(stable=True)[len(flat) - count :]] = 1
    sizes = [len(each) for each in importances.values()]
    return dict(zip(importances, scale.split(sizes), strict=True))


def prune_heads(
    importances: Mapping[Projections, Tensor], score: Callable[[], float], nll: float
) -> dict[str, Any]:
    """Return the loss with each of `KEPT`, by the keys of the record. `score` computes that of the model as
    it is, and `nll` is that with all heads."""
    heads = sum(len(each) for each in importances.values())
    counts = list(dict.fromkeys(max(1, round(share * heads)) for share in KEPT))
    nlls = [nll]
    for count in counts[1:]:
        with scaled_heads(kept_heads(importances, count)):
            nlls.append(score())
    return {"heads_kept": counts, "nll_heads_kept": nlls}


def kept_visits(visits: int, every: int) -> Sequence[int]:
    """Return the places of the visits that are left without the `every`-th one, the 2 · `every`-th one, …"""
    return [place for place in range(visits) if (place + 1) % every]


def prune_visits(model: LanguageModel, score: Callable[[], float], nll: float) -> dict[str, Any]:
    """Return the loss with all visits and without each of `LEFT_OUT`, by the keys of the record."""
    every = model.places
    counts, nlls = [len(every)], [nll]
    for period in LEFT_OUT:
        places = kept_visits(len(every), period)
        if len(places) in counts:
            continue
        model.places = places
        try:
            nlls.append(score())
        finally:
            model.places = every
        counts.append(len(places))
    return {"visits_kept": counts, "nll_visits_kept": nlls}
