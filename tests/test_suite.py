"""How `make test` runs the tests."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = """
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def shared():
    with Path("made.txt").open("a") as file:
        file.write(__name__ + "\\n")

@pytest.mark.parametrize("case", range(8))
def test_case(shared, case):
    pass
"""


def test_a_fixture_of_a_file_is_made_once(tmp_path: Path) -> None:
    """On several workers, with the options of the Makefile."""
    (options,) = re.findall(r"^PARALLEL := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    (tmp_path / "pytest.ini").touch()
    for name in ("test_a", "test_b"):
        (tmp_path / f"{name}.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", *shlex.split(options.replace("-n auto", "-n 2"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "16 passed" in done.stdout, done.stdout
    assert sorted((tmp_path / "made.txt").read_text().split()) == ["test_a", "test_b"]
