"""A recurrent layer with gates that reads a sequence in both directions (Hochreiter & Schmidhuber 1997, Long
Short-Term Memory, with the forget gate of Gers 2000, Learning to Forget; both directions: Graves &
Schmidhuber 2005).

Shapes: B batch, n vectors of a sequence, C channels, H channels of the state of a direction. The directions
are a dimension of 2, of which the second reads from the end.

    i, f, o = σ(W x[t] + U h[t−1] + b)     g = tanh(the same, with weights of its own)
    c[t] = f c[t−1] + i g                   h[t] = o tanh(c[t])

It is written out: into torch's own, which is one kernel, neither FLOP counters nor the compiler can see. Both
directions are one batch of products, so there are n steps of seven operations. Gates and states are float32
at least, also under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable

GATES = 4
STEPS = 64
"""Steps that a plan goes through as one: it repeats what the first of them cost."""


@repeatable
def _steps(z: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> None:
    """Turn the inputs in z (k, 2, B, 4H) into gates, and write all states h and c (k + 1, 2, B, H) but the
    first, which is given."""
    for t, gates in enumerate(z):
        gates.baddbmm_(h[t], weight)
        gates[..., : -h.shape[-1]].sigmoid_()
        gates[..., -h.shape[-1] :].tanh_()
        i, f, o, g = gates.chunk(GATES, -1)
        torch.addcmul(f * c[t], i, g, out=c[t + 1])
        torch.mul(o, c[t + 1].tanh(), out=h[t + 1])


@repeatable
def _steps_back(
    z: Tensor, c: Tensor, weight: Tensor, d_states: Tensor, dh: Tensor, dc: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gates z, the cells c (k + 1, 2, B, H), the gradients d_states of k states and those that later
    steps give the last one: write dz, return the gradients of the state before the first step."""
    for t in reversed(range(len(z))):
        i, f, o, g = z[t].chunk(GATES, -1)
        squashed, dh = c[t + 1].tanh(), dh + d_states[t]
        dc = torch.addcmul(dc, dh * o, 1 - squashed * squashed)
        of_i, of_f = dc * g * i * (1 - i), dc * c[t] * f * (1 - f)
        of_o, of_g = dh * squashed * o * (1 - o), dc * i * (1 - g * g)
        torch.cat([of_i, of_f, of_o, of_g], -1, out=dz[t])
        dh, dc = torch.bmm(dz[t], weight.transpose(1, 2)), dc * f
    return dh, dc


class _Recurrence(torch.autograd.Function):
    """Inputs of the gates (n, 2, B, 4H) and U (2, H, 4H) → states (n, 2, B, H)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        gates, total = inputs.clone(), len(inputs)
        h, c = (inputs.new_zeros(total + 1, *inputs.shape[1:3], weight.shape[1]) for _ in range(2))
        for t in range(0, total, STEPS):
            end = min(t + STEPS, total)
            _steps(gates[t:end], h[t : end + 1], c[t : end + 1], weight)
        ctx.save_for_backward(gates, h, c, weight)
        return h[1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor, Tensor]:
        gates, h, c, weight = ctx.saved_tensors
        d_inputs = torch.empty_like(gates)
        dh = dc = torch.zeros_like(c[0])
        for t in reversed(range(0, len(gates), STEPS)):
            end = min(t + STEPS, len(gates))
            pieces = gates[t:end], c[t : end + 1], weight, d_states[t:end], dh, dc, d_inputs[t:end]
            dh, dc = _steps_back(*pieces)
        before, given = (each.transpose(0, 1).flatten(1, 2) for each in (h[:-1], d_inputs))
        return d_inputs, torch.bmm(before.transpose(1, 2), given)


class BidirectionalLSTM(nn.Module):
    """(B, n, C) → (B, n, 2H): the states of both directions side by side."""

    def __init__(self, d_model: int, state: int) -> None:
        super().__init__()
        self.read = nn.Linear(d_model, 2 * GATES * state)
        self.recur = nn.Parameter(torch.empty(2, state, GATES * state).uniform_(-1, 1) / state**0.5)
        with torch.no_grad():  # at first the state is kept (Gers 2000)
            self.read.bias.zero_().view(2, GATES, state)[:, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        forward, backward = self.read(x).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)  # (n, B, 4H) each
        inputs = torch.stack([forward, backward.flip(0)], dim=1).to(self.recur.dtype)
        with torch.autocast(x.device.type, enabled=False):
            states: Tensor = _Recurrence.apply(inputs, self.recur)  # type: ignore[no-untyped-call]
        forward, backward = states.permute(1, 2, 0, 3)  # (B, n, H) each
        return torch.cat([forward, backward.flip(1)], dim=-1)

    @staticmethod
    def flops(vectors: int, d_model: int, state: int) -> tuple[int, int]:
        """FLOPs of the products of `vectors` in all: with the input, and with the states."""
        return 2 * vectors * d_model * 2 * GATES * state, 2 * vectors * 2 * GATES * state**2
