"""Gated linear recurrences by the kernels of fla-core (flash-linear-attention, Yang 2024).

github.com/fla-org/flash-linear-attention. Shapes: B batch, H heads, T tokens, K channels of queries and keys,
V channels of values; c tokens of a chunk. Tensors of the operators are (B, T, H, …), as in fla-core.

Untried: no device has run this module. It is tested on a CPU, with stand-ins of the same contract, and with
the kernels in Triton's interpreter.

One operator computes outputs, another one gradients. Only the inputs are saved: the backward pass computes
the decays of chunks and their triangular systems again, by the functions which fla-core's own autograd calls.
A planner is told of all launches. It does not see what the kernels allocate, nor the traffic between them: in
the forward pass the states before all chunks (K·V numbers for c tokens of a head) and a few tensors of the
size of the values, in the backward pass about three times as much.

Decays are summed within a chunk in float32, and their differences taken. The rounding of a sum of −1,000 is a
relative error of 1e-4 of a weight.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.base import Impl
from variants.ops.fused.backends import note_work
from variants.ops.recurrences.delta_chunks import LEAST_SQUARE
from variants.ops.recurrences.fla_kernels import BLOCK, KERNELS, Products, Rows
from variants.ops.recurrences.fla_products import missing_fla

HOPPER = 9
"""Major number of the compute capability."""
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? logs, str kernel, int chunk, bool unit"
"""Of both operators, in the language of schemas."""


# --- operators ------------------------------------------------------------------------------------


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and the inverse lengths in float32."""
    from fla.modules.norm.l2norm import l2norm_fwd

    found: tuple[Tensor, Tensor] = l2norm_fwd(x, eps=LEAST_SQUARE, output_dtype=dtype)
    return found


def _unit_backward(y: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x."""
    from fla.modules.norm.l2norm import l2norm_bwd

    found: Tensor = l2norm_bwd(y, inverse, grad, eps=LEAST_SQUARE)
    return found


@torch.library.custom_op(
    "longctx_bench::fla_scan",
    mutates_args=(),
    schema=f"({INPUTS}) -> Tensor",
)
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    logs: Tensor | None,
    kernel: str,
    chunk: int,
    unit: bool,
) -> Tensor:
    """Outputs (B, T, H, V) in the dtype of the values. Inputs are contiguous: see `Rows`. With `unit`,
    queries and keys are divided by their lengths first."""
    with torch.accelerator.device_index(q.device.index):
        if unit:
            q, k = (_unit(x, v.dtype)[0] for x in (q, k))
        y = KERNELS[kernel].forward(Rows(q, k, v, beta, logs), chunk)
    return y.to(v.dtype).contiguous()


@torch.library.custom_op(
    "longctx_bench::fla_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {INPUTS}) -> Tensor[]",
)
def _scan_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    logs: Tensor | None,
    kernel: str,
    chunk: int,
    unit: bool,
) -> list[Tensor]:
    """Gradients of the inputs that are not None."""
    given = Rows(q, k, v, beta, logs)
    with torch.accelerator.device_index(q.device.index):
        if unit:
            q, inverse_q = _unit(q, v.dtype)
            k, inverse_k = _unit(k, v.dtype)
        of_q, of_k, *others = KERNELS[kernel].backward(Rows(q, k, v, beta, logs), grad, chunk)
        if unit:
            of_q = _unit_backward(q, inverse_q, of_q)
            of_k = _unit_backward(k, inverse_k, of_k)
    found = [x for x in (of_q, of_k, *others) if x is not None]
    return [a.to(b.dtype).contiguous() for a, b in zip(found, given.given, strict=True)]


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    logs: Tensor | None,
    kernel: str,
    chunk: int,
    unit: bool,
) -> Tensor:
    return torch.empty_like(v)


@_scan_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    logs: Tensor | None,
    kernel: str,
    chunk: int,
    unit: bool,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in Rows(q, k, v, beta, logs).given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once, as checkpointing demands
    kernel, _, unit = ctx.options
    note_work(0, KERNELS[kernel].backward_launches + 4 * unit - 1, 0)
    found = iter(_scan_backward(grad.contiguous(), *saved, *ctx.options))
    return *(None if x is None else next(found) for x in saved), None, None, None


_scan.register_autograd(_gradients, setup_context=_save)


def _flops(work: Products, q: Tensor, v: Tensor, chunk: int) -> int:
    """Whole chunks are computed."""
    batch, seq_len, heads, keys = q.shape
    tokens = batch * heads * -(-seq_len // chunk) * chunk
    return 2 * tokens * work.multiplications(keys, v.shape[-1], chunk)


@register_flop_formula(torch.ops.longctx_bench.fla_scan, get_raw=True)
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Any, logs: Any, kernel: str, chunk: int, *_: Any, **__: Any
) -> int:
    return _flops(KERNELS[kernel].work, q, v, chunk)


@register_flop_formula(torch.ops.longctx_bench.fla_scan_backward, get_raw=True)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Any,
    logs: Any,
    kernel: str,
    chunk: int,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(KERNELS[kernel].backward_work, q, v, chunk)


# --- for layers -----------------------------------------------------------------------------------


def scan(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    logs: Tensor | None,
    *,
    chunk: int,
    dtype: torch.dtype,
    unit: bool = False,
) -> Tensor:
    """Outputs (B, H, T, V) in this dtype, which products have, for queries and keys (B, H, T, K), and values
    (B, H, T, V).

    `beta` (B, H, T, 1) and `logs` (B, H, T, 1 or K) are what the kernel reads, else None. `chunk` is in
    tokens, at most; shorter sequences have shorter chunks. With `unit`, queries and keys are divided by their
    lengths first, in their own dtype. Differentiable.
    """

    def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) → (B, T, H, D)."""
        return x.transpose(1, 2).to(dtype).contiguous()

    allowed = KERNELS[kernel].chunks
    chunk = next((c for c in allowed if c >= min(chunk, q.shape[2])), allowed[-1])
    q, k = (rows(x, x.dtype if unit else dtype) for x in (q, k))
    beta = None if beta is None else rows(beta, torch.float32).squeeze(-1)
    logs = None if logs is None else rows(logs, torch.float32)
    if logs is not None and KERNELS[kernel].decays_heads:
        logs = logs.squeeze(-1)
    note_work(0, KERNELS[kernel].launches + 2 * unit - 1, 0)
    y: Tensor = _scan(q, k, rows(v, dtype), beta, logs, kernel, chunk, unit)
    return y.transpose(1, 2)


def missing_scan(kernel: str, device: torch.device, dtype: torch.dtype, keys: int, values: int) -> str | None:
    """The reason why the kernels cannot run on this device, for heads of so many channels, or None."""
    found = KERNELS[kernel]
    if reason := missing_fla(device):
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return f"impl=fla needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if min(keys, values) < BLOCK:
        return (
            f"impl=fla needs heads of at least {BLOCK} channels of keys and values, not {min(keys, values)}"
        )
    if found.most_keys is not None and keys > found.most_keys:
        return f"impl=fla needs heads of at most {found.most_keys} channels of keys, not {keys}"
    if found.fails_on_hopper and torch.cuda.get_device_capability(device)[0] == HOPPER:
        version = importlib.metadata.version("triton")
        if (3, 4) <= tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 7, 1):
            return (
                f"impl=fla needs Triton 3.7.1 on Hopper: the gradients of {kernel} are wrong with {version}"
            )
    return None


def fla_impl(kernel: str, run: Callable[..., Tensor], *, half_keys: bool = False) -> Impl:
    """The declaration of an implementation by these kernels. With `half_keys`, keys have half as many
    channels as values."""

    def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return missing_scan(kernel, device, dtype, head_dim // 2 if half_keys else head_dim, head_dim)

    return Impl(
        run=run,
        missing=missing,
        flop_overhead_reason=(
            "causal: all pairs of a chunk are computed, the last chunk is padded, and the backward pass "
            "computes the weights and states of chunks again"
        ),
        has_shape_functions=True,
        untried=True,
    )
