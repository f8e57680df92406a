"""Every word that a knob of a variant takes, through the command line: plan, gates and a step.

Real processes. Nothing here names a variant: a knob that takes a word lists its words when it refuses
another one.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_contract_cost import words

import variants
from bench import records
from bench.records import Record

CELL = ["data=files", "data.path=corpus.txt", "seq_len=24", "depth=1", "model.d_model=16", "batch_size=2"]
QUICK = ["measure=quick", "measure.time_seconds=0", "measure.min_samples=1"]
SMALL = {"segment": 7, "mem_len": 5, "k": 8}
"""Knobs of any variant that has them: several segments, and a projection, in a short sequence."""
USUAL = {"ok", "unsupported"}


WORDS = [(name, knob, allowed) for name in variants.names() for knob, allowed in words(name).items()]
each_knob = pytest.mark.parametrize(
    ("name", "knob", "allowed"), WORDS, ids=[f"{name}-{knob}" for name, knob, _ in WORDS]
)


def test_knobs_that_take_a_word_are_found() -> None:
    assert ("compressive", "compression", ["mean", "max", "conv", "dilated_conv", "most_used"]) in WORDS
    assert len({name for name, _, _ in WORDS}) > 5


SWEEPS = """
import json, sys
from bench.__main__ import main
statuses = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["bench", *arguments]
    statuses.append(main())
print(json.dumps(statuses))
"""
"""The command line again and again in one process, which loads torch once."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], str]:
    """The records of sweeps over the words of each knob, and over all variants in bfloat16; and stderr."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    sweeps = []
    for name, knob, allowed in WORDS:
        config = variants.load(name).Config()
        small = [f"variant.{key}={value}" for key, value in SMALL.items() if hasattr(config, key)]
        sweeps.append([f"variant={name}", f"variant.{knob}={','.join(allowed)}", *small])
    sweeps.append(["variant=glob(*)", "dtype=bfloat16"])
    sweeps = [["-m", *sweep, *CELL, *QUICK] for sweep in sweeps]
    done = subprocess.run(
        [sys.executable, "-c", SWEEPS, json.dumps(sweeps)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, problems = records.read_all(folder / "results/adhoc")
    assert not problems
    return found, done.stderr


@pytest.mark.slow
@each_knob
def test_every_word_runs_or_says_why_not(
    name: str, knob: str, allowed: list[str], swept: tuple[list[Record], str]
) -> None:
    found, errors = swept
    rows = [record for record in found if record.variant == name and record.dtype == "float32"]
    assert {row.variant_params[knob] for row in rows} == {*allowed}, errors
    failed = [(row.variant_params, row.status, row.reason) for row in rows if row.status not in USUAL]
    assert not failed, errors
    assert all(row.reason for row in rows if row.status == "unsupported")
    assert any(row.status == "ok" and row.step_seconds_median for row in rows), "no word runs here"


@pytest.mark.slow
def test_every_variant_runs_in_bfloat16_or_says_why_not(swept: tuple[list[Record], str]) -> None:
    found, errors = swept
    rows = [record for record in found if record.dtype == "bfloat16"]
    assert {row.variant for row in rows} == {*variants.names()}
    failed = [(row.variant, row.status, row.reason) for row in rows if row.status not in USUAL]
    assert not failed, errors
    assert all(row.reason for row in rows if row.status == "unsupported")
    assert sum(row.status == "ok" for row in rows) > len(rows) / 2
