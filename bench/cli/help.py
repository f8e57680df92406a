"""`python -m bench --help`: the groups, and the knobs of the chosen entries with values and meanings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from bench.cli import overrides
from bench.config import groups, parse
from bench.config.folders import folders
from variants.declarations import line_of
from variants.knobs import knobs_of

HEADER = "Measures long-context attention: one cell, or with -m a sweep of cells."
FOOTER = """\
Examples
  python -m bench variant=longformer seq_len=4096 depth=4 activations=checkpoint
  python -m bench -m 'variant=glob(*)' seq_len=512,1024
  python -m bench -m variant=dense,longformer longformer.window=64,256
  python -m bench experiment=smoke
  python -m bench.report results/smoke

`python -m variants` describes the variants. Records are explained in results/README.md."""


def text(lines: Sequence[str], configs: Path) -> str:
    """Return the help for a command line with these overrides. Raises Hydra's exception for invalid ones."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = parse.plain(compose("config", overrides=[*lines]))
    options = [f"  {group}: {', '.join(overrides.options(group))}" for group in sorted(overrides.groups())]
    parts = [
        [HEADER],
        ["Groups (group=option)", *options],
        ["Presets (experiment=name)", *presets()],
        ["Knobs (knob=value, or section.knob=value), as this command line sets them", *_knobs(config)],
        [FOOTER],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


_SENTENCE = re.compile(r"(?<=[.?])\s+(?=[A-Z`])")
_DURATION = re.compile(r"\b(seconds?|minutes?|hours?|night|days?)\b")


def presets() -> Iterator[str]:
    """Yield a line for each preset: what its file says that it does, and how long that takes."""
    files = {path.stem: path for folder in folders() for path in (folder / "experiment").glob("*.yaml")}
    for name, path in sorted(files.items()):
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
        words = " ".join(line.lstrip("# ") for line in lines if "@package" not in line)
        first, *rest = _SENTENCE.split(words)
        times = [] if _DURATION.search(first) else [line for line in rest if _DURATION.search(line)][-1:]
        yield f"  {name}: {' '.join([first, *times])}".rstrip(": ")


def _knobs(config: dict[str, Any]) -> Iterator[str]:
    """Yield the knobs outside of any group, then those of each section."""
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    yield from _lines("", {name: value for name, value in config.items() if name not in sections})
    for section, values in sections.items():
        yield f"  {section}:"
        yield from _lines(section, values)


def _lines(section: str, values: dict[str, Any]) -> Iterator[str]:
    declared = groups.declared(section, str(values.get("name", "")))
    known = knobs_of(declared.config) if declared else {}
    texts = {name: _yaml(value) for name, value in values.items()}
    width = max(len(f"{name}: {value}") for name, value in texts.items())
    for name, value in texts.items():
        line = f"{'    ' if section else '  '}{f'{name}: {value}':{min(width, 30)}}"
        if declared and name in known:
            line += f"  # {line_of(known[name], declared.meanings.get(name, ''))}"
        yield line.rstrip()


def _yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    line: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return line.removesuffix("\n...\n").strip()
