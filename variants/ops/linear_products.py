"""Causal products of features: o_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s, by matrix products over chunks.

Shapes: N sequences, T tokens, m features, V channels of values; n chunks of c tokens.

Pairs within a chunk are computed and masked. Earlier chunks are one sum, the state, (N, m, V) in float32. The
sums before all chunks are two matrix products, one over groups of chunks: no loop over chunks, and the number
of operations does not depend on T.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

GROUP = 32
"""Chunks of a group, whose sums are accumulated by one matrix product."""


class LinearProducts(Protocol):
    """The causal product and its gradients, on tensors of one layout."""

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) → a view in the layout of this implementation."""

    def heads(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `rows`: a view (B, H, T, D)."""

    def empty_state(self, features: Tensor, values: Tensor) -> Tensor:
        """The state before the first token, float32 or wider."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys (rows, m), values (rows, V) and the state before them → outputs
        (rows, V) and the state after them."""

    def backward(
        self, grad: Tensor, of_end: Tensor, queries: Tensor, keys: Tensor, values: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the outputs and of the state after them → of queries, keys, values and the state."""


class ChunkedProducts:
    """By batched matrix products of torch; rows are (N, T)."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) → (N, T, D)."""
        return x.flatten(0, 1)

    def heads(self, x: Tensor, batch: int) -> Tensor:
        """(N, T, D) → (B, H, T, D)."""
        return x.unflatten(0, (batch, -1))

    def empty_state(self, features: Tensor, values: Tensor) -> Tensor:
        """Zeros (N, m, V)."""
        wide = torch.promote_types(features.dtype, torch.float32)
        return features.new_zeros(len(features), features.shape[-1], values.shape[-1], dtype=wide)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearProducts`."""
        seq_len = queries.shape[1]
        q, k, v = (self._chunks(x) for x in (queries, keys, values))
        before, end = _sums_before(k.mT @ v, state)
        y = q @ before
        y.baddbmm_((q @ k.mT).tril_(), v)
        return y.view(len(queries), -1, y.shape[-1])[:, :seq_len], end

    def backward(
        self, grad: Tensor, of_end: Tensor, queries: Tensor, keys: Tensor, values: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `LinearProducts`."""
        seq_len = queries.shape[1]
        q, k, v, g = (self._chunks(x) for x in (queries, keys, values, grad))
        of_sums, of_state = _sums_before(q.mT @ g, of_end, backward=True)
        g_v = k @ of_sums
        g_v.baddbmm_((q @ k.mT).tril_().mT, g)
        weights = (g @ v.mT).tril_()  # gradients of the products of queries and keys
        g_k = v @ of_sums.mT
        del of_sums
        g_k.baddbmm_(weights.mT, q)
        before, _ = _sums_before(k.mT @ v, state)
        g_q = g @ before.mT
        g_q.baddbmm_(weights, k)
        found = (x.view(len(queries), -1, x.shape[-1])[:, :seq_len] for x in (g_q, g_k, g_v))
        return *found, of_state

    def _chunks(self, x: Tensor) -> Tensor:
        """(N, T, D) → (N·n, c, D), padded with zeros."""
        remainder = -x.shape[1] % self.chunk
        if remainder:
            x = torch.nn.functional.pad(x, (0, 0, 0, remainder))
        return x.reshape(-1, self.chunk, x.shape[-1])


def _sums_before(sums: Tensor, start: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of each chunk (N·n, m, V) and the state before the first chunk (N, m, V) → the state before each
    chunk, of the dtype of the sums, and the state after the last one. `backward` goes from the last chunk to
    the first."""
    sequences, shape = len(start), sums.shape
    chunks = len(sums) // sequences
    group = min(GROUP, chunks)
    flat = sums.view(sequences, chunks, -1)
    if chunks % group:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, -chunks % group))
    grouped = flat.view(sequences, -1, group, flat.shape[-1])
    totals = grouped.sum(2, dtype=start.dtype)
    first = start.view(sequences, 1, -1)
    if backward:
        # the group of the last chunks is the first in order
        totals = torch.cat([first, totals.flip(1)], 1).cumsum(1).flip(1)
        end, of_groups = totals[:, 0], totals[:, 1:]
    else:
        totals = torch.cat([first, totals], 1).cumsum(1)
        end, of_groups = totals[:, -1], totals[:, :-1]
    ones = sums.new_ones(group, group)
    order = ones.triu_(1) if backward else ones.tril_(-1)
    before = torch.baddbmm(
        of_groups.to(sums.dtype).flatten(0, 1).unsqueeze(1),
        order.expand(grouped.shape[0] * grouped.shape[1], -1, -1),
        grouped.flatten(0, 1),
    )
    return before.view(sequences, -1, flat.shape[-1])[:, :chunks].reshape(shape), end.view(start.shape).clone()
