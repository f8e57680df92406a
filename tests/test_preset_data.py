"""The data of every preset is long enough for its cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra_sweeps import swept

from bench import CONFIGS, tasks
from bench.tasks.base import Setting, Task, TaskConfig

WITHOUT_NETWORK = {"plays", "stdlib", *tasks.names()}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_the_data_of_a_preset_is_long_enough(preset: str) -> None:
    needed: dict[str, tuple[type[Task], TaskConfig, Setting]] = {}
    for cell in swept(f"experiment={preset}"):
        spec = cell.spec
        task, config, setting = spec.task()
        if spec.measure.execute and spec.data.name in WITHOUT_NETWORK:
            setting = replace(setting, replicate=0)
            needed[repr((spec.data, setting))] = task, config, setting
    for task, config, setting in needed.values():
        assert task(config, setting).unsupported() is None
