"""A command line is data: whatever it says, no code that it names runs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bench import commandline
from bench.checks import ConfigError

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


@pytest.mark.parametrize("kind", ATTACKS)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    arguments = [text.format(seen=tmp_path / "seen", home=tmp_path) for text in ATTACKS[kind]]
    with pytest.raises(ConfigError, match=r"not allowed|does not name code|not from a command line") as said:
        commandline.check(arguments)
    assert "\n" not in str(said.value)


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
    assert done.stderr.startswith("error: hydra.job_logging.handlers: not from a command line")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argument",
    [
        "variant=glob(*)",
        "seq_len=${oc.env:LENGTH}",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5",
        "hydra.sweep.dir=elsewhere",
        "-m",
        "--multirun",
        "-cn=config",
        "--cfg=job",
        "--help",
        "+variant.hydra=1",
        "~data.tokenizer",
    ],
)
def test_what_an_experiment_needs_is_allowed(argument: str) -> None:
    commandline.check([argument])
