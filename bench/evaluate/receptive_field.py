"""Receptive field of a model: the inputs on which its outputs can depend, according to its layers' attention
masks.

Shapes: T tokens, L tokens of one window of the input schedule, N windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.model.language_model import LanguageModel
from variants.base import SequenceMixer, segment_mask
from variants.input_schedule import NetworkOut
from variants.ops.patterns.masks import composed

MAX_TOKENS = 4096
"""Maximum number of tokens for which `reach` is computed, because it needs several tensors of T² floats."""


def dependence(model: LanguageModel, seq_len: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: the inputs (columns) on which each output (row) can depend; None if the mask depends on
    content, or if the depth schedule reads several tokens at once.

    The masks of the layers are composed within each window of the input schedule, because all layers run on a
    window before the next one. It needs O(T²) memory. An output cannot depend on an input outside this mask.
    Whether a trained model uses an input inside the mask must be measured.
    """

    def mask_of(layer: SequenceMixer, tokens: int) -> Tensor | None:
        return segment_mask(layer, model.input_schedule, tokens, causal=causal)

    depth = model.spec.depth
    if depth.layer.no_decoding(depth.config) is not None:  # its path exchanges information between tokens
        return None
    if any(mask_of(layer, seq_len) is None for layer in model.layers):
        return None

    def network(window: Tensor, _: Any) -> NetworkOut:  # (N, L, T): the inputs on which each token depends
        masks = (mask_of(block.mixer, window.shape[1]) for block in model.visits)
        return NetworkOut(composed([mask for mask in masks if mask is not None]).float() @ window)

    return model.input_schedule.apply(network, torch.eye(seq_len)[None], causal=causal).y[0] > 0


def reach(model: LanguageModel, seq_len: int, *, causal: bool) -> int | None:
    """Return the distance, in tokens, from the last token back to the farthest input on which its output can
    depend; None if the mask depends on content or `seq_len` exceeds `MAX_TOKENS`."""
    depends = dependence(model, seq_len, causal=causal) if seq_len <= MAX_TOKENS else None
    return None if depends is None else seq_len - 1 - int(depends[-1].int().argmax())


def connected_share(model: LanguageModel, seq_len: int, *, causal: bool) -> float | None:
    """Return the share of the (output, input) pairs that all layers together connect, of all pairs allowed by
    causality; None if the mask depends on content."""
    depends = dependence(model, seq_len, causal=causal)
    if depends is None:
        return None
    allowed = torch.ones_like(depends)
    return depends[allowed.tril() if causal else allowed].float().mean().item()
