"""The weights of a recurrent cell of state vectors (see `state_cell`).

Shapes: S state vectors, C channels, H heads of queries, K heads of keys, D channels of a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from variants.base import Dims
from variants.ops.projections import Projections


class Weights(NamedTuple):
    """The weights of a cell."""

    scale: Tensor
    """(C,)"""
    identity: Tensor
    """(S, C)"""
    project: Tensor
    """W (Q + 2·K·D, C): queries, keys and values; Q is 2·H·D, or H·D if tied."""
    update: Tensor
    """U (C, Q)"""
    bias: Tensor
    """u (C,)"""
    gate: Tensor
    """b (C,) of the fixed gate, or b_f and b_i (2·C,) of the LSTM gate."""
    gates: Tensor | None
    """F_f and F_i (2·C, Q) of the LSTM gate."""
    inner: int
    """H·D."""

    @property
    def queries(self) -> int:
        """Q."""
        return self.update.shape[1]

    @property
    def tied(self) -> bool:
        """Whether both kinds of attention have the same queries, and the same part of U."""
        return self.queries == self.inner

    def zeros(self, dtype: torch.dtype) -> Weights:
        """Sums of gradients."""
        tensors = (t if t is None else torch.zeros_like(t, dtype=dtype) for t in self[:-1])
        return Weights._make((*tensors, self.inner))


class StateCell(nn.Module):
    """The parameters of a cell. The initial values of those that are no matrices are the authors'.

    A tied cell has no matrices but those of the LSTM gate: it uses the projections of tokens.
    """

    def __init__(self, dims: Dims, states: int, gate: Literal["fixed", "lstm"], *, tied: bool) -> None:
        super().__init__()
        width, self._inner = dims.d_model, dims.inner_dim
        queries = self._inner if tied else 2 * self._inner
        self.initial = nn.Parameter(0.1 * torch.randn(states, width))
        self.identity = nn.Parameter(torch.randn(states, width))
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        if gate == "fixed":
            self.gate = nn.Parameter(0.1 * torch.randn(width))
        else:
            self.gates = nn.Linear(queries, 2 * width)
            nn.init.normal_(self.gates.bias, std=0.1)
        if not tied:
            self.project = nn.Linear(width, queries + 2 * dims.key_dim, bias=False)
            self.update = nn.Linear(queries, width, bias=False)
        self.is_fixed, self.is_tied = gate == "fixed", tied

    def start(self, dtype: torch.dtype) -> Tensor:
        """The initial state (S, C), in float32 or wider."""
        return self.initial.to(torch.promote_types(dtype, torch.float32))

    def matrices(self, tokens: Projections) -> tuple[Tensor, Tensor]:
        """W and U; `tokens` are the projections of tokens."""
        owner = (tokens.qkv, tokens.out) if self.is_tied else (self.project, self.update)
        return owner[0].weight, owner[1].weight

    def weights(self, tokens: Projections, dtype: torch.dtype) -> Weights:
        """Matrices in the dtype of the keys, vectors that multiply the state in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        project, update = self.matrices(tokens)
        return Weights(
            scale=self.scale.to(wide),
            identity=self.identity.to(wide),
            project=project.to(dtype),
            update=update.to(dtype),
            bias=self.bias.to(dtype),
            gate=self.gate.to(wide) if self.is_fixed else self.gates.bias.to(dtype),
            gates=None if self.is_fixed else self.gates.weight.to(dtype),
            inner=self._inner,
        )
