"""`python -m variants`: list variants, feed-forward layers and depth schedules with papers and knobs.

For each attention variant also its family, its capabilities, and the complexity that its paper claims.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import variants
from variants import facts
from variants.declarations import Declared, Unreadable, attribute, line_of
from variants.knobs import as_text, knobs_of
from variants.safe_output import run
from variants.slots import SLOTS, Slot


def main() -> int:
    """Print all entries with details or, with --names, the variants' names only. Does not import torch."""
    parser = argparse.ArgumentParser(prog="python -m variants", description=__doc__)
    parser.add_argument("--names", action="store_true", help="print names of variants only, one on each line")
    names_only = parser.parse_args().names
    try:
        names = variants.names()
    except variants.PluginClash as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if names_only:
        print(*names, sep="\n")
        return 0
    for name in names:
        print(f"variant={name}", *_variant(name), sep="\n")
    for slot in SLOTS.values():
        for name in slot.names():
            print(f"{slot.group}={name}", *_layer(slot, name), sep="\n")
    return 0


def _variant(name: str) -> list[str]:
    """The lines below a variant."""
    return _described("variant", lambda: _facts(name), lambda: variants.declared(name))


def _layer(slot: Slot[Any], name: str) -> list[str]:
    """The lines below a feed-forward layer or a depth schedule."""
    return _described(slot.group, lambda: [f"  paper    {_paper(slot, name)}"], lambda: slot.declared(name))


def _described(group: str, known: Callable[[], list[str]], declared: Callable[[], Declared]) -> list[str]:
    """The facts of an entry and a line for each of its knobs, or why it cannot be read."""
    try:
        lines, found = known(), declared()
    except (variants.BrokenVariant, TypeError) as error:
        return [f"  broken   {error}"]
    for name, knob in knobs_of(found.config).items():
        value = knob.default if isinstance(knob.default, str) else as_text(knob.default)
        lines.append(f"  knob     {group}.{name}={value}  # {line_of(knob, found.meanings.get(name, ''))}")
    return lines


def _facts(name: str) -> list[str]:
    """Paper, family, capabilities and claims of a variant. A mixture has those of its members."""
    info = facts.info(name)
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


def _paper(slot: Slot[Any], name: str) -> str:
    """The paper of a layer or schedule. Imports its module if the source has no literal."""
    try:
        return str(attribute(slot.module_of(name), None, "paper"))
    except Unreadable:
        return str(slot.load(name).paper)


if __name__ == "__main__":
    run(main)
