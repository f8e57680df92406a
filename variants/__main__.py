"""`python -m variants`: list the variants with their papers, capabilities, claims and knobs."""

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
    """Print all variants with details or, with --names, their names only. Does not import torch."""
    parser = argparse.ArgumentParser(prog="python -m variants", description=__doc__)
    parser.add_argument("--names", action="store_true", help="print names only, one on each line")
    names_only = parser.parse_args().names
    try:
        names = variants.names()
    except variants.PluginClash as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in names:
        print(name if names_only else "\n".join([name, *_details(name)]))
    return 0


def _details(name: str) -> list[str]:
    """The lines below the name of a variant."""
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
    """Paper, family, capabilities and claims of a variant. A mixture has those of its members."""
    info = _info(name)
    if info is None:
        return ["  family   mixture: papers, capabilities and claims are those of its members"]
    claim = info["complexity"]
    exponents = f"time T^{claim['time']:g}, memory T^{claim['memory']:g}"
    return [
        f"  paper    {info['paper']}",
        f"  family   {info['family']}",
        f"  can      {', '.join(cap for cap, has in info['caps'].items() if has)}",
        f"  claims   {exponents}: {claim['formula']} ({claim['source']})",
    ]


def _info(name: str) -> dict[str, Any] | None:
    """The `info` of a variant; None for a mixture. Imports the variant if the source has no literals."""
    try:
        module, owner = variants.source_of(name)
        info = attribute(module, owner, "info")
        return None if info is None else dict(info)
    except Unreadable:
        variant = variants.load(name)
        return dataclasses.asdict(variant.info_for(variant.Config()))


if __name__ == "__main__":
    run(main)
