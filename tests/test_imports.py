"""Imports run one way, are lazy and have no effects: read from the sources, and proved in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import variants

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    "bench.plugins",
    "bench.__main__",
    "bench.tools",
    "bench.generate",
    "bench.cli",
    "bench.run",
    "bench.scenarios",
    "bench.evaluate",
    "bench.measure",
    "bench.train",
    "bench.config",
    "bench.model",
    "bench.claims",
    "bench.survey",
    "bench.report",
    "bench.tasks",
    "bench.corpora",
    "bench.trackers",
    "bench.process",
    "bench.records",
    "bench.inputs",
    "bench",
    "variants.__main__",
    "variants.facts",
    "variants.slots",
    "variants",
    "variants.attention",
    "variants.feed_forward",
    "variants.depth",
    "variants.ops",
    "variants.base",
    "variants.declarations",
    "variants.head_size",
    "variants.input_schedule",
    "variants.knobs",
    "variants.safe_output",
)
"""Highest first. A module lies in the layer of its longest prefix here, and imports from its own layer or
from lower ones."""
ALONE = {"bench", "variants"}
"""Layers that are one module: what lies below them has a layer of its own."""
HYDRA = ("bench.__main__", "bench.cli", "bench.plugins")
"""Who may import Hydra."""
OF_ANY_PROCESS = {"bench.process.signals", "bench.inputs.printable", "variants.safe_output"}
"""What any command needs, measuring or not: its signals and its screen."""
KERNELS = {"fla", "xformers"}
"""Optional packages that hold an `impl` of a variant; imported inside a function only."""


class Arrow(NamedTuple):
    """One import."""

    target: str
    """A module of the project by its full name, or the name of another top-level package."""
    lazy: bool
    """Inside a function."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted path in the checkout."""
    found = {}
    for package in ("bench", "variants"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below a node, except those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif not for_types_only(child):
            yield from imports(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def targets(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules that an import statement names: `from bench import config` names bench.config."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    assert not statement.level, "imports are absolute"
    for alias in statement.names:
        whole = f"{statement.module}.{alias.name}"
        yield whole if whole in modules() else str(statement.module)


@cache
def arrows(module: str) -> frozenset[Arrow]:
    """What a module imports; a package that it lies in does not count, Python imports that by itself."""
    found = set()
    for statement, lazy in imports(ast.parse(modules()[module].read_text())):
        for target in targets(statement):
            top = target.partition(".")[0]
            if not module.startswith(f"{target}."):
                found.add(Arrow(target if top in {"bench", "variants"} else top, lazy))
    return frozenset(found)


def ours(module: str, package: str = "") -> set[str]:
    """What it imports from the project, or from one package of it."""
    found = {
        arrow.target for arrow in arrows(module) if arrow.target.partition(".")[0] in {"bench", "variants"}
    }
    return {target for target in found if target.partition(".")[0] == package or not package}


def outside(module: str) -> set[str]:
    """Third-party packages that it imports."""
    return {a.target for a in arrows(module) if a.target not in sys.stdlib_module_names} - ours(module)


def layer(module: str) -> int:
    """Its index in `LAYERS`; 0 is the highest. Raises ValueError for a module that has no layer."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    fitting = [name for name in prefixes if name in LAYERS and (name == module or name not in ALONE)]
    if not fitting:
        raise ValueError(f"{module}: in no layer")
    return LAYERS.index(fitting[0])


def names_registry(module: str) -> bool:
    """Whether it imports the package `variants` itself."""
    statements = (found for found, _ in imports(ast.parse(modules()[module].read_text())))
    return any("variants" in targets(statement) for statement in statements)


of_report = [module for module in sorted(modules()) if module.startswith("bench.report")]
of_claims = [module for module in sorted(modules()) if module.startswith("bench.claims")]
of_variants = [module for module in sorted(modules()) if module.startswith("variants.")]


# --- read from the sources ------------------------------------------------------------------------


def test_the_sources_are_read_at_all() -> None:
    """The tests below would pass on nothing."""
    assert "variants.base" in ours("bench.model.language_model")
    assert "torch" in outside("bench.model.language_model")


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    assert {layer(module) for module in modules()} == {*range(len(LAYERS))}


def test_modules_of_the_harness_lie_in_packages() -> None:
    flat = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert flat == {"__init__", "__main__"}


def test_the_sources_have_lazy_imports_and_packages() -> None:
    assert Arrow("bench.run.cell", lazy=True) in arrows("bench.run.isolate")
    assert "bench.records" in ours("bench.measure.cached")
    assert "pandas" in outside("bench.records.store")


def test_imports_name_what_exists() -> None:
    assert {(module, target) for module in modules() for target in ours(module) - {*modules()}} == set()


def test_imports_run_one_way() -> None:
    every = {(module, target) for module in modules() for target in ours(module)}
    assert {(module, target) for module, target in every if layer(target) < layer(module)} == set()


def test_imports_have_no_cycle() -> None:
    """Not even by an import inside a function."""
    graph = TopologicalSorter({module: ours(module) for module in modules()})
    graph.prepare()  # raises CycleError, which names the modules


def test_every_command_ends_through_the_same_guard() -> None:
    """`if __name__ == "__main__"` holds one call, and the guard needs nothing of the project."""
    ends = {
        module: ast.unparse(node.body)  # type: ignore[arg-type]
        for module in modules()
        for node in ast.parse(modules()[module].read_text()).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    }
    assert len(ends) > 8
    assert set(ends.values()) == {"run(main)"}


def test_variants_know_nothing_of_the_harness() -> None:
    """A variant builds on shared code, on other variants and on torch. Only the command, the registry of the
    other slots, and the mixture that names its members, use the registry."""
    for module in of_variants:
        assert not ours(module, "bench"), module
        assert not names_registry(module) or module in {
            "variants.__main__",
            "variants.facts",
            "variants.slots",
            "variants.attention.hybrid",
        }, module
        optional = {a.target for a in arrows(module) if a.lazy} & KERNELS
        assert outside(module) - optional <= {"torch"}, module


def test_the_registry_needs_nothing() -> None:
    assert ours("variants") <= {"variants.attention", "variants.base", "variants.declarations"}
    assert ours("variants.attention") == outside("variants.attention") == set()
    assert outside("variants") == set()
    assert {arrow.target for arrow in arrows("variants") if not arrow.lazy} & {*modules()} == {
        "variants.attention"
    }


@pytest.mark.parametrize("module", sorted(OF_ANY_PROCESS))
def test_what_any_process_needs_needs_nothing(module: str) -> None:
    assert ours(module) == outside(module) == set()


OF_DECLARATIONS = ("figures.style", "data.collect", "sections.mixtures.data")
"""Modules of the report that read what variants declare."""


def test_report_reads_records_and_nothing_else() -> None:
    """And the families of variants and the knobs with layers, from their source, for looks and names, the
    usual layers, and the defaults of a mixture's layers."""
    for module in of_report:
        others = {t for t in ours(module) if t != "bench.report" and not t.startswith("bench.report.")}
        read = {f"bench.records{name}" for name in ("", ".configurations", ".files", ".record")}
        read.add("bench.inputs.errors")
        if module == "bench.report.figures.style":
            read.add("variants")
        if module in {f"bench.report.{name}" for name in OF_DECLARATIONS}:
            read.add("variants.facts")
        if module == "bench.report.sections.decoding.data":
            read.add("variants.slots")
        if module == "bench.report.data.layers":
            read.add("variants")
        assert others <= read | OF_ANY_PROCESS, module
        assert "torch" not in outside(module), module


def test_claims_are_judged_from_records_and_the_reports_statistics() -> None:
    for module in of_claims:
        others = {t for t in ours(module) if not t.startswith(("bench.claims", "bench.report"))}
        assert others <= {"bench.records"} | OF_ANY_PROCESS, module
        assert "torch" not in outside(module), module


def test_a_report_needs_no_claims() -> None:
    for module in of_report:
        assert not [target for target in ours(module) if target.startswith("bench.claims")], module


def test_records_need_no_torch_and_no_harness() -> None:
    package = {module for module in modules() if module.startswith("bench.records")}
    for module in package:
        assert ours(module) <= package | OF_ANY_PROCESS
        assert "torch" not in outside(module)


def test_hydra_stays_at_the_top() -> None:
    for module in modules():
        assert module.startswith(HYDRA) or "hydra" not in outside(module), module


# --- proved in fresh processes --------------------------------------------------------------------


def fresh(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def assert_imports_quietly(names: list[str], forbidden: set[str], cwd: Path) -> None:
    """Importing prints nothing, writes nothing, and loads none of the forbidden packages."""
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
loaded = {forbidden!r} & {{*sys.modules}}
assert not loaded, loaded
"""
    done = fresh(code, cwd)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert not [*cwd.iterdir()]


@pytest.mark.parametrize("package", ["bench", "variants"])
def test_importing_a_package_has_no_effects(package: str, tmp_path: Path) -> None:
    heavy = {"torch", "numpy", "hydra", "omegaconf", "pandas", "matplotlib"}
    assert_imports_quietly([package], heavy, tmp_path)


def test_importing_any_module_has_no_effects(tmp_path: Path) -> None:
    quiet = [m for m in modules() if not m.startswith("bench.plugins") and not m.endswith("__main__")]
    assert_imports_quietly(sorted(quiet), set(), tmp_path)


def test_the_parent_of_the_cells_needs_no_torch(tmp_path: Path) -> None:
    """Whoever starts cells, or only checks a command, does not wait for torch."""
    names = [
        "bench.__main__",
        "bench.run.sweep",
        "bench.run.isolate",
        "bench.config.parse",
        "bench.cli.errors",
        "bench.records",
    ]
    assert_imports_quietly(names, {"torch", "pandas", "matplotlib"}, tmp_path)


def test_checking_a_cell_needs_no_torch(tmp_path: Path) -> None:
    """Of every variant with an outline, up to the start of the cell's own process."""
    outlined = [name for name in variants.names() if variants.outline(name)]
    assert "dense" in outlined
    done = fresh(
        f"""
import sys
from hydra import compose, initialize_config_dir
from bench import CONFIGS
from bench.config.parse import parse
from bench.run.sweep import prepare_jobs
with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    cells = [parse(compose("config", [f"variant={{name}}", "device=cpu"])) for name in {outlined!r}]
prepare_jobs(cells)
assert "torch" not in sys.modules
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_report_needs_no_torch_and_no_hydra(tmp_path: Path) -> None:
    assert_imports_quietly([*of_report, *of_claims], {"torch", "hydra"}, tmp_path)


@pytest.mark.parametrize("module", ["bench", "variants", "bench.report", "bench.claims"])
def test_help_does_not_wait_for_torch(module: str, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = [{module!r}, "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3
    assert not [*tmp_path.iterdir()]
