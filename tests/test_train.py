"""Training: it learns, repeats to the bit, follows its schedule, and says when it has diverged."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import variants
from bench.model import LanguageModel
from bench.tasks import text
from bench.train import CLIP_NORM, Diverged, optimizer_for, schedule, train, training_step
from variants.base import Dims

SIZES = Dims(batch_size=1, seq_len=48, d_model=32, heads=2)


def model_of(seed: int = 0, **changed: Any) -> LanguageModel:
    torch.manual_seed(seed)
    given_: dict[str, Any] = {"depth": 1, "dropout": 0.0, "activations": "keep", **changed}
    variant = variants.load("dense")
    return LanguageModel(variant, variant.Config(), SIZES, ff_mult=4, vocabulary=text.VOCABULARY, **given_)


def batch(step: int, objective: str = "clm") -> text.Batch:
    windows = torch.randint(0, 256, (4, SIZES.seq_len + 1), generator=torch.Generator().manual_seed(step))
    if objective == "clm":
        return text.Batch(windows[:, :-1], windows[:, 1:])
    inputs = windows[:, :-1]
    masked = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(step)) < 0.15
    return text.Batch(inputs.masked_fill(masked, text.MASK), inputs.masked_fill(~masked, text.IGNORED))


def run(model: LanguageModel, steps: int = 5, **changed: Any) -> int:
    batches: Callable[[int], text.Batch] = changed.pop("batches", batch)
    given_: dict[str, Any] = {"learning_rate": 1e-3, "causal": True, **changed}
    return train(model, batches, tokens=steps * 4 * SIZES.seq_len, **given_)


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_the_schedule_rises_to_one_and_falls_to_a_tenth(steps: int) -> None:
    shares = [schedule(step, steps) for step in range(steps)]
    peak = shares.index(max(shares))
    assert max(shares) == pytest.approx(1)
    assert all(0.1 <= share <= 1 for share in shares[peak:])
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert peak == max(1, round(steps / 10)) - 1
    if steps >= 100:
        assert shares[0] == pytest.approx(1 / round(steps / 10)), "linear from nothing"
        assert shares[-1] == pytest.approx(0.1, abs=1e-3)
        middle = (peak + steps) // 2
        assert shares[middle] == pytest.approx(0.55, abs=0.03), "half-way down the cosine"


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_batch_is_learnt(objective: str, dtype: torch.dtype) -> None:
    """From ignorance, ln 257 ≈ 5.55 nats, to under half of it in a few dozen steps."""
    model = model_of(dtype=dtype).train()
    optimizer = optimizer_for(model, 1e-2)
    repeated = batch(0, objective)
    causal = objective == "clm"
    losses = [training_step(model, optimizer, repeated, causal=causal).item() for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(text.VOCABULARY), abs=0.3)
    assert losses[-1] < losses[0] / 2
    assert all(p.dtype == torch.float32 for p in model.parameters()), "only products are in bfloat16"


def test_bfloat16_computes_something_else_than_float32() -> None:
    """Autocast is on: the same parameters give other logits, by rounding and no more."""
    exact, rounded = (
        model_of(dtype=dtype).eval()(batch(0).inputs, causal=True).logits
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("changed", [{}, {"activations": "checkpoint", "dropout": 0.2}])
def test_the_same_seed_gives_the_same_parameters_to_the_bit(changed: dict[str, Any]) -> None:
    def trained(seed: int) -> list[torch.Tensor]:
        model = model_of(seed, **changed)
        run(model, steps=3)
        return [p.detach() for p in model.parameters()]

    first, second, other = trained(0), trained(0), trained(1)
    assert all(map(torch.equal, first, second))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.dim() == 2)


@pytest.mark.parametrize("tokens", [1, 4, 5, 21])
def test_tokens_are_rounded_up_to_whole_batches(tokens: int) -> None:
    asked: list[int] = []

    def batches(step: int) -> text.Batch:
        asked.append(step)
        return text.Batch(*(half[:1, :4] for half in batch(step)[:2]))

    seen = train(model_of(depth=1), batches, tokens=tokens, learning_rate=1e-3, causal=True)
    assert tokens <= seen < tokens + 4
    assert sorted(set(asked)) == list(range(seen // 4)), "each step has its own batch, in order"


def test_a_loss_that_is_no_number_names_its_step() -> None:
    """The weights are poisoned before the third step's batch is handed out."""
    model = model_of()

    def batches(step: int) -> text.Batch:
        if step == 2:
            with torch.no_grad():
                model.head.weight[0, 0] = float("nan")
        return batch(step)

    with pytest.raises(Diverged, match=r"nan at training step 3 of 5"):
        run(model, batches=batches)


def test_a_huge_learning_rate_diverges() -> None:
    with pytest.raises(Diverged, match=r"at training step \d+ of 40"):
        run(model_of(), steps=40, learning_rate=1e30)


def test_gradients_are_clipped_together() -> None:
    """By one factor: their directions stay, their joint norm is at most CLIP_NORM."""
    model = model_of().train()
    with torch.no_grad():
        model.head.weight.mul_(300)
    optimizer = optimizer_for(model, 0.0)
    training_step(model, optimizer, batch(0), causal=True)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert clipped.norm().item() == pytest.approx(CLIP_NORM, rel=1e-3)
    model.zero_grad()
    logits = model(batch(0).inputs, causal=True).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch(0).targets.flatten()).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert plain.norm() > 2 * CLIP_NORM, "nothing had to be clipped"
    torch.testing.assert_close(clipped, plain / plain.norm(), rtol=1e-3, atol=1e-6)


def test_unscored_targets_teach_nothing() -> None:
    """The loss is the mean over scored targets alone."""
    model = model_of().train()
    inputs, targets, _ = batch(0)
    half = targets.clone()
    half[:, ::2] = text.IGNORED
    step = training_step(model, optimizer_for(model, 0.0), text.Batch(inputs, half), causal=True)
    with torch.no_grad():
        nll = -model(inputs, causal=True).logits.double().log_softmax(-1)
    by_hand = nll.gather(-1, targets[..., None])[:, 1::2].mean()
    assert step.item() == pytest.approx(by_hand.item(), rel=1e-5)
