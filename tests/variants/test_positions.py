"""Positions that do not begin at 0: given outright, they do to a layer what a longer sequence would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, difference, dims_for, feed, make_layer, numbers, refer

import variants
from variants.base import Context
from variants.ops import projections
from variants.ops.projections import rotary, rotary_table, rotary_table_at
from variants.ops.segments import relative_attention

TOKENS = 40
SMALL: dict[str, dict[str, Any]] = {
    "compressive": {"segment": 64},
    "linformer": {"k": 8},
    "longformer": {"window": (7,), "global_tokens": 0},
    "reformer": {"chunk": 4, "n_buckets": 4},
    "routing": {"window": 5, "n_clusters": 4},
    "transformer_xl": {"segment": 64},
}
SHIFTS_CONTENT = ("reformer", "performer", "linear_transformer", "rfa", "luna")
"""What they hash, take features of or pack is rotated by the absolute position."""


CONSECUTIVE = ("sinkhorn",)
"""Keys have positions before the first token, which follow from it: positions are consecutive."""


@pytest.mark.parametrize("name", [name for name in variants.mixers() if name not in SHIFTS_CONTENT])
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_do_not_depend_on_where_positions_begin(name: str, causal: bool) -> None:
    """Scores depend on distances alone, so a constant added to all positions changes nothing."""
    variant = variants.load_mixer(name)
    config, dims = variant.Config(**SMALL.get(name, {})), dims_for(TOKENS)
    if reason := variant.unsupported(config, dims, causal=causal):
        pytest.skip(reason)
    layer, x = make_layer(variant, config, dims).eval(), numbers(2, TOKENS, dims.d_model)
    begin = torch.arange(TOKENS)
    want = layer(x, Context(causal=causal)).y
    for positions in (begin, begin + 1000):
        context = Context(causal=causal, positions=positions)
        assert difference(layer(x, context).y, want) <= 1e-7
        assert difference(layer.reference(x, context), want) <= 1e-7
    stretched = Context(causal=causal, positions=3 * begin)
    moved = layer(x, stretched).y
    if variant.position_scheme != "rotary":  # distances along a memory or a convolution, or none
        assert torch.equal(moved, want)
    else:
        assert difference(moved, want) > 1e-6, "they are used"
        assert name in CONSECUTIVE or difference(moved, layer.reference(x, stretched)) <= 1e-7


@pytest.mark.parametrize("name", SHIFTS_CONTENT)
def test_positions_from_zero_are_the_default(name: str) -> None:
    variant = variants.load_mixer(name)
    config, dims = variant.Config(**SMALL.get(name, {})), dims_for(TOKENS)
    causal = variant.info.caps.causal
    layer, x = make_layer(variant, config, dims).eval(), numbers(2, TOKENS, dims.d_model)
    given = Context(causal=causal, positions=torch.arange(TOKENS))
    assert difference(layer(x, given).y, layer(x, Context(causal=causal)).y) <= EXACT
    later = Context(causal=causal, positions=torch.arange(TOKENS) + 1000)
    assert difference(layer(x, later).y, layer.reference(x, later)) <= 1e-7
    assert difference(layer(x, later).y, layer(x, given).y) > 1e-6, "they are used"


def test_a_rotation_at_a_position_is_that_of_a_longer_sequence() -> None:
    x = numbers(2, 300, 3, 8).detach()
    later = rotary(x[:, 200:], torch.arange(200, 300))
    assert difference(later, rotary(x)[:, 200:]) <= EXACT
    for got, want in zip(rotary_table_at(torch.arange(300), 8, x), rotary_table(300, 8, x), strict=True):
        assert difference(got, want) <= EXACT


@pytest.mark.parametrize("name", variants.mixers())
def test_the_position_scheme_is_that_which_is_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the angles changes the outputs of a layer that has such angles, and of no other. Distances
    without angles, as in a convolution, are relative too."""
    variant = variants.load_mixer(name)
    config, dims = variant.Config(**SMALL.get(name, {})), dims_for(TOKENS)
    layer, x = make_layer(variant, config, dims).eval(), numbers(1, TOKENS, dims.d_model)
    context = Context(causal=variant.info.caps.causal)
    want, schemes = layer(x, context).y, set()
    rates = projections._rates
    for scheme, module, name_of_base, other in (
        ("rotary", projections, "_rates", lambda head_dim, like, _: rates(head_dim, like, 7.0)),
        ("relative", relative_attention, "SINUSOID_BASE", 7.0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name_of_base, other)
            schemes |= {scheme} if difference(layer(x, context).y, want) > 1e-6 else set()
    assert schemes == {variant.position_scheme} or (not schemes and variant.position_scheme != "rotary")


@pytest.mark.parametrize("name", variants.mixers())
def test_a_layer_reads_more_tokens_than_it_was_built_for_or_says_why_not(name: str) -> None:
    """Also one that chooses buckets, clusters or a stride by the length that it is built for."""
    variant = variants.load_mixer(name)
    config, dims = variant.Config(**SMALL.get(name, {})), dims_for(TOKENS)
    layer, x = make_layer(variant, config, dims).eval(), numbers(1, 2 * TOKENS + 3, dims.d_model)
    context = Context(causal=variant.info.caps.causal)
    if reason := variant.longer_unsupported(config):
        assert reason == f"{name} has parameters for a fixed number of positions"
        with pytest.raises(ValueError, match="built for at most"):
            layer(x, context)
    else:
        assert (
            difference(feed(layer, x, causal=context.causal), refer(layer, x, causal=context.causal)) <= 1e-7
        )
