"""General attention kernels of others, behind one door: FlexAttention (torch) and xformers.

Shapes: B batch, T tokens, H heads, D channels of a head; n blocks of `BLOCK` tokens.

Nothing here chooses: a variant's `impl` names the kernel, `missing_…` says why it cannot run, and
neither library is imported before then. Each kernel's FLOPs are found in torch's registry of formulas:
xformers' kernels are operators here, and FlexAttention's work is noted by one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.masks import HeadRule, depends_on_head

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens a side of a tile: FlexAttention leaves out the tiles in which no pair is allowed."""
SMALLEST_HEAD = 16
"""Channels of a head below which FlexAttention's kernel does not compile."""
MASKS, GRAPHS = 32, 64
"""Block masks and compiled kernels kept. More kernels than that in one process are an error, because
torch's answer to too many is to run uncompiled: T × T scores and no word of it."""
FLEX_OVERHEAD = f"flex computes tiles of {BLOCK} × {BLOCK} pairs whole if any pair in them is allowed"

# --- what is computed where no operation shows it ------------------------------------------------


@torch.library.custom_op(
    "longctx_bench::note_work", mutates_args=(), schema="(int flops, int launches, int bytes_moved) -> ()"
)
def note_work(flops: int, launches: int, bytes_moved: int) -> None:
    """Does nothing. Its arguments are counted as work: a counter sees the work of a kernel that is compiled
    into one piece. FLOPs are 2 per multiply-accumulate."""


@note_work.register_fake
def _(flops: int, launches: int, bytes_moved: int) -> None:
    """Nor on fake tensors."""


@register_flop_formula(torch.ops.longctx_bench.note_work, get_raw=True)
def _noted(flops: int, launches: int, bytes_moved: int, out_val: Any = None) -> int:
    return flops


def note_passes(
    y: Tensor, inputs: tuple[Tensor, ...], product_flops: int, *, backward_products: int
) -> Tensor:
    """Note the forward pass that gave y, two products in one launch, now, and its backward pass when it
    comes: the row sums of dy · y, and all gradients. The logsumexp of a row is float32."""
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
    """Pairs in the tiles that are not empty, of all heads that the mask tells apart."""


def missing_flex(device: torch.device, head_dim: int) -> str | None:
    """Why FlexAttention cannot train on this device, or None."""
    if device.type != "cuda":
        return f"impl=flex needs a CUDA device: FlexAttention has no backward pass on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "impl=flex needs Triton, which FlexAttention is compiled with; it is not installed"
    if head_dim < SMALLEST_HEAD:
        return f"impl=flex needs heads of {SMALLEST_HEAD} channels or more, not {head_dim}"
    return None


def flex(q: Tensor, k: Tensor, v: Tensor, rule: HeadRule) -> Tensor:
    """Softmax attention over the pairs that a rule allows, (B, H, T, D) → (B, H, T, D); 0 without any.

    Dong 2024, arXiv:2412.05496. On a CPU it computes T × T scores, so that masks can be checked there.

    Raises NotImplementedError where gradients are wanted and the device has none of them.
    """
    import torch._dynamo as dynamo

    batch, heads, seq_len, head_dim = q.shape
    if q.device.type != "cuda" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise NotImplementedError(missing_flex(q.device, head_dim))
    of_its_own = depends_on_head(rule)
    mask = _mask(rule, heads if of_its_own else 1, seq_len, q.device)
    pairs = mask.pairs * (1 if of_its_own else heads)
    with dynamo.config.patch(recompile_limit=GRAPHS):
        y = _compiled_flex(q.device.type)(q, k, v, block_mask=mask.block_mask, scale=head_dim**-0.5)
    # The backward pass computes scores and the weights' gradient once for Q and again for K and V.
    return note_passes(y, (q, k, v), 2 * batch * pairs * head_dim, backward_products=7)


@cache
def _compiled_flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # sizes are fixed within a cell, and without `fullgraph` too many graphs would mean none
    backend = "inductor" if device_type == "cuda" else "eager"
    compiled: Any = torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]


@lru_cache(maxsize=MASKS)
def _mask(rule: HeadRule, heads: int, seq_len: int, device: torch.device) -> _Mask:
    """Which tiles a rule fills, cuts or leaves empty, found a strip of queries at a time: never T × T."""
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
    cut = (pairs > 0) & ~full
    made = BlockMask.from_kv_blocks(
        *_listed(cut), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(seq_len, seq_len)
    )
    return _Mask(made, int((pairs > 0).sum()) * BLOCK * BLOCK)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(H, n, n) bool → how many key blocks a query block has (1, H, n), and all, those first (1, H, n, n)."""
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


# --- xformers -------------------------------------------------------------------------------------


def missing_xformers(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why xformers cannot train on this device with heads and numbers of this kind, or None."""
    if device.type != "cuda":
        return f"impl=xformers needs a CUDA device: xformers has no kernel on {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "impl=xformers needs the package xformers, which is not installed (pip install xformers)"
    return _refused_by_xformers(device, head_dim, dtype)


def _refused_by_xformers(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """What xformers says to a small example: it picks among kernels that differ by device and release."""
    what = (
        f"impl=xformers does not run heads of {head_dim} channels in {str(dtype).removeprefix('torch.')} here"
    )
    try:
        with torch.enable_grad():
            q = torch.zeros(1, 1, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
            xformers(q, q, q, causal=True).sum().backward()
    except (ImportError, NotImplementedError, ValueError) as refusal:
        lines = [line.strip() for line in str(refusal).splitlines()]
        return f"{what}: {'; '.join(line for line in lines if line)}"
    return None


def xformers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention by memory_efficient_attention, (B, H, T, D) → (B, H, T, D).

    Lefaudeux 2022, github.com/facebookresearch/xformers.

    Raises NotImplementedError, naming each kernel's reason, where it has none for these inputs.
    """
    y, _ = _xformers(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
    found: Tensor = y.transpose(1, 2)
    return found


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
    """Gradients of q, k and v."""
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_xformers_backward(dy, *ctx.saved_tensors, ctx.causal), None


_xformers.register_autograd(_differentiate, setup_context=_keep)


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
