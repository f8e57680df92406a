"""The layer benchmark: real processes at small sizes, and a table that says what they found."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiers import slow

import variants
from bench import CONFIGS
from bench.tools.bench_layers import Figures, Results, Sizes, collect, page, table

SIZES = Sizes(d_model=32, heads=2, lengths=[64, 128], predicted_length=4096, knobs={"chunked": {"chunk": 16}})


def test_every_knob_in_the_config_is_one_of_its_variant_s() -> None:
    knobs = OmegaConf.to_container(OmegaConf.load(CONFIGS / "layers.yaml"))["knobs"]  # type: ignore[index,call-overload]
    assert set(knobs) <= set(variants.mixers())
    for name, values in knobs.items():
        assert variants.load(name).Config.of(values).as_dict().items() >= values.items()


@pytest.mark.slow
def test_figures_of_each_variant_and_length_and_their_table() -> None:
    names = ["dense", "chunked"]
    kept: list[str] = []
    found = defaultdict(list)

    def keep(so_far: Results) -> None:
        found.update({key: list(figures) for key, figures in so_far.items()})
        kept.append(page(SIZES, names, 2, so_far))

    collect(SIZES, names, 2, keep)
    assert len(kept) == 2 * 2 * len(SIZES.lengths) + 2, "as measured, a figure at a time"
    assert all(f"| {name} " in text for text in kept for name in names)
    assert {key: len(rounds) for key, rounds in found.items()} == {
        **{(name, length): 2 for name in names for length in SIZES.lengths},
        **{(name, SIZES.predicted_length): 1 for name in names},
    }
    measured, predicted = found["dense", 64][0], found["dense", 4096][0]
    assert isinstance(measured, Figures)
    assert isinstance(predicted, Figures)
    assert measured.seconds is not None
    assert predicted.seconds is None
    twice = found["dense", 128][0]
    assert isinstance(twice, Figures)
    a_token = (twice.peak_bytes - measured.peak_bytes) / 64  # beside tables whose size is fixed
    line = measured.peak_bytes + a_token * (4096 - 64)
    assert predicted.peak_bytes == pytest.approx(line, rel=0.1)
    header, rule, dense, chunked = table(SIZES, names, found).splitlines()
    assert "time / dense at 64" in header
    assert "1.000 (1.000–1.000)" in dense
    assert "chunk=16" in chunked
    assert header.count("|") == rule.count("|") == dense.count("|") == chunked.count("|")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--only dense longfromer", "did you mean longformer?"),
        ("--out taken/x", "Not a directory"),
        *slow(
            ("--only chunked chunkd", "--only=chunkd: unknown; allowed are"),
            ("--rounds 0", "--rounds=0: allowed is 1 or more"),
            ("--out ~nosuchuser/x", "the home folder ~nosuchuser is not known"),
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    command = [sys.executable, "-m", "bench.tools.bench_layers", *arguments.split(" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
