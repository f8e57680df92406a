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
from bench.measure.gates import Sizes
from bench.measure.reference_gate import dtype_reference_errors, feed_forward_error, reference_error
from bench.model.compile import compiled
from bench.model.slots import LayerSpec

KEY = "compiled_reference_max_abs"


def check(spec: CellSpec, folder: Path, code_sha256: str) -> float:
    """Return the largest error in float32 over the cell's distinct layers, cached as the other gates are.

    The mixer and the feed-forward layer are compiled separately, because only they have a reference. The
    result holds for compile=block and compile=model. A mixer whose kernel does not exist in float32 is
    compared in the cell's dtype, which gives no error in float32. Raises gates.GateFailed.
    """
    model, sizes = spec.model_spec(), Sizes.of(spec)

    def of_layer(layer: LayerSpec) -> dict[str, float]:
        mixer, feed_forward = layer.mixer, layer.feed_forward
        errors = [
            feed_forward_error(
                feed_forward.layer, feed_forward.config, sizes.small.d_model, sizes.device, wrap=compiled
            )
        ]
        if dims := sizes.fit(mixer, torch.float32):
            own = mixer.layer, mixer.config, dims, 0, sizes.device
            errors.append(reference_error(*own, causal=spec.causal, schedule=model.input, wrap=compiled))
        else:
            own = mixer.layer, mixer.config, sizes.own, 0, sizes.device
            dtype_reference_errors(*own, sizes.dtype, causal=spec.causal, schedule=model.input, wrap=compiled)
        return {KEY: largest(errors)}

    errors = []
    for layer in model.kinds(spec.depth):
        slots = [[slot.name, slot.params] for slot in (layer.mixer, layer.feed_forward)]
        dims = asdict(sizes.small), asdict(sizes.own)
        decides = [*slots, spec.causal, *dims, repr(model.input), spec.device, spec.dtype, code_sha256]
        found = load_or_measure(folder / "gates", [*decides, "compiled"], partial(of_layer, layer), {KEY})
        errors.append(float(found[KEY]))
    return largest(errors)
