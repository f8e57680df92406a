"""The harness: a config in, a record out, records into a report."""

from pathlib import Path

_HERE = Path(__file__).parent
# a wheel carries the configs inside the package, a checkout beside it
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
