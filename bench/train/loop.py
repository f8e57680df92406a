"""One training step, and training with a budget of tokens, FLOPs or seconds.

With a budget of tokens or FLOPs, training is reproducible to the bit on a CPU, even if it is killed and
resumed. With a budget of seconds it is not, because the number of steps, and therefore the learning rate of
each step, depends on the clock.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from bench.config.spec import MeasureSpec
from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch
from bench.train.checkpoints import CheckpointStore, generator_states, restore_generators
from bench.train.loss_curve import Curve, Row
from variants.base import AuxiliaryLoss, UpdatesAfterStep

WARM_UP_SHARE = 0.1
FIRST_SHARE = 0.01
"""Assumed share of a budget of seconds for the first step, whose duration is not yet known."""
CLIP_NORM = 1.0


WEIGHT_DECAY = 0.1


def decayed_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the parameters to which weight decay applies: parameters of two or more dimensions whose name
    contains `weight`, as torch's modules name the matrices that they multiply by.

    Weight decay does not apply to biases, norms, embeddings and parameters with other names: position tables,
    vectors per head, mixtures over positions. A parameter that is shared with an embedding is an embedding.
    """
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    tables = {p for m in model.modules() if isinstance(m, embeddings) for p in m.parameters(recurse=False)}
    matrices = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "weight" in name and parameter.dim() >= 2
    }
    return matrices - tables


def optimizer_for(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return a fused AdamW (Loshchilov 2017, arXiv:1711.05101), which needs no temporary tensors of the
    model's size.

    Frozen parameters are excluded. Weight decay applies to `decayed_parameters`.
    """
    decayed = decayed_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(done: float, step_share: float) -> float:
    """Return the factor of the learning rate for a step that uses `step_share` of the budget after the share
    `done` is used: linear warm-up, then cosine decay to a tenth."""
    if done < WARM_UP_SHARE:
        return min(1.0, (done + step_share) / WARM_UP_SHARE)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


Phase = Literal["forward", "backward", "optimizer"]


def parameters_by_loss(model: LanguageModel) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the parameters that the task's loss trains, and those that only auxiliary losses train."""
    auxiliary = {
        parameter
        for layer in model.layers
        if isinstance(layer, AuxiliaryLoss)
        for parameter in layer.auxiliary_parameters()
    }
    both = list(model.parameters())
    return [p for p in both if p not in auxiliary], [p for p in both if p in auxiliary]


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    causal: bool,
    segments: Iterable[slice] | None = None,
    on_phase_end: Callable[[Phase], None] | None = None,
) -> torch.Tensor:
    """Run forward, backward, gradient clipping and update; returns the mean nll in nats, still on the device.

    If the input schedule has segments, each segment runs forward and backward in turn and the gradients
    accumulate; `segments` selects segments, by default all. Auxiliary losses are additional roots of the
    backward pass. They are not part of the nll, and the gradients of parameters that only they train are
    clipped separately. `on_phase_end` is called at the end of each phase; after a forward pass, everything
    that the backward pass needs is stored.
    """
    done = on_phase_end or (lambda _: None)
    optimizer.zero_grad(set_to_none=True)
    device = batch.inputs.device
    total, scored = torch.zeros((), device=device), (batch.targets != IGNORED).sum()
    states = None
    for segment in segments or model.input_schedule.segments(batch.inputs.shape[1]):
        out = model(batch.inputs[:, segment], causal=causal, states=states)
        states, losses = out.states, out.aux_losses
        targets = batch.targets[:, segment].flatten()
        nll = F.cross_entropy(out.logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        del out  # backward needs only the log-probabilities; keeping the logits would waste memory
        done("forward")
        torch.autograd.backward([nll / scored, *(loss for loss in losses if loss.requires_grad)])
        total += nll.detach() / scored
        done("backward")
    for parameters in parameters_by_loss(model):
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)  # on fake tensors as on others
    optimizer.step()
    for layer in model.layers:
        if isinstance(layer, UpdatesAfterStep):
            layer.after_step()
    done("optimizer")
    return total


class Diverged(ArithmeticError):
    """The loss or the weights became NaN or infinite.
    `step` is the training step, which the message names."""

    def __init__(self, what: str, step: int, of: int | None) -> None:
        super().__init__(f"{what} at training step {step}{f' of {of}' if of else ''}")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of a training: a number of steps or, if `steps` is None, seconds of wall-clock time."""

    steps: int | None = None
    seconds: float = math.inf

    @classmethod
    def of(cls, measure: MeasureSpec, *, step_tokens: int, step_flops: int) -> Budget:
        """Return the budget of the measure; tokens and FLOPs are rounded up to whole steps.

        `step_flops` are the algorithmic FLOPs of the variant. Therefore a budget of FLOPs gives every variant
        the same amount of work by its own formula, independent of the FLOPs that its implementation executes.
        """
        if measure.train_budget == "seconds":
            return cls(seconds=measure.train_seconds)
        each = step_tokens if measure.train_budget == "tokens" else step_flops
        return cls(steps=max(1, math.ceil(measure.train_amount / each)))


class Training:
    """A model in training, with everything except the batch that its next step depends on.

    Random operations (dropout, hashing, redrawn features) use the global generators. Their state at a step
    follows from the seed of the weights, and a checkpoint restores it.
    """

    def __init__(
        self, model: LanguageModel, *, budget: Budget, learning_rate: float, causal: bool, step_tokens: int
    ) -> None:
        self.model, self.optimizer = model, optimizer_for(model, learning_rate)
        self.budget, self.learning_rate = budget, learning_rate
        self.causal, self.step_tokens = causal, step_tokens
        self.device = next(model.parameters()).device
        self.step, self.seconds, self.curve = 0, 0.0, Curve()

    @property
    def tokens(self) -> int:
        """Number of tokens processed."""
        return self.step * self.step_tokens

    @property
    def done(self) -> float:
        """Used share of the budget."""
        steps = self.budget.steps
        return self.seconds / self.budget.seconds if steps is None else self.step / steps

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        if self.budget.steps is not None:
            share = 1 / self.budget.steps
        else:
            share = self.done / self.step if self.step else FIRST_SHARE
        return self.learning_rate * learning_rate_factor(self.done, share)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": generator_states(self.device),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve.load_state_dict(state["curve"])
        restore_generators(state["generators"], self.device)

    def advance(self, batches: Callable[[int, float], Batch]) -> None:
        """Run one step. Raises Diverged if its loss is NaN or infinite."""
        begun, rate = time.perf_counter(), self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batches(self.step, self.done)
        nll = training_step(self.model, self.optimizer, batch, causal=self.causal).item()
        self.step += 1
        self.seconds += time.perf_counter() - begun
        if not math.isfinite(nll):
            raise Diverged(f"the loss became {nll}", self.step, self.budget.steps)
        self.curve.add(Row(self.step, self.seconds, rate, nll))

    def check(self) -> None:
        """Raise Diverged if the last update produced NaN or infinite weights."""
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()])
        if not finite.all():
            raise Diverged("the weights became NaN or infinite", self.step, self.budget.steps)


def train(
    model: LanguageModel,
    batches: Callable[[int, float], Batch],
    *,
    budget: Budget,
    learning_rate: float,
    causal: bool,
    step_tokens: int,
    checkpoints: CheckpointStore | None = None,
) -> Training:
    """Train until the budget is used; `batches(step, done)` returns each step's batch of `step_tokens`
    tokens.

    With `checkpoints`, resume from the newest checkpoint if it can be loaded, write checkpoints during
    training, and write the training curve even if training fails. Raises Diverged.
    """
    training = Training(
        model, budget=budget, learning_rate=learning_rate, causal=causal, step_tokens=step_tokens
    )
    if checkpoints and (state := checkpoints.read()):
        training.load_state_dict(state)
        print(f"{checkpoints.path}: training resumes after step {training.step}", file=sys.stderr)
    model.train()
    try:
        while training.done < 1:
            training.advance(batches)
            if checkpoints and checkpoints.is_due():
                checkpoints.write(training.state_dict(), training.curve, step_tokens)
        training.check()
    finally:
        if checkpoints and training.step:
            checkpoints.write_curve(training.curve, step_tokens)
    return training
