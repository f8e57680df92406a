"""`python -m variants`: the variants, their papers, capabilities, claims and knobs. Waits for no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import suppress
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
        paper, caps, claim = _attributes(name)
        declared = variants.declared(name)
    except variants.BrokenVariant as error:
        return [f"  broken   {error}"]
    exponents = f"time T^{claim['time']:g}, memory T^{claim['memory']:g}"
    lines = [
        f"  paper    {paper}",
        f"  can      {', '.join(cap for cap, has in caps.items() if has)}",
        f"  claims   {exponents}: {claim['formula']} ({claim['source']})",
    ]
    defaults = declared.config().as_dict()
    for knob in knobs_of(declared.config).values():
        line = line_of(knob, declared.meanings.get(knob.name, ""))
        lines.append(f"  knob     variant.{knob.name}={defaults[knob.name]}  # {line}")
    return lines


def _attributes(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Paper, capabilities and claimed complexity; imported if the source does not write them in literals."""
    with suppress(Unreadable):
        module, owner = variants.source_of(name)
        paper, caps, claim = (attribute(module, owner, what) for what in ("paper", "caps", "complexity"))
        if None not in (paper, caps, claim):
            return paper, caps, claim
    variant = variants.load(name)
    return variant.paper, dataclasses.asdict(variant.caps), dataclasses.asdict(variant.complexity)


if __name__ == "__main__":
    run(main)
