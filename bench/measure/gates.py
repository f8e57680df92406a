"""Gates: correctness checks that a variant's configuration must pass before its figures are measured.

1. Causality, by perturbation: tokens after a cut are changed, and no output before the cut may change.
   Gradients cannot show this, because in published code the *selection* of keys leaks, which has no gradient.
2. Reference: the fast path equals the readable reference, in outputs and in every gradient.
3. Recomputation: a strategy for activations gives the same gradients as stored activations, with the same
   random numbers.
4. Cost: the dispatched FLOPs equal those of the formula. It depends on the cell's sizes, so it is checked in
   every cell (`cost_ratio`); the results of the other gates are reused.

Causality and recomputation are checked in the cell's dtype, with autocast as in the cell. The reference is
checked in float32, where rounding does not hide mathematical errors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.config.spec import CellSpec
from bench.measure.cached import load_or_measure
from bench.measure.gate_failed import GateFailed, largest
from bench.measure.gate_sizes import gate_dims
from bench.measure.recompute_gate import recompute_error
from bench.model.slots import LayerSpec
from variants.base import (
    Context,
    Cost,
    Dims,
    FeedForward,
    FeedForwardConfig,
    SequenceMixer,
    SlotSpec,
    VariantConfig,
    known_leak,
    scheduled_dims,
    scheduled_reference,
)
from variants.input_schedule import InputSchedule, NetworkOut

Module = TypeVar("Module", bound=torch.nn.Module)
Call = Callable[..., Any]

BATCH = 2
"""Batch size in the gates."""
FEED_FORWARD_TOKENS = 64
"""Sequence length in the gate of the feed-forward layer. It is short because tokens are independent there."""
LEAK_LAYERS = 4
"""Maximum number of layers in the causality gate; never more than the cell has. If the order of a sum depends
on later tokens, an output changes by a rounding error, which one layer hides when it rounds to bfloat16. With
each further layer, the difference is more likely to change a rounding or a selection, and so to be detected.
With 4 layers all known leaks are detected. A cell with fewer layers does not fail for a leak that only a
deeper model would show."""
LEAK_TOLERANCE = 1e-5
"""Maximum change of an output of order 1 that float32 rounding explains: 84 units in the last place. The same
limit applies to lower precision: the residual sums are float32 in every dtype, and later tokens do not affect
how a number rounds to bfloat16. If one rounding to bfloat16 changes (2⁻⁹, 2e-3), its input depended
on later tokens, and this is enough to change a selection (a hash, a nearest centroid) in a later layer."""
REFERENCE_TOLERANCE = 1e-4
"""Maximum error of float32 against float64, relative to the largest entry of the tensor. A sum over 1,000
tokens loses about √1000 units in the last place, 4e-6, and a gradient passes through several sums."""
COST_TOLERANCE = 0.01
"""Maximum relative difference of dispatched FLOPs and formula without a stated reason."""
COST_LIMIT = 2.2
"""Maximum ratio of dispatched FLOPs to the formula for masks that are gathered in blocks."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Errors that the gates measured, by record key."""

    leak_max_abs: float | None
    """None if the model is not causal."""
    reference_max_abs: float
    recompute_max_abs: float | None
    """None if all activations are stored."""


def check(spec: CellSpec, folder: Path, code_sha256: str) -> Figures:
    """Return the largest errors over the cell's distinct layers. Each is measured once for each experiment,
    code and device, and cached in `folder`.

    Raises GateFailed.
    """
    model, cache, dims = spec.model_spec(), folder / "gates", gate_dims(spec)
    settings = [spec.causal, asdict(dims), repr(model.input), spec.device, spec.dtype, code_sha256]
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)

    def of_layer(layer: LayerSpec, visits: int) -> dict[str, float | None]:
        """Return the errors of a distinct layer that is visited this number of times."""
        mixer, feed_forward = layer.mixer, layer.feed_forward
        leaked = None
        if spec.causal:
            depth = min(LEAK_LAYERS, visits)
            leaked = leak(mixer.layer, mixer.config, dims, depth, device, dtype, schedule=model.input)
        errors = [feed_forward_error(feed_forward.layer, feed_forward.config, dims.d_model, device)]
        errors += [
            reference_error(
                mixer.layer, mixer.config, dims, index, device, causal=spec.causal, schedule=model.input
            )
            for index in range(min(2, visits))
        ]
        return {"leak_max_abs": leaked, "reference_max_abs": largest(errors)}

    def identity(slot: SlotSpec[Any]) -> list[Any]:
        return [slot.name, slot.params]

    errors = []
    for layer, visits in model.kinds(spec.depth).items():
        decides = [identity(layer.mixer), identity(layer.feed_forward), min(LEAK_LAYERS, visits), *settings]
        take = partial(of_layer, layer, visits)
        errors.append(load_or_measure(cache, decides, take, {"leak_max_abs", "reference_max_abs"}))
    recomputed = None
    if spec.activations != "keep":
        layers = min(spec.depth, max(2, len(model.layers)))
        decides = [[identity(layer.mixer), identity(layer.feed_forward)] for layer in model.layers]
        decides += [identity(model.depth), layers, spec.activations, spec.model.ff_chunks, *settings]
        decides += [spec.compile] * spec.is_compiled
        (recomputed,) = load_or_measure(
            cache,
            decides,
            lambda: {"recompute_max_abs": recompute_error(spec, dims, layers, device)},
            {"recompute_max_abs"},
        ).values()
    return Figures(
        leak_max_abs=largest([error["leak_max_abs"] for error in errors]) if spec.causal else None,
        reference_max_abs=largest([error["reference_max_abs"] for error in errors]),
        recompute_max_abs=recomputed,
    )


def _layer(variant: type[SequenceMixer], config: VariantConfig, dims: Dims, layer: int) -> SequenceMixer:
    """Return a layer with weights of order 1/√fan-in, so that outputs and their errors are of order 1."""
    torch.manual_seed(layer)
    return _unit_weights(variant(config, dims, layer)).eval()


def _unit_weights(layer: Module) -> Module:
    for parameter in layer.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return layer


def leak(
    variant: type[SequenceMixer],
    config: VariantConfig,
    dims: Dims,
    layers: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    schedule: InputSchedule | None = None,
) -> float:
    """Return the maximum change of an output before a cut when the inputs from the cut on change, in float32
    or in `dtype` with autocast. `schedule` feeds the layers; the default is the variant's own.

    Each sequence of the batch has a different cut, so that an influence between sequences is also detected.
    Raises GateFailed if rounding cannot explain the change, unless the variant states that it leaks.
    """
    schedule = schedule or variant.input_schedule(config)
    fed = scheduled_dims(variant, schedule, dims)
    stack = [_layer(variant, config, fed, layer).to(device) for layer in range(layers)]

    def network(x: Tensor, states: list[Any] | None) -> NetworkOut:
        after = []
        for layer, state in zip(stack, states or [None] * layers, strict=True):
            out = layer(x, Context(causal=True), state)
            x = x + out.y
            after.append(out.state)
        return NetworkOut(x, after)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that hashing and random features are the same in every run
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return schedule.stream(network, x, causal=True)

    # a separate generator, because `run` seeds the global one: every change would be the same multiple of x
    source = torch.Generator(device).manual_seed(0)
    batch, tokens = BATCH, dims.seq_len

    def noise() -> Tensor:
        return torch.randn(batch, tokens, dims.d_model, device=device, generator=source)

    x = noise()
    before = run(x)
    unaligned = {1, tokens // 3, tokens // 2, tokens // 2 + 1, tokens - 2, tokens - 1}
    cuts = sorted(cut for cut in unaligned | {2**k for k in range(4, 10)} if 0 < cut < tokens)
    position = torch.arange(tokens, device=device)
    changes = [0.0]
    for group in (cuts[i : i + batch] for i in range(0, len(cuts), batch)):
        # the last group may be smaller than the batch; the remaining sequences repeat its last cut
        cut = torch.tensor([*group, *group[-1:] * (batch - len(group))], device=device)[:, None]
        masks = position >= cut, position == cut, (position == tokens - 1).expand(batch, -1)
        for mask, size in zip(masks, (10.0, 1.0, 1e-2), strict=True):
            changed = torch.where(mask[..., None], x + size * noise(), x)
            changes.append((run(changed) - before)[position < cut].abs().max().item())
    worst = largest(changes)
    if not worst <= LEAK_TOLERANCE and not known_leak(variant, config):
        raise GateFailed(f"causality gate: changing later tokens changed an earlier output by {worst:.2e}")
    return worst


def reference_error(
    variant: type[SequenceMixer],
    config: VariantConfig,
    dims: Dims,
    layer: int,
    device: torch.device,
    *,
    causal: bool,
    schedule: InputSchedule | None = None,
    wrap: Callable[[Call], Call] = lambda call: call,
) -> float:
    """Return the maximum error of the fast path in float32 against `reference` in float64, over the outputs
    and the gradients of the input and of every parameter, relative to the largest entry of each tensor (or to
    1). `wrap` changes the call of the fast path; it may compile it.

    Raises GateFailed if rounding cannot explain it.
    """
    ctx, schedule = Context(causal=causal), schedule or variant.input_schedule(config)
    fast = _layer(variant, config, scheduled_dims(variant, schedule, dims), layer).to(device)
    slow = copy.deepcopy(fast).double()  # on the same device, so that its random numbers are the same
    x = torch.randn(BATCH, dims.seq_len, dims.d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    torch.manual_seed(1)
    network = wrap(lambda window, state: NetworkOut(*fast(window, ctx, state)[:2]))
    y = schedule.stream(network, x, causal=causal)
    torch.manual_seed(1)
    y64 = scheduled_reference(slow, schedule, x64, ctx)
    direction = torch.randn_like(y64)
    roots, roots64 = ([p for p in layer.parameters() if p.requires_grad] for layer in (fast, slow))
    got = torch.autograd.grad(y, [x, *roots], direction.to(y), materialize_grads=True)
    want = torch.autograd.grad(y64, [x64, *roots64], direction, materialize_grads=True)
    worst = largest([_relative(a, b) for a, b in zip((y, *got), (y64, *want), strict=True)])
    if not worst <= REFERENCE_TOLERANCE:
        raise GateFailed(f"reference gate: layer {layer} differs from its reference by {worst:.2e}")
    return worst


def feed_forward_error(
    feed_forward: type[FeedForward],
    config: FeedForwardConfig,
    d_model: int,
    device: torch.device,
    *,
    wrap: Callable[[Call], Call] = lambda call: call,
) -> float:
    """Return the same error as `reference_error`, for a feed-forward layer. Raises GateFailed."""
    torch.manual_seed(0)
    fast = _unit_weights(feed_forward(config, d_model)).to(device)
    slow = copy.deepcopy(fast).double()
    x = torch.randn(BATCH, FEED_FORWARD_TOKENS, d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, y64 = wrap(lambda inputs: fast(inputs).y)(x), slow.reference(x64)
    direction = torch.randn_like(y64)
    roots, roots64 = ([p for p in layer.parameters() if p.requires_grad] for layer in (fast, slow))
    got = torch.autograd.grad(y, [x, *roots], direction.to(y), materialize_grads=True)
    want = torch.autograd.grad(y64, [x64, *roots64], direction, materialize_grads=True)
    worst = largest([_relative(a, b) for a, b in zip((y, *got), (y64, *want), strict=True)])
    if not worst <= REFERENCE_TOLERANCE:
        raise GateFailed(f"reference gate: the feed-forward layer differs from its reference by {worst:.2e}")
    return worst


def _relative(got: Tensor, want: Tensor) -> float:
    scale = max(1.0, want.abs().max().item())
    return (got.detach().double() - want).abs().max().item() / scale


def cost_ratio(dispatched: int, cost: Cost, reason: str | None, *, bounded: bool = True) -> float:
    """Return the dispatched forward FLOPs of mixing tokens, divided by those of the formula.

    `dispatched` is the total of a forward pass. Raises GateFailed if the ratio differs from 1 by more than
    `COST_TOLERANCE` without a `reason`, or exceeds `COST_LIMIT`. If the overhead is not `bounded`, any excess
    with a reason passes.
    """
    ratio = (dispatched - cost.tokenwise) / cost.mixing
    if abs(ratio - 1) > COST_TOLERANCE and reason is None:
        raise GateFailed(
            f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, without a reason"
        )
    limit = COST_LIMIT if bounded else math.inf
    if not 1 - COST_TOLERANCE <= ratio <= limit:
        raise GateFailed(f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, over {limit}")
    return ratio
