"""What memory a cell may take: read from the files of this system and of others, and kept to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS
from hydra import compose, initialize_config_dir

from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.process import cgroups
from bench.run import memory_limit

GIB = 2**30
V1_MOUNTS = """\
31 23 0:28 / {point} rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / {point}/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 {root} {point}/memory rw,relatime shared:9 - cgroup cgroup rw,memory
"""
V2_MOUNTS = "30 23 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def spec_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["device=cpu", *overrides])).spec


def test_a_limit_is_what_was_asked_for_or_what_is_free() -> None:
    assert memory_limit.memory_bytes(spec_of("measure.limit_bytes=3GiB")) == 3 * GIB
    free = memory_limit.memory_bytes(spec_of())
    assert 2**20 < free <= (memory_limit.available_bytes() or memory_limit.UNLIMITED) + GIB


def machine(proc: Path, *, membership: str, mounts: str, root: str = "/") -> Path:
    """A process's view of its groups: /proc with the files that are read, and where they are mounted."""
    point = proc / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(mounts.format(point=point, root=root))
    (proc / "self/cgroup").write_text(membership)
    (proc / "vmstat").write_text("pgfault 12\noom_kill 3\n")
    return point


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_the_tightest_group_above_a_process_limits_it(tmp_path: Path) -> None:
    """Version 2: no limit of its own, one above, and the root has none of these files."""
    point = machine(tmp_path, membership="0::/user/job\n", mounts=V2_MOUNTS)
    group(point / "user/job", max="max", current=GIB, events="low 0\noom 4\noom_kill 2\n")
    assert cgroups.groups(tmp_path) == [point / "user/job", point / "user", point]
    assert cgroups.free_bytes(tmp_path) is None
    stat = f"anon 5\nfile {GIB}\ninactive_file {GIB}\nactive_file 7"
    group(point / "user", max=4 * GIB, current=3 * GIB, stat=stat, events="oom_kill 9\n")
    assert cgroups.free_bytes(tmp_path) == 2 * GIB, "cached files give way"
    group(point / "user/job", max=GIB + 5, current=GIB)
    assert cgroups.free_bytes(tmp_path) == 5
    group(point / "user/job", max=GIB, current=GIB + 1)
    assert cgroups.free_bytes(tmp_path) == 0
    assert cgroups.oom_kills(tmp_path) == 2, "its own group's"


def test_groups_of_version_1_beside_a_version_2_without_memory(tmp_path: Path) -> None:
    mounts = V1_MOUNTS + V2_MOUNTS.replace("{point}", "{point}/unified")
    membership = "5:cpu:/elsewhere\n4:memory:/job\n0::/\n"
    point = machine(tmp_path, membership=membership, mounts=mounts)
    unlimited = 2**63 - 4096
    group(point / "memory", limit_in_bytes=unlimited, usage_in_bytes=5)
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}"
    group(point / "memory/job", limit_in_bytes=3 * GIB, usage_in_bytes=2 * GIB, stat=stat)
    group(point / "memory/job", oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 7")
    assert cgroups.groups(tmp_path)[:2] == [point / "memory/job", point / "memory"]
    assert cgroups.free_bytes(tmp_path) == 2 * GIB
    assert cgroups.oom_kills(tmp_path) == 7


@pytest.mark.parametrize("root", ["/docker/abc", "/docker/abc/inner", "/"])
def test_a_container_sees_its_own_group_where_it_is_mounted(root: str, tmp_path: Path) -> None:
    """/proc names the group as the host does; what is mounted begins there, within it, or at the root."""
    membership = "4:memory:/docker/abc\n" if root != "/" else "4:memory:/\n"
    point = machine(tmp_path, membership=membership, mounts=V1_MOUNTS, root=root)
    group(point / "memory", limit_in_bytes=GIB, usage_in_bytes=0)
    assert cgroups.free_bytes(tmp_path) == GIB


def test_where_groups_count_nothing_the_machine_does(tmp_path: Path) -> None:
    machine(tmp_path, membership="0::/\n", mounts=V2_MOUNTS)
    assert cgroups.oom_kills(tmp_path) == 3
    assert cgroups.free_bytes(tmp_path) is None


def test_a_system_without_any_of_it_says_nothing(tmp_path: Path) -> None:
    assert cgroups.groups(tmp_path) == []
    assert cgroups.free_bytes(tmp_path) is cgroups.oom_kills(tmp_path) is None
    assert memory_limit.available_bytes(tmp_path) is None


HELD = """
import json
from pathlib import Path
import torch
import sys
sys.path.insert(0, "tests")
from test_limits import spec_of
from bench.run import memory_limit
from bench.measure.memory import resident_bytes

torch.ones(2**20).sum()  # what a process has before
memory_limit.enforce(spec_of(), 256 * 2**20)
taken = 0
kept = []
try:
    while True:
        kept.append(torch.ones(2**20))
        taken += 4 * 2**20
except RuntimeError as error:
    kept.clear()
    words = str(error)
print(json.dumps({"taken": taken, "words": words, "resident": resident_bytes("VmHWM"),
    "score": int(Path("/proc/self/oom_score_adj").read_text())}))
"""


def test_a_process_is_held_to_its_limit_and_is_the_first_to_go() -> None:
    """It gets that much beside what it had; more only by the stacks of threads that it does not start."""
    command = [sys.executable, "-c", HELD]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    told = json.loads(done.stdout)
    assert 250 * 2**20 < told["taken"] < 512 * 2**20
    assert "can't allocate memory" in told["words"]
    assert told["score"] == memory_limit.FIRST_TO_GO
