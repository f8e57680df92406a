"""A convolution over tokens and modules of channels, as over the height and width of an image.

Products of matrices, not torch's convolution: on an accelerator, that rounds factors in float32 to 10 bits by
default (TF32), and its layouts depend on the device. The numbers that outputs read are copied side by side in
pieces of the sequence, for the backward pass again; only the two inputs are saved.

Shapes: B batch, T tokens, S modules of M channels, P maps with N outputs of a module; a kernel reads F tokens
and L modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**19, accelerator=2**27)
"""Numbers that are copied at a time, of all sequences together."""
PIECES = 32
"""Maximum number of pieces. Longer sequences have longer pieces, which bounds the operations."""


def _pieces(z: Tensor, weight: Tensor, device_type: str) -> Iterator[tuple[int, int]]:
    """First and last + 1 token of the pieces."""
    batch, _, modules, _ = z.shape
    tokens = z.shape[1] - weight.shape[1] + 1
    each = batch * modules * weight[0].numel()
    length = max(1, PIECE.on(device_type) // each, -(-tokens // PIECES))
    for first in range(0, tokens, length):
        yield first, min(tokens, first + length)


def _columns(z: Tensor, weight: Tensor, first: int, end: int) -> Tensor:
    """What the outputs of a piece of n tokens read: (B·n·S, F·L·M)."""
    _, tokens, modules, _ = weight.shape
    beyond = modules // 2
    read = F.pad(z[:, first : end + tokens - 1], (0, 0, beyond, beyond))
    windows = read.unfold(1, tokens, 1).unfold(2, modules, 1)  # (B, n, S, M, F, L)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, weight[0].numel())


def _outputs(z: Tensor, weight: Tensor, maps: int, first: int, end: int) -> Tensor:
    """The outputs of a piece: (B, n, P, S, N)."""
    product = _columns(z, weight, first, end) @ weight.flatten(1).T
    return product.view(len(z), end - first, z.shape[2], maps, -1).transpose(2, 3)


@repeatable
class _ModuleConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, maps: int, device_type: str) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.device_type = device_type
        y = z.new_empty(len(z), z.shape[1] - weight.shape[1] + 1, maps, z.shape[2], len(weight) // maps)
        for first, end in _pieces(z, weight, device_type):
            y[:, first:end] = _outputs(z, weight, maps, first, end)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sums are float32 or wider. A piece adds to the gradients of F − 1 tokens before it too."""
        z, weight = ctx.saved_tensors
        _, tokens, modules, _ = weight.shape
        count, beyond, wide = z.shape[2], modules // 2, torch.promote_types(z.dtype, torch.float32)
        of_z = z.new_zeros(*z.shape[:2], count + 2 * beyond, z.shape[3], dtype=wide)
        of_weight = weight.new_zeros(len(weight), weight[0].numel(), dtype=wide)
        for first, end in _pieces(z, weight, ctx.device_type):
            own = grad[:, first:end].transpose(2, 3).reshape(-1, len(weight))
            of_weight += own.T @ _columns(z, weight, first, end)
            parts = (own @ weight.flatten(1)).view(len(z), end - first, count, *weight.shape[1:])
            for token in range(tokens):
                for module in range(modules):
                    read = of_z[:, first + token : end + token, module : module + count]
                    read += parts[..., token, module, :]
        own_modules = of_z[:, :, beyond : beyond + count]
        return own_modules.to(z.dtype), of_weight.view_as(weight).to(weight.dtype), None, None


def module_convolution(z: Tensor, weight: Tensor, *, maps: int, device_type: str) -> Tensor:
    """y_{t,s} = Σ_{f,l} weight_{f,l} z_{t + f, s + l − L // 2}, where z is 0 beyond the modules; P times.

    z is (B, F − 1 + T, S, M), with the tokens before the first output; `weight` is (P·N, F, L, M) with odd L.
    → (B, T, P, S, N).
    """
    weight = weight.to(z.dtype)
    if z.shape[1] == weight.shape[1]:  # a single token, as in decoding: nothing to divide
        return _outputs(z, weight, maps, 0, 1)
    y: Tensor = _ModuleConvolution.apply(z, weight, maps, device_type)  # type: ignore[no-untyped-call]
    return y
