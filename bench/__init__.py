"""The harness: a config in, a record out, records into a report."""

from pathlib import Path

_HERE = Path(__file__).parent
# in a wheel the configs are inside the package, in a checkout next to it
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
