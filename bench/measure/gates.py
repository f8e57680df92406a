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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.config.spec import CellSpec
from bench.measure.cached import once
from bench.model import activations
from bench.model.language_model import LanguageModel
from bench.tasks.base import Batch
from bench.tasks.text import VOCABULARY
from bench.train.loop import training_step
from variants.base import Attention, Dims, VariantConfig

GATE_TOKENS = 1000
"""Longest sequence of the gates: past the default windows, and no multiple of a block."""
HEAD_DIM = 16
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
RECOMPUTE_TOLERANCE = {"float32": 1e-5, "bfloat16": torch.finfo(torch.bfloat16).eps}
"""Largest error of a gradient, relative to the largest, that rounding explains, by dtype. Only a reversible
network has any: it rebuilds float32 streams, 1e-7 off. In float32 the gradients are as close. In bfloat16
some of these numbers round to the neighbouring one, and a gradient may differ by a rounding of its own: one
unit in the last place of the largest, 2⁻⁷."""
COST_TOLERANCE = 0.01
COST_LIMIT = 2.2
"""Most that block-gathered patterns may dispatch, as a multiple of the allowed pairs."""


class GateFailed(Exception):
    """A variant did not pass; the message names the gate and its figure."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the gates measured."""

    leak_max_abs: float | None
    """None where the model is not causal."""
    reference_max_abs: float
    recompute_max_abs: float | None
    """None where every activation is kept."""


def check(spec: CellSpec, folder: Path, code_sha256: str) -> Figures:
    """The figures of this variant's configuration, taken once per experiment, code and device.

    Raises GateFailed.
    """
    variant, config, _ = spec.attention()
    tokens = min(spec.seq_len, GATE_TOKENS)
    dims = Dims(batch_size=2, seq_len=tokens, d_model=HEAD_DIM * spec.model.heads, heads=spec.model.heads)
    if variant.unsupported(config, dims, causal=spec.causal):  # a variant may need the cell's own length
        dims = Dims(batch_size=2, seq_len=spec.seq_len, d_model=dims.d_model, heads=dims.heads)
    layers, leak_layers = min(2, spec.depth), min(LEAK_LAYERS, spec.depth)
    settings = [spec.variant, spec.variant_params, spec.causal, asdict(dims)]
    decides = [*settings, leak_layers, spec.device, spec.dtype, code_sha256]
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)

    def attention() -> dict[str, Any]:
        return {
            "leak_max_abs": leak(variant, config, dims, leak_layers, device, dtype) if spec.causal else None,
            "reference_max_abs": max(
                reference_error(variant, config, dims, layer, device, causal=spec.causal)
                for layer in range(layers)
            ),
        }

    def recompute() -> dict[str, Any]:
        return {"recompute_max_abs": recompute_error(spec, dims, layers, device)}

    kept = folder / "gates"
    figures = once(kept, decides, attention, {"leak_max_abs", "reference_max_abs"})
    strategy = [spec.activations, spec.model.ff_chunks]
    if spec.activations == "keep":
        figures |= {"recompute_max_abs": None}
    else:
        figures |= once(kept, [*decides, *strategy], recompute, {"recompute_max_abs"})
    return Figures(**figures)


def _layer(variant: type[Attention], config: VariantConfig, dims: Dims, layer: int) -> Attention:
    """A layer with weights of order 1/√fan-in, so that outputs and their errors are of order 1."""
    torch.manual_seed(layer)
    made = variant(config, dims, layer)
    for parameter in made.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return made.eval()


def leak(
    variant: type[Attention],
    config: VariantConfig,
    dims: Dims,
    layers: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Largest move of an output before a cut when inputs from the cut on change, in float32 or, by
    autocast, in `dtype`.

    Each sequence of the batch has a cut of its own, so that no sequence may move another either. Raises
    GateFailed above rounding, unless the variant states that it leaks.
    """
    stack = [_layer(variant, config, dims, layer).to(device) for layer in range(layers)]

    def network(x: Tensor, states: list[Any] | None) -> tuple[Tensor, list[Any]]:
        after = []
        for layer, state in zip(stack, states or [None] * layers, strict=True):
            out = layer(x, causal=True, state=state)
            x = x + out.y
            after.append(out.state)
        return x, after

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # hashing and random features draw the same in every run
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return variant.plan(config).stream(network, x, causal=True)

    # of its own, because `run` sets the other one: every change would be the same, and a multiple of x
    source = torch.Generator(device).manual_seed(0)
    batch, tokens = dims.batch_size, dims.seq_len

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
    worst = _largest(moves)
    if not worst <= LEAK_TOLERANCE and not variant.leak(config):
        raise GateFailed(f"causality gate: changing later tokens moved an earlier output by {worst:.2e}")
    return worst


def reference_error(
    variant: type[Attention],
    config: VariantConfig,
    dims: Dims,
    layer: int,
    device: torch.device,
    *,
    causal: bool,
) -> float:
    """Largest error of the fast path in float32 against `reference` in float64, relative to each
    tensor's largest entry (or 1): outputs, gradients of the input and of every parameter.

    Raises GateFailed above rounding.
    """
    fast = _layer(variant, config, dims, layer).to(device)
    slow = copy.deepcopy(fast).double()  # on the same device, whose random numbers are the same
    x = torch.randn(dims.batch_size, dims.seq_len, dims.d_model, device=device, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    torch.manual_seed(1)
    y = variant.plan(config).stream(
        lambda window, state: fast(window, causal=causal, state=state)[:2], x, causal=causal
    )
    torch.manual_seed(1)
    y64 = slow.reference(x64, causal=causal)
    direction = torch.randn_like(y64)
    roots, roots64 = ([p for p in layer.parameters() if p.requires_grad] for layer in (fast, slow))
    got = torch.autograd.grad(y, [x, *roots], direction.to(y), materialize_grads=True)
    want = torch.autograd.grad(y64, [x64, *roots64], direction, materialize_grads=True)
    worst = _largest([_relative(a, b) for a, b in zip((y, *got), (y64, *want), strict=True)])
    if not worst <= REFERENCE_TOLERANCE:
        raise GateFailed(f"reference gate: layer {layer} differs from its reference by {worst:.2e}")
    return worst


def recompute_error(spec: CellSpec, dims: Dims, layers: int, device: torch.device) -> float:
    """Largest error of a parameter's gradient under the cell's strategy for activations, against storing
    them, relative to the largest entry of any; with dropout, in the cell's dtype, after one training step of
    each.

    A reversible network is compared with its own two streams. Raises GateFailed above rounding.
    """
    variant, config, _ = spec.attention()
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, dims.batch_size, dims.seq_len), generator=source).to(device)

    def gradients(run_blocks: activations.Run) -> list[Tensor]:
        torch.manual_seed(0)
        with device:
            model = LanguageModel(
                variant,
                config,
                dims,
                depth=layers,
                ff_mult=spec.model.ff_mult,
                ff_chunks=spec.model.ff_chunks,
                dropout=0.1,
                vocabulary=VOCABULARY,
                activations="keep",
                dtype=getattr(torch, spec.dtype),
            )
        torch.manual_seed(1)
        with model.running(run_blocks):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            training_step(model, optimizer, Batch(*tokens), causal=spec.causal)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    strategy = activations.STRATEGIES[spec.activations]
    want = gradients(strategy.stored)
    scale = max(grad.abs().max().item() for grad in want)
    pairs = zip(gradients(strategy.run), want, strict=True)
    worst = _largest([(a - b).abs().max().item() / scale for a, b in pairs])
    if not worst <= RECOMPUTE_TOLERANCE[spec.dtype]:
        raise GateFailed(
            f"recompute gate: activations={spec.activations} moved a gradient by {worst:.2e} of the largest"
        )
    return worst


def _largest(values: list[float]) -> float:
    """The largest value; NaN where there is one, which `max` would pass over."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _relative(got: Tensor, want: Tensor) -> float:
    scale = max(1.0, want.abs().max().item())
    return (got.detach().double() - want).abs().max().item() / scale


def cost_ratio(
    dispatched: int, projections: int, attention: int, padding: str | None, *, bounded: bool = True
) -> float:
    """Forward FLOPs dispatched for attention as a multiple of the formula's.

    Raises GateFailed where they differ by over 1 % and the variant does not say why, or by too much. Where
    the layer is not `bounded`, any excess that it explains passes.
    """
    ratio = (dispatched - projections) / attention
    if abs(ratio - 1) > COST_TOLERANCE and padding is None:
        raise GateFailed(f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, unexplained")
    limit = COST_LIMIT if bounded else math.inf
    if not 1 - COST_TOLERANCE <= ratio <= limit:
        raise GateFailed(f"cost gate: attention dispatched {ratio:.3f} × its formula's FLOPs, over {limit}")
    return ratio
