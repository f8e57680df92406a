"""Completion by a real bash: the function that Hydra prints is called as bash calls it at the tab key."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

TAB = """
eval "$(longctx-bench -sc install=bash)"
complete -p longctx-bench || exit 3
complete -p python 2>/dev/null && exit 4
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD={last}
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completions(line: str, folder: Path) -> list[str]:
    """What bash offers after this line, in a shell whose PATH has the command."""
    command = folder / "longctx-bench"
    command.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "
        "'from longctx_bench.command import main; main()' \"$@\"\n"
    )
    command.chmod(0o755)
    script = TAB.format(line=shlex.quote(line), last=len(line.split()) - 1)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("longctx-bench experiment=sm", "experiment=smoke"),
        ("longctx-bench -m variant=longf", "variant=longformer"),
        ("longctx-bench seq_l", "seq_len="),
        ("longctx-bench variant=linformer variant.sh", "variant.sharing="),
    ],
)
def test_the_tab_key_completes(line: str, offered: str, tmp_path: Path) -> None:
    assert completions(line, tmp_path) == [offered]


def test_completion_does_not_import_torch() -> None:
    line = "longctx-bench experiment="
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from longctx_bench.command import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-sc", "query=bash"],
        capture_output=True,
        text=True,
        env={**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))},
        check=True,
    )
    *offered, imported = done.stdout.split()
    assert "experiment=smoke" in offered
    assert imported == "False"
