"""`state_bytes` is what decoding needs: a sequence is read token by token from explicit tensors of that size.

Shapes: B batch, T tokens, C channels, H heads, D = C / H.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, bytes_of, difference, dims_for, feed, make_layer, numbers
from torch import Tensor

import variants
from variants.base import Context, SequenceMixer, Workload
from variants.input_schedule import Chunks, NetworkOut
from variants.ops.projections import Projections

BATCH = 2
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("longformer", {"window": (1,)}),
    ("longformer", {"window": (5,)}),
    ("longformer", {"window": (6, 3), "dilation": (1, 3)}),
    ("longformer", {"window": (2, 9), "dilation": (4,)}),
    ("longformer", {"window": (100,)}),
    *[
        (f"sparse_{name}", {"stride": stride, "head_mode": mode, **extra})
        for name, stride, extra in (
            ("strided", 1, {}),
            ("strided", 5, {}),
            ("fixed", 5, {"c": 2}),
            ("fixed", 7, {"c": 3, "subblocks": "shared"}),
            ("fixed", 4, {"c": 4}),
        )
        for mode in ("merged", "split", "interleaved")
    ],
]
"""Variants whose heads have a pattern each."""
SCHEDULES = [("chunked", {"chunk": c}) for c in (1, 5, 8, 50)] + [
    ("overlapping", {"chunk": c}) for c in (4, 8, 12, 64)
]
"""Variants that run the whole network on windows."""


def project(layer: SequenceMixer, token: Tensor, position: int) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, 1, D) of one token (B, 1, C) at a position."""
    projections = layer.get_submodule("projections")
    assert isinstance(projections, Projections)
    return tuple(part[:, :, -1:] for part in projections.split(F.pad(token, (0, 0, position, 0))))


def merge(layer: SequenceMixer, y: Tensor) -> Tensor:
    """(B, H, 1, D) → (B, 1, C)."""
    projections = layer.get_submodule("projections")
    assert isinstance(projections, Projections)
    return projections.merge(y)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query (B, 1, D) over (B, n, D) keys: its output, 0 without any."""
    return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values


def bytes_after(layer: SequenceMixer, tokens: int) -> int:
    sizes = layer.dims
    work = Workload(
        batch_size=BATCH,
        seq_len=tokens,
        d_model=sizes.d_model,
        heads=sizes.heads,
        causal=True,
        element_bytes=8,
    )
    return bytes_of(layer, work)


def allowed_pairs(layer: SequenceMixer, tokens: int) -> Tensor:
    """(H, T, T) bool: what each head reads; the outputs that follow from it are compared with `forward`."""
    for name in ("allowed", "_allowed"):
        if draw := getattr(layer, name, None):
            found = draw(tokens, causal=True)
            return found.expand(layer.dims.heads, tokens, tokens)
    raise AssertionError(f"{type(layer).__name__} draws no pattern of its heads")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("name", "knobs"), PATTERNS)
def test_decoding_from_the_keys_that_may_still_be_read(name: str, knobs: dict[str, Any], index: int) -> None:
    """After each token, exactly those keys and values are kept that a later query of the head may read."""
    tokens, horizon = 31, 90
    variant = variants.load(name)
    layer = make_layer(variant, variant.Config(**knobs), dims_for(horizon), index=index)
    x = numbers(BATCH, tokens, layer.dims.d_model).detach()
    allowed = allowed_pairs(layer, horizon)
    state: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(layer.dims.heads)]
    outputs = []
    for t in range(tokens):
        q, k, v = project(layer, x[:, t : t + 1], t)
        heads = []
        for head, kept in enumerate(state):
            kept[t] = k[:, head, 0], v[:, head, 0]
            read = [kept[j] for j in range(t + 1) if allowed[head, t, j]]  # KeyError: it was let go too early
            pairs = [torch.stack(rows, dim=1) for rows in zip(*read, strict=True)]
            heads.append(attend(q[:, head], *pairs) if read else torch.zeros_like(q[:, head]))
            later = allowed[head, t + 1 :].any(0)
            state[head] = {j: rows for j, rows in kept.items() if later[j]}
        outputs.append(merge(layer, torch.stack(heads, dim=1)))
        held = sum(row.nbytes for kept in state for rows in kept.values() for row in rows)
        assert bytes_after(layer, t + 1) == held, f"after {t + 1} tokens"
    assert difference(torch.cat(outputs, dim=1), feed(layer, x, causal=True)) <= EXACT


@pytest.mark.parametrize(("name", "knobs"), SCHEDULES)
def test_decoding_from_the_open_windows(name: str, knobs: dict[str, Any]) -> None:
    """Two layers with residuals: hidden states differ by window, so each open window holds its own keys and
    values in each layer; a window that has reached its length is let go."""
    tokens = 31
    variant = variants.load(name)
    config = variant.Config(**knobs)
    schedule = variant.input_schedule(config)
    assert isinstance(schedule, Chunks)
    layers = [make_layer(variant, config, dims_for(tokens), index=i, seed=i) for i in range(2)]
    x = numbers(BATCH, tokens, layers[0].dims.d_model).detach()
    lo, _ = schedule.used_range(causal=True)
    state: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}
    """First token of a window → layer → keys and values (B, H, 1, D) of its tokens."""
    outputs = []
    for t in range(tokens):
        if t % schedule.stride == 0:
            state[t] = [[], []]
        for start, caches in state.items():
            hidden = x[:, t : t + 1]
            for layer, cache in zip(layers, caches, strict=True):
                q, k, v = project(layer, hidden, t - start)
                cache.append((k, v))
                keys, values = (torch.cat(rows, dim=2) for rows in zip(*cache, strict=True))
                hidden = hidden + merge(layer, attend(q, keys, values))
            if t - start >= (lo if start else 0):
                outputs.append(hidden)
        state = {start: caches for start, caches in state.items() if start + schedule.length > t + 1}
        for index, layer in enumerate(layers):
            held = sum(row.nbytes for caches in state.values() for rows in caches[index] for row in rows)
            assert bytes_after(layer, t + 1) == held, f"after {t + 1} tokens"

    def network(window: Tensor, _: Any) -> NetworkOut:
        for layer in layers:
            window = window + layer(window, Context(causal=True)).y
        return NetworkOut(window)

    assert difference(torch.cat(outputs, dim=1), schedule.apply(network, x, causal=True).y) <= EXACT


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
def test_linformer_carries_its_mixed_keys_and_values(sharing: str) -> None:
    """Sums over the tokens so far, to which later ones are added: the whole sequence's follow from them."""
    tokens, variant = 23, variants.load("linformer")
    layer = make_layer(variant, variant.Config(k=5, sharing=sharing), dims_for(tokens))
    x = numbers(BATCH, tokens, layer.dims.d_model).detach()
    mixtures = [layer.get_parameter("key_mixture"), layer.get_parameter("key_mixture")]
    if sharing in ("none", "headwise"):
        mixtures[1] = layer.get_parameter("value_mixture")
    sums = [torch.zeros(BATCH, layer.dims.heads, 5, layer.dims.head_dim, dtype=x.dtype) for _ in mixtures]
    queries = []
    for t in range(tokens):
        q, *new = project(layer, x[:, t : t + 1], t)
        queries.append(q)
        for total, mixture, row in zip(sums, mixtures, new, strict=True):
            total += mixture[..., t : t + 1] * row
        assert bytes_after(layer, t + 1) == sum(total.nbytes for total in sums)
    y = merge(layer, attend(torch.cat(queries, dim=2), *sums))
    assert difference(y, feed(layer, x, causal=False)) <= EXACT
