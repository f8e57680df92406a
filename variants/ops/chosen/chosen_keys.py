"""Attention of each query to its own set of keys, chosen by an indexer (DeepSeek-AI 2025, arXiv:2512.02556).

Shapes: B batch, T tokens, P queries of a piece, S keys, K heads of keys, G query heads of each, D channels of
a head, h heads and d channels of the indexer, c keys of a query.

All heads of a query read the same keys. Queries are processed in pieces; scores of the indexer with all keys,
and gathered keys and values, exist for one piece at a time. The backward pass gathers again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

NUMBERS = Sizes(cpu=2**21, accelerator=2**28)
"""Scores of the indexer, or channels of gathered keys, of a piece."""
FEWEST_PIECES, MOST_PIECES = 8, 128
"""Pieces of a sequence: several, because a piece computes what its last query needs for all of its queries;
not too many operations."""

TIE = 1e-30
"""Score of a token of distance: below the rounding of any score but 0."""


def _pieces(first: int, tokens: int, numbers: int, device_type: str) -> Iterator[slice]:
    """Pieces of the queries [first, tokens); `numbers` are those of one query, of all sequences."""
    queries = tokens - first
    step = min(NUMBERS.on(device_type) // numbers, -(-queries // FEWEST_PIECES))
    step = max(1, step, -(-queries // MOST_PIECES))
    for begin in range(first, tokens, step):
        yield slice(begin, min(begin + step, tokens))


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Σ w·ReLU(q·k) over the heads of the indexer, in float32 or wider: queries (B, P, h, d), keys (B, S, d),
    weights (B, P, h) → (B, P, S)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    products = torch.bmm(q.flatten(1, 2), k.mT).relu_().to(wide).unflatten(1, w.shape[1:])
    scores = torch.bmm(w.to(wide).flatten(0, 1)[:, None], products.flatten(0, 1))
    return scores.view(*w.shape[:2], -1)


def best_keys(scores: Tensor, query: Tensor, count: int) -> Tensor:
    """The keys with the largest scores up to each query: scores (B, P, S) of the tokens `query` (P,) →
    (B, P, count). A query with fewer keys has later ones in place of the others.

    After the ReLU many scores are 0. Of these the latest keys are taken, so that a choice does not depend on
    the number of later keys. The scores are changed in place.
    """
    key = torch.arange(scores.shape[2], device=scores.device)
    distance = query[:, None] - key
    scores.sub_(distance * TIE).masked_fill_(distance < 0, -math.inf)
    return scores.topk(count, sorted=False).indices


@repeatable
def _choose(tensors: list[Tensor], picks: Tensor, first: int) -> None:
    """Write the picks (B, P, c) of the queries from `first` on, which have at least c keys."""
    q, k, w = tensors
    query = torch.arange(first, first + q.shape[1], device=q.device)
    picks.copy_(best_keys(index_scores(q, k, w), query, picks.shape[2]))


@torch.no_grad()
def choose(q: Tensor, k: Tensor, w: Tensor, count: int, device_type: str) -> Tensor:
    """The keys that each query reads: those with the largest scores among the keys up to itself, (B, T, c).

    c is `count`, or T. Later keys are masked before the choice. Query t < c has the picks 0 … c − 1, of which
    only those up to t exist. See `index_scores` for the arguments, with P = S = T.
    """
    batch, tokens, heads, _ = q.shape
    count = min(count, tokens)
    picks = torch.arange(count, device=q.device).repeat(batch, tokens, 1)
    with torch.autocast(q.device.type, enabled=False):
        w = w.to(q.dtype)
        for piece in _pieces(count, tokens, batch * heads * tokens, device_type):
            _choose([q[:, piece], k[:, : piece.stop], w[:, piece]], picks[:, piece], piece.start)
    return picks


def _pieces_of_picks(picks: Tensor, channels: int, device_type: str) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the queries, and their picks without those that exist for none of them."""
    batch, tokens, count = picks.shape
    numbers = batch * count * channels
    for first, last in ((0, count), (count, tokens)):
        for piece in _pieces(first, last, numbers, device_type) if first < last else ():
            yield piece, picks[:, piece, : piece.stop]


def _rows(picks: Tensor, tokens: int, heads: int) -> Tensor:
    """Picks (B, P, c) → the rows (B·P·K·c,) of a table (B·T·K, …)."""
    sequence = torch.arange(picks.shape[0], device=picks.device)[:, None, None, None] * tokens
    head = torch.arange(heads, device=picks.device)[:, None]
    return ((picks[:, :, None] + sequence) * heads + head).flatten()


def _missing(picks: Tensor, first: int) -> Tensor | None:
    """Which picks (P, 1, c) of the queries from `first` on do not exist; None if all do."""
    count = picks.shape[2]
    if first >= count - 1:
        return None
    query = torch.arange(first, first + picks.shape[1], device=picks.device)
    return (torch.arange(count, device=picks.device) > query[:, None])[:, None]


def _softmax(scores: Tensor, missing: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Weights (…, c) in float32 or wider; `sizes` are (B, P, heads) of the rows of the scores."""
    if missing is not None:
        scores = scores.view(*sizes, -1).masked_fill(missing, -math.inf).view(scores.shape)
    return scores.softmax(-1)


def _weights(q: Tensor, keys: Tensor, missing: Tensor | None) -> Tensor:
    """Queries (B, P, K, G, D), keys (B·P·K, c, D) → (B·P·K, G, c)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.flatten(0, 2), keys.mT).to(wide) * q.shape[-1] ** -0.5
    return _softmax(scores, missing, (*q.shape[:2], q.shape[2] * q.shape[3]))


def _mean_weights(weights: Tensor, like: Tensor) -> Tensor:
    """The mean of the weights over all heads: (B·P, c)."""
    return weights.view(-1, like.shape[2] * like.shape[3], weights.shape[-1]).mean(1)


def _index_logits(q: Tensor, k: Tensor, w: Tensor, missing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logarithms of the weights of the indexer (B·P, c), and its products (B·P, h, c) before the ReLU, from
    queries (B, P, h, d), chosen keys (B·P, c, d), weights (B, P, h)."""
    products = torch.bmm(q.flatten(0, 1), k.mT)
    scores = torch.bmm(w.to(q.dtype).flatten(0, 1)[:, None], products.relu())[:, 0]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if missing is not None:  # finite, so that 0 times it is 0
        scores = scores.view(*w.shape[:2], -1).masked_fill(missing[:, 0], -1e30).view(scores.shape)
    return scores.log_softmax(-1), products


@repeatable
def _attend(tensors: list[Tensor], tables: list[Tensor], out: list[Tensor], sizes: tuple[int, int]) -> None:
    """Write the outputs of a piece, and add its loss if there is a place for it."""
    (q, q_index, w, picks), (k, v, k_index), (y, *loss) = tensors, tables, out
    first, tokens = sizes
    rows, missing = _rows(picks, tokens, q.shape[2]), _missing(picks, first)
    keys, values = (t.index_select(0, rows).view(-1, picks.shape[2], t.shape[1]) for t in (k, v))
    weights = _weights(q, keys, missing)
    y.copy_(torch.bmm(weights.to(values.dtype), values).view(y.shape))
    if loss:
        target = _mean_weights(weights, q)
        chosen = k_index.index_select(0, _rows(picks, tokens, 1)).view(*target.shape, -1)
        logits, _ = _index_logits(q_index, chosen, w, missing)
        loss[0].add_((torch.xlogy(target, target) - target * logits).sum())


@repeatable
def _attend_backward(
    tensors: list[Tensor],
    tables: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    sizes: tuple[int, int],
) -> None:
    """Write the gradients of the queries of a piece, and add those of keys and values; with a gradient of the
    loss for each query, also those of the indexer."""
    (dy, q, q_index, w, picks, *d_loss), (k, v, k_index), (dq, dq_index, dw) = tensors, tables, grads
    first, tokens = sizes
    rows, missing = _rows(picks, tokens, q.shape[2]), _missing(picks, first)
    keys, values = (t.index_select(0, rows).view(-1, picks.shape[2], t.shape[1]) for t in (k, v))
    weights = _weights(q, keys, missing)
    d_rows, flat = dy.flatten(0, 2), q.flatten(0, 2)
    d_weights = torch.bmm(d_rows, values.mT).to(weights.dtype)
    d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_scores = d_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    dq.copy_(torch.bmm(d_scores, keys).view(dq.shape))
    for total, left, right in ((sums[0], d_scores, flat), (sums[1], weights.to(dy.dtype), d_rows)):
        grad = torch.bmm(left.mT, right).flatten(0, 1)
        total.index_add_(0, rows, grad.to(total.dtype))
    if not d_loss:
        return
    target, rows = _mean_weights(weights, q), _rows(picks, tokens, 1)
    chosen = k_index.index_select(0, rows).view(*target.shape, -1)
    logits, products = _index_logits(q_index, chosen, w, missing)
    d_index = ((logits.exp() - target) * d_loss[0]).to(products.dtype)[:, None]  # (B·P, 1, c)
    of_heads = w.to(products.dtype).flatten(0, 1)[:, :, None]
    dw.copy_(torch.bmm(products.relu(), d_index.mT).view(dw.shape))
    d_products = torch.bmm(of_heads, d_index) * (products > 0)
    dq_index.copy_(torch.bmm(d_products, chosen).view(dq_index.shape))
    d_chosen = torch.bmm(d_products.mT, q_index.flatten(0, 1)).flatten(0, 1)
    sums[2].index_add_(0, rows, d_chosen.to(sums[2].dtype))


class _Chosen(torch.autograd.Function):
    """Outputs (B, T, K, G, D), and the loss. Saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_index: Tensor,
        k_index: Tensor,
        w: Tensor,
        picks: Tensor,
        learns: bool,
        device_type: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, q_index, k_index, w, picks)
        ctx.settings = learns, device_type
        y = torch.empty_like(q)
        loss = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        tokens, tables = q.shape[1], [k.flatten(0, 2), v.flatten(0, 2), k_index.flatten(0, 1)]
        for piece, chosen in _pieces_of_picks(picks, k.shape[2:].numel(), device_type):
            tensors = [*(t[:, piece] for t in (q, q_index, w)), chosen]
            out = [y[:, piece], loss] if learns else [y[:, piece]]
            _attend(tensors, tables, out, (piece.start, tokens))
        return y, loss.div_(len(q) * tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, q_index, k_index, w, picks), (learns, device_type) = ctx.saved_tensors, ctx.settings
        tokens, tables = q.shape[1], [k.flatten(0, 2), v.flatten(0, 2), k_index.flatten(0, 1)]
        wide = torch.promote_types(q.dtype, torch.float32)
        grads = [torch.zeros_like(t) for t in (q, q_index, w)]
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in tables]
        by_token = [d_loss / (len(q) * tokens)] if learns else []
        for piece, chosen in _pieces_of_picks(picks, k.shape[2:].numel(), device_type):
            tensors = [*(t[:, piece] for t in (dy, q, q_index, w)), chosen, *by_token]
            _attend_backward(tensors, tables, [t[:, piece] for t in grads], sums, (piece.start, tokens))
        dk, dv, dk_index = (s.view(t.shape).to(t.dtype) for s, t in zip(sums, (k, v, k_index), strict=True))
        return grads[0], dk, dv, grads[1], dk_index, grads[2], None, None, None


def chosen_attention(
    q: Tensor, k: Tensor, v: Tensor, index: tuple[Tensor, Tensor, Tensor], picks: Tensor, *, device_type: str
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention to the picks (B, T, c) of `choose`, and the loss that trains the indexer.

    Queries (B, H, T, D), keys and values (B, K, T, D) → outputs (B, H, T, D). `index` are queries, keys and
    weights of the indexer (see `choose`). The loss is the mean over queries of KL(p ‖ softmax of the
    indexer's scores) over the picks that exist, where p is the mean of the attention weights of all heads,
    detached. It is None where no gradient is needed.
    """
    rows = q.unflatten(1, (k.shape[1], -1)).permute(0, 3, 1, 2, 4).contiguous()  # (B, T, K, G, D)
    by_key = (t.transpose(1, 2).contiguous() for t in (k, v))
    learns = torch.is_grad_enabled() and index[0].requires_grad
    q_index, k_index, w = index
    y, loss = _Chosen.apply(rows, *by_key, q_index, k_index, w, picks, learns, device_type)  # type: ignore[no-untyped-call]
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2), loss if learns else None
