"""One softmax over the keys of several calls of flash attention, merged by their logsumexp.

*Untried*: no device has run the CUDA kernels from here yet.

Shapes: B batch, T tokens, H heads, D channels of a head; (B, T, H, …) for tensors of a whole sequence.

Each pair (query, key) belongs to one call. The backward pass gives each call the outputs and the logsumexp of
the merged softmax, as ring attention does (Liu 2023, arXiv:2310.01889). So only q, k, v, y and lse are saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.fused.flash import Packing, Window, flash_backward, flash_forward
from variants.ops.patterns.strided_parts import StridedTokens

EMPTY = -1e30
"""The logsumexp over no keys while calls are merged: finite, so that the difference of two is not NaN."""


class Call(ABC):
    """One launch of the kernel: some queries, and the keys that they read.

    `rows` of the queries have the shape (B, …, H, …): first the batch, then the tokens, the heads, and what
    follows in the tensor.
    """

    whole: bool
    """Whether the rows are all tokens and heads in order, and each query has a key."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """The rows of the queries of x (B, T, H, …): a view, or a copy that `put` writes back."""

    @abstractmethod
    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write changed rows into x (B, T, H, …) if they are a copy."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of outputs and logsumexp from q, k and v (B, T, H, D)."""

    @abstractmethod
    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, totals: Totals
    ) -> Tensor:
        """Return the rows of the gradient of q; add the gradients of k and v to the totals. All tensors are
        (B, T, H, …), and y and lse are those of the merged softmax."""


@dataclass
class Totals:
    """Sums of gradients of keys and values, each (B, T, H, D)."""

    like: Tensor
    """A tensor of their shape and dtype."""
    sums: list[Tensor] | None = None
    """Of k and of v; None: zeros."""
    copies: list[Tensor] | None = None
    """For the keys that several sequences have copies of, of k and of v, float32: (B, pairs, D)."""

    def add(self, rows: Sequence[Tensor], complete: bool, view: Callable[[Tensor], Tensor]) -> None:
        """Add rows of k and of v, in the place that `view` selects in (B, T, H, D). `complete`: the rows are
        all tokens in order."""
        if self.sums is None and complete:
            self.sums = list(rows)
            return
        for total, grad in zip(self.get(), rows, strict=True):
            view(total).add_(grad)

    def get(self) -> list[Tensor]:
        """The sums of k and of v."""
        if self.sums is None:
            self.sums = [self.like.new_zeros(self.like.shape) for _ in range(2)]
        return self.sums


@dataclass(frozen=True, kw_only=True)
class Views(Call):
    """Queries and keys that are strided views of the sequence; one batch of groups."""

    queries: StridedTokens
    keys: StridedTokens
    causal: bool
    window: Window = (None, None)
    whole: bool = False

    @staticmethod
    def _of(tokens: StridedTokens, x: Tensor) -> Tensor:
        """(B, T, H, …) → (B, G, n, H, …), a view: the n tokens of each group."""
        view: Tensor = tokens.view(x.transpose(1, 2)).flatten(3, 4)
        return view.transpose(2, 3)

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, H, …) → (B, G, n, H, …)."""
        return self._of(self.queries, x)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Rows are a view."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Call`."""
        batch = q.shape[0]
        tensors = (self.rows(q), self._of(self.keys, k), self._of(self.keys, v))
        y, lse = flash_forward(*(t.flatten(0, 1) for t in tensors), causal=self.causal, window=self.window)
        return y.unflatten(0, (batch, -1)), lse.transpose(1, 2).unflatten(0, (batch, -1))

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, totals: Totals
    ) -> Tensor:
        """See `Call`."""
        dy, q_rows, y, lse = (self.rows(t).flatten(0, 1) for t in (dy, q, y, lse))
        k_rows, v_rows = (self._of(self.keys, t).flatten(0, 1) for t in (k, v))
        lse = lse.transpose(1, 2).contiguous()
        grads = flash_backward(dy, q_rows, k_rows, v_rows, y, lse, causal=self.causal, window=self.window)
        dq_rows, *rows = (grad.unflatten(0, (len(q), -1)) for grad in grads)
        if self.whole:  # one group
            rows = [grad[:, 0] for grad in rows]
        totals.add(rows, self.whole, lambda x: self._of(self.keys, x))
        dq: Tensor = dq_rows
        return dq


Pairs = tuple[Tensor, Tensor]
"""Indices of tokens and of heads, which broadcast against each other."""


@dataclass(frozen=True, kw_only=True)
class Packed(Call):
    """Sequences of several lengths one after the other. Keys may be copied into several sequences.

    `queries` and `keys` are pairs (token, head), (rows, heads of the call); None: all tokens in order. `own`
    are the rows of keys that are all tokens in order, or None. `copies` are all other rows, and `copy_of`
    says for each of them and each head which of the pairs of `Union.copied` it is.
    """

    packing: Packing
    """Of one element of the batch."""
    causal: bool
    queries: Pairs | None = None
    keys: Pairs | None = None
    own: Tensor | None = None
    copies: Tensor | None = None
    copy_of: Tensor | None = None
    whole: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, H, …) → (B, rows, heads of the call, …)."""
        return x if self.queries is None else x[:, *self.queries]

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Each query is in one row."""
        if self.queries is not None:
            x[:, *self.queries] = rows

    def _keys(self, x: Tensor) -> Tensor:
        """(B, T, H, D) → (B · rows, heads of the call, D)."""
        return (x if self.keys is None else x[:, *self.keys]).flatten(0, 1)

    def _packing(self, batch: int) -> Packing:
        return Packing(self.packing.queries * batch, self.packing.keys * batch)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Call`."""
        batch = len(q)
        y, lse = flash_forward(
            self.rows(q).flatten(0, 1),
            self._keys(k),
            self._keys(v),
            causal=self.causal,
            packing=self._packing(batch),
        )
        return y.unflatten(0, (batch, -1)), lse.transpose(0, 1).unflatten(0, (batch, -1))

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, totals: Totals
    ) -> Tensor:
        """See `Call`."""
        batch = len(q)
        grads = flash_backward(
            self.rows(dy).flatten(0, 1),
            self.rows(q).flatten(0, 1),
            self._keys(k),
            self._keys(v),
            self.rows(y).flatten(0, 1),
            self.rows(lse).flatten(0, 1).transpose(0, 1).contiguous(),
            causal=self.causal,
            packing=self._packing(batch),
        )
        dq_rows, *rows = (grad.unflatten(0, (batch, -1)) for grad in grads)
        if self.copy_of is not None:
            assert totals.copies is not None
            for total, grad in zip(totals.copies, rows, strict=True):
                copies = grad if self.copies is None else grad.index_select(1, self.copies)
                total.index_add_(1, self.copy_of.flatten(), copies.flatten(1, 2).to(total.dtype))
        if self.keys is None or self.own is not None:
            own = rows if self.own is None else [grad.index_select(1, self.own) for grad in rows]
            totals.add(own, True, lambda x: x)
        dq: Tensor = dq_rows
        return dq


@dataclass(frozen=True)
class Union:
    """Calls whose keys are disjoint for each query, and the pairs (token, head) that they copy."""

    calls: tuple[Call, ...]
    copied: Pairs | None = None


def _merge(call: Call, y: Tensor, lse: Tensor, y_part: Tensor, lse_part: Tensor) -> None:
    """Merge the softmax over the keys of a call into y (B, T, H, D) and lse (B, T, H)."""
    lse_part = lse_part.masked_fill(lse_part == torch.inf, EMPTY)  # queries without a key in this call
    y_rows, lse_rows = call.rows(y), call.rows(lse)
    weight = (lse_part - lse_rows).sigmoid_().to(y.dtype)
    y_rows.lerp_(y_part, weight[..., None])
    torch.logaddexp(lse_rows, lse_part, out=lse_rows)
    call.put(y, y_rows)
    call.put(lse, lse_rows)


def _forward(q: Tensor, k: Tensor, v: Tensor, union: Union) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, D) and logsumexp (B, T, H), +∞ for a query without a key."""
    calls = list(union.calls)
    if whole := bool(calls) and calls[0].whole:
        y, lse = calls.pop(0).forward(q, k, v)
        y, lse = y.reshape(q.shape), lse.reshape(q.shape[:3])
    else:
        y = q.new_zeros(q.shape)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], EMPTY, dtype=wide, device=q.device)
    for call in calls:
        _merge(call, y, lse, *call.forward(q, k, v))
    return y, lse if whole else lse.masked_fill_(lse <= EMPTY / 2, torch.inf)


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, union: Union
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B, T, H, D)."""
    totals = Totals(like=k)
    if union.copied is not None:
        # float32, because a key is copied into many sequences
        shape = (len(q), union.copied[0].numel(), q.shape[-1])
        wide = torch.promote_types(q.dtype, torch.float32)
        totals.copies = [k.new_zeros(shape, dtype=wide) for _ in range(2)]
    calls = list(union.calls)
    if calls and calls[0].whole:
        dq = calls.pop(0).backward(dy, q, k, v, y, lse, totals).reshape(q.shape)
    else:
        dq = q.new_zeros(q.shape)
    for call in calls:
        rows = call.backward(dy, q, k, v, y, lse, totals)
        call.put(dq, call.rows(dq).add_(rows))
    dk, dv = totals.get()
    if union.copied is not None:
        at = (slice(None), *union.copied)
        for total, copies in zip((dk, dv), totals.copies or (), strict=True):
            total[at] = (total[at] + copies).to(total.dtype)
    return dq, dk, dv


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, union: Union) -> Tensor:
        y, lse = _forward(q, k, v, union)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.union = union
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        return *_backward(dy, q, k, v, y, lse, ctx.union), None


def flash_union(q: Tensor, k: Tensor, v: Tensor, union: Union) -> Tensor:
    """Softmax attention over the keys of all calls: (B, H, T, D) → (B, H, T, D).

    A query without a key gives 0. Partial results are rounded to the dtype of q before they are merged.
    """
    y: Tensor = _Flash.apply(  # type: ignore[no-untyped-call]
        *(t.transpose(1, 2) for t in (q, k, v)), union
    )
    return y.transpose(1, 2)
