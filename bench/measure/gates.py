"""Gates that a variant's configuration passes before any figure of it is taken.

1. Causality, by perturbation: what comes after a cut is changed, and no output before it may move.
   Gradients would not do: what leaks in published code is the *selection* of keys, which has none.
2. Reference: the fast path equals the readable one, in outputs and in every gradient.
3. Recompute: a strategy for activations gives the gradients of stored ones, randomness replayed.

Causality and recomputation are checked in the cell's dtype, by autocast as in the cell; the reference in
float32, where an error of the mathematics is not hidden by rounding.

The last, that the dispatched FLOPs are those of the formula, is checked in every cell, because it
depends on the cell's sizes: see `cost_ratio`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.config.spec import CellSpec
from bench.measure.cached import load_or_measure
from bench.measure.gate_failed import GateFailed, largest
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

GATE_TOKENS = 1000
"""Longest sequence of the gates: past the default windows, and no multiple of a block."""
HEAD_DIM = 16
BATCH = 2
"""Sequences of the gates."""
FEED_FORWARD_TOKENS = 64
"""Tokens of the feed-forward layer's gate: each goes through by itself."""
LEAK_LAYERS = 4
"""Layers of the causality gate, at most; never more than the cell has. A sum whose order depends on later
tokens moves an output by a rounding, which one layer hides where it rounds to bfloat16. Each further layer
gives the difference another chance to change a rounding, or a selection, and to be seen. In 4 layers no
known leak stays hidden, and a cell of fewer layers is not blamed for what only a deeper one would do."""
LEAK_TOLERANCE = 1e-5
"""Largest move of an output of order 1 that float32 rounding explains: 84 units in the last place. Lower
precision gets no more. The sums between layers are float32 in every dtype, and a number rounds to the same
bfloat16 whatever comes later. One rounding to bfloat16 that changes (2⁻⁹, 2e-3) shows that an input of it
depended on later tokens, and is enough to flip a selection (a hash, a nearest centroid) in a layer above."""
REFERENCE_TOLERANCE = 1e-4
"""Largest error, relative to the tensor's largest entry, of float32 against float64; sums over
1,000 tokens lose about √1000 ulps, 4e-6, and gradients pass through several."""
COST_TOLERANCE = 0.01
COST_LIMIT = 2.2
"""Most that block-gathered patterns may dispatch, as a multiple of the allowed pairs."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the gates measured."""

    leak_max_abs: float | None
    """None where the model is not causal."""
    reference_max_abs: float
    recompute_max_abs: float | None
    """None where every activation is kept."""


def check(spec: CellSpec, folder: Path, code_sha256: str) -> Figures:
    """The largest figures of the cell's distinct layers, each taken once per experiment, code and device.

    Raises GateFailed.
    """
    model, kept = spec.model_spec(), folder / "gates"
    tokens = min(spec.seq_len, GATE_TOKENS)
    dims = Dims(seq_len=tokens, d_model=HEAD_DIM * spec.model.heads, heads=spec.model.heads)
    variant, config, _ = spec.attention()
    if variant.unsupported(config, dims, causal=spec.causal):  # a variant may need the cell's own length
        dims = replace(dims, seq_len=spec.seq_len)
    settings = [spec.causal, asdict(dims), repr(model.input), spec.device, spec.dtype, code_sha256]
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)

    def of_layer(layer: LayerSpec, blocks: int) -> dict[str, float | None]:
        """Of a kind of layer that so many blocks have."""
        mixer, feed_forward = layer.mixer, layer.feed_forward
        leaked = None
        if spec.causal:
            depth = min(LEAK_LAYERS, blocks)
            leaked = leak(mixer.layer, mixer.config, dims, depth, device, dtype, schedule=model.input)
        errors = [feed_forward_error(feed_forward.layer, feed_forward.config, dims.d_model, device)]
        errors += [
            reference_error(
                mixer.layer, mixer.config, dims, index, device, causal=spec.causal, schedule=model.input
            )
            for index in range(min(2, blocks))
        ]
        return {"leak_max_abs": leaked, "reference_max_abs": largest(errors)}

    def described(slot: SlotSpec[Any]) -> list[Any]:
        return [slot.name, slot.params]

    found = []
    for layer, blocks in model.kinds(spec.depth).items():
        decides = [described(layer.mixer), described(layer.feed_forward), min(LEAK_LAYERS, blocks), *settings]
        take = partial(of_layer, layer, blocks)
        found.append(load_or_measure(kept, decides, take, {"leak_max_abs", "reference_max_abs"}))
    recomputed = None
    if spec.activations != "keep":
        layers = min(spec.depth, max(2, len(model.layers)))
        decides = [[described(layer.mixer) for layer in model.layers], described(model.depth), layers]
        decides += [spec.model.ff_mult, spec.activations, spec.model.ff_chunks, *settings]
        (recomputed,) = load_or_measure(
            kept,
            decides,
            lambda: {"recompute_max_abs": recompute_error(spec, dims, layers, device)},
            {"recompute_max_abs"},
        ).values()
    return Figures(
        leak_max_abs=largest([one["leak_max_abs"] for one in found]) if spec.causal else None,
        reference_max_abs=largest([one["reference_max_abs"] for one in found]),
        recompute_max_abs=recomputed,
    )


def _layer(variant: type[SequenceMixer], config: VariantConfig, dims: Dims, layer: int) -> SequenceMixer:
    """A layer with weights of order 1/√fan-in, so that outputs and their errors are of order 1."""
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
    """Largest move of an output before a cut when inputs from the cut on change, in float32 or, by
    autocast, in `dtype`. The layers are fed by the schedule; by default, by the variant's own.

    Each sequence of the batch has a cut of its own, so that no sequence may move another either. Raises
    GateFailed above rounding, unless the variant states that it leaks.
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
        torch.manual_seed(0)  # hashing and random features draw the same in every run
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return schedule.stream(network, x, causal=True)

    # of its own, because `run` sets the other one: every change would be the same, and a multiple of x
    source = torch.Generator(device).manual_seed(0)
    batch, tokens = BATCH, dims.seq_len

    def noise() -> Tensor:
        return torch.randn(batch, tokens, dims.d_model, device=device, generator=source)

    x = noise()
    before = run(x)
    unaligned = {1, tokens // 3, tokens // 2, tokens // 2 + 1, tokens - 2, tokens - 1}
    cuts = sorted(cut for cut in unaligned | {2**k for k in range(4, 10)} if 0 < cut < tokens)
    position = torch.arange(tokens, device=device)
    moves = [0.0]
    for group in (cuts[i : i + batch] for i in range(0, len(cuts), batch)):
        # sequences that are one too many repeat the last cut
        cut = torch.tensor([*group, *group[-1:] * (batch - len(group))], device=device)[:, None]
        after = position >= cut, position == cut, (position == tokens - 1).expand(batch, -1)
        for where, size in zip(after, (10.0, 1.0, 1e-2), strict=True):
            changed = torch.where(where[..., None], x + size * noise(), x)
            moves.append((run(changed) - before)[position < cut].abs().max().item())
    worst = largest(moves)
    if not worst <= LEAK_TOLERANCE and not known_leak(variant, config):
        raise GateFailed(f"causality gate: changing later tokens moved an earlier output by {worst:.2e}")
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
) -> float:
    """Largest error of the fast path in float32 against `reference` in float64, relative to each
    tensor's largest entry (or 1): outputs, gradients of the input and of every parameter.

    Raises GateFailed above rounding.
    """
    ctx, schedule = Context(causal=causal), schedule or variant.input_schedule(config)
    fast = _layer(variant, config, scheduled_dims(variant, schedule, dims), layer).to(device)
    slow = copy.deepcopy(fast).double()  # on the same device, whose random numbers are the same
    x = torch.randn(BATCH, dims.seq_len, dims.d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    torch.manual_seed(1)
    y = schedule.stream(lambda window, state: NetworkOut(*fast(window, ctx, state)[:2]), x, causal=causal)
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
    feed_forward: type[FeedForward], config: FeedForwardConfig, d_model: int, device: torch.device
) -> float:
    """`reference_error` of a feed-forward layer. Raises GateFailed above rounding."""
    torch.manual_seed(0)
    fast = _unit_weights(feed_forward(config, d_model)).to(device)
    slow = copy.deepcopy(fast).double()
    x = torch.randn(BATCH, FEED_FORWARD_TOKENS, d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, y64 = fast(x).y, slow.reference(x64)
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
    """Forward FLOPs dispatched for mixing tokens as a multiple of the formula's.

    `dispatched` counts those of everything. Raises GateFailed where they differ by over 1 % and no `reason`
    is given, or by too much. Where the overhead is not `bounded`, any excess with a reason passes.
    """
    ratio = (dispatched - cost.tokenwise) / cost.mixing
    if abs(ratio - 1) > COST_TOLERANCE and reason is None:
        raise GateFailed(f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, unexplained")
    limit = COST_LIMIT if bounded else math.inf
    if not 1 - COST_TOLERANCE <= ratio <= limit:
        raise GateFailed(f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, over {limit}")
    return ratio
