"""`step_tokens`: the batch size that keeps the tokens of a step constant over lengths."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import Cell
from bench.inputs.errors import ConfigError


def cell_of(*overrides: str) -> Cell:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["device=cpu", *overrides]))


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1024, 64), (16384, 4), (65536, 1)])
def test_a_cell_is_that_of_the_batch_size(seq_len: int, batch_size: int) -> None:
    by_tokens = cell_of(f"seq_len={seq_len}", "step_tokens=65536")
    assert by_tokens.spec == cell_of(f"seq_len={seq_len}", f"batch_size={batch_size}").spec


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("seq_len=1000", "step_tokens=65536"), "allowed are multiples of seq_len=1000"),
        (("seq_len=4096", "step_tokens=1024"), "allowed are multiples of seq_len=4096"),
        (("step_tokens=1024", "batch_size=2"), "takes the place of batch_size=2"),
        (("step_tokens=1024", "batch_size=fit", "measure.budget=1GiB"), "takes the place of batch_size=fit"),
    ],
)
def test_what_cannot_be_is_told(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cell_of(*overrides)
