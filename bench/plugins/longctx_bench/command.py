"""The console script `longctx-bench`: `longctx-bench variant=dense` is `python -m bench variant=dense`, and
`longctx-bench report results/x` is `python -m bench.report results/x`."""

from __future__ import annotations

import runpy
import sys

import longctx_bench  # says which module bench is found, if it is another

COMMANDS = {
    "report": "bench.report",
    "records": "bench.records",
    "claims": "bench.claims",
    "corpora": "bench.corpora",
    "variants": "variants",
    "check": "bench.tools.check",
}
"""The first argument → the module of the command. Anything else is for `python -m bench`."""

assert longctx_bench


def main() -> None:
    """Run the command that the first argument names; ends with its status."""
    module = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if module is not None:
        del sys.argv[1]
    runpy.run_module(module or "bench", run_name="__main__", alter_sys=True)
