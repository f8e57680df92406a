"""A recurrent layer with gates that reads a sequence in both directions (Hochreiter & Schmidhuber 1997, Long
Short-Term Memory, with the forget gate of Gers 2000, Learning to Forget; both directions: Graves &
Schmidhuber 2005).

Shapes: B batch, n vectors of a sequence, C channels, H channels of the state of a direction.

    i, f, o = σ(W x[t] + U h[t−1] + b)     g = tanh(the same, with weights of its own)
    c[t] = f c[t−1] + i g                   h[t] = o tanh(c[t])

It is written out: into torch's own, which is one kernel, neither FLOP counters nor the compiler can see. Both
directions are one batch of products, so there are n steps of about ten operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GATES = 4


class BidirectionalLSTM(nn.Module):
    """(B, n, C) → (B, n, 2H): the states of both directions side by side."""

    def __init__(self, d_model: int, state: int) -> None:
        super().__init__()
        self.read = nn.Linear(d_model, 2 * GATES * state)
        self.recur = nn.Parameter(torch.empty(2, state, GATES * state).uniform_(-1, 1) / state**0.5)
        with torch.no_grad():  # at first the state is kept (Gers 2000)
            self.read.bias.zero_().view(2, GATES, state)[:, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """See the class. States are summed in float32 at least."""
        forward, backward = self.read(x).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)  # (n, B, 4H) each
        steps = torch.stack([forward, backward.flip(0)], dim=1)  # (n, 2, B, 4H)
        c = torch.zeros_like(steps[0].chunk(GATES, -1)[0], dtype=torch.promote_types(x.dtype, torch.float32))
        h, states = c, []
        for step in steps:
            gates = (step + h @ self.recur).to(c.dtype)
            (i, f, o), g = (
                gates[..., : -c.shape[-1]].sigmoid().chunk(3, -1),
                gates[..., -c.shape[-1] :].tanh(),
            )
            c = f * c + i * g
            h = o * c.tanh()
            states.append(h)
        forward, backward = torch.stack(states, dim=2).unbind()  # (B, n, H) each
        return torch.cat([forward, backward.flip(1)], dim=-1)

    @staticmethod
    def flops(vectors: int, d_model: int, state: int) -> tuple[int, int]:
        """FLOPs of the products of `vectors` in all: with the input, and with the states."""
        return 2 * vectors * d_model * 2 * GATES * state, 2 * vectors * 2 * GATES * state**2
