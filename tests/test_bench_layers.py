"""The layer benchmark: real processes at small sizes, and a table that says what they found."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import variants
from bench import CONFIGS
from bench.layers import Figures, Sizes, collect, table

SIZES = Sizes(d_model=32, heads=2, lengths=[64, 128], predicted_length=4096, knobs={"chunked": {"chunk": 16}})


def test_every_knob_in_the_config_is_one_of_its_variant_s() -> None:
    knobs = OmegaConf.to_container(OmegaConf.load(CONFIGS / "layers.yaml"))["knobs"]  # type: ignore[index,call-overload]
    assert set(knobs) <= set(variants.names())
    for name, values in knobs.items():
        assert variants.load(name).Config.of(values).as_dict().items() >= values.items()


def test_figures_of_each_variant_and_length_and_their_table() -> None:
    names = ["dense", "chunked"]
    found = collect(SIZES, names, rounds=2)
    assert {key: len(rounds) for key, rounds in found.items()} == {
        **{(name, length): 2 for name in names for length in SIZES.lengths},
        **{(name, SIZES.predicted_length): 1 for name in names},
    }
    measured, predicted = found["dense", 64][0], found["dense", 4096][0]
    assert isinstance(measured, Figures)
    assert isinstance(predicted, Figures)
    assert measured.seconds is not None
    assert predicted.seconds is None
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes * 64, rel=0.2)
    header, rule, dense, chunked = table(SIZES, names, found).splitlines()
    assert "time / dense at 64" in header
    assert "1.000 (1.000–1.000)" in dense
    assert "chunk=16" in chunked
    assert header.count("|") == rule.count("|") == dense.count("|") == chunked.count("|")
