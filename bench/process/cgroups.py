"""The control groups of this process: their free memory and their number of out-of-memory kills.

Linux only, cgroup versions 1 and 2 (cgroup-v2.rst and cgroup-v1/memory.rst of the kernel's documentation). On
other systems there are no control groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def groups(proc: Path = PROC) -> list[Path]:
    """Return the folders of the groups that limit this process's memory, innermost first."""
    try:
        mounts = (proc / "self/mountinfo").read_text().splitlines()
        memberships = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for root, point in _mounts(mounts, "cgroup" if controllers else "cgroup2"):
            inside = os.path.relpath(path, root)  # a container's mount may begin at its own group
            own = point if inside.startswith("..") else Path(os.path.normpath(point / inside))
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(point)]
    return folders


def _mounts(mounts: list[str], kind: str) -> Iterator[tuple[str, Path]]:
    """Yield (root in the hierarchy, mount point) of each hierarchy that may control memory."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, (filesystem, _, options) = before.split(" "), after.split(" ", 2)
        if filesystem == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            yield fields[3], Path(fields[4])


def free_bytes(proc: Path = PROC) -> int | None:
    """Return the least free memory of all groups: the limit minus the memory in use, not counting reclaimable
    cached files. None if no group has a limit."""
    free = []
    for folder in groups(proc):
        limit = _number(folder, "memory.max") or _number(folder, "memory.limit_in_bytes")
        used = _number(folder, "memory.current") or _number(folder, "memory.usage_in_bytes")
        cached = _number(folder, "memory.stat", "total_inactive_file")
        if cached is None:
            cached = _number(folder, "memory.stat", "inactive_file")
        if limit is not None and used is not None:
            free.append(max(0, limit - used + (cached or 0)))
    return min(free, default=None)


def oom_kills(proc: Path = PROC) -> int | None:
    """Return the number of processes that the kernel has killed in this process's group because memory ran
    out. If the group does not count them, the number for the machine; None if neither is available."""
    for folder in groups(proc):
        for name in ("memory.events", "memory.oom_control"):
            if (count := _number(folder, name, "oom_kill")) is not None:
                return count
    return _number(proc, "vmstat", "oom_kill")


def _number(folder: Path, name: str, key: str = "") -> int | None:
    """Return the number in a file, or the number after a key at the beginning of a line."""
    try:
        match = re.search(rf"^{key}\s*(\d+)$", (folder / name).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None
