"""General attention kernels of other libraries: FlexAttention (torch) and xformers.

Shapes: B batch, T tokens, H heads, D channels of a head; n blocks of `BLOCK` tokens.

This module does not choose a kernel: the `impl` of a variant names it, and `missing_…` returns the reason why
it cannot run. The libraries are imported when they are used. The FLOPs of each kernel are in torch's registry
of formulas. The kernels of xformers are wrapped in operators; for FlexAttention, `note_work` is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.patterns.masks import HeadRule, depends_on_head

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Side of a tile, in tokens: FlexAttention skips tiles without an allowed pair."""
SMALLEST_HEAD = 16
"""Minimum number of channels of a head for which FlexAttention's kernel compiles."""
MASKS, GRAPHS = 32, 64
"""Maximum number of cached block masks, and of compiled kernels in a process. More kernels raise an error.
Without it, torch would silently run uncompiled and compute T × T scores."""
FLEX_OVERHEAD = f"flex computes all pairs of a tile of {BLOCK} × {BLOCK} if any pair in it is allowed"

# --- FLOPs of compiled kernels, whose operations a counter does not see ---------------------------


@torch.library.custom_op(
    "longctx_bench::note_work", mutates_args=(), schema="(int flops, int launches, int bytes_moved) -> ()"
)
def note_work(flops: int, launches: int, bytes_moved: int) -> None:
    """Report the work of a compiled kernel to counters; does nothing else. FLOPs are 2 per
    multiply-accumulate; the FLOP formula of this operator is its argument.
    """


@note_work.register_fake
def _(flops: int, launches: int, bytes_moved: int) -> None:
    """Does nothing."""


@register_flop_formula(torch.ops.longctx_bench.note_work, get_raw=True)
def _reported_flops(flops: int, launches: int, bytes_moved: int, out_val: Any = None) -> int:
    return flops


def note_passes(
    y: Tensor, inputs: tuple[Tensor, ...], product_flops: int, *, backward_products: int
) -> Tensor:
    """Report the work of the forward pass that computed y from the inputs, two products in one launch, and
    that of the backward pass when it runs: the row sums of dy · y, and all gradients. The logsumexp of a row
    is float32. Returns y."""
    given, made = (sum(t.numel() * t.element_size() for t in some) for some in (inputs, (y,)))
    rows = 4 * y.numel() // y.shape[-1]
    note_work(2 * product_flops, 1, given + made + rows)
    if y.requires_grad:
        backward_bytes = 3 * made + 3 * rows + 2 * given
        y.register_hook(lambda _: note_work(backward_products * product_flops, 2, backward_bytes))
    return y


# --- FlexAttention --------------------------------------------------------------------------------


class _Mask(NamedTuple):
    block_mask: BlockMask
    pairs: int
    """Pairs in tiles that are not empty, of all heads of the mask."""


def missing_flex(device: torch.device, head_dim: int) -> str | None:
    """The reason why FlexAttention cannot train on this device, or None."""
    if device.type != "cuda":
        return f"impl=flex needs a CUDA device: FlexAttention has no backward pass on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "impl=flex needs Triton, which FlexAttention is compiled with; it is not installed"
    if head_dim < SMALLEST_HEAD:
        return f"impl=flex needs heads of {SMALLEST_HEAD} channels or more, not {head_dim}"
    return None


def flex(q: Tensor, k: Tensor, v: Tensor, rule: HeadRule) -> Tensor:
    """Softmax attention over the pairs that a rule allows: (B, H, T, D) → (B, H, T, D).

    A query without an allowed key gives 0. Dong 2024, arXiv:2412.05496. On a CPU, T × T scores are computed,
    so that masks can be tested there. Raises NotImplementedError if gradients are required on a device where
    FlexAttention has no backward pass.
    """
    import torch._dynamo as dynamo

    batch, heads, seq_len, head_dim = q.shape
    if q.device.type != "cuda" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise NotImplementedError(missing_flex(q.device, head_dim))
    by_head = depends_on_head(rule)
    mask = _mask(rule, heads if by_head else 1, seq_len, q.device)
    pairs = mask.pairs * (1 if by_head else heads)
    with dynamo.config.patch(recompile_limit=GRAPHS):
        y = _compiled_flex(q.device.type)(q, k, v, block_mask=mask.block_mask, scale=head_dim**-0.5)
    # the backward pass computes scores and the gradient of the weights twice: for Q, and for K and V
    return note_passes(y, (q, k, v), 2 * batch * pairs * head_dim, backward_products=7)


@cache
def _compiled_flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # static shapes, because sizes are fixed within a cell; without `fullgraph` more graphs than the limit
    # would run uncompiled
    backend = "inductor" if device_type == "cuda" else "eager"
    compiled: Any = torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]


@lru_cache(maxsize=MASKS)
def _mask(rule: HeadRule, heads: int, seq_len: int, device: torch.device) -> _Mask:
    """The full, partial and empty tiles of a rule; evaluated for BLOCK queries at a time, never T × T."""
    from torch.nn.attention.flex_attention import BlockMask

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(head, query, key)

    blocks = -(-seq_len // BLOCK)
    head = torch.arange(heads, device=device)[:, None, None]
    key = torch.arange(blocks * BLOCK, device=device)
    strips = []
    for query in torch.arange(seq_len, device=device)[:, None].split(BLOCK):
        allowed = (rule(head, query, key) & (key < seq_len)).expand(heads, -1, -1)
        strips.append(allowed.unflatten(-1, (blocks, BLOCK)).sum((1, 3)))
    pairs = torch.stack(strips, dim=1)  # (H, n, n)
    full = pairs == BLOCK * BLOCK
    partial = (pairs > 0) & ~full
    block_mask = BlockMask.from_kv_blocks(
        *_key_blocks(partial),
        *_key_blocks(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(seq_len, seq_len),
    )
    return _Mask(block_mask, int((pairs > 0).sum()) * BLOCK * BLOCK)


def _key_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(H, n, n) bool → number of chosen key blocks of each query block (1, H, n), and the indices of all key
    blocks, chosen ones first (1, H, n, n)."""
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


# --- xformers -------------------------------------------------------------------------------------


def missing_xformers(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """The reason why xformers cannot train on this device with these heads and dtype, or None."""
    if device.type != "cuda":
        return f"impl=xformers needs a CUDA device: xformers has no kernel on {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "impl=xformers needs the package xformers, which is not installed (pip install xformers)"
    return _refused_by_xformers(device, head_dim, dtype)


def _refused_by_xformers(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """The reason why xformers rejects a small example, or None.

    An example is run because xformers chooses among kernels that differ by device and release.
    """
    prefix = (
        f"impl=xformers does not run heads of {head_dim} channels in {str(dtype).removeprefix('torch.')} here"
    )
    try:
        with torch.enable_grad():
            q = torch.zeros(1, 1, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
            xformers(q, q, q, causal=True).sum().backward()
    except (ImportError, NotImplementedError, ValueError) as refusal:
        lines = [line.strip() for line in str(refusal).splitlines()]
        return f"{prefix}: {'; '.join(line for line in lines if line)}"
    return None


def xformers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention by memory_efficient_attention, (B, H, T, D) → (B, H, T, D).

    Lefaudeux 2022, github.com/facebookresearch/xformers. Raises NotImplementedError with the reason of each
    kernel if no kernel accepts these inputs.
    """
    y, _ = _xformers(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
    by_head: Tensor = y.transpose(1, 2)
    return by_head


def _bias(causal: bool) -> Any:
    from xformers.ops import LowerTriangularMask

    return LowerTriangularMask() if causal else None


@torch.library.custom_op("longctx_bench::xformers", mutates_args=())
def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, D) and logsumexp (B, H, T) of q, k and v (B, T, H, D)."""
    from xformers.ops import memory_efficient_attention_forward_requires_grad as forward

    y, lse = forward(q, k, v, attn_bias=_bias(causal), scale=q.shape[-1] ** -0.5)
    return y, lse


@torch.library.custom_op("longctx_bench::xformers_backward", mutates_args=())
def _xformers_backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B, T, H, D)."""
    from xformers.ops import memory_efficient_attention_backward as backward

    dq, dk, dv = backward(dy, y, lse, q, k, v, attn_bias=_bias(causal), scale=q.shape[-1] ** -0.5)
    return dq, dk, dv


@_xformers.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    batch, seq_len, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, heads, seq_len, dtype=torch.float32)


@_xformers_backward.register_fake
def _(dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_xformers_backward(dy, *ctx.saved_tensors, ctx.causal), None


_xformers.register_autograd(_differentiate, setup_context=_save)


def _product_flops(q: Tensor, causal: bool) -> int:
    """FLOPs of one product of queries × keys × channels."""
    batch, seq_len, heads, head_dim = q.shape
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len * seq_len
    return 2 * batch * heads * pairs * head_dim


@register_flop_formula(torch.ops.longctx_bench.xformers, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, out_val: Any = None) -> int:
    return 2 * _product_flops(q, causal)


@register_flop_formula(torch.ops.longctx_bench.xformers_backward, get_raw=True)
def _(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, out_val: Any = None
) -> int:
    return 5 * _product_flops(q, causal)
