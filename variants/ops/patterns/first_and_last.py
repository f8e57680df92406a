"""Decoding with the keys and values of the first tokens, which are kept for ever, and of the last ones.

Shapes: B batch, H heads, K heads of keys, n tokens of a step, D channels of a head, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from variants.base import Clock, DecodingState


class _Section(NamedTuple):
    """Some keys with their values, (B, K, S, D), the queries for them, and which of them a query reads."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    allowed: Tensor | None
    """(n, S) bool; None: all."""

    def scores(self) -> Tensor:
        """(B, K, H/K, n, S), in float32 or wider."""
        q = self.queries
        scores: Tensor = (q.flatten(2, 3) @ self.keys.to(q.dtype).mT).unflatten(2, q.shape[2:4])
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, float("-inf"))


class FirstAndLast(DecodingState):
    """A query reads the first `first` tokens, itself, and the `last` tokens before it.

    The last ones are in a ring, which holds none of the first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        first: int,
        last: int,
        max_len: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D)."""
        super().__init__(clock, max_len)
        batch, heads, head_dim = shape
        self.first, self.last = min(first, max_len), last
        self.ring = min(last, max_len - self.first)
        self.first_keys, self.first_values = (
            torch.zeros(batch, heads, self.first, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.ring_keys, self.ring_values = (
            torch.zeros(batch, heads, self.ring, head_dim, dtype=dtype, device=device) for _ in range(2)
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, for_first: Tensor | None = None, sink: Tensor | None = None
    ) -> Tensor:
        """The next tokens read the keys that are kept, and each other; then their own keys and values are
        kept: queries (B, H, n, D), keys and values (B, K, n, D) → (B, H, n, D).

        `for_first` (B, H, n, D) are the queries for the first tokens, if they are others. `sink` (H,) are
        scores of a further key, whose value is 0.
        """
        self._write_first(k, v)  # before they are read, by their own query too
        sections = self._sections(*(self._grouped(t, k) for t in (q, q if for_first is None else for_first)))
        scores = [section.scores() for section in (*sections, self._new(self._grouped(q, k), k, v))]
        values = [*(section.values for section in sections), v[:, :, v.shape[2] - scores[-1].shape[-1] :]]
        if sink is not None:
            of_heads = sink.to(scores[0].dtype).view(k.shape[1], -1, 1, 1)
            scores.append(of_heads.expand(*scores[0].shape[:-1], 1))
        weights = torch.cat(scores, dim=-1).softmax(-1).to(q.dtype)
        pieces = weights.split([part.shape[-1] for part in scores], dim=-1)
        y = torch.zeros_like(self._grouped(q, k)).flatten(2, 3)
        for piece, value in zip(pieces, values, strict=False):
            y = y + piece.flatten(2, 3) @ value.to(q.dtype)
        self._write_ring(k, v)  # not before: a ring has no slot beside those that are read
        by_head: Tensor = y.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        return by_head

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values (B, K, n, D) of a prompt that is read without the cache."""
        self._write_first(k, v)
        self._write_ring(k, v)

    @staticmethod
    def _grouped(q: Tensor, k: Tensor) -> Tensor:
        """(B, H, n, D) → (B, K, H/K, n, D)."""
        grouped: Tensor = q.unflatten(1, (k.shape[1], -1))
        return grouped

    def _sections(self, q: Tensor, for_first: Tensor) -> list[_Section]:
        """The keys in slots: of the first tokens, with those of this step, and of the ring."""
        position, tokens = self.clock.position, q.shape[3]
        sections, query = [], self.clock.positions(tokens, q.device)[:, None]
        if count := min(self.first, position + tokens):
            allowed = None if tokens == 1 else torch.arange(count, device=q.device) <= query
            kept = self.first_keys[:, :, :count], self.first_values[:, :, :count]
            sections.append(_Section(for_first, *kept, allowed))
        written = max(0, position - self.first)
        if count := min(self.ring, written):
            allowed = None
            if tokens > 1:
                slot = torch.arange(count, device=q.device)
                where = position - 1 - (written - 1 - slot) % self.ring
                allowed = query - where <= self.last
            kept = self.ring_keys[:, :, :count], self.ring_values[:, :, :count]
            sections.append(_Section(q, *kept, allowed))
        return sections

    def _new(self, q: Tensor, k: Tensor, v: Tensor) -> _Section:
        """The keys of this step that are not among the first."""
        position, tokens = self.clock.position, q.shape[3]
        skipped = min(tokens, max(0, self.first - position))
        query = self.clock.positions(tokens, q.device)
        key = query[skipped:]
        distance = query[:, None] - key
        allowed = None if tokens == 1 else (distance >= 0) & (distance <= self.last)
        return _Section(q, k[:, :, skipped:], v[:, :, skipped:], allowed)

    def _write_first(self, k: Tensor, v: Tensor) -> None:
        position = self.clock.position
        count = min(k.shape[2], max(0, self.first - position))
        for kept, new in ((self.first_keys, k), (self.first_values, v)):
            kept[:, :, position : position + count] = new[:, :, :count]

    def _write_ring(self, k: Tensor, v: Tensor) -> None:
        end = self.clock.position + k.shape[2] - self.first  # tokens that are not among the first, so far
        count = min(k.shape[2], self.ring, max(0, end))
        if not count:
            return
        begin = (end - count) % self.ring
        before_end = min(count, self.ring - begin)
        for ring, new in ((self.ring_keys, k), (self.ring_values, v)):
            last = new[:, :, new.shape[2] - count :]
            ring[:, :, begin : begin + before_end] = last[:, :, :before_end]
            ring[:, :, : count - before_end] = last[:, :, before_end:]
