"""What a strategy for activations promises: the same gradients for less memory, for every variant."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import variants
from bench import residual
from bench.model import LanguageModel
from bench.tasks.text import Batch
from bench.train import training_step
from variants.base import Dims

ON_HOST = [name for name, strategy in residual.STRATEGIES.items() if not strategy.needs_device]
TOLERANCE = 1e-5
"""Largest error of a float32 gradient, relative to the largest entry of any."""

every_variant = pytest.mark.parametrize("name", variants.names())


def model_of(
    name: str, activations: str, *, seq_len: int = 600, depth: int = 3, **kwargs: Any
) -> LanguageModel:
    """A small model; the same seed gives the same weights whatever the strategy."""
    variant = variants.load(name)
    dims = Dims(batch_size=1, seq_len=seq_len, d_model=32, heads=2)
    torch.manual_seed(5)
    options: dict[str, Any] = {"ff_mult": 2, "dropout": 0.1, "vocabulary": 17} | kwargs
    return LanguageModel(variant, variant.Config(), dims, depth=depth, activations=activations, **options)


def objective(name: str) -> bool:
    return variants.load(name).caps.causal


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
def wanted(name: str, *, two_streams: bool, ff_chunks: int = 1) -> dict[str, Tensor]:
    """The gradients with every activation stored, and one feed-forward piece at a time in two streams."""
    model = model_of(name, "keep", ff_chunks=ff_chunks)
    if two_streams:
        model.run_blocks = residual.two_streams
    return stepped(model, 600, causal=objective(name))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = max(grad.abs().max().item() for grad in want.values())
    assert scale > 0
    worst = {key: (got[key] - want[key]).abs().max().item() / scale for key in want}
    assert max(worst.values()) <= TOLERANCE, worst


@every_variant
@pytest.mark.parametrize("activations", [name for name in ON_HOST if name != "keep"])
def test_gradients_are_those_of_stored_activations(name: str, activations: str) -> None:
    """With dropout, hashing, random features and carried state replayed."""
    model = model_of(name, activations)
    got = stepped(model, 600, causal=objective(name))
    assert_same(got, wanted(name, two_streams=activations == "reversible"))


@every_variant
@pytest.mark.parametrize("activations", ["keep", "checkpoint", "reversible"])
def test_gradients_with_a_chunked_feed_forward(name: str, activations: str) -> None:
    model = model_of(name, activations, ff_chunks=3)
    got = stepped(model, 600, causal=objective(name))
    assert_same(got, wanted(name, two_streams=activations == "reversible", ff_chunks=3))
