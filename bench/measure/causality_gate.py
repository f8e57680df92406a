"""The causality gate: no output before a cut changes when the tokens after it change, and no output of a
feed-forward layer when any other token does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.config.spec import CellSpec
from bench.measure.gate_failed import GateFailed, largest
from bench.measure.reference_gate import BATCH, FEED_FORWARD_TOKENS, layer_of, unit_weights
from bench.model.language_model import LanguageModel
from bench.tasks.text import VOCABULARY
from variants.base import (
    Context,
    Dims,
    FeedForward,
    FeedForwardConfig,
    SequenceMixer,
    VariantConfig,
    known_leak,
    scheduled_dims,
)
from variants.input_schedule import InputSchedule, Network, NetworkOut

LEAK_TOLERANCE = 1e-5
"""Maximum change of an output of order 1 that float32 rounding explains: 84 units in the last place. The same
limit applies to lower precision: the residual sums are float32 in every dtype, and later tokens do not affect
how a number rounds to bfloat16. If one rounding to bfloat16 changes (2⁻⁹, 2e-3), its input depended
on later tokens, and this is enough to change a selection (a hash, a nearest centroid) in a later layer."""


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
    stack = [layer_of(variant, config, fed, layer).to(device) for layer in range(layers)]

    def network(x: Tensor, states: list[Any] | None) -> NetworkOut:
        after = []
        for layer, state in zip(stack, states or [None] * layers, strict=True):
            out = layer(x, Context(causal=True), state)
            x = x + out.y
            after.append(out.state)
        return NetworkOut(x, after)

    worst = _largest_change(network, schedule, dims, device, dtype)
    if not worst <= LEAK_TOLERANCE and not known_leak(variant, config):
        raise GateFailed(f"causality gate: changing later tokens changed an earlier output by {worst:.2e}")
    return worst


def path_leak(spec: CellSpec, dims: Dims, depth: int, device: torch.device) -> float:
    """Return the same for all visits of the cell's model with the path of its depth schedule, in the cell's
    dtype: a path that joins tokens may read later ones although no layer does.

    Raises GateFailed if rounding cannot explain the change, unless a layer states that it leaks.
    """
    parts = spec.model_spec()
    torch.manual_seed(0)
    with device:
        model = LanguageModel(
            parts, dims, depth=depth, dropout=0.0, vocabulary=VOCABULARY, activations="keep"
        )
    model.open_branches()
    unit_weights(model).eval()

    def network(x: Tensor, states: list[Any] | None) -> NetworkOut:
        return model.run_visits(x, states, Context(causal=True))

    worst = _largest_change(network, parts.input, dims, device, getattr(torch, spec.dtype))
    leaks = any(known_leak(layer.mixer.layer, layer.mixer.config) for layer in parts.layers)
    if not worst <= LEAK_TOLERANCE and not leaks:
        changed = f"changing later tokens changed an earlier output by {worst:.2e}"
        raise GateFailed(f"causality gate: stack={parts.depth.name}: {changed}")
    return worst


def feed_forward_leak(
    feed_forward: type[FeedForward], config: FeedForwardConfig, d_model: int, device: torch.device
) -> float:
    """Return the maximum change of a token's output when other tokens change, relative to the largest output,
    in evaluation and in training, in float32. Of a layer that says that it reads others, only later tokens
    and other sequences change.

    Raises GateFailed if rounding cannot explain the change.
    """
    torch.manual_seed(0)
    layer = unit_weights(feed_forward(config, d_model)).to(device)
    source = torch.Generator(device).manual_seed(0)
    size = BATCH, FEED_FORWARD_TOKENS, d_model
    x, other = (torch.randn(size, device=device, generator=source) for _ in range(2))
    sequence, position = (torch.arange(n, device=device) for n in size[:2])
    kept = [(sequence == 0)[:, None] & (position < size[1] // 3)]
    if not feed_forward.reads_others(config):
        kept += [(position % 3 == 1).expand(size[:2]), (sequence > 0)[:, None] & (position == size[1] - 1)]

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that what is drawn in training is the same
        y: Tensor = layer(x).y
        return y

    changes = []
    for training in (False, True):
        layer.train(training)
        before = run(x)
        for mask in kept:
            change = (run(torch.where(mask[..., None], x, other)) - before)[mask].abs().max()
            changes.append((change / before.abs().max().clamp(min=1.0)).item())
    worst = largest(changes)
    if not worst <= LEAK_TOLERANCE:
        raise GateFailed(
            f"causality gate: the feed-forward layer: changing other tokens changed an output by {worst:.2e}"
        )
    return worst


def _largest_change(
    network: Network, schedule: InputSchedule, dims: Dims, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the maximum change of an output before a cut when the inputs from the cut on change. A network
    with fewer outputs than inputs has those of the last inputs."""

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
            earlier = (position < cut)[:, -before.shape[1] :]
            if earlier.any():
                changes.append((run(changed) - before)[earlier].abs().max().item())
    return largest(changes)
