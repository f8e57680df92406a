"""`sbatch`, `srun` and `sacct` as far as a job array needs them: its tasks run here, at the same time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ARRAY = "4711"


def install(folder: Path) -> None:
    """Put the commands into a folder, and what sbatch is given beside them as `submitted.sh`."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {name} {folder} "$@"\n')
        script.chmod(0o755)


def sbatch(folder: Path, *arguments: str) -> None:
    """Start the array's tasks, and with --wait see them end."""
    script, *rest = [argument for argument in arguments if argument != "--wait"]
    text = Path(script).read_text()
    (folder / "submitted.sh").write_text(text)
    found = re.search(r"--array=0-(\d+)", text)
    tasks = []
    for task in range(int(found[1]) + 1 if found else 1):
        names = {"SLURM_ARRAY_JOB_ID": ARRAY, "SLURM_ARRAY_TASK_ID": task} if found else {}
        names |= {"SLURM_JOB_ID": f"{int(ARRAY) + task}" if found else ARRAY, "SLURM_PROCID": 0}
        names |= {"SLURM_NTASKS": 1, "SLURM_LOCALID": 0, "SLURM_JOB_NUM_NODES": 1, "SLURM_NODEID": 0}
        names |= {"SLURM_JOB_NODELIST": "localhost"}
        assign = [f"{key}={value}" for key, value in names.items()]
        log = (folder / f"{task}.log").open("w")
        command = ["env", *assign, "bash", script, *rest]
        tasks.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    print(f"Submitted batch job {ARRAY}")
    if "--wait" in arguments:
        sys.exit(max(task.wait() for task in tasks))


def srun(folder: Path, *arguments: str) -> None:
    """Run the command, without the options before it."""
    command = list(arguments)
    while command[0].startswith("-"):
        option = command.pop(0)
        if option in ("--output", "--error"):
            command.pop(0)
    sys.exit(subprocess.run(command).returncode)


def sacct(folder: Path, *arguments: str) -> None:
    """All run, for ever: who asks looks for the results first."""
    time.sleep(0.1)
    print(f"JobID|State|NodeList\n{ARRAY}|RUNNING|localhost")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
