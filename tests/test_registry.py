"""Variants are found by being there: a module in `variants/`, or an entry point of another package."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import pytest
import yaml
from tiers import slow

import variants
from bench.measure.gate_failed import GateFailed
from bench.run.code_hash import closure
from bench.tools import check
from variants import attention
from variants.knobs import Knobs, knob, knobs_of
from variants.slots import SLOTS

LAYERS = {f"{slot.group}={name}": slot.load(name) for slot in SLOTS.values() for name in slot.names()}
"""Feed-forward layers and depth schedules by what selects them."""

MODULE = '''
"""A variant of somebody else's: every token reads itself and the token `lag` before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from variants.base import Caps, Complexity, Context, Cost, Dims, Info, MixerOut
from variants.base import SequenceMixer, VariantConfig, Workload
from variants.knobs import knob
from variants.ops.projections import Projections, masked_attention


@dataclass(frozen=True, kw_only=True)
class LaggedConfig(VariantConfig):
    """Knobs."""

    lag: int = knob(1, least=1)
    """Tokens back."""


class Lagged(SequenceMixer):
    """Masked on purpose: it is a test."""

    Config = LaggedConfig
    info = Info(
        paper="Nobody 2024, Lagged",
        family="fixed patterns",
        complexity=Complexity(time=2, memory=2, formula="T^2", source="the loop"),
        caps=Caps(causal=True, bidirectional=False),
    )
    flop_overhead_reason = "masks a full matrix"

    def __init__(self, config: LaggedConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return MixerOut(self.reference(x, ctx))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.projections.split(x, ctx.positions)
        allowed = self.attention_mask(x.shape[1], causal=ctx.causal)
        return self.projections.merge(masked_attention(q, k, v, allowed))

    def cost(self, work: Workload) -> Cost:
        attention = 4 * work.batch_size * work.d_model * work.seq_len**2
        projections = Projections.flops(work)
        return Cost({"projections": projections, "attention": attention})

    def state_bytes(self, work: Workload) -> int:
        return 2 * work.batch_size * self.config.lag * work.d_model * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        index = torch.arange(seq_len)
        back = index[:, None] - index
        return (back == 0) | (back == self.config.lag)
'''
YAML = "lag: 3 # tokens back\n"
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "lagged-attention"
version = "0.0.1"

[project.entry-points."longctx_bench.variants"]
lagged = "lagged_attention.lagged:Lagged"

[tool.hatch.build.targets.wheel]
packages = ["lagged_attention"]
"""


def python(*arguments: str | Path, path: Path | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `path` before everything else it imports from."""
    kept = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), kept]))}
    env["LONGCTX_BENCH_LOCKS"] = str(cwd)  # nobody else's measurement is waited for
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def distribution(folder: Path, points: dict[str, str], name: str = "lagged_attention") -> Path:
    """What an installed package leaves behind: its modules, and metadata that names its entry points."""
    package, info = folder / name, folder / f"{name}-0.0.1.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "lagged.py").write_text(MODULE)
    (package / "lagged.yaml").write_text(YAML)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{variants.ENTRY_POINTS}]", *lines]) + "\n")
    return folder


@pytest.fixture
def plugged(tmp_path: Path) -> Path:
    return distribution(tmp_path / "site", {"lagged": "lagged_attention.lagged:Lagged"})


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Adds a plug-in with this module to this process; returns its name. Each module has another, because
    what was read of a module is not read again."""

    def add(text: str, owner: str = "Lagged") -> str:
        name = f"lagged_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        site = distribution(tmp_path / "site", {name: f"{name}.lagged:{owner}"}, name)
        (site / name / "lagged.py").write_text(text)
        monkeypatch.syspath_prepend(site)
        variants._entry_points.cache_clear()
        return name

    yield add
    variants._entry_points.cache_clear()


# --- what is built in -----------------------------------------------------------------------------


def test_names_are_the_sorted_modules_of_attention() -> None:
    modules = {path.stem for path in Path(attention.__file__).parent.glob("*.py")}
    own = {*variants.names()} - {point.name for point in entry_points(group=variants.ENTRY_POINTS)}
    assert own == modules - {"__init__"}
    assert variants.names() == sorted(set(variants.names()))


@pytest.mark.parametrize("name", variants.names())
def test_every_name_loads_a_variant_of_its_module(name: str) -> None:
    from variants.base import SequenceMixer, Variant

    loaded = variants.load(name)
    assert issubclass(loaded, Variant)
    assert issubclass(loaded, SequenceMixer) == (name in variants.mixers())
    if not issubclass(loaded, SequenceMixer):
        with pytest.raises(TypeError, match=f"^variant={name}: is a mixture of layers; there are "):
            variants.load_mixer(name)
    if name not in variants.plugins():
        assert loaded.__module__ == f"variants.attention.{name}"


@pytest.mark.parametrize("asked", ["variants.names()", "import variants.__main__", "variants.plugins()"])
def test_listing_imports_no_variant_and_no_torch(asked: str, plugged: Path, tmp_path: Path) -> None:
    code = f"""
import sys, variants
{asked}
heavy = {{"torch", "numpy", "hydra", "lagged_attention"}} & {{*sys.modules}}
loaded = {{f"variants.attention.{{name}}" for name in variants.names()}} & {{*sys.modules}}
assert not heavy and not loaded, (heavy, loaded)
"""
    done = python("-c", code, path=plugged, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [["--names"], []])
def test_command_lists_variants_without_torch(options: list[str], plugged: Path, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["variants", *{options}]
try:
    runpy.run_module("variants", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    done = python("-c", code, path=plugged, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    names = sorted({*variants.names(), "lagged"})
    assert named == (names if options else [*(f"variant={name}" for name in names), *LAYERS])


def test_command_describes_every_entry(plugged: Path, tmp_path: Path) -> None:
    done = python("-m", "variants", path=plugged, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if not line.startswith(" "):
            parts[line] = []
        else:
            parts[[*parts][-1]].append(line)
    assert "variant.lag=1  # Tokens back (an integer, 1 or more)" in "\n".join(parts.pop("variant=lagged"))
    for entry, lines in parts.items():
        group, _, name = entry.partition("=")
        cls, text = LAYERS.get(entry) or variants.load(name), "\n".join(lines)
        for one in knobs_of(cls.Config).values():
            (line,) = [line for line in lines if f" {group}.{one.name}=" in line]
            value, _, meaning = line.partition("=")[2].partition("  # ")
            assert one.read(yaml.safe_load(value)) == one.default
            assert meaning.endswith(f" ({one.allowed()})")
        if entry in LAYERS:
            assert cls.paper in text
        elif name in variants.mixers():
            info = cls.info_for(cls.Config())
            assert info.paper in text
            assert info.family in text
            assert info.complexity.formula in text
            assert ("bidirectional" in text) == info.caps.bidirectional
        else:
            assert "mixture" in text
        knobs = {line.split()[1].partition("=")[0] for line in lines if line.split()[0] == "knob"}
        assert knobs == {f"{group}.{field.name}" for field in dataclasses.fields(cls.Config)}


@pytest.mark.parametrize(("wrong", "near"), [("longfromer", "longformer"), ("Dense", "dense")])
def test_unknown_name_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(variants.UnknownVariant) as refused:
        variants.load(wrong)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"variant={wrong}: unknown")
    assert message.endswith(f"did you mean {near}?")
    assert all(name in message for name in variants.names())


@pytest.mark.parametrize("wrong", ["", "xyzzy", "base", "ops", "attention", "__init__", "../dense"])
def test_what_is_no_variant_is_refused(wrong: str) -> None:
    with pytest.raises(variants.UnknownVariant):
        variants.load(wrong)


# --- one more file --------------------------------------------------------------------------------


@pytest.fixture
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `variants` also looks into; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])
    for module in ("variants.attention.lagged", "variants.attention.empty"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def test_one_file_is_enough(dropped_in: Path) -> None:
    before = variants.names()
    (dropped_in / "lagged.py").write_text(MODULE)
    assert variants.names() == sorted([*before, "lagged"])
    assert variants.load("lagged").__name__ == "Lagged"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("from variants.attention.dense import Dense", 0),
        (MODULE + "\n\nclass More(Lagged): ...\n", 2),
    ],
)
def test_a_module_must_define_one_variant(dropped_in: Path, text: str, count: int) -> None:
    (dropped_in / "empty.py").write_text(text)
    with pytest.raises(TypeError, match=rf"empty\.py defines {count} variants"):
        variants.load("empty")


# --- plug-ins -------------------------------------------------------------------------------------


def installed(folder: Path) -> Path:
    """The same package, really installed: from source by pip, without a network."""
    source, target = folder / "source", folder / "target"
    (source / "lagged_attention").mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT)
    for name, text in (("__init__.py", ""), ("lagged.py", MODULE), ("lagged.yaml", YAML)):
        (source / "lagged_attention" / name).write_text(text)
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-q"]
    done = python("-m", "pip", "install", *offline, "--target", target, source, cwd=folder)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_plugin_runs_like_a_variant_of_ours(tmp_path: Path) -> None:
    site = installed(tmp_path)
    listed = python("-m", "variants", "--names", path=site, cwd=tmp_path)
    assert "lagged" in listed.stdout.split(), listed.stderr

    cell = ["variant=lagged", "variant.lag=2", "seq_len=64", "depth=1", "data=stdlib", "measure=quick"]
    done = python("-m", "bench", *cell, "results_dir=out", path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out" / "adhoc" / "records").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["reason"]) == ("ok", None)
    assert (record["variant"], record["variant_params"]) == ("lagged", {"lag": 2})
    assert record["objective"] == "clm"
    assert record["leak_max_abs"] < 1e-5
    assert record["reference_max_abs"] < 1e-4


def test_a_plugin_takes_its_defaults_from_the_yaml_beside_it(plugged: Path, tmp_path: Path) -> None:
    done = python("-m", "bench", "variant=lagged", "--cfg", "job", path=plugged, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "variant:\n  name: lagged\n  lag: 3\n" in done.stdout


@pytest.mark.slow
def test_a_plugin_needs_no_yaml(plugged: Path, tmp_path: Path) -> None:
    """Neither does one whose knobs cannot be read without importing it, or whose entry point is wrong."""
    package = plugged / "lagged_attention"
    (package / "lagged.yaml").unlink()
    for default in ("1", "len('a')"):
        (package / "lagged.py").write_text(MODULE.replace("lag: int = 1", f"lag: int = {default}"))
        done = python("-m", "bench", "variant=lagged", "--cfg", "job", path=plugged, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "variant:\n  name: lagged\n  lag: 1\n" in done.stdout
    (package / "lagged.py").write_text("1 / 0")
    done = python("-m", "bench", "variant=lagged", "--cfg", "job", path=plugged, cwd=tmp_path)
    assert "variant:\n  name: lagged\nfeed_forward:" in done.stdout
    listed = python("-m", "variants", path=plugged, cwd=tmp_path)
    assert "lagged\n  broken   plug-in lagged_attention.lagged:Lagged cannot be imported" in listed.stdout


def test_a_plugins_knobs_are_checked(plugged: Path, tmp_path: Path) -> None:
    done = python("-m", "bench", "variant=lagged", "variant.lagg=2", path=plugged, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "lagg" in line
    assert "did you mean" in line


@pytest.mark.parametrize("command", [["variants", "--names"], ["variants"], ["bench", "seq_len=64"]])
def test_a_plugin_cannot_take_the_name_of_a_builtin(command: list[str], tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", {"dense": "lagged_attention.lagged:Lagged"})
    done = python("-m", *command, path=site, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "plug-in lagged_attention.lagged:Lagged takes the name 'dense', which is taken" in last
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("command", [["variants", "--names"], ["bench", "seq_len=64"]])
def test_a_clash_of_names_is_one_line(command: list[str], tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", {"dense": "lagged_attention.lagged:Lagged"})
    done = python("-m", *command, path=site, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_two_plugins_cannot_share_a_name(tmp_path: Path) -> None:
    first = distribution(tmp_path / "one", {"lagged": "lagged_attention.lagged:Lagged"})
    second = tmp_path / "two" / "other-1.0.dist-info"
    second.mkdir(parents=True)
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (second / "entry_points.txt").write_text(f"[{variants.ENTRY_POINTS}]\nlagged = other.module:Other\n")
    code = f"import sys; sys.path.insert(0, {str(second.parent)!r}); import variants; variants.names()"
    done = python("-c", code, path=first, cwd=tmp_path)
    assert "takes the name 'lagged', which is taken" in done.stderr.splitlines()[-1]


def test_a_plugin_must_be_a_variant(plug_in: Callable[..., str]) -> None:
    name = plug_in(MODULE, "LaggedConfig")
    with pytest.raises(TypeError, match=f"^plug-in {name}.lagged:LaggedConfig is not a subclass"):
        variants.load(name)


@pytest.mark.parametrize(
    ("text", "why"), [("def (:", "SyntaxError"), ("import sys; sys.exit('no')", "SystemExit: no")]
)
def test_a_plugin_that_cannot_be_imported_says_why_and_still_has_its_source(
    text: str, why: str, plug_in: Callable[..., str]
) -> None:
    """So that its cell becomes a record, and not the end of a sweep."""
    name = plug_in(text)
    assert [*closure([variants.module_of(name)])] == [f"{name}.lagged", name]
    with pytest.raises(variants.BrokenVariant) as broken:
        variants.load(name)
    message = str(broken.value)
    assert message.startswith(f"plug-in {name}.lagged:Lagged cannot be imported: ")
    assert why in message


# --- the checks that a plug-in's author runs ------------------------------------------------------


def test_a_plug_in_is_checked(plugged: Path, tmp_path: Path) -> None:
    done = python("-m", "bench.tools.check", "lagged", "lag=5", "--tokens", "97", path=plugged, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok      ") for line in lines)
    for words in (
        "causal, 97 tokens, gates: leak 0.0e+00",
        "a plan of 65,536 tokens",
        "not supported",
        "decoding: not decoded: has no form for decoding",
    ):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize(
    ("planted", "by", "words"),
    [
        ("(back == 0) | (back == self.config.lag)", "(back == 0) | (back == -self.config.lag)", "causality"),
        (
            "return MixerOut(self.reference(x, ctx))",
            "return MixerOut(1.01 * self.reference(x, ctx))",
            "reference",
        ),
        (
            "return MixerOut(self.reference(x, ctx))",
            "return MixerOut(self.reference(x, ctx) + 0.01 * x.mean(dim=(0, 1)))",
            "another sequence of its batch",
        ),
        *slow(
            ("* work.seq_len**2", "* work.seq_len", "cost gate"),
            ("return 2 * work.batch_size * self.config.lag", "return -2", "state_bytes after 1 tokens is -"),
            ("lag: int = knob(1, least=1)", "lag: int = 1", "lag has no bounds"),
            ('    """Tokens back."""\n', "", "lag: no meaning"),
            (
                "return MixerOut(self.reference(x, ctx))",
                "torch._dynamo.graph_break()\n        return MixerOut(self.reference(x, ctx))",
                "one graph",
            ),
        ),
    ],
)
def test_a_fault_of_a_plug_in_is_found(
    planted: str,
    by: str,
    words: str,
    plug_in: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert planted in MODULE
    name = plug_in(MODULE.replace(planted, by))
    monkeypatch.setattr(sys, "argv", ["check", name, "--tokens", "97"])
    assert check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED") and words in line for line in lines), lines


def decoded(name: str) -> check.Outcome:
    """What the check says of decoding a variant."""
    outcomes = check.outcomes(check.cell(name, []), [33])
    return next(outcome for outcome in outcomes if outcome.what == "causal, 33 tokens, decoding")


def test_decoding_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that differ from the parallel pass are found, and a state of another size than is stated."""
    good = decoded("dense")
    assert good.found
    assert good.found.startswith("error ")
    dense = variants.load_mixer("dense")
    step, stated = dense.step, dense.decoding_bytes
    with monkeypatch.context() as patched:
        patched.setattr(dense, "step", lambda self, x, state: 1.01 * step(self, x, state))
        assert "steps changed a logit" in decoded("dense").reason
    with monkeypatch.context() as patched:
        patched.setattr(dense, "decoding_bytes", lambda self, work: stated(self, work) + 1)
        assert "are stated" in decoded("dense").reason
    size = dense.state_bytes
    with monkeypatch.context() as patched:
        patched.setattr(dense, "state_bytes", lambda self, work: 10 * size(self, work))
        assert "state_bytes of a sequence is" in decoded("dense").reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(Knobs):
    """Every kind of bound, −1 within some of them."""

    lowest: int = knob(0, least=-5)
    share: float = knob(0.5, above=0, most=1)
    offsets: tuple[int, ...] = knob((-3,), below=0)
    groups: int | None = knob(None, multiple=4)
    size: int | Literal["all"] = knob("all", least=1)
    word: str = ""
    on: bool = False


def test_a_knob_may_allow_negative_numbers_if_it_has_bounds() -> None:
    check.check_refusals(Bounded)
    for annotation in (int, float, int | None, tuple[float, ...]):
        unbounded = dataclasses.make_dataclass("U", [("x", annotation, None)], bases=(Knobs,), frozen=True)
        with pytest.raises(GateFailed, match="x has no bounds"):
            check.check_refusals(unbounded)


@pytest.mark.slow
def test_a_mistake_in_a_check_is_one_line(tmp_path: Path) -> None:
    for arguments, words in ((["longfromer"], "longformer"), (["chunked", "chunks=3"], "chunk")):
        done = python("-m", "bench.tools.check", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert words in line
