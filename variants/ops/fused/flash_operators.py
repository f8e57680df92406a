"""The operators of flash attention: for CUDA, for tests on a CPU, and for plans.

`flash` states the contract. CUDA: torch's own build of the kernels, by the operations
`aten._flash_attention_forward` and `…_backward`. `torch.nn.attention.varlen` calls the same kernels, but its
backward pass accepts no logsumexp of a softmax over more keys. CPU: a plain oracle for tests.

Shapes: B batch, T queries, S keys, H heads, D channels of a head; N packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.fused.backends import note_work

FORWARD_PRODUCTS = 2
"""The scores, and the weighted sum of V."""
BACKWARD_PRODUCTS = 5
"""The scores again, and the gradients of V, the weights, Q and K."""
UNLIMITED = -1
"""A side of the window without a limit."""
_SCHEMA = (
    "int left, int right, int[] queries, int[] keys, Tensor? q_offsets, Tensor? k_offsets, int pairs, "
    "float scale"
)


class Knobs(NamedTuple):
    """The arguments of the operators after the tensors, in the order of `_SCHEMA`."""

    left: int
    right: int
    queries: list[int]
    """Number of queries of each packed sequence, or their maximum if there are offsets; empty: not packed."""
    keys: list[int]
    q_offsets: Tensor | None
    """int32: the first query of each packed sequence, and the end of the last; None: from `queries`."""
    k_offsets: Tensor | None
    pairs: int
    """Allowed pairs of all sequences, of one head: for counting only."""
    scale: float


@torch.library.custom_op(
    "longctx_bench::flash",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)",
)
def forward(q: Tensor, k: Tensor, v: Tensor, *knobs: Any) -> tuple[Tensor, Tensor]:
    """Outputs and logsumexp; the oracle, one sequence after the other."""
    given = Knobs(*knobs)
    y, lse = _empty_outputs(q, given)
    for q_at, k_at in _places(q, given):
        scores = _scores(q[q_at], k[k_at], given)  # (H, T, S)
        rows = scores.logsumexp(-1)
        rows = rows.masked_fill(rows == -torch.inf, torch.inf)
        weights = (scores - rows[..., None]).exp()
        y[q_at] = (weights @ v[k_at].to(weights.dtype).transpose(0, 1)).transpose(0, 1).to(y.dtype)
        _rows(lse, q_at).copy_(rows)
    return y, lse


@torch.library.custom_op(
    "longctx_bench::flash_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, {_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *knobs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the oracle."""
    given = Knobs(*knobs)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for q_at, k_at in _places(q, given):
        weights = (_scores(q[q_at], k[k_at], given) - _rows(lse, q_at)[..., None]).exp()  # (H, T, S)
        q_s, k_s, v_s, y_s, dy_s = (
            t.to(weights.dtype).transpose(0, 1) for t in (q[q_at], k[k_at], v[k_at], y[q_at], dy[q_at])
        )  # (H, T or S, D)
        mean = (dy_s * y_s).sum(-1, keepdim=True)
        d_scores = weights * (dy_s @ v_s.transpose(1, 2) - mean) * given.scale
        dq[q_at] = (d_scores @ k_s).transpose(0, 1).to(q.dtype)
        dk[k_at] = (d_scores.transpose(1, 2) @ q_s).transpose(0, 1).to(k.dtype)
        dv[k_at] = (weights.transpose(1, 2) @ dy_s).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


Place = int | slice
"""Of a sequence: its index in a batch, or its tokens among packed ones."""


def _places(q: Tensor, given: Knobs) -> Iterator[tuple[Place, Place]]:
    """Where the queries and the keys of each sequence are."""
    if not given.queries:
        yield from ((sequence, sequence) for sequence in range(len(q)))
        return
    yield from zip(*(_spans(ends.tolist()) for ends in _both_offsets(given, q.device)), strict=True)


def _spans(ends: list[int]) -> Iterator[slice]:
    return (slice(first, last) for first, last in pairwise(ends))


def _both_offsets(given: Knobs, device: torch.device) -> tuple[Tensor, Tensor]:
    """The offsets of queries and of keys."""
    if given.q_offsets is None or given.k_offsets is None:
        return _offsets(tuple(given.queries), device), _offsets(tuple(given.keys), device)
    return given.q_offsets, given.k_offsets


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last: int32."""
    ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0)
    return ends.to(device, torch.int32)


def _rows(lse: Tensor, place: Place) -> Tensor:
    """The logsumexp (H, T) of a sequence, a view."""
    return lse[place] if isinstance(place, int) else lse[:, place]


def _scores(q: Tensor, k: Tensor, given: Knobs) -> Tensor:
    """(T, H, D), (S, H, D) → scaled scores (H, T, S), −∞ where the window forbids."""
    wide = _row_dtype(q)
    scores = q.to(wide).transpose(0, 1) @ k.to(wide).permute(1, 2, 0) * given.scale
    position = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    ahead = torch.arange(len(k), device=q.device) - position
    forbidden = torch.zeros_like(ahead, dtype=torch.bool)
    if given.left != UNLIMITED:
        forbidden |= ahead < -given.left
    if given.right != UNLIMITED:
        forbidden |= ahead > given.right
    return scores.masked_fill_(forbidden, -torch.inf)


def _row_dtype(q: Tensor) -> torch.dtype:
    """Sums are float32 because rows are long; float64 for tests of gradients."""
    return torch.promote_types(q.dtype, torch.float32)


def _empty_outputs(q: Tensor, given: Knobs) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[-3], q.shape[-2]
    rows = (heads, tokens) if given.queries else (q.shape[0], heads, tokens)
    return torch.empty_like(q), q.new_empty(rows, dtype=_row_dtype(q))


# --- CUDA -----------------------------------------------------------------------------------------


def _lengths(q: Tensor, k: Tensor, given: Knobs) -> tuple[Any, ...]:
    """Arguments of the kernels: offsets of queries and keys, and the largest lengths."""
    if not given.queries:
        return None, None, q.shape[1], k.shape[1]
    return *_both_offsets(given, q.device), max(given.queries), max(given.keys)


def _named(given: Knobs) -> dict[str, Any]:
    """Arguments of the kernels by name; there, too, a negative side of the window has no limit."""
    return {"scale": given.scale, "window_size_left": given.left, "window_size_right": given.right}


def _is_causal(given: Knobs) -> bool:
    """Whether the kernels take the form that is specialised for a triangle."""
    return given.left == UNLIMITED and given.right == 0


@forward.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, *knobs: Any) -> tuple[Tensor, Tensor]:
    given = Knobs(*knobs)
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(q, k, given), 0.0, _is_causal(given), False, **_named(given)
    )
    return y, lse


@_backward.register_kernel("cuda")
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *knobs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = Knobs(*knobs)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of the dropout
    lengths = _lengths(q, k, given)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dy, q, k, v, y, lse, *lengths, 0.0, _is_causal(given), unused, unused, **_named(given)
    )
    return dq, dk, dv


# --- shapes, gradients, work ----------------------------------------------------------------------


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *knobs: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, Knobs(*knobs))


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
    q, k, v, *knobs = inputs
    given = Knobs(*knobs)
    ctx.knobs = given._replace(q_offsets=None, k_offsets=None)
    ctx.save_for_backward(q, k, v, *output, given.q_offsets, given.k_offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in place of the gradient of the logsumexp


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, q_offsets, k_offsets = ctx.saved_tensors
    given = ctx.knobs._replace(q_offsets=q_offsets, k_offsets=k_offsets)
    return *backward(dy, *tensors, *given), *(None for _ in given)


forward.register_autograd(_differentiate, setup_context=_save)


def allowed_pairs(queries: int, keys: int, left: int, right: int) -> int:
    """The number of pairs (query, key) of one sequence and head that a window allows."""
    farthest = queries + keys  # more than any distance
    ahead = farthest if right == UNLIMITED else right
    behind = farthest if left == UNLIMITED else left
    return _pairs_up_to(queries, keys, ahead) - _pairs_up_to(queries, keys, -behind - 1)


def _pairs_up_to(queries: int, keys: int, distance: int) -> int:
    """The number of pairs whose key is at most `distance` after the position of the query.

    The query at position p has p + distance + 1 such keys, but not less than 0 and not more than there are.
    """

    def first_sum(n: int) -> int:
        """0 + 1 + … + n, each number at most `keys`."""
        inside = max(0, min(n, keys))
        return inside * (inside + 1) // 2 + max(0, n - keys) * keys

    last = keys + distance
    return first_sum(last) - first_sum(last - queries)


def _product_flops(q: Tensor, knobs: tuple[Any, ...]) -> int:
    """FLOPs of one product of allowed pairs × channels."""
    return 2 * Knobs(*knobs).pairs * q.shape[-2] * q.shape[-1]


@register_flop_formula(torch.ops.longctx_bench.flash, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, *knobs: Any, out_val: Any = None) -> int:
    return FORWARD_PRODUCTS * _product_flops(q, knobs)


@register_flop_formula(torch.ops.longctx_bench.flash_backward, get_raw=True)
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *knobs: Any, out_val: Any = None
) -> int:
    return BACKWARD_PRODUCTS * _product_flops(q, knobs)
