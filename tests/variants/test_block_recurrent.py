"""Block-recurrent attention: it equals a loop over blocks and heads, and a window if no state is read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, difference, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import gates
from variants.attention.block_recurrent import BlockRecurrent, BlockRecurrentConfig
from variants.attention.longformer import Longformer, LongformerConfig
from variants.base import Clock, Context, Workload
from variants.ops.segments.state_cell import EPS
from variants.ops.segments.state_scan import scan

SMALL: list[dict[str, Any]] = [
    {"window": 8, "states": 4},
    {"window": 7, "states": 3, "gate": "lstm", "weights": "separate"},
]

HEADS = 2


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS, kv_heads=kv_heads)


def layer_of(config: BlockRecurrentConfig, dims: Workload) -> BlockRecurrent:
    """With weights that matter: the initial values are small, or 0."""
    layer = make_layer(BlockRecurrent, config, dims)
    assert isinstance(layer, BlockRecurrent)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.cell.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed) / math.sqrt(parameter.shape[-1]))
    return layer


def softmax_mean(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query (D,) over keys and values (n, D)."""
    return (keys @ query / len(query) ** 0.5).softmax(0) @ values


def loop(layer: BlockRecurrent, x: Tensor) -> Tensor:
    """One sequence, block, vector and head after the other."""
    dims, cell, block = layer.dims, layer.cell, layer.config.window
    head_dim, group = dims.head_dim, dims.queries_per_key
    widths = [dims.inner_dim, dims.key_dim, dims.key_dim]
    w_q, w_k, w_v = layer.get_parameter("projections.qkv.weight").split(widths)
    w_out = layer.get_parameter("projections.out.weight")
    shared = layer.config.weights == "shared"
    if shared:
        w_own, w_block, w_key, w_value, w_ask = w_q, w_q, w_k, w_v, w_q
        w_out, w_update = torch.cat([w_out, w_out], dim=1), torch.cat([w_out, w_out], dim=1)
    else:
        of_state = layer.get_parameter("cell.project.weight")
        w_own, w_block, w_key, w_value = of_state.split([dims.inner_dim, *widths])
        w_ask = layer.get_parameter("reading.weight")
        w_out = torch.cat([w_out, layer.get_parameter("read_out.weight")], dim=1)
        w_update = layer.get_parameter("cell.update.weight")

    def by_head(rows: Tensor, weight: Tensor) -> Tensor:
        """(n, C) → (heads, n, D)."""
        return einsum("nc,dc->nd", rows, weight).unflatten(-1, (-1, head_dim)).transpose(0, 1)

    sequences = []
    for tokens in x:
        q, k, v, asking = (by_head(tokens, w) for w in (w_q, w_k, w_v, w_ask))
        q_turned, k_turned = (rotated(t.transpose(0, 1)[None])[0].transpose(0, 1) for t in (q, k))
        state, outputs = cell.initial, []
        for start in range(0, len(tokens), block):
            stop = min(start + block, len(tokens))
            hidden = torch.stack([c / (c.square().mean() + EPS).sqrt() * cell.scale for c in state])
            hidden = hidden + cell.identity
            own, of_block, keys, values = (by_head(hidden, w) for w in (w_own, w_block, w_key, w_value))
            for t in range(start, stop):
                near = slice(max(0, t - block + 1), t + 1)
                local, read = [], []
                for h in range(dims.heads):
                    j = h // group
                    local.append(softmax_mean(q_turned[h, t], k_turned[j, near], v[j, near]))
                    read.append(softmax_mean(asking[h, t], keys[j], values[j]))
                both = torch.cat([torch.cat(local), torch.cat(read)])
                outputs.append(w_out @ both)
            updated = []
            for s, c in enumerate(state):
                found = [
                    softmax_mean(own[h, s], keys[h // group], values[h // group]) for h in range(dims.heads)
                ]
                found += [
                    softmax_mean(of_block[h, s], k[h // group, start:stop], v[h // group, start:stop])
                    for h in range(dims.heads)
                ]
                y = torch.cat(found)
                z = w_update @ y + cell.bias
                if layer.config.gate == "fixed":
                    g = torch.sigmoid(cell.gate)
                    updated.append(g * c + (1 - g) * z)
                else:
                    given = y.unflatten(0, (2, -1)).sum(0) if shared else y
                    forget, new = (cell.gates.weight @ given + cell.gates.bias).chunk(2)
                    updated.append(torch.sigmoid(forget + 1) * c + torch.sigmoid(new - 1) * z)
            state = torch.stack(updated)
        sequences.append(torch.stack(outputs))
    return torch.stack(sequences)


@settings(deadline=None, max_examples=4)
@given(
    tokens=st.integers(1, 20),
    window=st.integers(1, 8),
    states=st.integers(1, 4),
    gate=st.sampled_from(["fixed", "lstm"]),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([None, 1]),
    weights=st.sampled_from(["shared", "separate"]),
)
@example(tokens=1, window=4, states=2, gate="fixed", batch=1, kv_heads=None, weights="shared")
@example(tokens=13, window=4, states=3, gate="fixed", batch=2, kv_heads=1, weights="shared")
@example(tokens=12, window=4, states=5, gate="lstm", batch=2, kv_heads=None, weights="shared")
@example(tokens=9, window=4, states=2, gate="lstm", batch=1, kv_heads=1, weights="separate")
@example(tokens=9, window=4, states=2, gate="fixed", batch=2, kv_heads=None, weights="separate")
def test_equals_a_loop(
    tokens: int, window: int, states: int, gate: Any, batch: int, kv_heads: int | None, weights: Any
) -> None:
    config = BlockRecurrentConfig(window=window, states=states, gate=gate, weights=weights)
    layer = layer_of(config, dims_of(tokens, batch, kv_heads))
    x = numbers(batch, tokens, 12)
    used = [p for name, p in layer.named_parameters() if tokens > window or not is_of_update(name)]
    assert_same(lambda: feed(layer, x, causal=True), lambda: loop(layer, x), [x, *used])


def is_of_update(name: str) -> bool:
    """Parameters that only an update uses."""
    return name.startswith(("cell.update", "cell.gate", "cell.bias"))


def test_a_state_that_is_not_read_leaves_the_window() -> None:
    """Longformer's causal window, also with its gradients."""
    layer = layer_of(BlockRecurrentConfig(window=5, states=3, weights="separate"), dims_of(23))
    with torch.no_grad():
        layer.get_parameter("read_out.weight").zero_()
    window = make_layer(Longformer, LongformerConfig(window=(5,)), dims_of(23), seed=1)
    shared = {name: t for name, t in layer.state_dict().items() if name.startswith("projections")}
    window.load_state_dict(shared)
    x = numbers(2, 23, 12)
    assert_same(lambda: feed(layer, x, causal=True), lambda: feed(window, x, causal=True), [x])


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_a_gate_that_never_opens_keeps_the_first_state(gate: Any) -> None:
    """No token outside the window has an influence then."""
    layer = layer_of(BlockRecurrentConfig(window=4, states=3, gate=gate), dims_of(20))
    x = numbers(1, 20, 12).detach()
    other = x.clone()
    other[:, :15] += 1
    y, moved = (feed(layer, each, causal=True) for each in (x, other))
    assert difference(y[:, 19], moved[:, 19]) > 1e-3
    with torch.no_grad():
        if gate == "fixed":
            layer.cell.gate.fill_(1e4)
        else:
            layer.cell.gates.weight.zero_()
            layer.cell.gates.bias.copy_(torch.cat([torch.full((12,), 1e4), torch.full((12,), -1e4)]))
    y, moved = (feed(layer, each, causal=True) for each in (x, other))
    assert difference(y[:, 19], moved[:, 19]) <= EXACT


def test_the_gate_sees_a_state_that_is_updated_before_it_is_read() -> None:
    """The block reads its own later tokens."""

    class ReadsAfterUpdate(BlockRecurrent):
        def _read(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys, values = (torch.cat([t[:, 1:], t[:, -1:]], dim=1) for t in (keys, values))
            return super()._read(q, keys, values)

    dims, config = replace(dims_of(96, 2), d_model=24), BlockRecurrentConfig(window=8, states=4)
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(BlockRecurrent, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(ReadsAfterUpdate, config, *given)


def test_identities_tell_the_vectors_apart() -> None:
    """Without them and with equal first vectors, all state vectors stay equal: one vector is as good."""
    many, one = (layer_of(BlockRecurrentConfig(window=4, states=states), dims_of(18)) for states in (5, 1))
    weights = {
        name: t for name, t in many.state_dict().items() if name not in ("cell.initial", "cell.identity")
    }
    one.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for layer in (many, one):
            layer.cell.identity.zero_()
            layer.cell.initial.copy_(numbers(12, seed=3))
    x = numbers(2, 18, 12).detach()
    assert difference(feed(many, x, causal=True), feed(one, x, causal=True)) <= EXACT


@pytest.mark.parametrize("steps", [[17, 1, 1, 9, 4], [1] * 9, [4, 4, 4], [3, 14]])
@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_prompts_and_steps_of_any_length(steps: list[int], gate: Any) -> None:
    """A step may end several blocks, or none."""
    tokens = sum(steps)
    layer = layer_of(BlockRecurrentConfig(window=4, states=3, gate=gate), dims_of(tokens, 2, 1))
    x = numbers(2, tokens, 12).detach()
    clock = Clock()
    with torch.no_grad():
        state = layer.init_state(2, tokens, clock=clock, dtype=x.dtype)
        outputs = []
        for part in x.split(steps, dim=1):
            outputs.append(layer(part, Context(causal=True), state).y)
            clock.advance(part.shape[1])
    assert difference(torch.cat(outputs, dim=1), feed(layer, x, causal=True)) <= EXACT


def test_the_saved_states_do_not_grow_with_heads_or_pairs() -> None:
    """For the backward pass of the recurrence are saved: the states, and the inputs."""
    saved: list[Tensor] = []
    dims, block = dims_of(40), 4
    layer = layer_of(BlockRecurrentConfig(window=block, states=3), dims)
    k, v = (numbers(1, HEADS, 40, 6, seed=seed) for seed in (1, 2))
    cell = layer.cell
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scan(cell.start(k.dtype), k, v, cell.weights(layer.projections, k.dtype), block)
    inputs = {k.data_ptr(), v.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    own = [t for t in saved if t.data_ptr() not in inputs]
    assert [tuple(t.shape) for t in own] == [(11, 1, 3, 12)]
