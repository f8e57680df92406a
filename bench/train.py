"""One training step, and training for a fixed number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from bench.model import LanguageModel
from bench.tasks.text import IGNORED, Batch

WARM_UP_SHARE = 0.1
CLIP_NORM = 1.0


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype`, parameters and sums in float32; float32 throughout needs nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


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


def loss_of(model: LanguageModel, batch: Batch, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood in nats of the scored targets, and the same plus auxiliary losses."""
    out = model(batch.inputs, causal=causal)
    nll = F.cross_entropy(out.logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    return nll, nll if out.aux_loss is None else nll + out.aux_loss


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    causal: bool,
    dtype: torch.dtype = torch.float32,
    after_forward: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Forward, backward, clip, update; returns the mean nll in nats, still on the device.

    `after_forward` is called between the passes, when all that backward needs is stored.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(batch.inputs.device, dtype):
        nll, loss = loss_of(model, batch, causal=causal)
    if after_forward:
        after_forward()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    for layer in model.layers:
        layer.after_step()
    return nll.detach()


class Diverged(ArithmeticError):
    """The loss is no longer a number; the message names the step."""


def train(
    model: LanguageModel,
    batches: Callable[[int], Batch],
    *,
    tokens: int,
    learning_rate: float,
    causal: bool,
    dtype: torch.dtype,
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
        nll = training_step(model, optimizer, batches(step), causal=causal, dtype=dtype)
        if not math.isfinite(nll.item()):
            raise Diverged(f"the loss became {nll.item()} at training step {step + 1} of {steps}")
    return steps * size
