"""`python -m bench.tools.impls`: time, memory and errors of every implementation of each variant on a device.

It measures forward and backward of one layer, at the sizes of configs/impls.yaml, and names the
implementations that `impl=auto` should select. `make gpu-report` contains this comparison;
`make bench-layers` compares variants instead, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import variants
from bench import records
from bench.inputs.errors import ConfigError, choose
from bench.inputs.paths import user_path
from bench.inputs.printable import printable
from bench.run.devices import devices_of
from bench.tools.impls import figures, table
from variants.safe_output import run


def main() -> int:
    """Measure, and print the page. Returns the exit status: 2 for an invalid command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.impls", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (default bfloat16)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="compare implementations of these only")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a sequence")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start nothing after so long (default 60)"
    )
    parser.add_argument("--out", default="results/layers", help="folder of the page")
    arguments = parser.parse_args()
    try:
        device = devices_of(choose("--device", arguments.device, ["cuda", "cpu"]))[0]
        if device.kind != "cpu" and device.uuid is None:
            raise ConfigError("--device=cuda: this machine has no CUDA device")
        dtype = choose("--dtype", arguments.dtype, ["bfloat16", "float32"])
        names = [choose("--only", name, variants.mixers()) for name in arguments.only or variants.mixers()]
        setting = table.read_setting(device.kind, dtype)
        if arguments.lengths:
            setting = replace(setting, lengths=tuple(sorted(arguments.lengths)))
        folder = user_path("--out", arguments.out)
        records.make_folder(folder)
    except (ConfigError, OSError) as error:
        print(f"bench.tools.impls: {printable(error)}", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * arguments.minutes
    table.collect(
        setting,
        figures.cases(setting, names),
        device,
        left=lambda: ends - time.monotonic(),
        keep=lambda results: table.write(folder, setting, results, device.kind),
    )
    print((folder / "impls.md").read_text(encoding="utf-8"))
    print(folder / "impls.md")
    return 0


if __name__ == "__main__":
    run(main)
