"""The real part of the Fourier transform along tokens and channels, and the FLOPs of fast transforms.

Shapes: B batch, T tokens, C channels.

FLOPs of fast transforms: 5·N·log₂ N real operations for N complex numbers, for any N. It is the count of the
algorithm of Cooley and Tukey: ½ N log₂ N steps, each with a complex product (6 operations) and two complex
sums (2 each). A transform of real numbers counts half of it. torch has no formula for these operations, so
importing this module registers one, and a counter of dispatched FLOPs includes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from variants.ops.memoizable import repeatable


def fft_flops(transforms: int, size: int, *, real: bool = False) -> int:
    """FLOPs of so many transforms of `size` complex numbers, or real ones."""
    return transforms * round((2.5 if real else 5) * size * math.log2(size))


def real_fourier_flops(batch_size: int, seq_len: int, channels: int) -> int:
    """FLOPs of `real_fourier`: real transforms of the channels of each token, then complex ones of the tokens
    of half of the channels."""
    of_channels = fft_flops(batch_size * seq_len, channels, real=True)
    return of_channels + fft_flops(batch_size * (channels // 2 + 1), seq_len)


@register_flop_formula(torch.ops.aten._fft_r2c)
def _r2c_flops(shape: Any, dim: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The last dimension is that of the real transforms."""
    *others, last = dim
    of_last = fft_flops(math.prod(shape) // shape[last], shape[last], real=True)
    return of_last + sum(fft_flops(math.prod(out_shape) // shape[d], shape[d]) for d in others)


@register_flop_formula(torch.ops.aten._fft_c2c)
def _c2c_flops(shape: Any, dim: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Complex transforms of every dimension."""
    return sum(fft_flops(math.prod(shape) // shape[d], shape[d]) for d in dim)


def _real_part(x: Tensor, norm: str) -> Tensor:
    """Re(F_T x F_C), from the transforms of half of the channels: those of real numbers are symmetric."""
    channels = x.shape[-1]
    half = channels // 2 + 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # channels first, because their transforms are real
    found = torch.view_as_real(torch.fft.rfft2(wide, dim=(1, 2), norm=norm))[..., 0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y[..., :half] = found
    # channel C − c at frequency t is the conjugate of channel c at frequency −t
    mirrored = found[..., 1 : channels - half + 1].flip(-1)
    y[:, :1, half:] = mirrored[:, :1]
    y[:, 1:, half:] = mirrored[:, 1:].flip(1)
    return y


@repeatable
class _RealFourier(torch.autograd.Function):
    """The cosines and sines of both transforms are symmetric matrices, so the map is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str) -> Tensor:
        ctx.norm = norm
        return _real_part(x, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _real_part(grad, ctx.norm), None


def real_fourier(x: Tensor, *, ortho: bool) -> Tensor:
    """The real part of the Fourier transform along tokens and channels: (B, T, C) → (B, T, C).

    `ortho`: divided by √(T·C), so that the complex transform keeps lengths. Nothing is saved for the backward
    pass.
    """
    y: Tensor = _RealFourier.apply(x, "ortho" if ortho else "backward")  # type: ignore[no-untyped-call]
    return y
