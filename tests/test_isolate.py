"""Cells that end badly: each becomes a record with its status and reason, and the sweep goes on.

Plug-in variants, installed as any package would be, go wrong in the training step, each in its own way; the
cells are those of `python -m bench`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import wait_until

from bench.process import cgroups
from bench.process.stderr_tail import TAIL_BYTES
from bench.records import Record, read_all

PLUGIN = """
import ctypes, mmap, os, signal, subprocess, sys, time
from pathlib import Path
import torch
from variants.base import MixerOut
from variants.attention.dense import Dense

HERE = Path(__file__).parent


def say_pid():
    (HERE / "victim.part").write_text(str(os.getpid()))
    (HERE / "victim.part").rename(HERE / "victim")
    time.sleep(600)


def loop_for_ever():
    (HERE / "hangs").touch()
    while True:
        time.sleep(0.01)


def refuse():
    print("deep trouble, said with umlauts: äöü", file=sys.stderr)
    raise RuntimeError("the kernel refused\\nand said more than one line")


def spend():
    raise MemoryError("all of it")


def grow():
    '''Memory that is shared is no data of this process's, so nothing refuses it.'''
    size, piece = 2**33, bytes(2**20)
    memory = mmap.mmap(-1, size)
    for begin in range(0, size, len(piece)):
        memory[begin : begin + len(piece)] = piece


def abort():
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n")
    os.abort()


def leave():
    print("so much for that", file=sys.stderr)
    os._exit(3)


def chatter():
    os.write(2, b"over and over again\\n" * 20_000 + b"and out\\n")
    sys.exit(4)


def fill():
    with (HERE / "results/full/filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**10))


def freeze():
    if not os.path.ismount(HERE / "results/frozen"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", HERE / "results/frozen"], check=True)


WAYS = {
    "fine": lambda: None,
    "also_fine": lambda: print("a word of a cell that is fine", file=sys.stderr),
    "raises": refuse,
    "spends": spend,
    "huge": lambda: torch.empty(2**55),
    "refused": lambda: [torch.ones(2**24) for _ in range(32)],
    "grows": grow,
    "aborts": abort,
    "killed": say_pid,
    "segfaults": lambda: ctypes.string_at(0),
    "leaves": leave,
    "exits": chatter,
    "hangs": loop_for_ever,
    "fills": fill,
    "freezes": freeze,
    "diverges": None,
}


class Trouble(Dense):
    def forward(self, x, ctx, state=None):
        out = super().forward(x, ctx)
        if not self.training:  # the gates pass
            return out
        if self.way is None:
            return MixerOut(out.y * float("nan"))
        if type(x).__name__ != "FakeTensor":  # so does the prediction
            self.way()
        return out


for name, way in WAYS.items():
    globals()[name] = type(name, (Trouble,), {"way": staticmethod(way) if way else None})
"""

BROKEN = "1 / 0\n"
ONE_SWEEP = {
    "adhoc": [
        "fine",
        "raises",
        "refused",
        "huge",
        "aborts",
        "grows",
        "killed",
        "segfaults",
        "leaves",
        "exits",
    ],
    "slow": ["hangs"],
    "full": ["fine", "fills", "also_fine"],
    "frozen": ["fine", "freezes", "also_fine"],
    "last": ["diverges", "broken", "also_fine"],
}
"""Experiment → its cells, of one sweep; some folders are of their own, since they fill up or go away."""
LIMIT = "measure.limit_bytes=512MiB"
ROOM = 2**31
"""Bytes that all of a sweep's processes may have where a control group can be made."""


class Sweep:
    """A sweep over ways to end, in a process of its own."""

    def __init__(
        self, folder: Path, grids: dict[str, list[str]], *overrides: str, group: Path | None = None
    ) -> None:
        self.grids, self.results = grids, folder / "results"
        each = [
            f"{{name: {experiment}, variant: '{','.join(ways)}', "
            f"measure.limit_seconds: {8 if experiment == 'slow' else 600}}}"
            for experiment, ways in grids.items()
        ]
        knobs = ["-m", f"hydra.sweeper.grids=[{', '.join(each)}]", f"results_dir={self.results}"]
        knobs += ["seq_len=24", "depth=1", "model.d_model=16", "data=files"]
        knobs += [f"data.path={folder / 'corpus.txt'}", "measure=standard", "measure.time_seconds=0"]
        knobs += ["measure.min_samples=2", "measure.train_tokens=100", "measure.eval_tokens=50", *overrides]
        # TMPDIR holds the lock of the device: nobody's sweep is waited for, and no two of these run at once
        path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own = {"TMPDIR": str(folder), "LONGCTX_BENCH_LOCKS": str(folder)}
        env = {**os.environ, **own, "PYTHONPATH": path}
        command = [sys.executable, "-m", "bench", *knobs]
        if group:
            command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing goes on, whatever the test came to."""
        self.process.kill()
        self.process.communicate()

    def finish(self) -> Sweep:
        self.out, self.errors = self.process.communicate()
        return self

    def record(self, way: str, experiment: str = "") -> Record:
        """The cell's record; a way that was not tried is skipped."""
        tried = [name for name, ways in self.grids.items() if way in ways and experiment in ("", name)]
        if not tried:
            pytest.skip("needs root: it makes a control group, or mounts")
        found, problems = read_all(self.results / tried[-1])
        assert not problems
        (record,) = (record for record in found if record.variant == way)
        return record

    def log(self, way: str) -> str | None:
        """The cell's last words."""
        record = self.record(way)
        path = self.results / record.name / "logs" / f"{record.cell_id}.txt"
        return path.read_text() if path.exists() else None


@contextmanager
def room(limit: int) -> Iterator[Path | None]:
    """A control group with a limit of memory; None where none can be made."""
    groups = cgroups.groups()
    group = groups[0] / f"cells-{os.getpid()}" if groups else None
    try:
        if group:
            group.mkdir()
            v2 = (group / "memory.max").exists()
            (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError:
        group = None
    try:
        yield group
    finally:
        if group:
            wait_until(lambda: not (group / "cgroup.procs").read_text())
            group.rmdir()


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Two megabytes mounted there; False where this process may not."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plug-ins are installed, and all is done."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "trouble.py").write_text(PLUGIN)
    (folder / "trouble.yaml").write_text("impl: sdpa\n")
    (folder / "broken.py").write_text(BROKEN)
    info = folder / "trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n")
    ways = {way for ways in ONE_SWEEP.values() for way in ways} | {"spends"}
    points = [f"{way} = {'broken' if way == 'broken' else 'trouble'}:{way}\n" for way in sorted(ways)]
    (info / "entry_points.txt").write_text("[longctx_bench.variants]\n" + "".join(points))
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Iterator[Sweep]:
    """Everything that can go wrong, one after the other."""
    with ExitStack() as stack:
        group = stack.enter_context(room(ROOM))
        root = stack.enter_context(small_disk(folder / "results/full"))
        grids = {
            name: [way for way in ways if way != "grows" or group]
            for name, ways in ONE_SWEEP.items()
            if root or name not in ("full", "frozen")
        }
        with Sweep(folder, grids, LIMIT, group=group) as started:
            victim = folder / "victim"
            wait_until(lambda: victim.exists() or started.process.poll() is not None)
            if victim.exists():
                os.kill(int(victim.read_text()), signal.SIGKILL)
            started.finish()
        if root:  # what it hides is what was stored before
            subprocess.run(["umount", "--lazy", folder / "results/frozen"])
        yield started


@pytest.fixture(scope="module")
def spent(folder: Path) -> Sweep:
    """A sweep whose cells run out of memory and in no other way."""
    return Sweep(folder, {"spent": ["refused", "spends", "also_fine"]}, LIMIT).finish()


ENDINGS = {
    "raises": ("error", "RuntimeError: the kernel refused"),
    "refused": ("oom", "can't allocate memory"),
    "huge": ("oom", "can't allocate memory"),
    "aborts": ("oom", "killed by SIGABRT after std::bad_alloc"),
    "grows": ("oom", "killed by SIGKILL, and the kernel counts an out-of-memory kill"),
    "killed": ("error", "the cell's process was killed by SIGKILL"),
    "segfaults": ("error", "killed by SIGSEGV: __init__.py:"),
    "leaves": ("error", "exit status 3 and no result: so much for that"),
    "exits": ("error", "exit status 4 and no result: and out"),
    "diverges": ("diverged", "nan at training step 1 of "),
    "broken": ("error", "BrokenVariant: plug-in broken:broken cannot be imported: ZeroDivisionError"),
    "hangs": ("timeout", "still running after measure.limit_seconds=8"),
}


@pytest.mark.parametrize("way", ENDINGS)
def test_an_end_has_its_status_and_its_reason(sweep: Sweep, way: str) -> None:
    status, reason = ENDINGS[way]
    record = sweep.record(way)
    assert record.status == status
    assert reason in (record.reason or "")
    assert "\n" not in (record.reason or "")
    assert record.nll is None, "a cell that did not finish has no quality"
    assert record.seconds_total is not None
    assert record.started_at is not None
    assert record.memory_limit_bytes == 2**29


@pytest.mark.parametrize("way", [way for way in ENDINGS if way not in ("broken", "hangs")])
def test_what_was_told_before_the_end_is_kept(sweep: Sweep, way: str) -> None:
    """The gates ran first. Their figures survive whatever the process came to."""
    record = sweep.record(way)
    assert record.leak_max_abs is not None
    assert record.reference_max_abs is not None
    assert record.threads == 1
    assert (record.step_seconds_median is not None) == (way == "diverges"), "NaN is timed, and trained on"


@pytest.mark.parametrize(
    ("way", "experiment"), [("fine", "adhoc"), ("fine", "full"), ("fine", "frozen"), ("also_fine", "last")]
)
def test_the_rest_of_the_sweep_is_unharmed(sweep: Sweep, way: str, experiment: str) -> None:
    """The first cells, whose folders fill up or go away later, and the last, after every failure."""
    record = sweep.record(way, experiment)
    assert (record.status, record.reason) == ("ok", None)
    assert record.perplexity is not None
    assert record.peak_bytes == record.peak_bytes_predicted


def test_a_cell_that_diverges_names_the_step(sweep: Sweep) -> None:
    assert sweep.record("diverges").diverged_step == 1
    assert sweep.record("raises").diverged_step is None


def test_a_sweep_with_failures_lists_them(sweep: Sweep) -> None:
    assert sweep.process.returncode == 1
    total = sum(map(len, sweep.grids.values()))
    failures = [way for way, (status, _) in ENDINGS.items() if status != "oom"]
    lost = sum(len(sweep.grids.get(name, [])[1:]) for name in ("full", "frozen"))
    head, listed = sweep.errors.split(f"{len(failures) + lost} of {total} cells failed:\n")
    lines = [line for line in listed.splitlines() if line.startswith("  ")]
    assert len(lines) == len(failures) + lost
    for way in failures:
        assert any(f" {way} T=24 " in line for line in lines)
    assert "ok          fine T=24" in head


@pytest.mark.slow
def test_running_out_of_memory_is_an_answer(spent: Sweep) -> None:
    assert spent.process.returncode == 0
    assert "failed" not in spent.errors
    assert "Traceback" not in spent.errors
    assert [spent.record(way).status for way in spent.grids["spent"]] == ["oom", "oom", "ok"]
    assert spent.record("spends").reason == "MemoryError: all of it"


# --- last words -----------------------------------------------------------------------------------


def test_last_words_are_kept_of_cells_that_are_not_ok(sweep: Sweep) -> None:
    assert "deep trouble, said with umlauts: äöü" in (sweep.log("raises") or "")
    assert "in refuse\n    raise RuntimeError" in (sweep.log("raises") or "")
    assert "in <listcomp>" in (sweep.log("refused") or ""), "where memory ran out"
    assert "Fatal Python error: Segmentation fault" in (sweep.log("segfaults") or "")
    assert "terminate called" in (sweep.log("aborts") or "")
    assert "ZeroDivisionError" in (sweep.log("broken") or "")
    assert {sweep.log(way) for way in ("fine", "also_fine", "diverges", "killed")} == {None}, "they had none"


def test_a_cell_that_is_stopped_says_where_it_was(sweep: Sweep, folder: Path) -> None:
    if not (folder / "hangs").exists():
        pytest.skip("this machine is so busy that the cell was stopped before it came there")
    assert re.search(r": trouble\.py:\d+ in loop_for_ever$", sweep.record("hangs").reason or "")
    assert "in loop_for_ever" in (sweep.log("hangs") or "")


def test_of_many_words_the_last_are_kept(sweep: Sweep) -> None:
    log = sweep.log("exits") or ""
    assert len(log) == TAIL_BYTES
    assert log.endswith("over and over again\nand out\n")


def test_a_person_sees_all_of_it_once(sweep: Sweep) -> None:
    assert sweep.errors.count('raise RuntimeError("the kernel refused') == 1
    assert sweep.errors.count("said with umlauts: äöü") == 1
    assert sweep.errors.count("over and over again\n") == 20_000
    assert sweep.errors.count("Fatal Python error: Segmentation fault") == 1
    assert "a word of a cell that is fine" in sweep.errors


# --- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "way", "why"),
    [("full", "fills", "No space left on device"), ("frozen", "freezes", "Read-only file system")],
)
def test_what_cannot_be_stored_has_failed_and_is_not_run_again(
    sweep: Sweep, experiment: str, way: str, why: str
) -> None:
    """One line each: the cell whose record is lost, and the next one. What was stored before is there."""
    sweep.record("fine", experiment)
    listed = [line for line in sweep.errors.splitlines() if line.startswith("  error")]
    (lost,) = (line for line in listed if f" {way} T=24 " in line)
    assert f"cannot write {sweep.results / experiment}" in lost
    assert lost.endswith(why)
    (next_one,) = (
        line
        for line in listed
        if f"not run: results_dir: cannot write to {sweep.results}" in line and f"/{experiment}:" in line
    )
    assert " also_fine T=24 " in next_one
    assert next_one.endswith(why)
    found, problems = read_all(sweep.results / experiment)
    assert [record.variant for record in found] == ["fine"]
    assert not problems
    assert not [*(sweep.results / experiment).rglob("*.tmp")]


@pytest.mark.slow
def test_once_there_is_room_the_same_command_goes_on(sweep: Sweep) -> None:
    before = sweep.record("fine", "full")
    (sweep.results / "full/filler").unlink(missing_ok=True)
    again = Sweep(sweep.results.parent, {"full": ["fine", "also_fine"]}, LIMIT).finish()
    assert again.process.returncode == 0, again.errors
    assert again.record("fine") == before or before.contaminated  # what was disturbed is measured again
    assert again.record("also_fine").status == "ok"


# --- what is left ---------------------------------------------------------------------------------


def test_no_process_is_left(sweep: Sweep) -> None:
    """Not the cell that was stopped, nor the server that cells start from."""
    wait_until(lambda: not processes(sweep))


def test_a_sweep_that_is_killed_takes_its_cell_with_it(folder: Path) -> None:
    """Or it would compute for nobody, beside the same cell once the sweep is started again."""
    (folder / "hangs").unlink(missing_ok=True)
    with Sweep(folder, {"four": ["hangs"]}) as again:
        wait_until((folder / "hangs").exists)
    wait_until(lambda: not processes(again))


def processes(sweep: Sweep) -> list[str]:
    """Everything that runs for the sweep, or for another in its folder: all inherit its TMPDIR."""
    mark = f"TMPDIR={sweep.results.parent}".encode()
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if holds(path, mark)]


def holds(environ: Path, entry: bytes) -> bool:
    try:
        return entry in environ.read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or somebody else's
        return False
