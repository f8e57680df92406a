"""Luna against two softmax attentions, its recurrence, and what it reduces to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, assert_same, difference, numbers, rotated
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.luna import Luna, LunaConfig
from variants.base import Context, Dims, Workload
from variants.ops.recurrences import packed_sums
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [
    {"length": 3, "chunk": 16},
    {"length": 5, "chunk": 16, "activation": "softplus"},
]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: Any) -> Luna:
    torch.manual_seed(0)
    return Luna(LunaConfig(**{"length": 5, **knobs}), dims_of(seq_len)).double()


def token_by_token(layer: Luna, x: Tensor) -> Tensor:
    """The causal form by the paper's two sums, each of which a token adds to and reads."""
    heads = (2, 8)
    values, q, m = (
        F.linear(x, w.weight).unflatten(-1, heads) for w in (layer.pack, layer.query, layer.unpack)
    )
    keys = rotated(values)
    first, second = x.new_zeros(len(x), 2, 8, 5), x.new_zeros(len(x), 2, 5, 8)
    outputs = []
    for t in range(x.shape[1]):
        scores = einsum("bhd,hld->bhl", keys[:, t], layer.packed_queries) / 8**0.5
        w = F.elu(scores) + 1 if layer.config.activation == "elu" else F.softplus(scores)
        first = first + einsum("bhd,bhl->bhdl", m[:, t], w)
        second = second + einsum("bhl,bhd->bhld", w, m[:, t])
        a = (einsum("bhd,bhdl->bhl", q[:, t], first) / (t + 1) / 8**0.5).softmax(-1)
        outputs.append(einsum("bhl,bhld->bhd", a, second) / (t + 1))
    return torch.stack(outputs, 1).flatten(2) @ layer.out.weight.T


def test_it_is_registered() -> None:
    assert variants.load("luna") is Luna


@pytest.mark.parametrize("activation", ["elu", "softplus"])
@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 64), (41, 8), (70, 64)])
def test_the_causal_form_is_its_recurrence(seq_len: int, chunk: int, activation: str) -> None:
    layer, x = make(seq_len, activation=activation, chunk=chunk), numbers(2, seq_len, 16)
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: token_by_token(layer, x),
        [x, *layer.parameters()],
    )


def test_one_packed_position_gives_all_tokens_one_output() -> None:
    """There is nothing to choose from: each token reads the whole packed sequence."""
    layer, x = make(30, length=1), numbers(2, 30, 16).detach()
    y = layer(x, Context(causal=False)).y
    assert difference(y, y[:, :1].expand_as(y)) <= EXACT


def test_equal_weights_pack_the_mean() -> None:
    layer, x = make(30), numbers(2, 30, 16).detach()
    with torch.no_grad():
        layer.packed_queries.zero_()
    mean = x.mean(1, keepdim=True)
    for part in (layer.pack, layer.unpack, layer.out):
        mean = mean @ part.weight.T
    assert difference(layer(x, Context(causal=False)).y, mean.expand_as(x)) <= EXACT


def test_equal_weights_give_running_means() -> None:
    """elu(0) + 1 = 1, so each of the sums is a mean of the values so far."""
    layer, x = make(30), numbers(2, 30, 16).detach()
    with torch.no_grad():
        layer.packed_queries.zero_()
    means = x.cumsum(1) / torch.arange(1, 31)[:, None]
    want = means @ layer.unpack.weight.T @ layer.out.weight.T
    assert difference(layer(x, Context(causal=True)).y, want) <= EXACT


def test_parameters_are_four_projections_and_the_packed_queries() -> None:
    assert sum(p.numel() for p in make(9).parameters()) == 4 * 16**2 + 5 * 16


def test_heads_of_another_width_are_refused() -> None:
    dims = Dims(seq_len=9, d_model=16, heads=2, head_size=4)
    reason = Luna.unsupported(LunaConfig(), dims, causal=True)
    assert reason is not None
    assert "d_model=16" in reason
    with pytest.raises(ValueError, match="d_model=16"):
        Luna(LunaConfig(), dims)


def test_the_pack_of_the_whole_sequence_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bidirectional form under a causal objective."""
    forward = Luna.forward
    monkeypatch.setattr(
        Luna, "forward", lambda self, x, ctx, state=None: forward(self, x, Context(causal=False))
    )
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Luna, LunaConfig(), dims_of(75, 2), 2, CPU)


def test_a_state_with_the_own_chunk_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a chunk would read its later tokens in the state."""
    make_states = packed_sums._states

    def leaking(w: Tensor, m: Tensor, start: Tensor) -> Tensor:
        states = make_states(w, m, start)
        states[:-1] = states[1:].clone()
        return states

    monkeypatch.setattr(packed_sums, "_states", leaking)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Luna, LunaConfig(), dims_of(75, 2), 2, CPU)


@pytest.mark.parametrize("segment", [1, 2**7, 2**17])
def test_segments_change_neither_outputs_nor_gradients(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_sums, "SEGMENT", Sizes(segment, segment))
    layer, x = make(70, chunk=8), numbers(2, 70, 16)
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: layer.reference(x, Context(causal=True)),
        [x, *layer.parameters()],
    )
