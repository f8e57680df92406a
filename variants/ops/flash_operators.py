"""The operators of flash attention: for CUDA, for tests on a CPU, and for plans.

`variants.ops.flash` states the contract. CUDA: torch's own build of the kernels, by the operations
`aten._flash_attention_forward` and `…_backward`. `torch.nn.attention.varlen` calls the same kernels, but its
backward pass accepts no logsumexp of a softmax over more keys. CPU: a plain oracle for tests.

Shapes: B batch, T queries, S keys, H heads, D channels of a head; N packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.backends import note_work

BACKWARD_PRODUCTS = 5
"""The scores again, and the gradients of V, the weights, Q and K."""
UNLIMITED = -1
"""A side of the window without a limit."""


# --- operators ------------------------------------------------------------------------------------

_KNOBS = "int left, int right, int[] queries, int[] keys, float scale"


@torch.library.custom_op(
    "longctx_bench::flash",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, {_KNOBS}) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, queries: list[int], keys: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs and logsumexp; the oracle, one sequence after the other. An empty list: not packed."""
    y, lse = _empty_outputs(q, queries)
    for q_at, k_at in _slices(q, k, queries, keys):
        scores = _scores(q[q_at], k[k_at], left, right, scale)  # (H, T, S)
        row_lse = scores.logsumexp(-1)
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
        weights = (scores - row_lse[..., None]).exp()
        y[q_at] = (weights @ v[k_at].to(weights.dtype).transpose(0, 1)).transpose(0, 1).to(y.dtype)
        _rows(lse, q_at).copy_(row_lse)
    return y, lse


@torch.library.custom_op(
    "longctx_bench::flash_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, {_KNOBS})"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    queries: list[int],
    keys: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the oracle."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for q_at, k_at in _slices(q, k, queries, keys):
        scores = _scores(q[q_at], k[k_at], left, right, scale)
        weights = (scores - _rows(lse, q_at)[..., None]).exp()  # (H, T, S)
        q_s, k_s, v_s, y_s, dy_s = (
            t.to(weights.dtype).transpose(0, 1) for t in (q[q_at], k[k_at], v[k_at], y[q_at], dy[q_at])
        )  # (H, T or S, D)
        mean = (dy_s * y_s).sum(-1, keepdim=True)
        d_scores = weights * (dy_s @ v_s.transpose(1, 2) - mean) * scale
        dq[q_at] = (d_scores @ k_s).transpose(0, 1).to(q.dtype)
        dk[k_at] = (d_scores.transpose(1, 2) @ q_s).transpose(0, 1).to(k.dtype)
        dv[k_at] = (weights.transpose(1, 2) @ dy_s).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


Place = int | slice
"""Of a sequence: its index in a batch, or its tokens among packed ones."""


def _slices(
    q: Tensor, k: Tensor, queries: Sequence[int], keys: Sequence[int]
) -> Iterator[tuple[Place, Place]]:
    """Where the queries and the keys of each sequence are."""
    yield from ((sequence, sequence) for sequence in range(0 if queries else len(q)))
    q_end = k_end = 0
    for q_length, k_length in zip(queries, keys, strict=True):
        q_end, k_end = q_end + q_length, k_end + k_length
        yield slice(q_end - q_length, q_end), slice(k_end - k_length, k_end)


def _rows(lse: Tensor, place: Place) -> Tensor:
    """The logsumexp (H, T) of a sequence, a view."""
    return lse[place] if isinstance(place, int) else lse[:, place]


def _scores(q: Tensor, k: Tensor, left: int, right: int, scale: float) -> Tensor:
    """(T, H, D), (S, H, D) → scaled scores (H, T, S), −∞ where the window forbids."""
    wide = _row_dtype(q)
    scores = q.to(wide).transpose(0, 1) @ k.to(wide).permute(1, 2, 0) * scale
    position = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    ahead = torch.arange(len(k), device=q.device) - position
    forbidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left != UNLIMITED:
        forbidden |= ahead < -left
    if right != UNLIMITED:
        forbidden |= ahead > right
    return scores.masked_fill_(forbidden, -torch.inf)


def _row_dtype(q: Tensor) -> torch.dtype:
    """Sums are float32 because rows are long; float64 for tests of gradients."""
    return torch.promote_types(q.dtype, torch.float32)


def _empty_outputs(q: Tensor, queries: Sequence[int]) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[-3], q.shape[-2]
    rows = (heads, tokens) if queries else (q.shape[0], heads, tokens)
    return torch.empty_like(q), q.new_empty(rows, dtype=_row_dtype(q))


# --- CUDA -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last: int32."""
    ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0)
    return ends.to(device, torch.int32)


def _lengths(q: Tensor, k: Tensor, queries: list[int], keys: list[int]) -> tuple[Any, ...]:
    """Arguments of the kernels: offsets of queries and keys, and the largest lengths."""
    if not queries:
        return None, None, q.shape[1], k.shape[1]
    offsets = (_offsets(tuple(lengths), q.device) for lengths in (queries, keys))
    return *offsets, max(queries), max(keys)


def _sides(left: int, right: int) -> dict[str, int]:
    """Arguments of the kernels for the window; there, too, a negative side has no limit."""
    return {"window_size_left": left, "window_size_right": right}


@forward.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, queries: list[int], keys: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    lengths = _lengths(q, k, queries, keys)
    is_causal = left == UNLIMITED and right == 0
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, is_causal, False, scale=scale, **_sides(left, right)
    )
    return y, lse


@_backward.register_kernel("cuda")
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    queries: list[int],
    keys: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(q, k, queries, keys)
    is_causal = left == UNLIMITED and right == 0
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of the dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dy, q, k, v, y, lse, *lengths, 0.0, is_causal, unused, unused, scale=scale, **_sides(left, right)
    )
    return dq, dk, dv


# --- shapes, gradients, work ----------------------------------------------------------------------


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, queries: list[int], *_: Any
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, queries)


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, and a report of the launches and bytes that it does not show.

    torch's kernel has three launches (flash_bwd_launch_template.h): the row sums of dy · y, which also clear
    a float32 gradient of q; the main kernel, which adds to it; and its conversion to the dtype of q. The
    rounding of lengths to whole tiles is not counted.
    """
    dy, y = dy.contiguous(), y.contiguous()  # the kernel would copy them unseen
    rows, accumulated = 4 * q.numel() // q.shape[-1], 4 * q.numel()
    again = dy.numel() * dy.element_size()  # the row sums and the main kernel both read dy
    note_work(0, 2, again + 2 * rows + 4 * accumulated)
    dq, dk, dv = _backward(dy, q, k, v, y, *others)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.knobs = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in place of the gradient of the logsumexp


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *backward(dy, *ctx.saved_tensors, *ctx.knobs), *(None for _ in ctx.knobs)


forward.register_autograd(_differentiate, setup_context=_save)


def _sequences(q: Tensor, k: Tensor, queries: Sequence[int], keys: Sequence[int]) -> list[tuple[int, int]]:
    """Number of queries and keys of each sequence."""
    if not queries:
        return [(q.shape[1], k.shape[1])] * q.shape[0]
    return list(zip(queries, keys, strict=True))


@lru_cache(maxsize=1024)
def allowed_pairs(queries: int, keys: int, left: int, right: int) -> int:
    """The number of pairs (query, key) of one sequence and head that a window allows; `UNLIMITED` is −1."""
    total = 0
    for position in range(keys - queries, keys):
        first = 0 if left == UNLIMITED else max(0, position - left)
        last = keys - 1 if right == UNLIMITED else min(keys - 1, position + right)
        total += max(0, last - first + 1)
    return total


def _product_flops(
    q: Tensor, k: Tensor, left: int, right: int, queries: Sequence[int], keys: Sequence[int]
) -> int:
    """FLOPs of one product of allowed pairs × channels."""
    pairs = sum(allowed_pairs(*lengths, left, right) for lengths in _sequences(q, k, queries, keys))
    return 2 * pairs * q.shape[-2] * q.shape[-1]


@register_flop_formula(torch.ops.longctx_bench.flash, get_raw=True)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    queries: list[int],
    keys: list[int],
    scale: float,
    out_val: Any = None,
) -> int:
    return 2 * _product_flops(q, k, left, right, queries, keys)


@register_flop_formula(torch.ops.longctx_bench.flash_backward, get_raw=True)
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    queries: list[int],
    keys: list[int],
    scale: float,
    out_val: Any = None,
) -> int:
    return BACKWARD_PRODUCTS * _product_flops(q, k, left, right, queries, keys)
