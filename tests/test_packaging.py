"""What a user installs: the wheel is whole and works away from a checkout; `make` sets up or says why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_registry import distribution

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command as a fresh shell would: nothing of the calling make, Python or venv leaks into it."""
    leaks = ("PYTHON", "MAKE", "MFLAGS", "VIRTUAL_ENV", "CONSTRAINTS", "VENV")
    env = {key: value for key, value in os.environ.items() if not key.startswith(leaks)}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if check and done.returncode != 0:
        pytest.fail(f"{done.args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def tree(folder: str, pattern: str) -> set[str]:
    """Paths of the project's files below a folder of the checkout, caches left out."""
    files = (ROOT / folder).rglob(pattern)
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def contents(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def bin_python(environment: Path) -> Path:
    return environment / "bin" / "python"


def assert_works_away_from_checkout(environment: Path, elsewhere: Path) -> None:
    """The installed project answers from its own copy, lists its variants and runs a cell."""
    python = bin_python(environment)
    asked = "import bench, variants; print(bench.__file__, variants.__file__, sep='\\n')"
    for origin in run(python, "-c", asked, cwd=elsewhere).stdout.split():
        assert Path(origin).is_relative_to(environment), f"imported from {origin}, not from the wheel"

    assert "dense" in run(python, "-m", "variants", "--names", cwd=elsewhere).stdout.split()

    script = environment / "bin" / "longctx-bench"
    assert "dense" in run(script, "variants", "--names", cwd=elsewhere).stdout.split()
    assert run(python, "-c", "import longctx_bench", cwd=elsewhere).returncode == 0

    results = elsewhere / "results"
    cell = ["variant=dense", "seq_len=64", "depth=1", "data=stdlib", "measure=quick"]
    run(python, "-m", "bench", *cell, f"results_dir={results}", cwd=elsewhere)
    (record,) = (results / "adhoc" / "records").glob("*.json")
    outcome = json.loads(record.read_text())
    assert outcome["status"] == "ok", outcome["reason"]
    assert (outcome["variant"], outcome["seq_len"], outcome["depth"]) == ("dense", 64, 1)


def test_wheel_has_all_code_and_configs_and_nothing_else(wheel: Path) -> None:
    names = contents(wheel)
    code = tree("bench", "*.py") | tree("variants", "*.py") | tree("bench/report", "*.mplstyle")
    code |= {path for kind in ("html", "css", "js") for path in tree("bench/report/page", f"*.{kind}")}
    assert len([path for path in code if path.endswith(".js")]) > 1
    code = {path.removeprefix("bench/plugins/") for path in code}  # Hydra's namespace is its own top level
    configs = {f"bench/{path}" for path in tree("configs", "*.yaml")}
    assert configs, "the checkout has no configs"
    assert code | configs <= names
    dist_info = f"longctx_bench-{PROJECT['version']}.dist-info"
    packages = {"bench", "variants", "hydra_plugins", "longctx_bench"}
    assert {name.split("/")[0] for name in names} == {*packages, dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names


def test_sdist_has_the_notebooks_and_their_pages(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    notebooks = tree("notebooks", "*.ipynb") | tree("notebooks", "*.nb.py")
    assert len(notebooks) > 2
    assert notebooks | tree("docs/notebooks", "*.md") | tree("docs/notebooks", "*.png") <= names


def test_editable_install_leaves_configs_in_the_checkout(tmp_path: Path) -> None:
    """A copy in site-packages would go stale: an edited yaml must take effect at once."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable", "-d", tmp_path, cwd=ROOT)
    (built,) = tmp_path.glob("*.whl")
    assert {name.split("/")[0] for name in contents(built)} == {
        "_longctx_bench.pth",
        f"longctx_bench-{PROJECT['version']}.dist-info",
    }


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the project from the wheel, and its dependencies from this environment."""
    environment = tmp_path_factory.mktemp("from_wheel") / "venv"
    venv.create(environment, symlinks=True)
    run(
        *(sys.executable, "-m", "pip", "-q", "--python", bin_python(environment)),
        *("install", "--no-deps", "--no-index", wheel),
        cwd=environment,
    )
    # A folder named in a .pth comes last, and the .pth files inside it are not read: a checkout that is
    # installed as editable in this environment stays out.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return environment


def test_wheel_works_away_from_checkout(from_wheel: Path, tmp_path: Path) -> None:
    assert_works_away_from_checkout(from_wheel, tmp_path)


@pytest.mark.slow
def test_wheel_checks_a_plug_in_of_another_folder(from_wheel: Path, tmp_path: Path) -> None:
    """A faulty plug-in fails, so that it is not another variant that was checked."""
    site = distribution(tmp_path / "site", {"lagged": "lagged_attention.lagged:Lagged"})
    (site_packages,) = from_wheel.glob("lib/python*/site-packages")
    path = site_packages / "plug_in.pth"
    path.write_text(f"{site}\n")
    command = [from_wheel / "bin" / "longctx-bench", "check", "lagged", "lag=2", "--tokens", "97"]
    try:
        lines = run(*command, cwd=tmp_path).stdout.splitlines()
        assert len(lines) > 5
        assert all(line.startswith("ok ") for line in lines)
        module = site / "lagged_attention" / "lagged.py"
        module.write_text(module.read_text().replace("self.reference(x, ctx)", "2 * self.reference(x, ctx)"))
        faulty = run(*command, cwd=tmp_path, check=False)
        assert faulty.returncode == 1, faulty.stderr
        assert "FAILED  causal, 97 tokens, gates: GateFailed: reference" in faulty.stdout
    finally:
        path.unlink()


@pytest.mark.slow
def test_wheel_installs_and_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing is borrowed: the declared dependencies are enough, and the pins agree with one another."""
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, symlinks=True, with_pip=True)
    python = bin_python(environment)
    constraints = ROOT / "constraints" / "cpu.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=elsewhere)
    run(python, "-m", "pip", "check", cwd=elsewhere)
    assert_works_away_from_checkout(environment, elsewhere)


PIN_FILES = sorted(path.name for path in (ROOT / "constraints").glob("*.txt"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    entries = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(package)): version for package, version in entries}


def required_by(extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements of these extras; one may include others of the project."""
    for requirement in map(Requirement, (r for e in extras for r in PROJECT["optional-dependencies"][e])):
        if requirement.name == PROJECT["name"]:
            yield from required_by(requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize(
    ("names", "extras"),
    [
        (["cpu.txt"], ["dev", "cluster", "baselines"]),
        (["gpu.txt"], ["dev", "cluster", "baselines", "gpu"]),
        (["cpu.txt", "peers.txt"], ["dev", "peers"]),
        (["gpu.txt", "peers.txt"], ["dev", "peers"]),
    ],
)
def test_every_declared_dependency_is_pinned_within_its_range(names: list[str], extras: list[str]) -> None:
    pinned = {package: version for name in names for package, version in pins(name).items()}
    declared = [*map(Requirement, PROJECT["dependencies"]), *required_by(extras)]
    for requirement in declared:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} has no pin in constraints/: {names}"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_pins_of_peers_go_with_those_of_the_environments() -> None:
    """A package pinned twice could be pinned to two versions, and then nothing installs."""
    for name in ("cpu.txt", "gpu.txt"):
        assert not pins("peers.txt").keys() & pins(name).keys()


def test_pins_suit_any_build_of_a_release() -> None:
    """A local version tag (`+cpu`) would tie the pins to one place to install from."""
    local = {f"{p}=={v}" for name in PIN_FILES for p, v in pins(name).items() if "+" in v}
    assert not local


def test_make_help_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    helped = set(re.findall(r"^  make ([a-z-]+) +\S", run("make", "help", cwd=ROOT).stdout, re.MULTILINE))
    assert helped == set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE))
    assert helped >= {"help", "install", "bench", "smoke", "report", "clean", "lint", "format"}
    assert helped >= {"test", "test-slow", "test-cuda", "test-peers"}


@pytest.mark.parametrize("interpreter", ["3.10.13", "missing"])
def test_make_says_in_one_line_that_python_does_not_suit(tmp_path: Path, interpreter: str) -> None:
    """A stand-in answers as an old interpreter does: not with success, and with its version when asked."""
    python = tmp_path / "python"
    if interpreter != "missing":
        python.write_text(f'#!/bin/sh\ncase "$2" in *platform*) echo {interpreter};; *) exit 1;; esac\n')
        python.chmod(0o755)
    environment = tmp_path / "venv"
    done = run("make", "install", f"PYTHON={python}", f"VENV={environment}", cwd=ROOT, check=False)
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert "3.11" in error
    assert interpreter in error
    assert not environment.exists()
