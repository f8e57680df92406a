"""Folders of configs of the user's: presets, entries of groups, and what they may not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra_plugins.longctx_bench import Composer

from bench import CONFIGS
from bench.cli import help, overrides
from bench.config.folders import VARIABLE, folders, take
from bench.config.parse import parse, plain
from bench.config.spec import CellSpec
from bench.inputs.errors import ConfigError

PRESET = """# @package _global_
# What sayings cost. They are short. It takes two minutes.
defaults:
  - override /data: sayings
name: mine
seq_len: 32
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      variant: dense,narrow
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a preset, a data set, a variant with other defaults, and a model."""
    (tmp_path / "sayings.txt").write_text("All is well that ends well.\n" * 200)
    files = {
        "experiment/mine": PRESET,
        "data/sayings": f"name: files\npath: {tmp_path / 'sayings.txt'}\n",
        "variant/narrow": "name: longformer\nwindow: 8\n",
        "model/wide": "d_model: 96\nheads: 3\n",
    }
    folder = tmp_path / "ours"
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def composed(*lines: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=[*lines])).spec


def test_an_entry_of_each_group_is_chosen_by_its_name(ours: Path) -> None:
    spec = composed("data=sayings", "variant=narrow", "model=wide", "device=cpu")
    assert spec.data.params["path"] == str(ours.parent / "sayings.txt")
    assert (spec.variant, list(spec.variant_params["window"])) == ("longformer", [8])
    assert (spec.model.size, spec.model.d_model) == ("wide", 96)
    assert list(composed("variant=narrow", "variant.window=16").variant_params["window"]) == [16]
    assert "narrow" in overrides.options("variant")
    lines = help.text([], CONFIGS).splitlines()
    assert "mine" in next(line for line in lines if line.startswith("  experiment: "))
    assert "  mine: What sayings cost. It takes two minutes." in lines


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("# @package _global_\nmodel: {d_model: 96, heads: 3}\nvariant: {impl: naive}", "name: dense"),
        ("d_model: 96\nheads: 3", "# @package _global_\nvariant: {name: dense}\nmodel: {dropout: 0.1}"),
        ("defaults: [small]\nheads: 3", "name: dense\nimpl: naive"),
    ],
)
def test_entries_that_change_more_than_their_section_are_composed_by_hydra(
    wide: str, narrow: str, ours: Path
) -> None:
    (ours / "model/wide.yaml").write_text(wide)
    (ours / "variant/narrow.yaml").write_text(narrow)
    chosen = "defaults:\n  - override /model: wide\n  - override /variant: narrow"
    (ours / "experiment/mine.yaml").write_text(PRESET.replace("defaults:", chosen))
    jobs = [["model=wide"], ["variant=narrow"]]
    jobs += [["experiment=mine", entry] for entry in ("variant=dense", "model=small")]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        make = Composer(loader, composed)
        for job in jobs:
            assert make(job) == plain(loader.load_sweep_config(composed, job))


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.slow
def test_a_preset_of_one_s_own_is_swept(way: str, ours: Path, tmp_path: Path) -> None:
    """A process in another folder; the option is relative to where the command runs."""
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    option = ["--config-dir", "ours"] if way == "option" else []
    env |= {VARIABLE: str(ours)} if way == "variable" else {}
    command = [sys.executable, "-m", "bench", *option, "experiment=mine", "measure=plan"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in (tmp_path / "results/mine/records").glob("*.json")]
    assert {(record["variant"], record["data"], record["seq_len"]) for record in found} == {
        ("dense", "files", 32),
        ("longformer", "files", 32),
    }


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nhydra: {callbacks: {x: {_target_: a.B}}}",
        "# @package _global_\nname: ${oc.env:HOME}",
        "# @package _global_\ndefaults: [../../x]",
    ],
)
def test_the_same_rules_apply_as_in_the_project(text: str, ours: Path) -> None:
    (ours / "experiment/evil.yaml").write_text(text)
    with pytest.raises(ConfigError, match="experiment=evil"):
        composed("experiment=evil")


def test_a_folder_of_hydra_s_own_is_not_read(ours: Path) -> None:
    for group in ("hydra/launcher", "unknown"):
        (ours / group).mkdir(parents=True)
        (ours / group / "evil.yaml").write_text("_target_: os.system")
    with pytest.raises(MissingConfigException, match="evil"):
        composed("hydra/launcher=evil")
    assert "unknown" not in overrides.groups()


def test_a_name_in_use_is_refused(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(ours), str(other)]))
    for name, owner in {
        "experiment/cpu": r"a file in .*configs/experiment",
        "variant/dense": "an entry of variant",
        "model/wide": r"a file in .*ours/model",
    }.items():
        path = other / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        with pytest.raises(ConfigError, match=rf"{path.name}: {owner} has this name"):
            folders()
        path.unlink()
        path.parent.rmdir()


def test_what_is_no_folder_of_configs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none: is not a folder"):
        folders()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no folder of a group.* experiment"):
        folders()


def test_the_option_is_taken_from_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    rest = take(["-m", "--config-dir", "b", "-c", "job", "x=1", f"--config-dir={tmp_path}/a"])
    assert rest == ["-m", "-c", "job", "x=1"]
    assert os.environ[VARIABLE] == os.pathsep.join(str(tmp_path / name) for name in ("a", "b"))
    with pytest.raises(ConfigError, match="config-dir"):
        take(["x=1", "--config-dir"])
