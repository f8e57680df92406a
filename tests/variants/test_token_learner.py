"""TokenLearner against sums that are written out token by token."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from test_depth_lengths import hidden, model_of, run
from torch import Tensor
from torch.nn import functional as F

from variants.base import Context


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("tokens", [9, 1])
def test_learnt_tokens_are_weighted_means_that_return_to_all_positions(
    gate: Literal["sigmoid", "softmax"], tokens: int
) -> None:
    """Outputs, and gradients of the input."""
    model, x = model_of("token_learner", tokens, knobs={"gate": gate}), hidden(tokens).requires_grad_()
    path: Any = model.path

    def visit(begin: int, end: int, x: Tensor) -> Tensor:
        for place in range(begin, end):
            x = model.visits[place](x, None, Context(causal=False)).x
        return x

    def numbers(gates: Any, x: Tensor) -> Tensor:
        """(T, S) of one sequence."""
        return F.gelu(gates.norm(x) @ gates.down.weight.T) @ gates.up.weight.T

    full = visit(0, 2, x)
    rows = []
    for sequence in full:
        of = numbers(path.pool, sequence)
        weights = of.softmax(0) if gate == "softmax" else of.sigmoid() / tokens
        rows.append(torch.stack([(weights[:, s, None] * sequence).sum(0) for s in range(4)]))
    learnt = visit(2, 4, torch.stack(rows))
    out = []
    for sequence, z in zip(full, learnt, strict=True):
        mixed = path.out.weight @ path.norm(z)
        weights = numbers(path.spread, sequence).sigmoid()
        out.append(torch.stack([sequence[t] + weights[t] @ mixed for t in range(tokens)]))
    want, got = torch.stack(out), run(model, x, causal=False)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)
