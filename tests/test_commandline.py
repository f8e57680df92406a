"""A command line is data: whatever it says, no code that it names runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import OverrideParseException

from bench import CONFIGS
from bench.cli import guard
from bench.inputs.errors import ConfigError

ROOT = Path(__file__).parents[1]
HANDLER = "{h:{class:logging.FileHandler,filename:%s}}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], capture_output=True, text=True, cwd=ROOT
    )


ATTACKS = {
    "callback": ["+hydra.callbacks.x._target_=pathlib.Path.touch", "+hydra.callbacks.x.self={seen}"],
    "callback in one": ["+hydra.callbacks={{x:{{_target_:subprocess.run,args:[touch,{seen}]}}}}"],
    "callback from the environment": ["+hydra.callbacks=${{oc.decode:${{oc.env:EVIL}}}}"],
    "launcher": ["-m", "hydra.launcher._target_=subprocess.run"],
    "sweeper": ["-m", "hydra.sweeper._target_=subprocess.run"],
    "logging": ["hydra.job_logging.handlers={{h:{{class:logging.FileHandler,filename:{seen}}}}}"],
    "hydra's logging": ["+hydra.hydra_logging.handlers.h={{class:logging.FileHandler,filename:{seen}}}"],
    "all of hydra": ["++hydra={{callbacks:{{}}}}"],
    "environment": ["+hydra.job.env_set.LD_PRELOAD={seen}"],
    "knob": ["+variant.x={{_target_:os.system,command:'touch {seen}'}}"],
    "configs": ["--config-dir", "{home}", "+hydra/callbacks=evil"],
    "configs, shortened": ["--config-d={home}", "+hydra/callbacks=evil"],
    "configs by a setting": ["hydra.searchpath=[file://{home}]", "+hydra/callbacks=evil"],
    "pickle": ["--experimental-rerun", "{home}/job.pickle"],
    "pickle, shortened": ["--exp={home}/job.pickle"],
}


class Evil:
    """Runs code as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


EVIL = """\
# @package _global_
hydra:
  job_logging:
    version: 1
    root: {{handlers: [h], level: INFO}}
    handlers:
      h: {{class: logging.FileHandler, filename: {seen}}}
  callbacks:
    x: {{_target_: logging.FileHandler, filename: {seen}}}
"""
"""A preset that makes a file as soon as Hydra takes it up."""

ELSEWHERE = {
    "a path": ["experiment={away}"],
    "in quotes": ["experiment='{away}'"],
    "in double quotes": ['experiment="{away}"'],
    "with a suffix": ["experiment={away}.yaml"],
    "absolute": ["experiment={home}/x"],
    "through its own group": ["experiment=./{away}"],
    "as a variant": ["variant={away}"],
    "as a model": ["model={away}"],
    "as a tracker": ["tracker={away}"],
    "as a measure": ["measure={away}"],
    "as a cluster": ["cluster={away}"],
    "as a launcher": ["-m", "hydra/launcher={away}"],
    "as a launcher, absolute": ["-m", "hydra/launcher={home}/x"],
    "as logging": ["hydra/job_logging={home}/x"],
    "as callbacks": ["+hydra/callbacks={home}/x"],
    "elsewhere": ["experiment@_global_={away}"],
    "added elsewhere": ["+experiment@_global_={away}"],
    "added": ["++experiment={away}"],
    "in a list": ["experiment=[{away}]"],
    "in a sweep": ["-m", "experiment=smoke,{away}"],
    "in a choice": ["-m", "experiment=choice({away})"],
    "in a swept variant": ["-m", "variant=dense,'{away}'"],
    "in a grid": ["-m", "hydra.sweeper.params={{experiment:{away}}}"],
    "in grids": ["-m", "hydra.sweeper.grids=[{{variant:'{away}'}}]"],
    "as the root": ["--config-name={home}/x"],
    "as the root, shortened": ["-cn", "{home}/x"],
}


def spelt(arguments: list[str], home: Path) -> list[str]:
    away = os.path.relpath(home / "x", CONFIGS / "experiment")
    return [text.format(away=away, home=home) for text in arguments]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_no_config_from_elsewhere_is_read(kind: str, tmp_path: Path) -> None:
    home, results = tmp_path / "home", tmp_path / "results"
    home.mkdir()
    (home / "x.yaml").write_text(EVIL.format(seen=home / "seen"))
    quick = ["data=stdlib", "measure=plan", "seq_len=32", f"results_dir={results}"]
    given = spelt(ELSEWHERE[kind], home)
    done = run(*given, *(text for text in quick if text.split("=")[0] not in given[-1]))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert [path.name for path in home.iterdir()] == ["x.yaml"]
    assert not results.exists()


@pytest.mark.parametrize(
    "kind", [kind for kind in ELSEWHERE if "in a grid" not in kind and "grids" not in kind]
)
def test_a_config_from_elsewhere_is_refused_before_hydra(kind: str, tmp_path: Path) -> None:
    """What a grid holds is checked where the grid is taken up."""
    with pytest.raises(ConfigError) as said:
        guard.checked(spelt(ELSEWHERE[kind], tmp_path))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("kind", ATTACKS)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    arguments = [text.format(seen=tmp_path / "seen", home=tmp_path) for text in ATTACKS[kind]]
    refused = r"not allowed|must not name code|Error parsing"
    with pytest.raises((ConfigError, OverrideParseException), match=refused):
        guard.checked(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKS)
def test_nothing_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("EVIL", f"{{x: {{_target_: subprocess.run, args: [touch, {seen}]}}}}")
    (tmp_path / "hydra/callbacks").mkdir(parents=True)
    evil = f"# @package hydra.callbacks\nx:\n  _target_: subprocess.run\n  args: [touch, {seen}]\n"
    (tmp_path / "hydra/callbacks/evil.yaml").write_text(evil)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Evil(seen)))
    done = run(*(text.format(seen=seen, home=tmp_path) for text in ATTACKS[kind]), f"results_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not seen.exists()


def test_the_command_refuses_before_hydra_runs(tmp_path: Path) -> None:
    """A handler is made, and so a file, as soon as Hydra sets up its logging."""
    done = run(f"hydra.job_logging.handlers={HANDLER % (tmp_path / 'seen')}", f"results_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: hydra.job_logging.handlers: not allowed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argument",
    [
        "variant=glob(*)",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5",
        "hydra.sweep.dir=elsewhere",
        "-m",
        "--multirun",
        "--cfg=job",
        "--help",
        "+variant.hydra=1",
        "hydra.sweeper.params={seq_len:'1,2'}",
        "experiment=smoke",
    ],
)
def test_what_an_experiment_needs_is_allowed(argument: str) -> None:
    assert guard.checked([argument]) == [argument]


ONE_LINE = {
    "--shell-completion": "install=bash",
    "--shell-completion bash": "install=bash",
    "--shell-completion install=tcsh": "install=bash",
    "--cfg jobs": "invalid choice",
    "--info everything": "invalid choice",
    "--cfg job --multirun": "only one of them is allowed",
    "--run --info all": "only one of them is allowed",
    "--resolve": "--cfg or --help",
    "--nosuchflag": "unrecognized",
    "~seq_len": "cannot be removed",
    "~measure": "cannot be removed",
    "~variant=dense": "cannot be removed",
    "results_dir=${depth}": "plain",
    "results_dir='${depth}'": "plain",
    'name="a${depth}"': "plain",
    "name=a,${depth}": "plain",
    "name=choice(a,'${depth}')": "plain",
    "variant.window=[1,${depth}]": "plain",
    "data.path=${oc.env:HOME}": "plain",
    "hydra.run.dir=${oc.env:HOME}": "plain",
    "cluster=local,ray": "the same cluster",
    "cluster.cells_per_job=1,2": "the same cluster",
    "hydra.job.chdir=true": "not allowed; Hydra.s settings",
    "nosuch/group=x": "unknown group",
    "name=\udcff": "not UTF-8",
}


@pytest.mark.parametrize("line", ONE_LINE)
def test_what_cannot_be_is_refused_in_one_line(line: str) -> None:
    with pytest.raises(ConfigError, match=ONE_LINE[line]) as said:
        guard.checked(line.split(" "))
    assert "\n" not in str(said.value)


TYPED = {
    # what Hydra spells in another way is quoted, and nothing else
    "name=2024_11_26": "name='2024_11_26'",
    "name=1e3": "name='1e3'",
    "name=1.10": "name='1.10'",
    "name=true": "name='true'",
    "name=FALSE": "name='FALSE'",
    "name=+1": "name='+1'",
    "name=.5": "name='.5'",
    "name=NaN": "name='NaN'",
    "name=1e3,1.10,plain": "name='1e3','1.10',plain",
    "name=choice(1e3, 1.10)": "name=choice('1e3', '1.10')",
    "results_dir=1_0": "results_dir='1_0'",
    "data.path=2024_11_26": "data.path='2024_11_26'",
    "data.path=/home/Jürgen/a b;c": "data.path='/home/Jürgen/a b;c'",
    "data.path=~/books": "data.path='~/books'",
    "data.path=a=b": "data.path='a=b'",
    "+tracker.place=1e3": "+tracker.place='1e3'",
    "variant.window=[1_0,8]": "variant.window=['1_0',8]",
    "experiment=1e3": "experiment='1e3'",
    "name=12": "name=12",
    "name=1.5": "name=1.5",
    "name=0x10": "name=0x10",
    "name=null": "name=null",
    "name='1e3'": "name='1e3'",
    "name=2024-11-26": "name=2024-11-26",
    "name=glob(*)": "name=glob(*)",
    "data.path='it s',\"1e3\"": "data.path='it s',\"1e3\"",
    "data.n_pairs=range(1,9)": "data.n_pairs=range(1,9)",
    "seq_len=1_024": "seq_len=1_024",
    "measure.learning_rate=1e-3": "measure.learning_rate=1e-3",
    "force=true": "force=true",
    "hydra.launcher.timeout_min=1_0": "hydra.launcher.timeout_min=1_0",
}


@pytest.mark.parametrize("line", TYPED)
def test_text_is_handed_on_as_it_was_typed(line: str) -> None:
    assert guard.checked([line]) == [TYPED[line]]
