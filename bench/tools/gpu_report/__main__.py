"""`python -m bench.tools.gpu_report`: everything that a machine with a GPU can tell, within a time limit.

In this order: the environment, the tests marked `cuda`, the host's time for a launch, every implementation
of every variant (`bench.tools.impls`), and the preset `gpu` from its first round on. Each part has a share of
the time and runs in processes of its own, so that a part that fails or hangs does not stop the others. The
first page is written again after each part. If the time is over, the running part ends, and the rest is left
out; `--parts` runs some of them, and continues an earlier run. No part needs an installation of this project:
from a checkout, any Python with its requirements will do.

Exit status: 0 if everything that ran is as it should be, 1 if a part failed, 2 for an invalid command or a
missing device, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys

import variants
from bench import records
from bench.inputs.errors import ConfigError, choose
from bench.inputs.paths import user_path
from bench.inputs.printable import printable
from bench.run.devices import devices_of
from bench.tools.gpu_report.deadline import Deadline
from bench.tools.gpu_report.parts import PARTS, PLANS, GpuReport
from variants.safe_output import run


def main() -> int:
    """Run the parts and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.gpu_report", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0, help="time limit (default 25)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command in small sizes")
    parser.add_argument("--out", default="results/gpu-report", help="folder of the report")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help=f"run only these: {', '.join(PARTS)}; keep earlier results"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="compare implementations of these only")
    arguments = parser.parse_args()
    try:
        if not arguments.minutes > 0:
            raise ConfigError(f"--minutes={arguments.minutes:g}: allowed is more than 0")
        plan = PLANS[choose("--device", arguments.device, list(PLANS))]
        names = [choose("--only", name, variants.mixers()) for name in arguments.only or variants.mixers()]
        parts = [choose("--parts", part, list(PARTS)) for part in arguments.parts or PARTS]
        deadline = Deadline(60 * arguments.minutes)
        device = devices_of(arguments.device)[0]
        if device.kind != "cpu" and device.uuid is None:
            raise ConfigError(
                "--device=cuda: this machine has no CUDA device; --device=cpu tries the command"
            )
        folder = user_path("--out", arguments.out).resolve()
        records.make_folder(folder)
    except (ConfigError, OSError) as error:
        print(f"bench.tools.gpu_report: {printable(error)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the commands that run, as Ctrl-C does
    report = GpuReport(device, plan, folder, deadline, names, parts)
    try:
        good = report.run()
    except KeyboardInterrupt:
        print(f"stopped; what has run is in {folder / 'gpu-report.md'}", file=sys.stderr)
        return 130
    print((folder / "gpu-report.md").read_text(encoding="utf-8"))
    print(folder / "gpu-report.md")
    return 0 if good else 1


if __name__ == "__main__":
    run(main)
