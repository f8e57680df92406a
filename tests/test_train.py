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
from bench.config.spec import MeasureSpec
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks import text
from bench.train.loop import Diverged, Training, train
from bench.train.schedule import FIRST_SHARE, Budget, cosine_factor
from bench.train.step import CLIP_NORM, WEIGHT_DECAY, optimizer_for, training_step
from variants.attention.sparse_qkv import ModuleConvolution
from variants.base import Workload

SIZES = Workload(causal=True, batch_size=1, seq_len=48, d_model=32, heads=2)


def model_of(seed: int = 0, **changed: Any) -> LanguageModel:
    torch.manual_seed(seed)
    given_: dict[str, Any] = {"depth": 1, "dropout": 0.0, "activations": "keep", **changed}
    variant = variants.load("dense")
    return LanguageModel(
        ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=4)),
        SIZES,
        vocabulary=text.VOCABULARY,
        **given_,
    )


def batch(step: int, objective: str = "clm") -> text.Batch:
    windows = torch.randint(0, 256, (4, SIZES.seq_len + 1), generator=torch.Generator().manual_seed(step))
    if objective == "clm":
        return text.Batch(windows[:, :-1], windows[:, 1:])
    inputs = windows[:, :-1]
    masked = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(step)) < 0.15
    return text.Batch(inputs.masked_fill(masked, text.MASK), inputs.masked_fill(~masked, text.IGNORED))


def run(model: LanguageModel, steps: int = 5, **changed: Any) -> Training:
    batches: Callable[[int, float], text.Batch] = changed.pop("batches", lambda step, done: batch(step))
    given_: dict[str, Any] = {"budget": Budget(steps=steps), "learning_rate": 1e-3, "causal": True, **changed}
    return train(model, batches, step_tokens=4 * SIZES.seq_len, **given_)


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_the_schedule_rises_to_one_and_falls_to_a_tenth(steps: int) -> None:
    shares = [cosine_factor(step / steps, 1 / steps) for step in range(steps)]
    peak = shares.index(max(shares))
    assert max(shares) == pytest.approx(1)
    assert all(0.1 <= share <= 1 for share in shares[peak:])
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert peak <= math.ceil(steps / 10), "the warm-up takes a tenth"
    if steps >= 10:
        assert shares[0] == pytest.approx(10 / steps), "linear from nothing"
    if steps >= 100:
        assert shares[-1] == pytest.approx(0.1, abs=1e-2)
        middle = (steps // 10 + steps) // 2
        assert shares[middle] == pytest.approx(0.55, abs=0.03), "half-way down the cosine"


def test_a_step_that_takes_the_whole_budget_has_the_whole_rate() -> None:
    assert cosine_factor(0.0, 1.0) == 1.0


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_batch_is_learnt(objective: str, dtype: torch.dtype) -> None:
    """From ignorance, ln 257 ≈ 5.55 nats, to under half of it in a few dozen steps."""
    model = model_of(dtype=dtype).train()
    optimizer = optimizer_for(model, 1e-2)
    repeated = batch(0, objective)
    causal = objective == "clm"
    losses = [training_step(model, optimizer, repeated, causal=causal).nll.item() for _ in range(30)]
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


@pytest.mark.parametrize("amount", [1, 4, 5, 21])
@pytest.mark.parametrize(
    ("name", "knob", "each"), [("tokens", "train_tokens", 4), ("flops", "train_flops", 7)]
)
def test_what_is_counted_is_rounded_up_to_whole_steps(amount: int, name: str, knob: str, each: int) -> None:
    measure = MeasureSpec(train_budget=name, eval_tokens=1, **{knob: amount})  # type: ignore[arg-type]
    steps = Budget.of(measure, step_tokens=4, step_flops=7).steps
    assert steps is not None
    assert (steps - 1) * each < amount <= steps * each


def test_each_step_has_its_own_batch_in_order_and_knows_how_far_training_is() -> None:
    asked: list[tuple[int, float]] = []

    def batches(step: int, done: float) -> text.Batch:
        asked.append((step, done))
        return batch(step)

    training = run(model_of(), steps=4, batches=batches)
    assert asked == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert training.tokens == 4 * 4 * SIZES.seq_len
    assert [row.step for row in training.curve.rows] == [1, 2, 3, 4]
    shares = [row.learning_rate / 1e-3 for row in training.curve.rows]
    assert shares == [cosine_factor(done, 0.25) for _, done in asked]


def test_seconds_are_spent_and_the_schedule_follows_the_clock() -> None:
    training = run(model_of(), budget=Budget(seconds=1.0))
    last = training.curve.rows[-2]
    assert training.seconds >= 1.0 > last.seconds, "it stops after the step that spends the budget"
    assert training.tokens == training.step * 4 * SIZES.seq_len
    rates = [row.learning_rate for row in training.curve.rows]
    assert rates[0] == pytest.approx(1e-3 * FIRST_SHARE / 0.1)
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[-1] < 2e-4
    for before, after in pairwise(training.curve.rows):  # each rate is that of the share spent before it
        share = before.seconds / before.step
        assert after.learning_rate == pytest.approx(1e-3 * cosine_factor(before.seconds, share))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_step(poison: float) -> None:
    """The weights are poisoned before the third step's batch is handed out."""
    model = model_of()

    def batches(step: int, done: float) -> text.Batch:
        if step == 2:
            with torch.no_grad():
                model.head.weight[0, 0] = poison
        return batch(step)

    with pytest.raises(Diverged, match=r"(nan|inf) at training step 3 of 5") as caught:
        run(model, batches=batches)
    assert caught.value.step == 3


def test_weights_that_the_last_update_ruins_are_noticed() -> None:
    """The last loss was taken before that update, and no further step sees what it did."""
    model, updates = model_of(), 0

    def ruin() -> None:
        nonlocal updates
        updates += 1
        if updates == 5:
            with torch.no_grad():
                model.head.weight[0, 0] = float("inf")

    model.layers[0].after_step = ruin  # type: ignore[assignment]
    with pytest.raises(Diverged, match=r"the weights .* at training step 5 of 5"):
        run(model)


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


class Everything(torch.nn.Module):
    """A parameter of each kind that a plug-in may have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.convolution = torch.nn.Conv1d(3, 4, 2)
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.norm = torch.nn.LayerNorm(4)
        self.table = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.again = torch.nn.Linear(3, 4, bias=False)
        self.again.weight = self.linear.weight
        self.frozen = torch.nn.Linear(3, 4, bias=False).requires_grad_(False)
        self.positions = torch.nn.Parameter(torch.ones(9, 4))
        self.u = torch.nn.Parameter(torch.ones(2, 2))
        self.temperature = torch.nn.Parameter(torch.ones(()))
        self.weight = torch.nn.Parameter(torch.ones(4))


def shrunk(model: torch.nn.Module) -> set[str]:
    """The parameters that an optimiser's step without gradients, but for weight decay, makes smaller."""
    optimizer = optimizer_for(model, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = set()
    for name, p in model.named_parameters():
        if not torch.equal(p, before[name]):
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * WEIGHT_DECAY))
            found.add(name)
    return found


def test_of_a_plug_in_s_parameters_only_matrices_decay() -> None:
    """Whatever their dimensions; what is shared with an embedding is one, what is frozen stays."""
    matrices = {
        "linear.weight",
        "convolution.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert shrunk(Everything()) == matrices


@pytest.mark.parametrize("name", variants.mixers())
def test_of_every_variant_only_matrices_decay(name: str) -> None:
    """Those of Linear modules and of convolutions with matrices for taps; not norms, embeddings, u and v for
    each head, mixtures of positions."""
    variant = variants.load(name)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=2)),
        SIZES,
        depth=2,
        dropout=0.0,
        vocabulary=text.VOCABULARY,
        activations="keep",
    )
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    kinds = (torch.nn.Linear, ModuleConvolution)
    linear = {f"{key}.weight" for key, m in model.named_modules() if isinstance(m, kinds)}
    assert shrunk(model) == linear & {key for key, _ in model.named_parameters()}
    assert "head.weight" in linear
    assert not any(key.endswith((".u", ".v", "norm.weight", "embedding.weight", "mixture")) for key in linear)


def test_every_trained_parameter_is_in_the_optimiser_once() -> None:
    model = Everything()
    held = [p for group in optimizer_for(model, 0.1).param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}


def test_unscored_targets_teach_nothing() -> None:
    """The loss is the mean over scored targets alone."""
    model = model_of().train()
    inputs, targets, _ = batch(0)
    half = targets.clone()
    half[:, ::2] = text.IGNORED
    step = training_step(model, optimizer_for(model, 0.0), text.Batch(inputs, half), causal=True).nll
    with torch.no_grad():
        nll = -model(inputs, causal=True).logits.double().log_softmax(-1)
    by_hand = nll.gather(-1, targets[..., None])[:, 1::2].mean()
    assert step.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_an_auxiliary_loss_changes_nothing_in_the_step_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large it is: what it alone trains is clipped by itself."""
    variant = variants.load("compressive")
    config = variant.Config.of({"segment": 16, "mem_len": 8, "comp_len": 4})
    plain = variant._reconstruction  # type: ignore[attr-defined]

    def gradients(times: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """By the task and by the auxiliary loss, which is multiplied."""
        monkeypatch.setattr(variant, "_reconstruction", lambda *given_: times * plain(*given_))
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"depth": 2, "dropout": 0.0, "vocabulary": text.VOCABULARY}
        model = LanguageModel(ModelSpec.of(variant, config), SIZES, activations="keep", **sizes).train()
        training_step(model, optimizer_for(model, 0.0), batch(0), causal=True)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        auxiliary = {name: found.pop(name) for name in list(found) if "compressor" in name}
        return found, auxiliary

    task, small = gradients(1.0)
    same, large = gradients(1e6)
    assert len(small) == 2, "a layer's each"
    assert all(torch.equal(task[name], same[name]) for name in task)
    assert joint_norm(small) < CLIP_NORM
    assert joint_norm(large) == pytest.approx(CLIP_NORM, rel=1e-3)


def joint_norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))
