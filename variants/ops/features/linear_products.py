"""Causal products of features: o_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s, by matrix products over chunks.

Shapes: B batch, H heads, N = B·H sequences, T tokens, m features, V channels of values; n chunks of c tokens.

Pairs within a chunk are computed and masked. Earlier chunks are one sum, the state, in float32 (N, m, V). The
state before each chunk follows from two sums, over the chunks of a group and over groups: no loop over
chunks, and the number of operations does not depend on T.

The states of a chunk are stored below the features of its keys. One product of the queries with both gives
the weights of the chunk's own keys and the sums over all earlier ones. The backward pass does the same with
the features of the queries and the gradients of the states.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from variants.ops.features.scaled_features import write

GROUP = 32
"""Chunks of a group, whose sums are accumulated by one matrix product."""


class Store(NamedTuple):
    """Memory for the features of some tokens."""

    features: Tensor
    """(rows, m). A view, if the implementation keeps something beside the features."""
    whole: Tensor
    """All of the memory; only the implementation knows its layout."""


class LinearProducts(Protocol):
    """The causal product and its gradients. `rows` are the layout of an implementation."""

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) → rows (…, D), contiguous. Do not write to the result, which may be a view of x."""

    def empty(self, like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """Rows for tokens as those of `like` (B, H, T, …), uninitialised, but 0 where they are padded."""

    def heads(self, x: Tensor, like: Tensor) -> Tensor:
        """Rows (…, D) → a view (B, H, T, D), with B, H and T of `like`."""

    def store(self, x: Tensor, features: int, channels: int, dtype: torch.dtype) -> Store:
        """Memory for the features of vectors x (rows, D), for products with values of `channels` channels."""

    def empty_state(self, keys: Store, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The state before the first token."""

    def forward(self, queries: Store, keys: Store, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys, values (rows, V) and the state before them → outputs (rows, V) and
        the state after them."""

    def backward(
        self, grad: Tensor, of_end: Tensor, queries: Store, keys: Store, values: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the outputs and of the state after them → of the features of queries and keys, of the
        values and of the state before them."""


class ChunkedProducts:
    """By batched matrix products of torch; rows are chunks (N·n, c), padded with zeros."""

    def __init__(self, chunk: int, sequences: int) -> None:
        self.chunk, self.sequences = chunk, sequences

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) → chunks (N·n, c, D)."""
        x = x.to(dtype, memory_format=torch.contiguous_format).contiguous()
        remainder = -x.shape[2] % self.chunk
        if remainder:
            x = torch.nn.functional.pad(x, (0, 0, 0, remainder))
        return x.view(-1, self.chunk, x.shape[-1])

    def empty(self, like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """Chunks (N·n, c, channels)."""
        batch, heads, seq_len = like.shape[:3]
        make = torch.zeros if seq_len % self.chunk else torch.empty
        chunks = batch * heads * -(-seq_len // self.chunk)
        return make(chunks, self.chunk, channels, dtype=dtype, device=like.device)

    def heads(self, x: Tensor, like: Tensor) -> Tensor:
        """(N·n, c, D) → (B, H, T, D)."""
        batch, heads, seq_len = like.shape[:3]
        tokens: Tensor = x.view(batch, heads, -1, x.shape[-1])
        return tokens[:, :, :seq_len]

    def store(self, x: Tensor, features: int, channels: int, dtype: torch.dtype) -> Store:
        """(N·n, c + V, m): features, and below them what is summed over other chunks, transposed."""
        whole = torch.empty(len(x), self.chunk + channels, features, dtype=dtype, device=x.device)
        return Store(whole[:, : self.chunk], whole)

    def empty_state(self, keys: Store, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros (N, V·m)."""
        size = values.shape[-1] * keys.whole.shape[-1]
        return torch.zeros(self.sequences, size, dtype=dtype, device=values.device)

    def forward(self, queries: Store, keys: Store, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearProducts`."""
        end = self._sum_before(keys, values, state)
        products = queries.features @ keys.whole.mT  # (N·n, c, c + V)
        weights, earlier = products.split([self.chunk, values.shape[-1]], dim=-1)
        return torch.baddbmm(earlier, weights.tril(), values), end

    def backward(
        self, grad: Tensor, of_end: Tensor, queries: Store, keys: Store, values: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `LinearProducts`."""
        self._sum_before(keys, values, state)
        of_state = self._sum_before(queries, grad, of_end, backward=True)
        products = keys.features @ queries.whole.mT
        weights, later = products.split([self.chunk, values.shape[-1]], dim=-1)
        g_values = torch.baddbmm(later, weights.triu(), grad)
        del weights, later
        of_products = torch.empty_like(products)
        of_weights, of_earlier = of_products.split([self.chunk, values.shape[-1]], dim=-1)
        write(of_weights, torch.tril, grad @ values.mT)
        of_earlier.copy_(grad)
        g_queries = of_products @ keys.whole
        g_keys = torch.cat([of_weights.mT, values], -1) @ queries.whole
        return g_queries, g_keys, g_values, of_state

    def _sum_before(self, store: Store, values: Tensor, start: Tensor, *, backward: bool = False) -> Tensor:
        """Write the state before each chunk below its features, from the sums of values · features over each
        chunk and the state before the first chunk. Returns the state after the last one. `backward` goes from
        the last chunk to the first."""
        sums = (values.mT @ store.features).view(self.sequences, -1, start.shape[-1])  # (N, n, V·m)
        chunks = sums.shape[1]
        group = min(GROUP, chunks)
        if chunks % group:
            sums = torch.nn.functional.pad(sums, (0, 0, 0, -chunks % group))
        grouped = sums.view(-1, group, start.shape[-1])
        totals = grouped.sum(1, dtype=start.dtype).view(self.sequences, -1, start.shape[-1])
        if backward:
            running = torch.cat([start[:, None], totals.flip(1)], 1).cumsum(1).flip(1)
            end, of_groups = running[:, 0], running[:, 1:]
        else:
            running = torch.cat([start[:, None], totals], 1).cumsum(1)
            end, of_groups = running[:, -1], running[:, :-1]
        ones = torch.ones(group, group, dtype=sums.dtype, device=sums.device)
        earlier = (ones.triu(1) if backward else ones.tril(-1)).expand(len(grouped), -1, -1)
        base = of_groups.to(sums.dtype).reshape(-1, 1, start.shape[-1])
        # (N, n, V·m): what is below the features
        target = store.whole.unflatten(0, (self.sequences, -1))[:, :, self.chunk :].flatten(2)
        if chunks % group:
            padded = torch.baddbmm(base, earlier, grouped).view(sums.shape)
            target.copy_(padded[:, :chunks])
        else:
            write(target.view(grouped.shape), torch.baddbmm, base, earlier, grouped)
        return end.clone()
