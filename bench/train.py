"""One training step, and training for a fixed number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from bench.model import LanguageModel
from bench.tasks.base import IGNORED, Batch

WARM_UP_SHARE = 0.1
CLIP_NORM = 1.0


def optimizer_for(model: LanguageModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2017, arXiv:1711.05101), fused: no temporaries the size of the model."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine to a tenth."""
    warm_up = max(1, round(steps * WARM_UP_SHARE))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


Phase = Literal["forward", "backward", "optimizer"]


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    causal: bool,
    segments: Sequence[slice] | None = None,
    after: Callable[[Phase], None] | None = None,
) -> torch.Tensor:
    """Forward, backward, clip, update; returns the mean nll in nats, still on the device.

    A plan of segments goes forward and backward through each in turn, and the gradients add up;
    `segments` are those to go through, by default all. Auxiliary losses are further roots of the
    backward pass; they are not part of the nll. `after` is called at the end of each phase: after a
    forward pass, all that backward needs is stored.
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
        torch.autograd.backward([nll / scored, *losses])
        total += nll.detach() / scored
        done("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    for layer in model.layers:
        layer.after_step()
    done("optimizer")
    return total


class Diverged(ArithmeticError):
    """The loss is no longer a number; the message names the step."""


def train(
    model: LanguageModel,
    batches: Callable[[int], Batch],
    *,
    tokens: int,
    learning_rate: float,
    causal: bool,
) -> int:
    """Train on ⌈tokens / (B·T)⌉ batches; `batches(step)` gives each. Returns the tokens seen.

    Raises Diverged where the loss becomes NaN or infinite.
    """
    optimizer = optimizer_for(model, learning_rate)
    model.train()
    size = batches(0).inputs.numel()
    steps = max(1, math.ceil(tokens / size))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        nll = training_step(model, optimizer, batches(step), causal=causal)
        if not math.isfinite(nll.item()):
            raise Diverged(f"the loss became {nll.item()} at training step {step + 1} of {steps}")
    return steps * size
