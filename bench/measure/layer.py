"""One attention layer outside of a model: its forward and backward pass, as in training.

Shapes: B batch, T tokens, C channels (d_model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from variants.base import Context, SequenceMixer
from variants.input_schedule import NetworkOut


def step(
    layer: SequenceMixer,
    x: Tensor,
    *,
    causal: bool,
    dtype: torch.dtype = torch.float32,
    direction: Tensor | None = None,
    keep: Callable[[Tensor, Tensor | None], None] = lambda y, gradient: None,
) -> None:
    """Run forward and backward of each segment in order, with gradients of x (B, T, C) and the parameters.

    The forward pass runs under autocast if `dtype` is lower than float32, as in a model. `direction`
    (B, T, C) is the gradient of the outputs; by default it is 1. `keep` receives the outputs and
    the gradient of the inputs of each segment. The gradients of the parameters are in `layer`.
    """
    schedule, state, ctx = layer.input_schedule(layer.config), None, Context(causal=causal)
    layer.zero_grad(set_to_none=True)

    def network(window: Tensor, state: Any) -> NetworkOut:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = layer(window, ctx, state)
        return NetworkOut(out.y, out.state, () if out.aux_loss is None else (out.aux_loss,))

    for segment in schedule.segments(x.shape[1]):
        window = x[:, segment].detach().requires_grad_()
        y, state, losses, _ = schedule.apply(network, window, state, causal=causal)
        trained = [loss for loss in losses if loss.requires_grad]
        towards = torch.ones_like(y) if direction is None else direction[:, segment].to(y)
        torch.autograd.backward([y, *trained], [towards, *(None for _ in trained)])
        keep(y.detach(), window.grad)
        del window


def outcome(
    layer: SequenceMixer, x: Tensor, direction: Tensor, *, causal: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Return the outputs, the gradients of x and the gradient of every trained parameter, with the same
    random numbers in every call."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep(y: Tensor, gradient: Tensor | None) -> None:
        outputs.append(y)
        gradients.append(torch.zeros_like(y) if gradient is None else gradient)

    torch.manual_seed(1)
    step(layer, x, causal=causal, dtype=dtype, direction=direction, keep=keep)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    of_parameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return [torch.cat(outputs, 1), torch.cat(gradients, 1), *of_parameters]


def relative_errors(got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Return the error of the outputs and the largest error of a gradient, each relative to the norm of the
    tensor.

    The Frobenius norm is used, because a single selection that rounding changes (a hash, a cluster) is not an
    error of a kernel. A gradient whose norm is below a thousandth of the largest is compared with that.
    """
    errors = [(a.double() - b.double()).norm().item() for a, b in zip(got, want, strict=True)]
    norms = [b.double().norm().item() for b in want]
    least = 1e-3 * max(norms[1:])
    of_gradients = [
        error / max(norm, least, 1e-30) for error, norm in zip(errors[1:], norms[1:], strict=True)
    ]
    return errors[0] / max(norms[0], 1e-30), max(of_gradients)
