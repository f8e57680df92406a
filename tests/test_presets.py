"""What a file under configs/ may hold: plain values of knobs, names of entries, and what is swept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError
from hydra_plugins.longctx_configs import CheckedSource
from hydra_sweeps import swept
from omegaconf import OmegaConf

import variants
from bench import CONFIGS, tasks
from bench.config.groups import GROUPS, SECTIONS, entries
from bench.config.parse import parse
from bench.config.spec import ModelSizes
from bench.inputs.errors import ConfigError
from bench.tasks.base import Setting, Task, TaskConfig


def source(folder: Path) -> CheckedSource:
    return CheckedSource("main", f"{CheckedSource.scheme()}://{folder}")


def loaded(folder: Path, name: str, text: str) -> Any:
    """The content of a file that says this, as Hydra is handed it."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return OmegaConf.to_container(source(folder).load_config(name).config, resolve=False)


GLOBAL = "# @package _global_\n"
REFUSED = {
    "a callback": GLOBAL + "hydra: {callbacks: {x: {_target_: a.B}}}",
    "logging": GLOBAL + "hydra: {job_logging: {handlers: {h: {class: logging.FileHandler}}}}",
    "the environment": GLOBAL + "hydra: {job: {env_set: {LD_PRELOAD: x.so}}}",
    "another search path": GLOBAL + "hydra: {searchpath: [/tmp]}",
    "another sweeper": GLOBAL + "hydra: {sweeper: {_target_: a.B}}",
    "a launcher's class": GLOBAL + "hydra: {launcher: {_target_: a.B}}",
    "a class within a launcher": GLOBAL + "hydra: {launcher: {init: {x: {_target_: a.B}}}}",
    "a resolver in a launcher": GLOBAL + "hydra: {launcher: {x: '${oc.decode:a}'}}",
    "a package of Hydra's": "# @package hydra.callbacks\nx: {a: 1}",
    "defaults from elsewhere": GLOBAL + "defaults: [../../../tmp/x]",
    "defaults by an absolute path": GLOBAL + "defaults: [/tmp/x]",
    "an override from elsewhere": GLOBAL + "defaults: [{override /data: ../../x}]",
    "defaults of Hydra's": GLOBAL + "defaults: [{/hydra/callbacks: x}]",
    "defaults elsewhere": GLOBAL + "defaults: [{/data@hydra: x}]",
    "a list of defaults": GLOBAL + "defaults: [{override /variant: [dense, chunked]}]",
    "a reference in defaults": GLOBAL + "defaults: [{override /data: '${name}'}]",
    "a class in a knob": GLOBAL + "variant: {x: {_target_: a.B}}",
    "a reference in a knob": GLOBAL + "seq_len: ${depth}",
    "a resolver in a knob": GLOBAL + "name: ${oc.env:HOME}",
    "no value": GLOBAL + "seq_len: ???",
    "no value in a section": GLOBAL + "measure: {train_tokens: ???}",
    "a reference in a grid": GLOBAL + "hydra: {sweeper: {grids: [{seq_len: '${depth}'}]}}",
    "a class in a grid": GLOBAL + "hydra: {sweeper: {params: {variant.x: {_target_: a.B}}}}",
    "no mapping": "- 1",
    "a tag of Python's": GLOBAL + "x: !!python/object/apply:os.system [ls]",
    "not YAML": "a: [",
    "a key twice": "a: 1\na: 2",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("group", ["experiment", "variant", "cluster"])
def test_more_than_knobs_is_refused(kind: str, group: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{group}[=/]x"):
        loaded(tmp_path, f"{group}/x", REFUSED[kind])


def test_a_preset_without_its_first_line_is_refused(tmp_path: Path) -> None:
    """Else its content would be a section that nothing reads, and the default cell would run."""
    with pytest.raises(ConfigError, match=r"experiment=x: the first line must be # @package _global_"):
        loaded(tmp_path, "experiment/x", "name: mine\nseq_len: 64")


@pytest.mark.parametrize("name", ["../x", "experiment/../../x", "/tmp/x", "experiment/../x.yaml"])
def test_only_files_of_the_folder_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "configs/experiment").mkdir(parents=True)
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="not allowed; a config must be the name of a file under"):
        source(tmp_path / "configs").load_config(name)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/**/*.yaml")), ids=lambda path: path.stem)
def test_every_file_that_comes_with_the_program_is_taken(path: Path) -> None:
    name = str(path.relative_to(CONFIGS).with_suffix(""))
    content = OmegaConf.to_container(source(CONFIGS).load_config(name).config, resolve=False)
    plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    assert isinstance(plain, dict)
    assert plain.keys() <= content.keys()
    assert content.keys() == plain.keys() or path.parent.name in GROUPS, "which have declared defaults"


def test_a_file_says_what_differs_from_the_declared_defaults(tmp_path: Path) -> None:
    narrow = loaded(tmp_path, "variant/narrow", "name: longformer\nwindow: [8]")
    assert narrow == {"name": "longformer", **variants.load("longformer").Config(window=(8,)).as_dict()}
    assert loaded(tmp_path, "model/wide", "d_model: 512") == {
        **ModelSizes().as_dict(),
        "size": "wide",
        "d_model": 512,
    }
    assert "window" not in loaded(tmp_path, "cluster/here", "cells_per_job: 3")


@pytest.mark.parametrize("path", [*CONFIGS.glob("measure/*.yaml"), *CONFIGS.glob("model/*.yaml")], ids=str)
def test_no_file_repeats_a_default(path: Path) -> None:
    defaults = SECTIONS[path.parent.name]().as_dict()
    given: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert given
    assert not {knob for knob, value in given.items() if defaults[knob] == value}


@pytest.mark.parametrize("group", GROUPS)
def test_an_entry_needs_no_file(group: str, tmp_path: Path) -> None:
    """The same as in configs/, where files add to them."""
    bare, ours = source(tmp_path), source(CONFIGS)
    assert bare.is_group(group)
    assert (
        {*bare.list(group, ObjectType.CONFIG)} == {*entries(group)} <= {*ours.list(group, ObjectType.CONFIG)}
    )
    assert group in bare.list("", ObjectType.GROUP)
    for entry in entries(group):
        assert bare.is_config(f"{group}/{entry}")
        assert entry in OmegaConf.to_container(bare.load_config(f"{group}/{entry}").config).values()  # type: ignore[union-attr]
    assert not bare.is_config(f"{group}/no_such")
    with pytest.raises(ConfigLoadError):
        bare.load_config(f"{group}/no_such")


TEXT: dict[str, tuple[Any, ...]] = {
    "name: 2024_11_26": ("name", "2024_11_26"),
    "name: 1e3": ("name", "1e3"),
    "name: 1.10": ("name", "1.10"),
    "name: true": ("name", "true"),
    "name: 0x10": ("name", "0x10"),
    "name: 010": ("name", "010"),
    "name: 'quoted'": ("name", "quoted"),
    "name: 12": ("name", "12"),
    "data: {path: 12}": ("data", "path", 12),
    "data: {path: 1:30}": ("data", "path", "1:30"),
    "data: {path: 0x10}": ("data", "path", "0x10"),
    "data: {path: 2024_11_26}": ("data", "path", "2024_11_26"),
    "data: {path: 1e3}": ("data", "path", "1e3"),
    "tracker: {place: 1.10}": ("tracker", "place", "1.10"),
    "tracker: {place: null}": ("tracker", "place", None),
    "seq_len: 1_024": ("seq_len", 1024),
    "measure: {train_tokens: 10_000}": ("measure", "train_tokens", 10_000),
    "measure: {learning_rate: 1e-3}": ("measure", "learning_rate", 0.001),
    "force: true": ("force", True),
    "hydra: {sweeper: {params: {name: 1e3}}}": ("hydra", "sweeper", "params", "name", "1e3"),
    "hydra: {sweeper: {grids: [{measure.budget: null}]}}": (
        "hydra",
        "sweeper",
        "grids",
        0,
        "measure.budget",
        "null",
    ),
    "hydra: {sweeper: {params: null}}": ("hydra", "sweeper", "params", None),
}


@pytest.mark.parametrize("line", TEXT)
def test_text_is_read_as_it_is_written(line: str, tmp_path: Path) -> None:
    *path, value = TEXT[line]
    found: Any = loaded(tmp_path, "experiment/x", GLOBAL + line)
    for key in path:
        found = found[key]
    assert (type(found), found) == (type(value), value)


def test_numbers_that_are_kept_as_text_are_numbers_again_in_a_cell() -> None:
    """`max_bytes: 100_000_000` of pg19 is handed on as written, and typed by the corpus' own config."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        spec = parse(compose("config", overrides=["data=pg19", "device=cpu"])).spec
    assert spec.data.params["max_bytes"] == 100_000_000


RUN = """
import pathlib, sys
import bench
bench.CONFIGS = pathlib.Path(sys.argv.pop(1))
from bench.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("group", ["experiment", "variant"])
def test_a_preset_that_names_code_runs_nothing(group: str, tmp_path: Path) -> None:
    """A real process, over a copy of the config folder with a preset in it that would make a file."""
    configs, seen = tmp_path / "configs", tmp_path / "seen"
    shutil.copytree(CONFIGS, configs)
    handlers = f"{{h: {{class: logging.FileHandler, filename: {seen}}}}}"
    logging = f"{{version: 1, root: {{handlers: [h]}}, handlers: {handlers}}}"
    (configs / group).mkdir(exist_ok=True)
    (configs / group / "evil.yaml").write_text(f"{GLOBAL}hydra: {{job_logging: {logging}}}\n")
    command = [sys.executable, "-c", RUN, str(configs), f"{group}=evil", "measure=plan", "seq_len=32"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: {group}=evil: hydra.job_logging: not allowed; "
        "a preset sets hydra.mode, .sweeper, .launcher\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


PRESETS = {path.stem: path.read_text() for path in sorted((CONFIGS / "experiment").glob("*.yaml"))}
WITHOUT_NETWORK = {"plays", "stdlib", *tasks.names()}


@pytest.mark.parametrize("preset", PRESETS)
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


@pytest.mark.parametrize("preset", [name for name, text in PRESETS.items() if "linformer" in text])
def test_masked_variants_have_a_baseline_wherever_causal_ones_do(preset: str) -> None:
    """Where causal variants are compared with dense attention, those that exist only with a masked objective
    are compared with dense attention of that objective."""
    found: dict[str, set[tuple[str, str]]] = {}
    for cell in swept(f"experiment={preset}"):
        setting = replace(cell.spec, variant="", variant_params={}, objective="", twin=0)
        found.setdefault(repr(setting), set()).add((cell.spec.objective, cell.spec.variant))
    for setting, cells in found.items():
        has_masked = any(objective == "mlm" for objective, _ in cells)
        if has_masked and ("clm", "dense") in cells:
            assert ("mlm", "dense") in cells, setting
