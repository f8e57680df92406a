"""The transformer around the attention: the same for every variant, causal where it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import variants
from bench.model.initial_weights import initial_std
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import IGNORED, VOCABULARY, Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Workload, known_leak
from variants.input_schedule import Chunks

T, C, HEADS = 301, 32, 2
"""Past every default window and chunk, and a multiple of none of them."""
NAMES = variants.mixers()


def model_of(name: str, *, causal: bool = True, seed: int = 0, **changed: Any) -> LanguageModel:
    """A model of this variant with its default knobs, or a skip with the variant's reason."""
    variant, dims = (
        variants.load(name),
        Workload(causal=True, batch_size=1, seq_len=T, d_model=C, heads=HEADS),
    )
    if reason := variant.unsupported(variant.Config(), dims, causal=causal):
        pytest.skip(f"{name}: {reason}")
    others: dict[str, Any] = {"depth": 2, "dropout": 0.0, "activations": "keep", **changed}
    spec = ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=others.pop("ff_mult", 4)))
    torch.manual_seed(seed)
    return LanguageModel(spec, dims, vocabulary=VOCABULARY, **others)


def random_tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, T), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LanguageModel, tokens: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """(B, T, V) of a whole sequence, segment by segment; what a forward pass draws is drawn alike."""
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.eval().stream(tokens, causal=causal)], dim=1)


@pytest.mark.parametrize(("depth", "ff_mult"), [(1, 4), (3, 2)])
def test_parameters_are_counted_on_paper(depth: int, ff_mult: int) -> None:
    """Embedding and head V·C each, not tied; a block: projections 4·C², feed-forward 2·m·C², two norms."""
    model = model_of("dense", depth=depth, ff_mult=ff_mult)
    block = 4 * C * C + 2 * ff_mult * C * C + 2 * 2 * C
    assert sum(p.numel() for p in model.parameters()) == 2 * VOCABULARY * C + depth * block + 2 * C
    assert all(p.requires_grad for p in model.parameters())


def test_what_writes_to_the_residual_stream_starts_smaller() -> None:
    """Over √(2·depth) for a block's two outputs. A projection of C numbers has the variance of one of GPT-2:
    768 · 0.02²."""
    depth = 8
    for name, parameter in model_of("dense", depth=depth).named_parameters():
        if parameter.dim() == 2:
            variance = C * parameter.var().item() * (2 * depth if name.endswith("out.weight") else 1)
            assert variance == pytest.approx(0.3072, rel=0.2), name


def test_at_the_width_of_gpt_2_weights_start_as_its_weights() -> None:
    assert initial_std(768) == 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_every_parameter(name: str) -> None:
    first, again, other = (
        model_of(name, causal=variants.load(name).info.caps.causal, seed=s) for s in (0, 0, 1)
    )
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.std() == 0 or a.numel() < 2 or not torch.equal(a, c)


@pytest.mark.parametrize("name", ["chunked", "longformer", "overlapping"])
def test_variants_of_the_same_shapes_start_from_the_same_parameters(name: str) -> None:
    """So that under one seed a difference is the attention's."""
    dense = dict(model_of("dense").named_parameters())
    theirs = dict(model_of(name).named_parameters())
    assert dense.keys() == theirs.keys()
    assert all(torch.equal(dense[key], theirs[key]) for key in dense)


@pytest.mark.parametrize("name", NAMES)
def test_causal_logits_do_not_depend_on_later_tokens(name: str) -> None:
    """All tokens from the cut on are other ones; nothing before it moves. What a variant states that it
    leaks, it may."""
    variant = variants.load(name)
    if reason := known_leak(variant, variant.Config()):
        pytest.skip(f"{name}: {reason}")
    model = model_of(name)
    tokens = random_tokens()
    before = logits_of(model, tokens, causal=True)
    assert before.shape == (2, T, VOCABULARY)
    for cut in (1, 100, 150, 256, T - 1):
        changed = tokens.clone()
        changed[:, cut:] = random_tokens(seed=cut)[:, cut:]
        after = logits_of(model, changed, causal=True)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-5)
        assert not torch.equal(after[:, cut], before[:, cut]), "the token itself is read"


@pytest.mark.parametrize("name", NAMES)
def test_bidirectional_logits_read_later_tokens(name: str) -> None:
    """The opposite, so that the test above could fail."""
    model = model_of(name, causal=False)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 256
    moved = (logits_of(model, changed, causal=False) - logits_of(model, tokens, causal=False)).abs()
    assert moved[:, :100].max() > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    """With dropout on: the second computation must drop what the first dropped."""
    causal = variants.load(name).info.caps.causal
    tokens = random_tokens()
    targets = random_tokens(seed=1)
    targets[:, ::5] = IGNORED
    losses, gradients = [], []
    for activations in ("keep", "checkpoint"):
        model = model_of(name, causal=causal, activations=activations, dropout=0.3).train()
        torch.manual_seed(2)
        optimizer = optimizer_for(model, 0.0)
        losses.append(training_step(model, optimizer, Batch(tokens, targets), causal=causal).nll)
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    kept, recomputed = gradients
    for key, want in kept.items():
        got = recomputed[key]
        assert (want is None) == (got is None), key
        if want is not None:
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), key


def test_dropout_drops_in_training_alone() -> None:
    model, tokens = model_of("dense", dropout=0.5), random_tokens()
    assert torch.equal(logits_of(model, tokens, causal=True), logits_of(model, tokens, causal=True))
    torch.manual_seed(1)
    trained = model.train()(tokens, causal=True).logits
    assert not torch.equal(trained, model(tokens, causal=True).logits)


@pytest.mark.parametrize("causal", [True, False])
def test_the_plan_is_applied_around_the_whole_network(causal: bool) -> None:
    """A chunk in a sequence has the logits of that chunk alone, at any depth: positions restart too."""
    model, tokens = model_of("chunked", depth=3), random_tokens()
    assert isinstance(model.input_schedule, Chunks)
    whole = logits_of(model, tokens, causal=causal)
    for lo in range(0, T, model.input_schedule.length):
        alone = logits_of(model, tokens[:, lo : lo + model.input_schedule.length], causal=causal)
        torch.testing.assert_close(
            whole[:, lo : lo + model.input_schedule.length], alone, rtol=1e-5, atol=1e-5
        )
