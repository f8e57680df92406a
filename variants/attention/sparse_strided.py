"""Sparse Transformer, strided pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops import masks
from variants.ops.factorised import Reads, Role, SparseAttention, SparseConfig
from variants.ops.strided_parts import Cut, Part


@dataclass(frozen=True, kw_only=True)
class SparseStridedConfig(SparseConfig):
    """Knobs of the strided pattern: those that both patterns have."""


class SparseStrided(SparseAttention):
    """The previous l tokens and itself (near), and every l-th token before (far).

    Written as a matrix of rows of l tokens, the near factor is a row's own triangle and its complement
    in the row above, the far factor is dense attention down each column: a transpose, no mask.
    Bidirectionally both extend to later tokens, which the paper does not have: l on each side, and
    the whole column.
    """

    Config = SparseStridedConfig
    config: SparseStridedConfig
    flop_overhead_reason = (
        "a row of queries is given all of the neighbouring row's keys, of which it may read half"
    )

    def parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """Rows, then columns; what both hold is left to the cheaper place."""
        parts = []
        if role.factor != "far":
            parts += self._rows(seq_len, role, causal, device)
        if role.factor != "near":
            parts += self._columns(seq_len, role, causal)
        return parts

    def _rows(self, seq_len: int, role: Role, causal: bool, device: torch.device) -> list[Part]:
        """Row by row: its own keys, those of the row above and, bidirectionally, of the row below."""
        stride, heads = self.stride, (role.first, role.last)
        rows, rest = divmod(seq_len, stride)
        index = torch.arange(stride, device=device)
        step = index[None, :] - index[:, None]  # (queries, keys): columns from query to key
        # Bidirectionally, columns hold the distances 0 and ±l whole; causally they leave 0 and l here
        # (see `_columns`), so that the triangle of the row itself is the kernel's own.
        shared = role.factor == "merged" and not causal

        def pair(first: int, count: int, offset: int, mask: Tensor | None) -> list[Part]:
            """`count` rows of queries from `first`, keys `offset` rows further; the last may be short."""
            whole = min(count, rows - max(first, first + offset))
            found = []
            if whole > 0:
                queries = Cut(start=first * stride, groups=whole, group_step=stride, run=stride)
                keys = Cut(start=(first + offset) * stride, groups=whole, group_step=stride, run=stride)
                found.append(
                    Part(heads=heads, queries=queries, keys=keys, mask=mask, causal=causal and not offset)
                )
            if rest and first <= rows - max(offset, 0) < first + count:
                query_row = rows - max(offset, 0)
                n_queries, n_keys = (
                    rest if row == rows else stride for row in (query_row, query_row + offset)
                )
                found.append(
                    Part(
                        heads=heads,
                        queries=Cut(start=query_row * stride, run=n_queries),
                        keys=Cut(start=(query_row + offset) * stride, run=n_keys),
                        mask=None if mask is None else mask[:n_queries, :n_keys],
                        causal=causal and not offset,
                    )
                )
            return found

        count = rows + bool(rest)
        parts = pair(0, count, 0, step != 0 if shared else None)
        parts += pair(1, count - 1, -1, step > 0 if shared else step >= 0)
        if not causal:
            parts += pair(0, count - 1, 1, step < 0 if shared else step <= 0)
        return parts

    def _columns(self, seq_len: int, role: Role, causal: bool) -> list[Part]:
        """Dense attention down each column; the first `rest` columns are one row longer."""
        stride, heads = self.stride, (role.first, role.last)
        rows, rest = divmod(seq_len, stride)
        # the near factor already has the token itself and the one above: start two rows above
        skip = 2 if role.factor == "merged" and causal else 0
        parts = []
        for first, width, length in ((0, rest, rows + 1 - skip), (rest, stride - rest, rows - skip)):
            if width > 0 and length > 0:
                keys = Cut(start=first, groups=width, group_step=1, rows=length, row_step=stride)
                queries = Cut(
                    start=first + skip * stride, groups=width, group_step=1, rows=length, row_step=stride
                )
                parts.append(Part(heads=heads, queries=queries, keys=keys, causal=causal))
        return parts

    @staticmethod
    def rule(layer: Reads, role: Role, head: Tensor) -> masks.Rule:
        """|i − j| ≤ l, i ≡ j (mod l), or either."""
        near, far = masks.window(layer.stride + 1), masks.same(lambda i: i % layer.stride)
        return {"near": near, "far": far, "merged": masks.either(near, far)}[role.factor]

    def pairs(self, seq_len: int, role: Role, head: int, *, causal: bool) -> int:
        """Window plus columns minus the distances 0 and l, which both have."""
        near = masks.window_pairs(seq_len, self.stride + 1, is_causal=causal)
        rows, rest = divmod(seq_len, self.stride)
        longer, shorter = ((n * (n + 1) // 2 if causal else n * n) for n in (rows + 1, rows))
        far = rest * longer + (self.stride - rest) * shorter
        both = seq_len + (1 if causal else 2) * max(0, seq_len - self.stride)
        return {"near": near, "far": far, "merged": near + far - both}[role.factor]

    def carried(self, seq_len: int, role: Role, head: int) -> int:
        """The last l tokens, or all: every column is read again."""
        return min(seq_len, self.stride) if role.factor == "near" else seq_len
