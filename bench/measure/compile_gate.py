"""The reference gate of a compiled cell: the compiled layers equal their references, in outputs and in every
gradient."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench.config.spec import CellSpec
from bench.measure.cached import load_or_measure
from bench.measure.gate_failed import largest
from bench.measure.gate_sizes import gate_dims
from bench.measure.gates import feed_forward_error, reference_error
from bench.model.compile import compiled
from bench.model.slots import LayerSpec

KEY = "compiled_reference_max_abs"


def check(spec: CellSpec, folder: Path, code_sha256: str) -> float:
    """Return the largest error over the cell's distinct layers, cached as the other gates are.

    The mixer and the feed-forward layer are compiled separately, because only they have a reference. The
    result holds for compile=block and compile=model. Raises gates.GateFailed.
    """
    model, dims, device = spec.model_spec(), gate_dims(spec), torch.device(spec.device)

    def of_layer(layer: LayerSpec) -> dict[str, float]:
        mixer, feed_forward = layer.mixer, layer.feed_forward
        fed = feed_forward_error(feed_forward.layer, feed_forward.config, dims.d_model, device, wrap=compiled)
        mixed = reference_error(
            mixer.layer,
            mixer.config,
            dims,
            0,
            device,
            causal=spec.causal,
            schedule=model.input,
            wrap=compiled,
        )
        return {KEY: largest([fed, mixed])}

    errors = []
    for layer in model.kinds(spec.depth):
        slots = [[slot.name, slot.params] for slot in (layer.mixer, layer.feed_forward)]
        decides = [*slots, spec.causal, asdict(dims), repr(model.input), spec.device, code_sha256, "compiled"]
        found = load_or_measure(folder / "gates", decides, partial(of_layer, layer), {KEY})
        errors.append(float(found[KEY]))
    return largest(errors)
