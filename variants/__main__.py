"""`python -m variants`: the registered variants, their papers, capabilities, claims and knobs."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from variants import PluginClash, load, names
from variants.safe_output import run


def main() -> int:
    """Print the table, or with --names the names alone, which needs no torch."""
    parser = argparse.ArgumentParser(prog="python -m variants", description=__doc__)
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    names_only = parser.parse_args().names
    try:
        found = names()
    except PluginClash as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if names_only:
        print("\n".join(found))
        return 0
    for name in found:
        variant = load(name)
        caps = [field.name for field in dataclasses.fields(variant.caps) if getattr(variant.caps, field.name)]
        claim = variant.complexity
        print(f"{name}\n  paper    {variant.paper}\n  can      {', '.join(caps)}")
        exponents = f"time T^{claim.time:g}, memory T^{claim.memory:g}"
        print(f"  claims   {exponents}: {claim.formula} ({claim.source})")
        for knob in dataclasses.fields(variant.Config):
            default = getattr(variant.Config(), knob.name)
            shown = list(default) if isinstance(default, tuple) else default
            print(f"  knob     variant.{knob.name}={shown}")
    return 0


if __name__ == "__main__":
    run(main)
