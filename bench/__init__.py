"""The harness: a config in, a record out, records into a report."""

import sys
from pathlib import Path

if sys.platform == "win32":
    raise SystemExit("error: longctx-bench does not run on Windows itself; use it in WSL 2, which is Linux")

_HERE = Path(__file__).parent
# in a wheel the configs are inside the package, in a checkout next to it
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
