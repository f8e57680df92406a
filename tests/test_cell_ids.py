"""The id of a cell does not change with the code that composes it: records are found again by it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from bench import CONFIGS
from bench.cli import guard
from bench.config.parse import parse

IDS = {
    "variant=dense": "752bb6edd74c2304",
    "variant=longformer": "efcb442a451f7bda",
    "variant=performer": "b29312a832b61f6f",
    "variant=sparse_fixed": "517d2f024bd00c64",
    "variant=longformer variant.window=64": "f6ba5b35ba63aef3",
    "data=mqar": "7f04fc100fc3dbba",
    "data=needle": "3ecfb17ac43150d4",
    "data=listops": "4637e1adf20baf73",
    "data=pg19": "a9a5a31354c572b5",
    "measure=fits": "d2801d0ce627ff14",
    "measure=thorough": "dbc20a64ffa45b9a",
    "measure=plan": "4068844dde6ad670",
    "model=base": "b9aa410e3063a775",
    "activations=offload": "797ec5585684097f",
    "measure.train_budget=flops measure.train_flops=10": "4e14c72c1cdd8231",
    "measure.train_budget=seconds measure.train_seconds=2": "1c7a2fe89c2130c2",
    "batch_size=fit measure.budget=8GiB": "9d5229cf0a69f758",
    "variant=routing variant.decay=0": "75a71cac53c2a92d",
    "measure.learning_rate=1": "0ea6f54c9353917f",
    "measure.precision=0": "bfe9b36527c663b8",
    "measure.reach=true": "b37007fb9b36e2b6",
    "twin=1": "aa1e365a9d72ad61",
    "compile=off": "752bb6edd74c2304",
    "feed_forward=mlp stack=stack": "752bb6edd74c2304",
    "feed_forward=mlp feed_forward.activation=gelu": "752bb6edd74c2304",
}
"""What is typed → its cell's id with the data "data" and the code "code"."""


@pytest.mark.parametrize("line", IDS)
def test_a_cell_keeps_its_id(line: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=guard.checked(["device=cpu", *line.split()]))
    assert parse(composed).spec.cell_id("data", "code") == IDS[line]
