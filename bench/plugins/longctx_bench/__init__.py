"""longctx-bench in Python: run cells, sweep, predict, load and report, in a script or a notebook.

    import longctx_bench

    record = longctx_bench.run(variant="longformer", seq_len=4096, measure="quick", **{"variant.window": 512})
    frame = longctx_bench.sweep(["variant=dense,longformer", "seq_len=1024,4096"], name="mine")
    folder = longctx_bench.report("results/mine")

Names and values are those of the command line (`python -m bench --help`). As there, each cell runs in a
process of its own, its record is stored under `results_dir`, and finished cells are not run again. The
processes do not import the calling script, so that it needs no `if __name__ == "__main__"`.

This module has a package of its own because `bench` and `variants` are names that other code may use.
"""

from __future__ import annotations

import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench
import variants

if TYPE_CHECKING:
    import pandas as pd

    from bench.config.spec import Cell
    from bench.records import Record

for _module, _needed in ((bench, "CONFIGS"), (variants, "mixers")):
    if not hasattr(_module, _needed):
        raise ImportError(
            f"longctx_bench needs its own module {_module.__name__}, but {_module.__file__} is found first; "
            "rename that file, or run from another folder"
        )

__all__ = ["load", "plan", "report", "run", "sweep"]

_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_NOT_TEXT = {"null", "true", "false", "inf", "nan"}
"""Words that Hydra's grammar does not read as text."""


def run(**knobs: Any) -> Record:
    """Run one cell, or return its record if it is finished.

    A knob in a section has a dotted name: `run(variant="chunked", **{"variant.chunk": 128})`. A cell that
    cannot run has a record with another status than "ok", and a `reason`. Raises
    `bench.inputs.errors.ConfigError` for an unknown knob or value.
    """
    if "experiment" in knobs:
        line = f"experiment={knobs['experiment']}"
        raise _config_error(f"{line}: a preset is a sweep; write sweep([{line!r}])")
    return _run([_cell(_lines(knobs))])[0]


def plan(**knobs: Any) -> Record:
    """Predict a cell's FLOPs and peak memory without running it: `run` with measure=plan."""
    return run(**{"measure": "plan", **knobs})


def sweep(cells: Iterable[str | Mapping[str, Any]], **knobs: Any) -> pd.DataFrame:
    """Run several cells; returns their records, one row a cell, in the order in which they ran.

    `cells` are the overrides of a sweep on the command line, in which commas separate the values of an axis
    (`["variant=dense,chunked", "seq_len=512,1024"]` or `["experiment=smoke"]`); or mappings of knobs, one a
    cell. `knobs` apply to all cells. Raises `bench.inputs.errors.ConfigError` before the first cell runs.
    """
    from bench import records

    given = [cells] if isinstance(cells, str) else list(cells)
    swept = [one for one in given if isinstance(one, str)]
    if swept and len(swept) < len(given):
        raise _config_error("sweep: allowed are overrides or mappings of knobs, not both")
    if swept:
        found = _cells([*swept, *_lines(knobs)])
    else:
        found = [_cell(_lines({**knobs, **one})) for one in given if not isinstance(one, str)]
    return records.frame_of(_run(found))


def load(folder: str | Path) -> pd.DataFrame:
    """Return the records of an experiment, such as results/mine, one row a cell and one column a key.

    A record that cannot be read is left out with a warning that names it. Raises FileNotFoundError if there
    is no such folder.
    """
    from bench import records

    return records.load(folder)


def report(folder: str | Path) -> Path:
    """Write the report of an experiment; returns its folder, which contains index.html and summary.md."""
    from bench.report import build

    return build(Path(folder))


def _run(cells: Sequence[Cell]) -> list[Record]:
    """Run the cells in their processes. The caller's standard streams stay as they are."""
    from bench.run import sweep

    streams = sys.stdout, sys.stderr
    try:
        return sweep.run(cells)
    finally:
        sys.stdout, sys.stderr = streams


def _cell(lines: Sequence[str]) -> Cell:
    """The cell with these overrides."""
    from hydra import compose

    from bench.config import parse

    with _composing(lines) as checked:
        return parse.parse(compose("config", overrides=checked))


def _cells(lines: Sequence[str]) -> list[Cell]:
    """The cells of a sweep with these overrides."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from hydra_plugins.longctx_bench import IN_THIS_PROCESS, cells_of, presets_of

    with _composing(lines) as checked:
        loader = GlobalHydra.instance().config_loader()
        composed = loader.load_configuration("config", ["hydra.mode=MULTIRUN", *checked], RunMode.MULTIRUN)
        if composed.hydra.launcher._target_ != IN_THIS_PROCESS:
            raise _config_error("hydra/launcher: jobs of a cluster are started by the command line only")
        given = list(composed.hydra.overrides.task)
        return [
            cell for preset in presets_of(loader, composed, given) for cell, _ in cells_of(loader, preset)
        ]


@contextmanager
def _composing(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the checked overrides while Hydra can compose them. Raises ConfigError, with the text of the
    command line, for what is invalid."""
    from hydra import initialize_config_dir

    from bench.cli import errors, guard

    try:
        checked = guard.checked(lines)
        with initialize_config_dir(str(bench.CONFIGS), version_base="1.3"):
            yield checked
    except errors.KINDS as error:
        raise _config_error(errors.explain(error, [*lines], bench.CONFIGS)) from None


def _config_error(text: str) -> Exception:
    from bench.inputs.errors import ConfigError

    return ConfigError(text)


def _lines(knobs: Mapping[str, Any]) -> list[str]:
    """The overrides that set these knobs to these values."""
    return [f"{knob}={_text(knob, value)}" for knob, value in knobs.items()]


def _text(knob: str, value: Any) -> str:
    """A value in Hydra's grammar. Text is quoted, so that no character of it has a meaning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    if isinstance(value, str | Path):
        text = str(value)
        return text if _NAME.fullmatch(text) and text.lower() not in _NOT_TEXT else _quoted(text)
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(knob, one) for one in value)}]"
    raise _config_error(f"{knob}={value!r}: allowed are numbers, text, None, and lists of them")


def _quoted(text: str) -> str:
    from bench.inputs.quoting import quoted

    return quoted(text)
