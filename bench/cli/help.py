"""`python -m bench --help`: the groups, and every knob of the chosen entries with its value and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from bench.cli import overrides
from bench.config import groups, parse
from variants.declarations import line_of
from variants.knobs import knobs_of

HEADER = "Long-context attention, measured: one cell, or with -m a sweep of cells."
FOOTER = """\
Examples
  python -m bench variant=longformer seq_len=4096 depth=4 activations=checkpoint
  python -m bench -m 'variant=glob(*)' seq_len=512,1024
  python -m bench experiment=smoke
  python -m bench.report results/smoke

`python -m variants` describes the variants. Records are explained in results/README.md."""


def text(lines: Sequence[str], configs: Path) -> str:
    """The help for a command line with these overrides. Raises what Hydra raises for one that cannot be."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = parse.plain(compose("config", overrides=[*lines]))
    options = [f"  {group}: {', '.join(overrides.options(group))}" for group in sorted(overrides.groups())]
    parts = [
        [HEADER],
        ["Groups (group=option)", *options],
        ["Knobs (knob=value, or section.knob=value), as this command line sets them", *_knobs(config)],
        [FOOTER],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _knobs(config: dict[str, Any]) -> Iterator[str]:
    """The knobs outside of any group, then section by section."""
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    yield from _described("", {name: value for name, value in config.items() if name not in sections})
    for section, values in sections.items():
        yield f"  {section}:"
        yield from _described(section, values)


def _described(section: str, values: dict[str, Any]) -> Iterator[str]:
    declared = groups.declared(section, str(values.get("name", "")))
    known = knobs_of(declared.config) if declared else {}
    shown = {name: _shown(value) for name, value in values.items()}
    width = max(len(f"{name}: {value}") for name, value in shown.items())
    for name, value in shown.items():
        line = f"{'    ' if section else '  '}{f'{name}: {value}':{min(width, 30)}}"
        if declared and name in known:
            line += f"  # {line_of(known[name], declared.meanings.get(name, ''))}"
        yield line.rstrip()


def _shown(value: Any) -> str:
    """A value as YAML writes it on one line."""
    line: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return line.removesuffix("\n...\n").strip()
