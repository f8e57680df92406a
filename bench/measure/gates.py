"""Gates: correctness checks that a variant's configuration must pass before its figures are measured.

1. Causality, by perturbation: tokens after a cut are changed, and no output before the cut may change.
   Gradients cannot show this, because in published code the *selection* of keys leaks, which has no gradient.
   Layers are checked by themselves, and all visits again if the depth schedule computes between them.
2. Reference: the fast path equals the readable reference, in outputs and in every gradient. In float32 on
   small heads, and in a cell of another dtype also in that dtype on the cell's own heads.
3. Recomputation: a strategy for activations gives the same gradients as stored activations, with the same
   random numbers.
4. Cost: the dispatched FLOPs equal those of the formula. It depends on the cell's sizes, so it is checked in
   every cell (`cost_ratio`); the results of the other gates are reused.

Causality and recomputation are checked in the cell's dtype, with autocast as in the cell. A kernel that does
not exist for small heads is checked on the cell's own. A kernel that does not exist in float32 is compared
with the reference in the cell's dtype only, and the record says so: another kernel of the same mathematics
would prove nothing about the one that is timed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.config.spec import CellSpec
from bench.measure.cached import load_or_measure
from bench.measure.causality_gate import LEAK_TOLERANCE as LEAK_TOLERANCE
from bench.measure.causality_gate import feed_forward_leak, leak, path_leak
from bench.measure.gate_failed import GateFailed, largest
from bench.measure.recompute_gate import recompute_error
from bench.measure.reference_gate import (
    FEWEST_TOKENS,
    Errors,
    dtype_reference_errors,
    feed_forward_dtype_errors,
    feed_forward_error,
    reference_error,
)
from bench.measure.reference_gate import REFERENCE_TOLERANCE as REFERENCE_TOLERANCE
from bench.model.slots import LayerSpec
from variants.base import Cost, Dims, SequenceMixer, SlotSpec
from variants.input_schedule import InputSchedule

GATE_TOKENS = 1000
"""Maximum sequence length in the gates: longer than the default windows, and not a multiple of a block."""
HEAD_DIM = 16
"""Channels of a head in the gates of mathematics."""
LEAK_LAYERS = 4
"""Maximum number of layers in the causality gate; never more than the cell has. If the order of a sum depends
on later tokens, an output changes by a rounding error, which one layer hides when it rounds to bfloat16. With
each further layer, the difference is more likely to change a rounding or a selection, and so to be detected.
With 4 layers all known leaks are detected. A cell with fewer layers does not fail for a leak that only a
deeper model would show."""
COST_TOLERANCE = 0.01
"""Maximum relative difference of dispatched FLOPs and formula without a stated reason."""
COST_LIMIT = 2.2
"""Maximum ratio of dispatched FLOPs to the formula for masks that are gathered in blocks."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Errors that the gates measured, by record key."""

    leak_max_abs: float | None = None
    """None if the model is not causal."""
    reference_max_abs: float | None = None
    """None if the kernel of a layer does not exist in float32."""
    reference_max_abs_reason: str | None = None
    dtype_reference_rms: float | None = None
    """None in float32."""
    dtype_reference_row_rms: float | None = None
    recompute_max_abs: float | None = None
    """None if all activations are stored."""


def check(spec: CellSpec, folder: Path, code_sha256: str) -> Figures:
    """Return the largest errors over the cell's distinct layers. Each is measured once for each experiment,
    code and device, and cached in `folder`.

    Raises GateFailed.
    """
    model, cache = spec.model_spec(), folder / "gates"
    sizes = Sizes.of(spec)
    settings = [
        spec.causal,
        asdict(sizes.small),
        asdict(sizes.own),
        repr(model.input),
        spec.device,
        spec.dtype,
        code_sha256,
    ]

    def identity(slot: SlotSpec[Any]) -> list[Any]:
        return [slot.name, slot.params]

    errors = []
    for layer, visits in model.kinds(spec.depth).items():
        gate = LayerGates(spec, layer, visits, sizes, model.input)
        decides = [identity(layer.mixer), identity(layer.feed_forward), min(LEAK_LAYERS, visits), *settings]
        errors.append(load_or_measure(cache, decides, gate.measure, set(LAYER_KEYS)))
    layers = model.representative_depth(spec.depth, spec.activations)
    network: list[Any] = [[identity(layer.mixer), identity(layer.feed_forward)] for layer in model.layers]
    network += [identity(model.depth), layers]
    fits = {sizes.fit(layer.mixer, sizes.dtype) for layer in model.layers}
    dims = sizes.small if fits == {sizes.small} else sizes.own
    if spec.causal and model.has_own_path(layers, dims):
        leaks = load_or_measure(
            cache,
            ["path", *network, *settings, repr(model.block)],
            lambda: {"leak_max_abs": path_leak(spec, dims, layers, sizes.device)},
            {"leak_max_abs"},
        )
        errors[0] |= {"leak_max_abs": largest([errors[0]["leak_max_abs"], leaks["leak_max_abs"]])}
    recomputed = None
    if spec.activations != "keep":
        decides = [*network, spec.activations, spec.model.ff_chunks, *settings]
        decides += ["tied"] * spec.model.tie_embeddings
        decides += [repr(model.block), spec.model.embedding_size]
        decides += [spec.compile] * spec.is_compiled
        (recomputed,) = load_or_measure(
            cache,
            decides,
            lambda: {"recompute_max_abs": recompute_error(spec, dims, layers, sizes.device)},
            {"recompute_max_abs"},
        ).values()
    return Figures(recompute_max_abs=recomputed, **{key: _worst(errors, key) for key in LAYER_KEYS})


def _worst(errors: list[dict[str, Any]], key: str) -> Any:
    """The largest error of all layers, None if one has none; the first reason."""
    values = [error[key] for error in errors]
    if key.endswith("_reason"):
        return next(filter(None, values), None)
    return None if None in values else largest(values)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the layers that the gates build, their device and dtype."""

    small: Dims
    """Small heads: enough to show errors of the mathematics."""
    own: Dims
    """The cell's heads."""
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, spec: CellSpec) -> Sizes:
        """Return the sizes for a cell: at most `GATE_TOKENS` tokens, unless the variant needs more."""
        variant, config, _ = spec.attention()
        parts, sizes = spec.model_spec(), spec.model
        tokens = min(spec.seq_len, GATE_TOKENS)

        def dims(tokens: int, d_model: int, head_size: int | None) -> Dims:
            few = Dims(
                seq_len=tokens,
                d_model=d_model,
                heads=sizes.heads,
                rotary_base=sizes.rotary_base,
                head_size=head_size,
                kv_heads=sizes.kv_heads,
            )
            enough = not (
                variant.unsupported(config, few, causal=spec.causal)
                or parts.wrong_lengths(spec.depth, few, causal=spec.causal)
            )
            return few if enough else replace(few, seq_len=spec.seq_len)

        device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        small = dims(tokens, HEAD_DIM * sizes.heads, HEAD_DIM if sizes.head_size else None)
        own = dims(max(tokens, FEWEST_TOKENS), sizes.d_model, sizes.head_size)
        return cls(small, own, device, dtype)

    def fit(self, mixer: SlotSpec[SequenceMixer], dtype: torch.dtype) -> Dims | None:
        """Return the smaller heads for which the layer's kernel exists in `dtype`, or None."""
        for dims in (self.small, self.own):
            if not mixer.layer.missing(mixer.config, dims, device=self.device, dtype=dtype):
                return dims
        return None


class LayerGates:
    """The gates of one kind of layer; `visits` is the number of times that a model visits it."""

    def __init__(
        self, spec: CellSpec, layer: LayerSpec, visits: int, sizes: Sizes, schedule: InputSchedule
    ) -> None:
        self.mixer, self.feed_forward = layer.mixer, layer.feed_forward
        self.causal, self.visits, self.sizes, self.schedule = spec.causal, visits, sizes, schedule

    def measure(self) -> dict[str, Any]:
        """Return the largest errors, by record key. Raises GateFailed."""
        sizes, mixer, feed_forward = self.sizes, self.mixer, self.feed_forward
        figures: dict[str, Any] = dict.fromkeys(LAYER_KEYS)
        if self.causal:
            figures["leak_max_abs"] = leak(
                mixer.layer,
                mixer.config,
                sizes.fit(mixer, sizes.dtype) or sizes.own,
                min(LEAK_LAYERS, self.visits),
                sizes.device,
                sizes.dtype,
                schedule=self.schedule,
            )
        small, own = sizes.small.d_model, sizes.own.d_model
        leaks = feed_forward_leak(feed_forward.layer, feed_forward.config, small, sizes.device)
        if self.causal:
            figures["leak_max_abs"] = largest([figures["leak_max_abs"], leaks])
        errors = [feed_forward_error(feed_forward.layer, feed_forward.config, small, sizes.device)]
        if dims := sizes.fit(mixer, torch.float32):
            errors += [self._reference_error(dims, index) for index in self._indices()]
            figures["reference_max_abs"] = largest(errors)
        else:
            figures["reference_max_abs_reason"] = "no float32: " + str(
                mixer.layer.missing(mixer.config, sizes.own, device=sizes.device, dtype=torch.float32)
            )
        if sizes.dtype != torch.float32:
            found = [self._dtype_errors(index) for index in self._indices()]
            found.append(
                feed_forward_dtype_errors(
                    feed_forward.layer, feed_forward.config, own, sizes.device, sizes.dtype
                )
            )
            figures["dtype_reference_rms"], figures["dtype_reference_row_rms"] = Errors.worst(found)
        return figures

    def _indices(self) -> range:
        """The places of the layers that are compared: a layer may depend on whether it is the lowest."""
        return range(min(2, self.visits))

    def _reference_error(self, dims: Dims, index: int) -> float:
        mixer, device = self.mixer, self.sizes.device
        return reference_error(
            mixer.layer, mixer.config, dims, index, device, causal=self.causal, schedule=self.schedule
        )

    def _dtype_errors(self, index: int) -> Errors:
        mixer, sizes = self.mixer, self.sizes
        return dtype_reference_errors(
            mixer.layer,
            mixer.config,
            sizes.own,
            index,
            sizes.device,
            sizes.dtype,
            causal=self.causal,
            schedule=self.schedule,
        )


LAYER_KEYS = (
    "leak_max_abs",
    "reference_max_abs",
    "reference_max_abs_reason",
    "dtype_reference_rms",
    "dtype_reference_row_rms",
)
"""The figures of `LayerGates`."""


def cost_ratio(dispatched: int, cost: Cost, reason: str | None, *, bounded: bool = True) -> float:
    """Return the dispatched forward FLOPs of mixing tokens, divided by those of the formula; of a model whose
    formulas have none, such as a running mean, those of all its parts.

    `dispatched` is the total of a forward pass. Raises GateFailed if the ratio differs from 1 by more than
    `COST_TOLERANCE` without a `reason`, or exceeds `COST_LIMIT`. If the overhead is not `bounded`, any excess
    with a reason passes.
    """
    own, formula = (dispatched - cost.tokenwise, cost.mixing) if cost.mixing else (dispatched, cost.total)
    ratio = own / formula if formula else math.inf if own else 1.0
    part = "attention" if cost.mixing else "a model without products between tokens"
    found = (
        f"cost gate: {part} dispatched {ratio:.3f} × its formula's FLOPs "
        f"(in all {dispatched:,}, by the formulas of all parts {cost.total:,})"
    )
    if abs(ratio - 1) > COST_TOLERANCE and reason is None:
        raise GateFailed(f"{found}, without a reason")
    limit = COST_LIMIT if bounded else math.inf
    if not 1 - COST_TOLERANCE <= ratio <= limit:
        raise GateFailed(f"{found}, over {limit}")
    return ratio
