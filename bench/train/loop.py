"""One training step, and training on a budget: of tokens, of FLOPs or of seconds.

Counted budgets repeat to the bit on a CPU, killed and resumed or not. One of seconds does not: how many
steps it buys, and so the learning rate of each, is up to the clock.
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
from bench.train.checkpoints import Kept, generators, set_generators
from bench.train.loss_curve import Curve, Row

WARM_UP_SHARE = 0.1
FIRST_SHARE = 0.01
"""Share of a budget of seconds that the first step is taken to need: nobody knows yet."""
CLIP_NORM = 1.0


WEIGHT_DECAY = 0.1


def decayed_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The parameters that weight decay pulls to zero: matrices, i.e. the parameters of two dimensions or
    more that a module multiplies by and, as torch's modules do, calls its weight.

    Not decayed: biases, norms, embeddings, and what a module holds under another name: position tables,
    vectors for each head, mixtures over positions. A parameter shared with an embedding is an embedding.
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
    """AdamW (Loshchilov 2017, arXiv:1711.05101), fused: no temporaries the size of the model.

    Frozen parameters are left out; `decayed_parameters` says which of the others decay.
    """
    decayed = decayed_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(done: float, step_share: float) -> float:
    """Share of the learning rate in a step that takes `step_share` of the budget when `done` of it is spent:
    linear warm-up, then a cosine to a tenth."""
    if done < WARM_UP_SHARE:
        return min(1.0, (done + step_share) / WARM_UP_SHARE)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


Phase = Literal["forward", "backward", "optimizer"]


def parameters_by_loss(model: LanguageModel) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters that the task trains, and those that auxiliary losses alone do."""
    auxiliary = {parameter for layer in model.layers for parameter in layer.auxiliary_parameters()}
    both = list(model.parameters())
    return [p for p in both if p not in auxiliary], [p for p in both if p in auxiliary]


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    causal: bool,
    segments: Iterable[slice] | None = None,
    after: Callable[[Phase], None] | None = None,
) -> torch.Tensor:
    """Forward, backward, clip, update; returns the mean nll in nats, still on the device.

    A plan of segments goes forward and backward through each in turn, and the gradients add up;
    `segments` are those to go through, by default all. Auxiliary losses are further roots of the
    backward pass; they are not part of the nll, and what they alone train is clipped by itself.
    `after` is called at the end of each phase: after a forward pass, all that backward needs is stored.
    """
    done = after or (lambda _: None)
    optimizer.zero_grad(set_to_none=True)
    device = batch.inputs.device
    total, scored = torch.zeros((), device=device), (batch.targets != IGNORED).sum()
    states = None
    for segment in segments or model.plan.segments(batch.inputs.shape[1]):
        out = model(batch.inputs[:, segment], causal=causal, states=states)
        states, losses = out.states, out.aux_losses
        targets = batch.targets[:, segment].flatten()
        nll = F.cross_entropy(out.logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        del out  # backward reads the log-probabilities; the logits would only take room beside them
        done("forward")
        torch.autograd.backward([nll / scored, *(loss for loss in losses if loss.requires_grad)])
        total += nll.detach() / scored
        done("backward")
    for parameters in parameters_by_loss(model):
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    optimizer.step()
    for layer in model.layers:
        layer.after_step()
    done("optimizer")
    return total


class Diverged(ArithmeticError):
    """The training is no longer one of numbers; the message names the step, `step` has it."""

    def __init__(self, what: str, step: int, of: int | None) -> None:
        super().__init__(f"{what} at training step {step}{f' of {of}' if of else ''}")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a training may spend: whole steps or, where `steps` is None, seconds of wall clock."""

    steps: int | None = None
    seconds: float = math.inf

    @classmethod
    def of(cls, measure: MeasureSpec, *, step_tokens: int, step_flops: int) -> Budget:
        """As the measure has it; tokens and FLOPs are rounded up to whole steps.

        `step_flops` are the variant's algorithmic ones, so a budget of FLOPs buys every variant the same
        work by its own formula, whatever its implementation dispatches.
        """
        if measure.train_budget == "seconds":
            return cls(seconds=measure.train_seconds)
        each = step_tokens if measure.train_budget == "tokens" else step_flops
        return cls(steps=max(1, math.ceil(measure.train_amount / each)))


class Training:
    """A model in training, and all that its next step depends on besides the batch.

    Randomness (dropout, hashing, redrawn features) is the global generators': what they were at a step
    follows from the seed of the weights, and a checkpoint restores them.
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
        """Tokens seen."""
        return self.step * self.step_tokens

    @property
    def done(self) -> float:
        """Share of the budget that is spent."""
        steps = self.budget.steps
        return self.seconds / self.budget.seconds if steps is None else self.step / steps

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        if self.budget.steps is not None:
            share = 1 / self.budget.steps
        else:
            share = self.done / self.step if self.step else FIRST_SHARE
        return self.learning_rate * schedule(self.done, share)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": generators(self.device),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve.load_state_dict(state["curve"])
        set_generators(state["generators"], self.device)

    def advance(self, batches: Callable[[int, float], Batch]) -> None:
        """One step. Raises Diverged where its loss is NaN or infinite."""
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
        """Raises Diverged where the last update left weights that are no numbers."""
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
    kept: Kept | None = None,
) -> Training:
    """Train until the budget is spent; `batches(step, done)` gives each step's batch of `step_tokens`.

    With `kept`, go on from the checkpoint there, if there is one that can be taken up, write checkpoints
    on the way, and leave the curve of what was trained, however it ends. Raises Diverged.
    """
    training = Training(
        model, budget=budget, learning_rate=learning_rate, causal=causal, step_tokens=step_tokens
    )
    if kept and (state := kept.read()):
        training.load_state_dict(state)
        print(f"{kept.path}: training goes on after step {training.step}", file=sys.stderr)
    model.train()
    try:
        while training.done < 1:
            training.advance(batches)
            if kept and kept.due():
                kept.write(training.state_dict(), training.curve, step_tokens)
        training.check()
    finally:
        if kept and training.step:
            kept.write_curve(training.curve, step_tokens)
    return training
