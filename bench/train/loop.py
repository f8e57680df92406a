"""Training with a budget of tokens, FLOPs or seconds, or with several budgets at once.

With a budget of tokens or FLOPs, training is reproducible to the bit on a CPU, even if it is killed and
resumed. With a budget of seconds it is not, because the number of steps, and therefore the learning rate of
each step, depends on the clock.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from bench.model.language_model import LanguageModel
from bench.tasks.base import Batch
from bench.train.checkpoints import CheckpointStore, generator_states, restore_generators
from bench.train.loss_curve import Curve, Row
from bench.train.schedule import FIRST_SHARE, Budget, cosine_factor, decay_start
from bench.train.step import optimizer_for, training_step


class Diverged(ArithmeticError):
    """The loss or the weights became NaN or infinite.
    `step` is the training step, which the message names."""

    def __init__(self, what: str, step: int, of: int | None) -> None:
        super().__init__(f"{what} at training step {step}{f' of {of}' if of else ''}")
        self.step = step


class Training:
    """A model in training, with everything except the batch that its next step depends on.

    Random operations (dropout, hashing, redrawn features) use the global generators. Their state at a step
    follows from the seed of the weights, and a checkpoint restores it.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: Budget,
        learning_rate: float,
        causal: bool,
        step_tokens: int,
        carry_state: bool = False,
    ) -> None:
        """`carry_state`: each step starts from the states that the previous step returned; its batch must
        continue that of the previous step, row by row."""
        self.model, self.optimizer = model, optimizer_for(model, learning_rate)
        self.budget, self.learning_rate = budget, learning_rate
        self.causal, self.step_tokens, self.carry_state = causal, step_tokens, carry_state
        self.device = next(model.parameters()).device
        self.step, self.seconds, self.curve = 0, 0.0, Curve()
        self.states: list[Any] | None = None
        self.results: list[float] = []
        """Results of the smaller budgets, each as soon as it is known."""
        self.validations: list[list[float]] = []
        """[tokens, nll on the validation split] at equal distances."""
        self.trunk: dict[str, Any] | None = None
        """In the branch of a smaller budget: the state to which training then returns."""

    @property
    def tokens(self) -> int:
        """Number of tokens processed."""
        return self.step * self.step_tokens

    @property
    def done(self) -> float:
        """Used share of the largest budget."""
        steps = self.budget.steps
        return self.seconds / self.budget.seconds if steps is None else self.step / steps

    @property
    def end(self) -> int | None:
        """Steps of the budget that training is on its way to; None if it is counted in seconds."""
        return None if self.budget.steps is None else self.budget.all_steps[len(self.results)]

    @property
    def is_at_branch(self) -> bool:
        """Whether the next step is the first of the decay for a smaller budget."""
        if self.trunk is not None or self.end is None or self.end == self.budget.steps:
            return False
        return self.step == decay_start(self.end)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        if self.budget.is_wsd and self.end is not None:
            return self.learning_rate * self.budget.wsd_factor(self.step, self.end)
        if self.budget.steps is not None:
            share = 1 / self.budget.steps
        else:
            share = self.done / self.step if self.step else FIRST_SHARE
        return self.learning_rate * cosine_factor(self.done, share)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": generator_states(self.device),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve.state_dict(),
            "states": None if self.states is None else tree_leaves(self.states),
            "results": self.results,
            "validations": self.validations,
            "trunk": self.trunk,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve.load_state_dict(state["curve"])
        self.states = None if state["states"] is None else self._states(state["states"])
        self.results, self.trunk = list(state["results"]), state["trunk"]
        self.validations = list(state["validations"])
        restore_generators(state["generators"], self.device)

    def _states(self, leaves: list[Any]) -> list[Any]:
        """Return the states with these leaves; their structure is that of the states after one token."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            structure = tree_structure(self.model(token, causal=self.causal).states)
        moved = [leaf.to(self.device) if torch.is_tensor(leaf) else leaf for leaf in leaves]
        return tree_unflatten(moved, structure)  # type: ignore[no-any-return]

    def advance(self, batches: Callable[[int, float], Batch]) -> None:
        """Run one step, which may be the first of a branch.
        Raises Diverged if its loss is NaN or infinite."""
        if self.is_at_branch:
            self.trunk = deepcopy(self.state_dict())
        begun, rate = time.perf_counter(), self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batches(self.step, self.done)
        out = training_step(self.model, self.optimizer, batch, causal=self.causal, states=self.states)
        nll = out.nll.item()
        if self.carry_state:
            self.states = out.states
        self.step += 1
        self.seconds += time.perf_counter() - begun
        if not math.isfinite(nll):
            raise Diverged(f"the loss became {nll}", self.step, self.budget.steps)
        self.curve.add(Row(self.step, self.seconds, rate, nll))

    def end_branch(self, result: float) -> None:
        """Keep the result of a smaller budget, and return to the trunk."""
        assert self.trunk is not None
        trunk, self.trunk = self.trunk, None
        self.load_state_dict({**trunk, "results": [*self.results, result]})

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
    carry_state: bool = False,
    checkpoints: CheckpointStore | None = None,
    evaluate: Callable[[], float] | None = None,
    validate: Callable[[], float] | None = None,
    validations: int = 0,
) -> Training:
    """Train until the budget is used; `batches(step, done)` returns each step's batch of `step_tokens`
    tokens.

    `evaluate` returns the result of the model at the end of a smaller budget; `validate` is called
    `validations` times, at equal shares of the budget. Neither may change the model or the state of the
    random generators.

    With `checkpoints`, resume from the newest checkpoint if it can be loaded, write checkpoints during
    training, and write the training curve even if training fails. Raises Diverged.
    """
    training = Training(
        model,
        budget=budget,
        learning_rate=learning_rate,
        causal=causal,
        step_tokens=step_tokens,
        carry_state=carry_state,
    )
    if checkpoints and (state := checkpoints.read()):
        training.load_state_dict(state)
        print(f"{checkpoints.path}: training resumes after step {training.step}", file=sys.stderr)
    model.train()
    try:
        while training.done < 1:
            training.advance(batches)
            if training.trunk is not None and training.step == training.end:
                training.end_branch(evaluate() if evaluate else math.nan)
                model.train()
            elif training.trunk is None and int(training.done * validations) > len(training.validations):
                assert validate is not None
                training.validations.append([training.tokens, validate()])
                model.train()
            if checkpoints and checkpoints.is_due():
                checkpoints.write(training.state_dict(), training.curve, step_tokens)
        training.check()
    finally:
        if checkpoints and training.step:
            checkpoints.write_curve(training.curve, step_tokens)
    return training
