"""Tokens sorted by expert, and linear maps of which each expert has its own.

Shapes: N tokens, k experts of a token, so N·k assignments; R rows; E experts; C and D channels in and out.

Rows are assignments in the order of their experts. How many rows an expert has depends on the tokens; the
shapes do not. No expert's rows are padded, so that FLOPs are those of the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.fused.backends import note_work


class Rows(NamedTuple):
    """Which assignment is in which row."""

    assignments: Tensor
    """(R,) the assignment of each row: token · k + number of the choice."""
    rows: Tensor
    """(N, k) the row of each assignment; any row if the assignment was dropped."""
    ends: Tensor
    """(E,) the row after the last one of each expert. Rows from ends[-1] on belong to no expert."""
    kept: Tensor | None
    """(N, k) False for assignments that were dropped; None if none were."""


def sorted_by_expert(experts: Tensor, n_experts: int, kept: Tensor | None, rows: int) -> Rows:
    """Sort assignments (N, k) to experts; of one expert, the order is kept. `rows` is the number of rows, at
    least the number of assignments with `kept` (N, k)."""
    keys = (experts if kept is None else torch.where(kept, experts, n_experts)).flatten()
    assignments = torch.argsort(keys, stable=True)
    places = torch.empty_like(assignments)
    places = places.scatter(0, assignments, torch.arange(len(keys), device=keys.device))
    every = torch.arange(n_experts, device=keys.device)
    ends = torch.searchsorted(keys[assignments], every, right=True)
    places = places.clamp(max=rows - 1).view_as(experts)
    return Rows(assignments[:rows], places, ends, kept)


def within_capacity(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """(B, T, k) experts → (B, T, k) bool: whether fewer than `capacity` earlier assignments of the same
    sequence have the same expert. Of one token, the first choice is the earliest."""
    batch, tokens, k = experts.shape
    flat = experts.reshape(batch, tokens * k, 1)
    is_same = flat == torch.arange(n_experts, device=experts.device)
    numbers = is_same.cumsum(dim=1, dtype=torch.int32).gather(2, flat)
    return (numbers <= capacity).view_as(experts)


class _ToRows(torch.autograd.Function):
    """x (N, C) → (R, C). The gradient of a token is a sum over its k rows: a gather, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, assignments: Tensor, rows: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, kept)
        return x[assignments // rows.shape[1]]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, kept = ctx.saved_tensors
        of_choices = dy[rows]
        if kept is not None:
            of_choices = torch.where(kept[..., None], of_choices, 0)
        return of_choices.sum(1), None, None, None


class _FromRows(torch.autograd.Function):
    """y (R, D) → (N, k, D). The gradients of assignments that were dropped must be 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, assignments: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(assignments)
        return y[rows]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (assignments,) = ctx.saved_tensors
        return dy.flatten(0, 1)[assignments], None, None


def to_rows(x: Tensor, rows: Rows) -> Tensor:
    """The input of each row: (N, C) → (R, C)."""
    result: Tensor = _ToRows.apply(x, rows.assignments, rows.rows, rows.kept)  # type: ignore[no-untyped-call]
    return result


def from_rows(y: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """The sum of a token's rows (R, D), weighted by `gates` (N, k): → (N, D). What was dropped counts 0."""
    if rows.kept is not None:
        gates = torch.where(rows.kept, gates, 0)
    chosen: Tensor = _FromRows.apply(y, rows.assignments, rows.rows)  # type: ignore[no-untyped-call]
    return (chosen * gates[..., None]).sum(1)


# --- products --------------------------------------------------------------------------------------


@torch.library.custom_op("longctx_bench::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_r W_eᵀ with the weight of the row's expert: (R, C), (E, D, C), (E,) → (R, D); 0 in rows of no expert.

    One operator, because the sizes of the products depend on content. On an accelerator it waits for `ends`.
    Its FLOPs are counted as if every row had an expert, its launches by `multiply`.
    """
    y = x.new_empty(len(x), weight.shape[1])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(x[begin:end], weight[expert].T, out=y[begin:end])
        begin = end
    y[begin:].zero_()
    return y


@torch.library.custom_op("longctx_bench::expert_outer", mutates_args=())
def expert_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Σ_r dy_r x_rᵀ over the rows of each expert: (R, D), (R, C), (E,) → (E, D, C)."""
    total = x.new_empty(len(ends), dy.shape[1], x.shape[1])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(dy[begin:end].T, x[begin:end], out=total[expert])
        begin = end
    return total


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@expert_outer.register_fake
def _(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    note_work(0, (needs_x + needs_weight) * (len(weight) - 1), 0)
    dx = expert_linear(dy, weight.mT, ends) if needs_x else None
    return dx, expert_outer(dy, x, ends) if needs_weight else None, None


expert_linear.register_autograd(_linear_backward, setup_context=_save)


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`expert_linear`, which counters take as one launch, and its other launches: one for each expert."""
    note_work(0, len(weight) - 1, 0)
    y: Tensor = expert_linear(x, weight, ends)
    return y


@register_flop_formula(torch.ops.longctx_bench.expert_linear)
def _linear_flops(x: Any, weight: Any, ends: Any, out_shape: Any = None) -> int:
    return int(2 * x[0] * weight[1] * weight[2])


@register_flop_formula(torch.ops.longctx_bench.expert_outer)
def _outer_flops(dy: Any, x: Any, ends: Any, out_shape: Any = None) -> int:
    return int(2 * x[0] * dy[1] * x[1])
