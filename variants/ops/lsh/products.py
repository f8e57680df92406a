"""Rounds of hashed attention by matrix products of blocks: a kernel for any device, in few launches.

Shapes: D head_dim, R rounds. A stream of R·n·P sorted rows is divided into G blocks of b rows. The queries of
a block read K keys (see `variants.ops.lsh.windows`), and the keys of a block are read by K queries.

Scores are float32. Weights, and gradients of scores, are rounded to the dtype of the rows before they are
multiplied by them, as in fused kernels. Gradients of keys and values are computed key by key from scores that
are computed once more, because sums over overlapping windows would move more bytes.

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

PAIRS = 2**27
"""Pairs (query, key) that are computed at a time: 1.5 GB of scores, weights and comparisons."""


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
    """The kernel; see `variants.ops.lsh.streams.Kernel`."""

    multiple = 1

    def sequences(self, rounds: int, positions: int, window: Window, head_dim: int) -> int:
        """As many as `PAIRS` allows."""
        return PAIRS // (rounds * positions * window.keys)

    def forward(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        view = _Blocks(stream, by_query=True)
        query, value = view.blocks(stream.rows[:, 0]), view.windows(stream.rows[:, 1])
        scores = _scores(query, view.windows(_keys(stream)))
        scores.masked_fill_(view.forbidden(), FILL)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores.sub_(top), out=query.new_empty(scores.shape))
        del scores
        total = weights.sum(-1, keepdim=True, dtype=top.dtype)
        out = torch.bmm(weights, value).mul_(total.reciprocal())
        return out.flatten(0, 1), (top + total.log()).flatten()

    def backward(
        self, stream: Stream, lse: Tensor, grad: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        key, query_key, value = _keys(stream), stream.rows[:, 0], stream.rows[:, 1]
        view = _Blocks(stream, by_query=True)
        weights = _weights(view.blocks(query_key), view.windows(key), view.blocks_of_inner(lse)[..., None], view)
        of_scores = _grad_scores(
            view.blocks_of_inner(grad), view.windows(value), view.blocks_of_inner(mean)[..., None], weights
        )
        del weights
        grad_query = torch.bmm(of_scores, view.windows(key))
        del of_scores
        view = _Blocks(stream, by_query=False)
        lse, grad, mean = (_with_margin(x, stream.margin) for x in (lse, grad, mean))
        weights = _weights(view.blocks(key), view.windows(query_key), view.windows(lse)[:, None], view)
        grad_value = torch.bmm(weights, view.windows(grad))
        of_scores = _grad_scores(
            view.blocks(value), view.windows(grad), view.windows(mean)[:, None], weights
        )
        del weights
        grad_key = torch.bmm(of_scores, view.windows(query_key))
        grad_key.mul_(view.blocks(stream.factor)[..., None])
        return grad_query.flatten(0, 1), grad_key.flatten(0, 1), grad_value.flatten(0, 1)


def _keys(stream: Stream) -> Tensor:
    """(L, D): query-keys times their factors, in the dtype of the rows."""
    return (stream.rows[:, 0] * stream.factor[:, None]).to(stream.rows.dtype)


def _with_margin(x: Tensor, margin: int) -> Tensor:
    """(R·n·P, …) → (L, …), with 0 at both ends."""
    return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 1), margin, margin))


def _weights(a: Tensor, b: Tensor, lse: Tensor, view: _Blocks) -> Tensor:
    """exp(scores − lse) of allowed pairs, 0 of others: (G, b, K) in the dtype of a."""
    scores = _scores(a, b).sub_(lse)
    weights = torch.exp(scores, out=a.new_empty(scores.shape))
    del scores
    return weights.masked_fill_(view.forbidden(), 0)


def _grad_scores(a: Tensor, b: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """weights · (a·b − mean): (G, b, K) in the dtype of a."""
    scores = _scores(a, b).sub_(mean)
    return torch.mul(scores, weights, out=a.new_empty(scores.shape))


class _Blocks:
    """Blocks of queries with the keys that they read, or blocks of keys with the queries that read them."""

    def __init__(self, stream: Stream, *, by_query: bool) -> None:
        window = stream.window
        self.stream, self.window, self.by_query = stream, window, by_query
        back, ahead = (window.back, window.ahead) if by_query else (window.ahead, window.back)
        self.start = stream.margin - back
        self.end = len(stream.index) - stream.margin + ahead

    def blocks(self, x: Tensor) -> Tensor:
        """(L, …) → (G, b, …), a view."""
        return self.blocks_of_inner(self.stream.inner(x))

    def blocks_of_inner(self, x: Tensor) -> Tensor:
        """(R·n·P, …) → (G, b, …), a view."""
        return x.unflatten(0, (-1, self.window.block))

    def windows(self, x: Tensor) -> Tensor:
        """(L, …) → (G, K, …), an overlapping view."""
        return x[self.start : self.end].unfold(0, self.window.keys, self.window.block).movedim(-1, 1)

    def forbidden(self) -> Tensor:
        """(G, b, K) bool: pairs that a round does not read, or that an earlier round reads."""
        rounds, sequences, positions = self.stream.shape
        low, high = self.window.read
        own = self._own_code()
        forbidden = self._outside(own, 0, low + self.window.band * self.window.causal, high)
        if not (self.window.band and self.window.causal):
            # codes say it of the band only: there they differ by the distance in the bucket
            forbidden.logical_or_(self._wrong_order(forbidden.device))
        for earlier in range(rounds - 1):
            # the order of two tokens of a bucket is the same in every round
            first = (earlier + 1) * sequences * positions // self.window.block
            outside = self._outside(self.stream.code[earlier], first, low, high)
            forbidden[first:].logical_or_(outside.logical_not_())
        return forbidden

    def _outside(self, code: Tensor, first: int, low: int, high: int) -> Tensor:
        """(G − first, b, K) bool: code(query) − code(key) is below `low` or above `high`."""
        block, window = self.blocks(code)[first:, :, None], self.windows(code)[first:, None, :]
        if self.by_query:
            return (window > block - low).logical_or_(window < block - high)
        return (window < block + low).logical_or_(window > block + high)

    def _own_code(self) -> Tensor:
        """(L,): the codes of the round in which a row lies; different in neighbouring sequences."""
        stream = self.stream
        rounds, sequences, positions = stream.shape
        inner = stream.code[:, stream.margin : stream.code.shape[1] - stream.margin]
        by_round = inner.view(rounds, rounds, -1).diagonal().movedim(-1, 0)  # (R, n·P)
        other = torch.arange(rounds * sequences, device=inner.device) % 2
        other = other.to(inner.dtype).mul_(torch.iinfo(inner.dtype).max // 4)
        own = by_round.reshape(rounds * sequences, positions) + other[:, None]
        return torch.nn.functional.pad(
            own.flatten(), (stream.margin, stream.margin), value=torch.iinfo(inner.dtype).min // 2
        )

    def _wrong_order(self, device: torch.device) -> Tensor:
        """(b, K) bool: pairs that the positions forbid."""
        window = self.window
        inner = torch.arange(window.block, device=device)[:, None]
        other = torch.arange(window.keys, device=device) - (window.back if self.by_query else window.ahead)
        query, key = (inner, other) if self.by_query else (other, inner)
        return key >= query if window.causal else key == query
