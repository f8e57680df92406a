"""The reference gates: the fast path equals the readable reference in float64, in outputs and in gradients.

One runs in float32, where rounding does not hide errors of the mathematics, on small heads. The other runs in
the cell's own dtype and at its own head size, because kernels differ by both: the kernel that is timed may be
one that the first gate has never called.

Tolerances of a dtype with unit roundoff u (2⁻⁸ for bfloat16). Kernels round their inputs, weights and results
to the dtype and add in float32, so an error does not grow with the length n of a sum beyond √n float32
roundings. Behind a parameter's gradient lie about 24 roundings: projections, rotation, weights, sums and
their gradients. Up to 4 more are of scores, in the forward and the backward pass. A score of unit variance is
below 4.5, so that its rounding changes its weight by up to 4.5 u. Independent errors below a·u have a root
mean square below a·u/√3, and add up to √((24 + 4 · 4.5²)/3) u ≈ 6 u, relative to the root mean square of the
tensor. A single row, such as the output of one token, may have 16 u: a rounded weight changes all channels of
a row alike, and the terms of some rows cancel more than those of others. Both limits are doubled for a
parameter with no more entries than there are channels, such as a bias, or with few entries for each channel,
such as the taps of a short convolution: its gradient is a sum over all tokens, most of which cancels, and no
channel evens out the errors of another.

Measured on a CPU in bfloat16, all variants and implementations that run there, heads of 16 to 128 channels,
70 to 1,000 tokens: root mean square up to 3.9 u, of a row up to 10.9 u (dense by SDPA 2.1 u and 4.4 u), of
biases 5.5 u. The readable references have the same errors in bfloat16. With one or two tokens nearly all of
some gradients cancels, so the gate uses at least 64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.measure.choices import choices_in
from bench.measure.gate_failed import GateFailed, largest
from variants.base import (
    Context,
    Dims,
    FeedForward,
    FeedForwardConfig,
    MakesChoices,
    SequenceMixer,
    VariantConfig,
    scheduled_dims,
    scheduled_reference,
)
from variants.input_schedule import InputSchedule, NetworkOut

Module = TypeVar("Module", bound=torch.nn.Module)

Call = Callable[..., Any]
Wrap = Callable[[Call], Call]
"""Changes the call of a fast path; it may compile it."""


def as_is(call: Call) -> Call:
    """Return the call itself."""
    return call


BATCH = 2
"""Batch size in the gates."""
FEED_FORWARD_TOKENS = 256
"""Sequence length in the gate of the feed-forward layer. Tokens are independent there, but the gradient of a
weight that only a few tokens choose has the rounding errors of each: of 32 channels, with 64 tokens, up to
20 u in a row, and 9 u with 256."""
REFERENCE_TOLERANCE = 1e-4
"""Maximum error of float32 against float64, relative to the largest entry of the tensor. A sum over 1,000
tokens loses about √1000 units in the last place, 4e-6, and a gradient passes through several sums."""
FEWEST_TOKENS = 64
"""Minimum sequence length in the gate of a dtype. A single token's weight is 1, and what its gradients leave
is rounding."""
ROUNDINGS = 6
"""Maximum root mean square of a tensor's errors in a narrower dtype, in unit roundoffs; see the module."""
ROW_ROUNDINGS = 16
"""The same for a single row; see the module."""
MOST_TAPS = 8
"""Entries of a row, at most, of a parameter whose limits are doubled; see the module."""
LEAST_ROW = 1 / 16
"""Errors of a row are relative to this share of the tensor's root mean square, if the row has less."""


class Errors(NamedTuple):
    """Errors of tensors against their references; of several tensors, the largest."""

    rms: float
    """Root mean square of the errors, relative to that of the reference."""
    row_rms: float
    """The same of the row where it is largest. A row runs along the last dimension; one of a tensor of
    several tokens belongs to one token."""

    @classmethod
    def worst(cls, errors: Sequence[Errors]) -> Errors:
        """Return the largest of each."""
        return cls(*(largest(list(each)) for each in zip(*errors, strict=True)))


def tolerance(dtype: torch.dtype, terms: int) -> Errors:
    """Return the errors that rounding to `dtype` explains, for sums of `terms` numbers in float32; see the
    module."""
    unit, sums = (torch.finfo(each).eps / 2 for each in (dtype, torch.float32))
    lost = math.sqrt(terms) * sums
    return Errors(ROUNDINGS * unit + lost, ROW_ROUNDINGS * unit + lost)


def layer_of(variant: type[SequenceMixer], config: VariantConfig, dims: Dims, layer: int) -> SequenceMixer:
    """Return a layer with weights of order 1/√fan-in, so that outputs and their errors are of order 1."""
    torch.manual_seed(layer)
    return unit_weights(variant(config, dims, layer)).eval()


def unit_weights(layer: Module) -> Module:
    """Draw matrices again, of order 1/√fan-in, in place."""
    for parameter in layer.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return layer


def reference_error(
    variant: type[SequenceMixer],
    config: VariantConfig,
    dims: Dims,
    layer: int,
    device: torch.device,
    *,
    causal: bool,
    schedule: InputSchedule | None = None,
    wrap: Wrap = as_is,
) -> float:
    """Return the maximum error of the fast path in float32 against `reference` in float64, over the outputs
    and the gradients of the input and of every parameter, relative to the largest entry of each tensor (or to
    1). `wrap` changes the call of the fast path.

    Raises GateFailed if rounding cannot explain it.
    """
    pairs = _mixer_pairs(variant, config, dims, layer, device, torch.float32, causal, schedule, wrap)
    return _require_equal(f"layer {layer}", pairs)


def dtype_reference_errors(
    variant: type[SequenceMixer],
    config: VariantConfig,
    dims: Dims,
    layer: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    causal: bool,
    schedule: InputSchedule | None = None,
    wrap: Wrap = as_is,
) -> Errors:
    """Return the same comparison for the fast path in `dtype`, by autocast as in a model.

    The reference makes the same discrete choices: see `MakesChoices`. Raises GateFailed if rounding to the
    dtype cannot explain the errors.
    """
    pairs = _mixer_pairs(variant, config, dims, layer, device, dtype, causal, schedule, wrap)
    return _require_rounded(f"layer {layer}", pairs, dtype, BATCH * dims.seq_len)


def feed_forward_error(
    feed_forward: type[FeedForward],
    config: FeedForwardConfig,
    d_model: int,
    device: torch.device,
    *,
    wrap: Wrap = as_is,
) -> float:
    """Return the same error as `reference_error`, for a feed-forward layer. Raises GateFailed."""
    pairs = _feed_forward_pairs(feed_forward, config, d_model, device, torch.float32, wrap)
    return _require_equal("the feed-forward layer", pairs)


def feed_forward_dtype_errors(
    feed_forward: type[FeedForward],
    config: FeedForwardConfig,
    d_model: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Errors:
    """Return the same errors as `dtype_reference_errors`, for a feed-forward layer. Raises GateFailed."""
    pairs = _feed_forward_pairs(feed_forward, config, d_model, device, dtype, as_is)
    return _require_rounded("the feed-forward layer", pairs, dtype, BATCH * FEED_FORWARD_TOKENS)


Pairs = list[tuple[str, Tensor, Tensor]]
"""The name of a tensor, its value by the fast path, and its value by the reference in float64."""


def _mixer_pairs(
    variant: type[SequenceMixer],
    config: VariantConfig,
    dims: Dims,
    layer: int,
    device: torch.device,
    dtype: torch.dtype,
    causal: bool,
    schedule: InputSchedule | None,
    wrap: Wrap,
) -> Pairs:
    """The outputs, and the gradients of the input and of every parameter, of a layer and of its reference."""
    ctx, schedule = Context(causal=causal), schedule or variant.input_schedule(config)
    fast = layer_of(variant, config, scheduled_dims(variant, schedule, dims), layer).to(device)
    slow = copy.deepcopy(fast).double()  # on the same device, so that its random numbers are the same
    _share_choices(fast, slow, dtype)

    network = wrap(lambda window, state: NetworkOut(*fast(window, ctx, state)[:2]))

    return _pairs(
        (fast, lambda x: schedule.stream(network, x, causal=causal)),
        (slow, lambda x: scheduled_reference(slow, schedule, x, ctx)),
        torch.randn(BATCH, dims.seq_len, dims.d_model, device=device),
        dtype,
    )


def _feed_forward_pairs(
    feed_forward: type[FeedForward],
    config: FeedForwardConfig,
    d_model: int,
    device: torch.device,
    dtype: torch.dtype,
    wrap: Wrap,
) -> Pairs:
    torch.manual_seed(0)
    fast = unit_weights(feed_forward(config, d_model)).to(device).eval()
    _share_choices(fast, slow := copy.deepcopy(fast).double(), dtype)
    x = torch.randn(BATCH, FEED_FORWARD_TOKENS, d_model, device=device)
    return _pairs((fast, wrap(lambda x: fast(x).y)), (slow, slow.reference), x, dtype)


def _share_choices(fast: torch.nn.Module, slow: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let a reference make the discrete choices of the fast path, if the layer makes any."""
    if isinstance(fast, MakesChoices):
        own: Any = slow.choices
        slow.choices = choices_in(dtype, fast, own)  # type: ignore[assignment]  # a method of this layer alone


def _pairs(
    fast: tuple[torch.nn.Module, Callable[[Tensor], Tensor]],
    slow: tuple[torch.nn.Module, Callable[[Tensor], Tensor]],
    x: Tensor,
    dtype: torch.dtype,
) -> Pairs:
    """Run both on the same input and backward along the same random direction."""
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = fast[1](x)
    torch.manual_seed(1)
    y64 = slow[1](x64)
    direction = torch.randn_like(y64)
    names = [name for name, p in fast[0].named_parameters() if p.requires_grad]
    roots, roots64 = ([p for p in layer.parameters() if p.requires_grad] for layer, _ in (fast, slow))
    got = torch.autograd.grad(y, [x, *roots], direction.to(y), materialize_grads=True)
    want = torch.autograd.grad(y64, [x64, *roots64], direction, materialize_grads=True)
    gradients = [f"the gradient of {name}" for name in ("the input", *names)]
    return list(zip(["the output", *gradients], (y, *got), (y64, *want), strict=True))


def _require_equal(layer: str, pairs: Pairs) -> float:
    worst = largest([_relative(got, want) for _, got, want in pairs])
    if not worst <= REFERENCE_TOLERANCE:
        raise GateFailed(f"reference gate: {layer} differs from its reference by {worst:.2e}")
    return worst


def _relative(got: Tensor, want: Tensor) -> float:
    scale = max(1.0, want.abs().max().item())
    return (got.detach().double() - want).abs().max().item() / scale


def _require_rounded(layer: str, pairs: Pairs, dtype: torch.dtype, terms: int) -> Errors:
    (_, _, output), *_ = pairs
    errors = [(name, want, _errors(got, want)) for name, got, want in pairs]
    for name, want, found in errors:
        is_sum = want.numel() <= output.shape[-1] or want.shape[-1] <= MOST_TAPS
        cancels = 2 if is_sum and want is not output else 1
        allowed = (cancels * most for most in tolerance(dtype, terms))
        for kind, error, most in zip(("", " in a row"), found, allowed, strict=True):
            if not error <= most:
                raise GateFailed(
                    f"reference gate: {layer} in {str(dtype).removeprefix('torch.')}: {name} differs from "
                    f"its reference by {error:.2e}{kind}; rounding explains {most:.2e}"
                )
    return Errors.worst([found for *_, found in errors])


def _errors(got: Tensor, want: Tensor) -> Errors:
    """The errors of a tensor; absolute ones if the reference is 0."""
    want = want.detach().reshape(-1, want.shape[-1] if want.dim() > 1 else want.numel())
    error = got.detach().double().reshape(want.shape) - want
    size = want.square().mean().sqrt().item() or 1.0
    by_row = want.square().mean(dim=-1).sqrt().clamp(min=LEAST_ROW * size)
    return Errors(
        error.square().mean().sqrt().item() / size,
        (error.square().mean(dim=-1).sqrt() / by_row).max().item(),
    )
