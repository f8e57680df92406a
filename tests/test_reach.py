"""What a model's patterns say it can look at is what changes its outputs, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import variants
from bench.evaluate.receptive_field import connected_share, dependence, reach
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from variants.base import Workload, sequence_mask
from variants.ops.patterns import masks

T = 41
KNOBS: dict[str, dict[str, Any]] = {
    "chunked": {"chunk": 9},
    "compressive": {"segment": 6, "mem_len": 5, "comp_len": 2, "rate": 2},
    "linformer": {"k": 4},
    "longformer": {"window": (5, 3), "dilation": (1, 2)},
    "overlapping": {"chunk": 12},
    "performer": {"n_features": 8, "chunk": 8},
    "sparse_fixed": {"stride": 6, "c": 1},
    "sparse_strided": {"stride": 6},
    "transformer_xl": {"segment": 6, "mem_len": 4},
}
"""Small enough that three layers do not reach everywhere, where there is anything to be small."""


def model_of(name: str, knobs: dict[str, Any], *, depth: int, seq_len: int = T) -> LanguageModel:
    """float64, with weights large enough that what a token holds arrives wherever it can go."""
    torch.manual_seed(0)
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=16, heads=2)
    given_: dict[str, Any] = {"dropout": 0.0, "vocabulary": 7, "activations": "keep"}
    model = (
        LanguageModel(
            ModelSpec.of(variant, variant.Config(**knobs), feed_forward=feed_forward(mult=1)),
            dims,
            depth=depth,
            **given_,
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def changed_by(model: LanguageModel, seq_len: int, *, causal: bool) -> Tensor:
    """(T, T) bool: whether an output (row) is another when an input (column) is."""
    tokens = torch.randint(0, 6, (seq_len,), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([tokens[None], tokens + torch.eye(seq_len, dtype=torch.int64)])
    torch.manual_seed(2)
    parts = [out.logits.double() for _, out in model.stream(rows, causal=causal)]
    y = torch.cat(parts, dim=1)
    return (y[1:] != y[0]).any(dim=-1).T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", variants.mixers())
def test_dependence_is_what_changes_an_output(name: str, causal: bool) -> None:
    variant, knobs = variants.load(name), KNOBS.get(name, {})
    dims = Workload(causal=True, batch_size=1, seq_len=T, d_model=16, heads=2)
    if reason := variant.unsupported(variant.Config(**knobs), dims, causal=causal):
        pytest.skip(reason)
    for depth in (1, 3):
        model = model_of(name, knobs, depth=depth)
        found = dependence(model, T, causal=causal)
        if found is None:
            assert sequence_mask(model.layers[0], model.input_schedule, T, causal=causal) is None
            return
        changed = changed_by(model, T, causal=causal)
        assert not (changed & ~found).any(), "an output changed with what it is said not to see"
        assert torch.equal(changed, found)


@given(window=st.integers(1, 9), depth=st.integers(1, 4), seq_len=st.integers(1, 40))
def test_a_window_reaches_a_window_less_one_a_layer(window: int, depth: int, seq_len: int) -> None:
    model = model_of("longformer", {"window": (window,)}, depth=depth, seq_len=seq_len)
    assert reach(model, seq_len, causal=True) == min(depth * (window - 1), seq_len - 1)


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize(("seq_len", "expected"), [(8, 7), (9, 0), (16, 7), (13, 4)])
def test_depth_does_not_take_a_chunk_further(depth: int, seq_len: int, expected: int) -> None:
    assert reach(model_of("chunked", {"chunk": 8}, depth=depth), seq_len, causal=True) == expected


def test_windows_of_overlapping_chunks_do_not_chain() -> None:
    """Each window runs through all layers by itself, though the windows have tokens in common."""
    model = model_of("overlapping", {"chunk": 8}, depth=4)
    assert reach(model, 32, causal=True) == 7
    naive = masks.composed([layer.attention_mask(32, causal=True) for layer in model.layers])  # type: ignore[misc]
    assert naive[-1, : 32 - 8].any(), "composing the patterns alone would say more"


def test_memory_adds_up_over_layers() -> None:
    """Of a segment of 4 and a memory of 4, the last token reads 7 back, and each layer more 4 more."""
    for depth in (1, 2, 3):
        model = model_of("transformer_xl", {"segment": 4, "mem_len": 4}, depth=depth)
        assert reach(model, 40, causal=True) == 3 + 4 * depth


def test_content_decides() -> None:
    assert reach(model_of("reformer", {}, depth=2), T, causal=True) is None


@given(window=st.integers(1, 9), depth=st.integers(1, 4), seq_len=st.integers(1, 40), causal=st.booleans())
def test_pairs_that_windows_connect_are_those_in_reach(
    window: int, depth: int, seq_len: int, causal: bool
) -> None:
    model = model_of("longformer", {"window": (window,)}, depth=depth, seq_len=seq_len)
    far = depth * (window - 1)
    within = sum(-far <= i - j <= far for i in range(seq_len) for j in range(i + 1 if causal else seq_len))
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    assert connected_share(model, seq_len, causal=causal) == pytest.approx(within / pairs)


@pytest.mark.parametrize("head_mode", ["merged", "split", "interleaved"])
@pytest.mark.parametrize("name", ["sparse_fixed", "sparse_strided"])
def test_two_sparse_layers_connect_what_one_does_not(name: str, head_mode: str) -> None:
    one, two = (
        connected_share(model_of(name, KNOBS[name] | {"head_mode": head_mode}, depth=depth), T, causal=True)
        for depth in (1, 2)
    )
    assert one is not None
    assert one < 1
    assert two == 1


def test_of_what_content_decides_no_share_is_known() -> None:
    assert connected_share(model_of("routing", {}, depth=2), T, causal=True) is None
