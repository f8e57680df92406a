"""How far back a model can look: which inputs its outputs can depend on, by its layers' patterns alone.

Shapes: T tokens, L tokens of one window of the plan, N windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.model.language_model import LanguageModel
from variants.ops.masks import composed

LONGEST = 4096
"""Tokens up to which `reach` is worked out: it takes T² floats, several times."""


def dependence(model: LanguageModel, seq_len: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: which inputs (columns) an output (row) can depend on; None where content decides.

    The layers' patterns are composed within each window of the plan, as the plan runs all layers on a window
    before the next. It takes O(T²) memory. What it says cannot be read isn't; whether a model has learnt to
    carry the rest over its layers is for a measurement to tell.
    """
    patterns = [layer.pattern(seq_len, causal=causal) for layer in model.layers]
    if any(pattern is None for pattern in patterns):
        return None

    def network(window: Tensor) -> Tensor:  # (N, L, T): what each token of each window holds
        drawn = (layer.pattern(window.shape[1], causal=causal) for layer in model.layers)
        return composed([pattern for pattern in drawn if pattern is not None]).float() @ window

    return model.plan.apply(network, torch.eye(seq_len)[None], causal=causal)[0] > 0


def reach(model: LanguageModel, seq_len: int, *, causal: bool) -> int | None:
    """Tokens from the last back to the farthest that its output can depend on; None where content decides,
    or beyond `LONGEST` tokens."""
    found = dependence(model, seq_len, causal=causal) if seq_len <= LONGEST else None
    return None if found is None else seq_len - 1 - int(found[-1].int().argmax())


def connected_share(model: LanguageModel, seq_len: int, *, causal: bool) -> float | None:
    """Of the pairs of an output and an input that it may read (no later one where causal), the share that
    all layers together connect; None where content decides."""
    found = dependence(model, seq_len, causal=causal)
    if found is None:
        return None
    allowed = torch.ones_like(found)
    return found[allowed.tril() if causal else allowed].float().mean().item()
