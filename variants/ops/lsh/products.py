"""Rounds of hashed attention by matrix products of blocks: a kernel for any device, in few launches.

Shapes: D head_dim, R rounds. A stream of n·R·P sorted rows is divided into G blocks of b rows. The queries of
a block read K keys (see `variants.ops.lsh.windows`), and the keys of a block are read by K queries.

Scores are float32. Weights, and gradients of scores, are rounded to the dtype of the rows before they are
multiplied by them, as in fused kernels. For the gradients of keys and values they are copied to the order of
the keys, because sums over overlapping windows would move more bytes.

With the `band` neighbourhood, causal, no bit of an output depends on a later token: the blocks and the
positions in them are those of `variants.ops.lsh.windows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.lsh.streams import FILL, Stream
from variants.ops.lsh.windows import Window

PAIRS = (2**29, 2**28)
"""Pairs (query, key) that are computed at a time, forward and backward. A pair takes about 8 bytes of scores,
weights and comparisons, and the backward pass has more sorted rows beside them."""


@torch.library.custom_op("longctx_bench::bmm_float32", mutates_args=())
def _bmm_float32(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm in float32 of tensors in half precision. torch has this operation on CUDA only."""
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


@_bmm_float32.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float32)


@register_flop_formula(torch.ops.longctx_bench.bmm_float32)
def _(a_shape: Any, b_shape: Any, out_shape: Any = None, **_: Any) -> int:
    batch, rows, inner = a_shape
    return int(2 * batch * rows * inner * b_shape[-1])


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """a (G, b, D) · b (G, K, D) → (G, b, K), float32 or float64."""
    b = b.transpose(1, 2)
    if a.dtype in (torch.bfloat16, torch.float16):
        scores: Tensor = _bmm_float32(a, b)
        return scores
    return torch.bmm(a, b)


class Products:
    """The kernel; see `variants.ops.lsh.streams.Kernel`. The margins of its windows are whole blocks."""

    multiple = 1

    def sequences(self, rounds: int, positions: int, window: Window, head_dim: int, *, backward: bool) -> int:
        """As many as `PAIRS` allows."""
        return PAIRS[backward] // (rounds * positions * window.keys)

    def new_decisions(
        self, sequences: int, rounds: int, positions: int, window: Window, like: Tensor
    ) -> Tensor:
        """(N, R·P / b, b, K) bool: the forbidden pairs, which cost more time than memory."""
        blocks = rounds * positions // window.block
        return like.new_empty(sequences, blocks, window.block, window.keys, dtype=torch.bool)

    def forward(self, stream: Stream, decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        view = _Blocks(stream)
        query, value = view.queries(stream.rows[:, 0]), view.keys(stream.rows[:, 1])
        forbidden = view.forbid(decisions.flatten(0, 1))
        scores = _scores(query, view.keys(_keys(stream))).masked_fill_(forbidden, FILL)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores.sub_(top), out=query.new_empty(scores.shape))
        del scores
        total = weights.sum(-1, keepdim=True, dtype=top.dtype)
        return torch.bmm(weights, value).flatten(0, 1), top.flatten(), (top + total.log_()).flatten()

    def backward(
        self, stream: Stream, decisions: Tensor, lse: Tensor, grad: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        view, key, query_key, value = _Blocks(stream), _keys(stream), stream.rows[:, 0], stream.rows[:, 1]
        scores = _scores(view.queries(query_key), view.keys(key)).sub_(view.queries(lse)[..., None])
        weights = view.with_margin(query_key)
        torch.exp(scores, out=view.trim(weights)).masked_fill_(decisions.flatten(0, 1), 0)
        del scores
        grad_value = torch.bmm(view.by_key(weights), view.readers(grad))
        scores = _scores(view.queries(grad), view.keys(value)).sub_(view.queries(mean)[..., None])
        # weights becomes the gradient of the scores
        of_scores = torch.mul(scores, view.trim(weights), out=view.trim(weights))
        del scores
        grad_query = torch.bmm(of_scores, view.keys(key))
        grad_key = torch.bmm(view.by_key(weights), view.readers(query_key))
        grad_key.mul_(view.queries(stream.factor)[..., None])
        return grad_query.flatten(0, 1), grad_key.flatten(0, 1), grad_value.flatten(0, 1)


def _keys(stream: Stream) -> Tensor:
    """(L, D): query-keys times their factors, in the dtype of the rows."""
    query_key = stream.rows[:, 0]
    return torch.mul(query_key, stream.factor[:, None], out=torch.empty_like(query_key))


class _Blocks:
    """Blocks of queries and the windows of keys that they read."""

    def __init__(self, stream: Stream) -> None:
        window = stream.window
        self.stream, self.window = stream, window
        self.back, self.ahead = window.back // window.block, window.ahead // window.block  # in blocks
        assert (self.back + self.ahead) * window.block == window.back + window.ahead, "whole blocks"

    def queries(self, x: Tensor) -> Tensor:
        """(L, …) → (G, b, …), a view."""
        blocks: Tensor = self.stream.inner(x).unflatten(0, (-1, self.window.block))
        return blocks

    def keys(self, x: Tensor) -> Tensor:
        """(L, …) → (G, K, …), the keys of each block of queries; an overlapping view."""
        return self._windows(x, self.window.back, self.window.ahead)

    def readers(self, x: Tensor) -> Tensor:
        """(L, …) → (G, K, …), the queries that read each block of keys; an overlapping view."""
        return self._windows(x, self.window.ahead, self.window.back)

    def _windows(self, x: Tensor, before: int, after: int) -> Tensor:
        margin = self.stream.margin
        inside = x[margin - before : len(x) - margin + after]
        windows: Tensor = inside.unfold(0, self.window.keys, self.window.block).movedim(-1, 1)
        return windows

    def with_margin(self, like: Tensor) -> Tensor:
        """Uninitialised memory for weights, with blocks of 0 at both ends, which `by_key` reads: (ahead + G +
        back, b, K)."""
        window = self.window
        blocks = (len(like) - 2 * self.stream.margin) // window.block
        weights = like.new_empty(self.ahead + blocks + self.back, window.block, window.keys)
        for edge in (weights[: self.ahead], weights[self.ahead + blocks :]):
            if len(edge):
                edge.zero_()
        return weights

    def trim(self, weights: Tensor) -> Tensor:
        """Without the margins, a view: (G, b, K)."""
        return weights[self.ahead : len(weights) - self.back]

    def by_key(self, weights: Tensor) -> Tensor:
        """The weights of each block of keys and the queries that read it: (G, b, K), a copy.

        Key c of block h is in the window of block g = h − ahead + j at (back + ahead − j)·b + c.
        """
        block, keys = self.window.block, self.window.keys
        count = self.back + 1 + self.ahead
        found = weights.as_strided(
            (len(weights) - count + 1, count, block, block),
            (block * keys, block * keys - block, keys, 1),
            keys - block,
        )
        by_key: Tensor = found.reshape(-1, keys, block).transpose(1, 2)
        return by_key

    def forbid(self, forbidden: Tensor) -> Tensor:
        """Write to (G, b, K) bool: the pairs that a round does not read, or that an earlier round reads."""
        sequences, rounds, _ = self.stream.shape
        window, code = self.window, self.stream.code
        low, high = window.read
        own, keys = self.stream.own, self.keys(self.stream.own)[:, None]
        torch.gt(self.queries(own - high)[..., None], keys, out=forbidden)
        if window.band and window.causal:  # equal codes: the token itself
            forbidden.logical_or_(self.queries(own)[..., None] <= keys)
        else:
            forbidden.logical_or_(self.queries(own - low)[..., None] < keys)
            forbidden.logical_or_(self._wrong_order(own.device))
        by_round = forbidden.view(sequences, rounds, -1, *forbidden.shape[1:])
        lowest, highest = code - high, code if low == 0 else code - low
        for earlier in range(rounds - 1):
            # the order of two tokens of a bucket is the same in every round
            key = self._later(self.keys(code[earlier])[:, None], earlier)
            read = self._later(self.queries(lowest[earlier])[..., None], earlier) <= key
            read.logical_and_(self._later(self.queries(highest[earlier])[..., None], earlier) >= key)
            by_round[:, earlier + 1 :].logical_or_(read)
        return forbidden

    def _later(self, x: Tensor, earlier: int) -> Tensor:
        """(G, …) → (n, R − earlier − 1, G / (n·R), …): the blocks of later rounds, a view."""
        sequences, rounds, _ = self.stream.shape
        later: Tensor = x.unflatten(0, (sequences, rounds, -1))[:, earlier + 1 :]
        return later

    def _wrong_order(self, device: torch.device) -> Tensor:
        """(b, K) bool: pairs that the positions forbid."""
        query = torch.arange(self.window.block, device=device)[:, None] + self.window.back
        key = torch.arange(self.window.keys, device=device)
        return key >= query if self.window.causal else key == query
