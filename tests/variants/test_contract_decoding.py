"""Decoding: a prompt and steps give the outputs of the whole sequence, from a state of the stated size.

Nothing here names a variant, except the configurations whose borders are near: every variant that can be
decoded is covered as it stands, at least with its defaults and its own small configurations.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from typing import Any

import pytest
import torch
from oracles import EXACT, bytes_of, difference, dims_for, feed, make_layer, numbers
from test_contract import NAMES, small_knobs
from test_contract_state import PATTERNS
from tiers import tiered
from torch import Tensor

import variants
from variants.base import Clock, Context, DecodingState, SequenceMixer, Workload

TOKENS = 61
MEMORIES: list[tuple[str, dict[str, Any]]] = [
    *[("transformer_xl", {"segment": s, "mem_len": m}) for s, m in ((5, 7), (7, 3), (5, 0), (100, 100))],
    *[
        ("compressive", {"compression": kind, "segment": s, "mem_len": m, "comp_len": c, "rate": r})
        for kind in ("mean", "max", "conv", "dilated_conv", "most_used")
        for s, m, c, r in ((5, 7, 4, 3), (4, 4, 2, 2), (6, 3, 5, 4), (5, 0, 3, 2), (5, 7, 0, 3))
    ],
]
"""Segments, memories and groups that end at different tokens."""
STEPS = {
    "token by token": [1] * TOKENS,
    "after a prompt": [17] + [1] * (TOKENS - 17),
    "in blocks": [5] * (TOKENS // 5) + [TOKENS % 5],
    "a token, then two blocks": [1, 30, 30],
}


def configurations() -> list[tuple[Hashable, tuple[str, dict[str, Any]]]]:
    """Groups of configurations that have the same code in common, for `tiered`, and the configurations."""
    found: list[tuple[Hashable, tuple[str, dict[str, Any]]]] = [((name,), (name, {})) for name in NAMES]
    found += [((name, "small"), (name, knobs)) for name in NAMES for knobs in small_knobs(name)]
    found += [((name, "pattern"), (name, knobs)) for name, knobs in PATTERNS]
    found += [((name, knobs.get("compression")), (name, knobs)) for name, knobs in MEMORIES]
    return found


def in_steps() -> list[Any]:
    """Each group in every way of reading; the defaults, longer than the sequence, token by token alone."""
    cases = []
    for group, (name, knobs) in configurations():
        for place, (way, steps) in enumerate(STEPS.items()):
            key = None if not knobs and place else (group, way)
            cases.append((key, pytest.param(name, knobs, steps, id=f"{name}-{knobs}-{way}")))
    return tiered(cases)


def layer_of(name: str, knobs: dict[str, Any], index: int = 0) -> SequenceMixer:
    """A layer, or a skip with the reason why it is not decoded."""
    variant = variants.load(name)
    config = variant.Config(**knobs)
    dims = dims_for(90)
    if reason := variant.unsupported(config, dims, causal=True) or variant.no_decoding(config):
        pytest.skip(reason)
    layer = make_layer(variant, config, dims, index=index).eval()
    if reason := variant.missing(config, dims, device=torch.device("cpu"), dtype=torch.float64):
        pytest.skip(reason)
    return layer


def begin(layer: SequenceMixer, batch: int, max_len: int) -> DecodingState:
    return layer.init_state(batch, max_len, clock=Clock(), dtype=torch.float64)


@torch.no_grad()
def decode(layer: SequenceMixer, x: Tensor, state: DecodingState, steps: list[int]) -> Tensor:
    """The outputs of x (B, T, C), read in steps of these numbers of tokens."""
    ctx, outputs = Context(causal=True), []
    for end, tokens in zip(accumulate(steps), steps, strict=True):
        outputs.append(layer(x[:, end - tokens : end], ctx, state).y)
        state.clock.advance(tokens)
    return torch.cat(outputs, dim=1)


def whole(layer: SequenceMixer, x: Tensor) -> Tensor:
    """The outputs of the layer for one window of its input schedule, or a sequence if it has state."""
    if layer.info.caps.stateful:
        return feed(layer, x, causal=True).detach()
    return layer(x, Context(causal=True)).y.detach()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_one_sequence_is_copied_into_every_sequence_of_a_batch(name: str) -> None:
    """As the largest batch is measured after one prompt."""
    layer = layer_of(name, next(iter(small_knobs(name)), {}))
    x = numbers(1, 20, layer.dims.d_model).detach()
    single, batch = begin(layer, 1, 20), begin(layer, 3, 20)
    decode(layer, x[:, :17], single, [17])
    batch.copy_from(single)
    batch.clock.position = single.clock.position
    got = decode(layer, x[:, 17:].expand(3, -1, -1), batch, [1, 2])
    assert difference(got, decode(layer, x[:, 17:], single, [1, 2]).expand(3, -1, -1)) <= EXACT


@pytest.mark.parametrize(("name", "knobs", "steps"), in_steps())
def test_steps_give_the_outputs_of_the_whole_sequence(
    name: str, knobs: dict[str, Any], steps: list[int]
) -> None:
    """At every prefix: no output depends on later tokens, which the gate of causality shows."""
    for index in (0, 1):
        layer = layer_of(name, knobs, index)
        x = numbers(2, TOKENS, layer.dims.d_model).detach()
        state = begin(layer, 2, TOKENS)
        assert difference(decode(layer, x, state, steps), whole(layer, x)) <= EXACT
        state.reset()
        state.clock.restart()
        again = decode(layer, x.flip(1), state, steps)
        assert difference(again, whole(layer, x.flip(1))) <= EXACT, "after another sequence"


def work_of(layer: SequenceMixer, tokens: int) -> Workload:
    dims = layer.dims
    return Workload(
        batch_size=3, seq_len=tokens, d_model=dims.d_model, heads=dims.heads, causal=True, element_bytes=8
    )


@pytest.mark.parametrize(
    ("name", "knobs"), tiered((group, pytest.param(*case)) for group, case in configurations())
)
def test_the_state_has_the_stated_size_and_holds_what_is_needed(name: str, knobs: dict[str, Any]) -> None:
    layer = layer_of(name, knobs)
    for tokens in (1, 2, 7, TOKENS):
        state = begin(layer, 3, tokens)
        assert state.nbytes == layer.decoding_bytes(work_of(layer, tokens))
        before = [(name, tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors()]
        decode(layer, numbers(3, tokens, layer.dims.d_model).detach(), state, [1] * tokens)
        assert before == [(name, tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors()]
    if layer.input_schedule(layer.config).open_windows(TOKENS) == [TOKENS]:
        needed = max(bytes_of(layer, work_of(layer, tokens)) for tokens in range(1, TOKENS + 1))
        assert layer.decoding_bytes(work_of(layer, TOKENS)) >= needed


@pytest.mark.parametrize("name", NAMES)
def test_a_state_has_room_for_so_many_tokens(name: str) -> None:
    layer = layer_of(name, {})
    state, x = begin(layer, 1, 4), numbers(1, 5, layer.dims.d_model).detach()
    decode(layer, x[:, :3], state, [3])
    with pytest.raises(ValueError, match=r"^2 tokens after 3: the state was made for at most 4$"):
        layer(x[:, 3:], Context(causal=True), state)


def test_what_cannot_be_decoded_says_why() -> None:
    for name in NAMES:
        variant = variants.load(name)
        reason = variant.no_decoding(variant.Config())
        assert reason is None or len(reason.split()) >= 4
        if reason:
            layer = make_layer(variant, variant.Config(), dims_for(300))
            with pytest.raises(NotImplementedError, match=variant.__name__):
                begin(layer, 1, 4)
