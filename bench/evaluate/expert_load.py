"""The load of experts while a model is evaluated: tokens that are dropped, and the most used expert.

A forward hook on each layer of experts makes the router's choices again, so that a forward pass itself counts
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bench.model.language_model import LanguageModel
from variants.base import ExpertLoad, HasExperts


class ExpertLoads:
    """Sums of the assignments of tokens to experts, by layer."""

    def __init__(self) -> None:
        self.by_layer: dict[nn.Module, ExpertLoad] = {}

    def add(self, layer: nn.Module, args: tuple[Tensor], _output: Any) -> None:
        """Count a call; the signature is that of a forward hook."""
        assert isinstance(layer, HasExperts)
        new, before = layer.load(*args), self.by_layer.get(layer)
        if before is not None:
            dropped = None if new.dropped is None or before.dropped is None else new.dropped + before.dropped
            new = ExpertLoad(new.assigned + before.assigned, dropped)
        self.by_layer[layer] = new

    def figures(self) -> dict[str, float | None]:
        """Return the record's figures: None of a model without experts, or whose experts take all tokens.

        `dropped_tokens_share` is over all layers with a capacity; `busiest_expert_share` is that of the layer
        where it is largest.
        """
        loads = [(load.assigned.tolist(), load.dropped) for load in self.by_layer.values()]
        limited = [(sum(assigned), int(dropped)) for assigned, dropped in loads if dropped is not None]
        tokens, dropped = (sum(counts) for counts in zip(*limited, strict=True)) if limited else (0, 0)
        return {
            "dropped_tokens_share": dropped / tokens if limited else None,
            "busiest_expert_share": max((max(own) / sum(own) for own, _ in loads), default=None),
        }


@contextmanager
def counting_loads(model: LanguageModel) -> Iterator[ExpertLoads]:
    """Count all tokens that the layers of experts of the model process inside the context."""
    loads = ExpertLoads()
    layers = [layer for layer in model.modules() if isinstance(layer, HasExperts)]
    hooks = [layer.register_forward_hook(loads.add) for layer in layers]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()
