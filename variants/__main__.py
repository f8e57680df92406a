"""`python -m variants`: the variants, their papers, capabilities, claims and knobs. Waits for no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import variants
from variants.declarations import Unreadable, attribute, line_of
from variants.knobs import knobs_of
from variants.safe_output import run


def main() -> int:
    """Print the table, or with --names the names alone."""
    parser = argparse.ArgumentParser(prog="python -m variants", description=__doc__)
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    names_only = parser.parse_args().names
    try:
        found = variants.names()
    except variants.PluginClash as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in found:
        print(name if names_only else "\n".join([name, *_described(name)]))
    return 0


def _described(name: str) -> list[str]:
    """The lines below a variant's name."""
    try:
        lines, declared = _facts(name), variants.declared(name)
    except variants.BrokenVariant as error:
        return [f"  broken   {error}"]
    defaults = declared.config().as_dict()
    for knob in knobs_of(declared.config).values():
        line = line_of(knob, declared.meanings.get(knob.name, ""))
        lines.append(f"  knob     variant.{knob.name}={defaults[knob.name]}  # {line}")
    return lines


def _facts(name: str) -> list[str]:
    """Paper, family, capabilities and claims of a variant; those of a mixture are its members'."""
    info = _info(name)
    if info is None:
        return ["  family   mixture: its members give papers, capabilities and claims"]
    claim = info["complexity"]
    exponents = f"time T^{claim['time']:g}, memory T^{claim['memory']:g}"
    return [
        f"  paper    {info['paper']}",
        f"  family   {info['family']}",
        f"  can      {', '.join(cap for cap, has in info['caps'].items() if has)}",
        f"  claims   {exponents}: {claim['formula']} ({claim['source']})",
    ]


def _info(name: str) -> dict[str, Any] | None:
    """The `info` of a variant, None for a mixture; imported if the source does not write it in literals."""
    try:
        module, owner = variants.source_of(name)
        info = attribute(module, owner, "info")
        return None if info is None else dict(info)
    except Unreadable:
        variant = variants.load(name)
        return dataclasses.asdict(variant.info_for(variant.Config()))


if __name__ == "__main__":
    run(main)
