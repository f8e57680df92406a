"""Sequences that a recurrent cell of state vectors reads block by block (see `state_cell`).

Shapes: B batch, S state vectors, C channels, K heads of keys, D channels of a head, W tokens of a block,
n blocks. A state is (B, S, C), in float32 or wider.

Saved are the inputs and the states between blocks; the backward pass computes each step again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.segments.state_cell import keys_and_values, next_state, read_backward, step_backward
from variants.ops.segments.state_weights import Weights


def states_of(c: Tensor, k: Tensor, v: Tensor, weights: Weights, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The states (n + 1, B, S, C) before each block and after the last, and their keys and values
    (B, n + 1, K, S, D), from the first state and the keys and values (B, K, n·W, D); without gradients."""
    count = k.shape[2] // block
    states = c.new_empty(count + 1, *c.shape)
    states[0] = c
    of_states = len(k), count + 1, k.shape[1], c.shape[1], k.shape[3]
    keys, values = k.new_empty(of_states), k.new_empty(of_states)
    for i in range(count):
        tokens = slice(i * block, (i + 1) * block)
        read = keys[:, i], values[:, i]
        states[i + 1] = next_state(states[i], k[:, :, tokens], v[:, :, tokens], weights, read)
    keys[:, count], values[:, count] = keys_and_values(states[count], weights, k.shape[1])
    return states, keys, values


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: int, inner: int, initial: Tensor, k: Tensor, v: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor]:
        first = initial.expand(len(k), -1, -1)
        states, keys, values = states_of(first, k, v, Weights._make((*flat, inner)), block)
        ctx.block, ctx.inner = block, inner
        ctx.save_for_backward(states, k, v, *flat)
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        states, k, v, *flat = ctx.saved_tensors
        weights, count = Weights._make((*flat, ctx.inner)), len(states) - 1
        totals = weights.zeros(states.dtype)
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        d_state = read_backward(states[count], weights, (d_keys[:, count], d_values[:, count]), totals)
        for i in reversed(range(count)):
            tokens = slice(i * ctx.block, (i + 1) * ctx.block)
            d_state = step_backward(
                states[i],
                k[:, :, tokens],
                v[:, :, tokens],
                weights,
                d_state,
                (d_keys[:, i], d_values[:, i]),
                (d_k[:, :, tokens], d_v[:, :, tokens]),
                totals,
            )
        d_weights = (t if t is None else t.to(w.dtype) for t, w in zip(totals[:-1], flat, strict=True))
        return None, None, d_state.sum(0), d_k, d_v, *d_weights


def scan(initial: Tensor, k: Tensor, v: Tensor, weights: Weights, block: int) -> tuple[Tensor, Tensor]:
    """The keys and values (B, n + 1, K, S, D) of the states before each block, and after the last.

    The initial state (S, C) is the same for all sequences, in float32 or wider. The keys and values
    (B, K, n·W, D) of n full blocks of W tokens have the dtype of the matrices. Only the states are saved.
    """
    *tensors, inner = weights
    found: tuple[Tensor, Tensor] = _Scan.apply(block, inner, initial, k, v, *tensors)  # type: ignore[no-untyped-call]
    return found
