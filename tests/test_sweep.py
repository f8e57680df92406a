"""Sweeps that are killed, stopped, started twice at once or short of memory: real processes and signals."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS, wait_until

from bench import records
from bench.config.spec import Cell, CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.records import FINAL, Record
from bench.run import prepare
from bench.run.locks import CellLocks
from bench.run.oom_skip import OutOfMemorySkip

CELL = ["depth=1", "model.d_model=16", "data=files", "data.path=corpus.txt", "seq_len=16"]


class Sweep:
    """`python -m bench -m` in a folder, in a process and a session of its own."""

    def __init__(self, folder: Path, *overrides: str, stderr: int = subprocess.DEVNULL) -> None:
        self.folder = folder
        (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
        self.env = apart(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench", "-m", *CELL, *overrides],
            cwd=folder,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def kill(self) -> None:
        """As the system does when it has no memory left."""
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """Wait for the end; what was written to stderr."""
        _, errors = self.process.communicate(timeout=HANG_SECONDS)
        return errors or ""

    def cells(self) -> list[int]:
        """The processes of cells: what the server that they start from has started."""
        servers = children(self.process.pid)
        return [cell for server in servers for cell in children(server)]


def apart(folder: Path) -> dict[str, str]:
    """The environment of runs that share devices with nobody but those of the same folder."""
    own = {"TMPDIR": str(folder), "LONGCTX_BENCH_LOCKS": f"{os.getpid()}-{folder.name}"[:40]}
    return {**os.environ, **own}


def heed_signals() -> None:
    """A signal that is ignored here, as in the background of a shell, would be ignored there too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def texts(folder: Path) -> dict[str, str]:
    """The cells whose records are final, and the records as they stand in their files."""
    found = {path.stem: path.read_text() for path in folder.glob("results/adhoc/records/*.json")}
    return {cell: text for cell, text in found.items() if ended(text)}


def ended(text: str) -> bool:
    try:
        return records.parse(text).status in FINAL
    except records.RecordError:
        return False


def known(folder: Path) -> list[Record]:
    found, problems = records.read_all(folder / "results/adhoc")
    assert not problems
    return found


def in_turn(found: list[Record]) -> bool:
    """Whether no two cells ran at the same time."""
    spans = sorted((str(record.started_at), str(record.ended_at)) for record in found)
    return all(start <= end for start, end in spans) and all(a[1] <= b[0] for a, b in pairwise(spans))


def test_two_sweeps_measure_their_cells_in_turn(tmp_path: Path) -> None:
    """They share the device, which has one cell at a time."""
    cell = ["measure=quick", "measure.time_seconds=0", "measure.min_samples=1", "depth=1"]
    both = [
        Sweep(tmp_path, *cell, f"replicate={seeds}", stderr=subprocess.PIPE) for seeds in ("0,1,2", "3,4,5")
    ]
    said = [each.end() for each in both]
    assert [each.process.returncode for each in both] == [0, 0], said
    found = known(tmp_path)
    assert len(found) == 6
    assert in_turn(found)


def killed_and_resumed(folder: Path, *, cells: int, kills: int, seed: int) -> None:
    """Kill a sweep at random moments and start it again each time, the last time twice at once."""
    draw = random.Random(seed)
    overrides = ["measure=plan", f"replicate=range({cells})"]
    final: dict[str, str] = {}
    for _ in range(kills):
        one = Sweep(folder, *overrides)
        more = len(final) + draw.randint(0, 2 * cells // (3 * kills))
        wait_until(lambda: len(texts(folder)) >= more or one.process.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 0.3))
        one.kill()
        now = texts(folder)
        assert final.items() <= now.items(), "what is final is neither lost nor measured again"
        final = now
    assert 0 < len(final) < cells, "it was killed with some cells done and some to do"

    torn, emptied = sorted(final)[:2]
    stale = final[torn].replace(torn, "a" * 16)
    stale = stale.replace(records.parse(stale).code_sha256 or "", "b" * 16)
    (folder / f"results/adhoc/records/{'a' * 16}.json").write_text(stale)
    for cell, content in ((torn, final.pop(torn)[:200]), (emptied, ""), ("f" * 16, "{")):
        (folder / f"results/adhoc/records/{cell}.json").write_text(content)
    final.pop(emptied)
    both = [Sweep(folder, *overrides, stderr=subprocess.PIPE) for _ in range(2)]
    wait_until(lambda: any(each.cells() for each in both))
    said = [each.end() for each in both]
    assert [each.process.returncode for each in both] == [0, 0], said
    assert (folder / f"results/adhoc/records/{'f' * 16}.json").read_text() == "{", "foreign, and left alone"
    (folder / f"results/adhoc/records/{'f' * 16}.json").unlink()
    assert texts(folder).pop("a" * 16) == stale, "of other code, and left alone"
    (folder / f"results/adhoc/records/{'a' * 16}.json").unlink()
    found = known(folder)
    assert len(found) == cells
    assert {record.replicate for record in found} == set(range(cells))
    assert {record.status for record in found} == {"ok"}
    assert final.items() <= texts(folder).items()
    measured = [line for errors in said for line in errors.splitlines() if line.startswith("[")]
    new = [line for line in measured if "by another sweep" not in line]
    assert len(new) == cells - len(final), "each cell was measured by one of the two"
    assert not [*folder.rglob("*.tmp")]


def test_a_sweep_that_is_killed_goes_on_and_two_at_once_share_it(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, cells=16, kills=3, seed=1)


@pytest.mark.slow
def test_200_cells_survive_20_kills(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, cells=200, kills=20, seed=2)


def test_sigterm_ends_the_cell_in_hand_and_the_printed_command_goes_on(tmp_path: Path) -> None:
    stopped = Sweep(tmp_path, "measure=plan", "replicate=range(5)", stderr=subprocess.PIPE)
    wait_until(lambda: texts(tmp_path) and stopped.cells())
    stopped.process.terminate()
    said = stopped.end().splitlines()
    assert stopped.process.returncode == 128 + signal.SIGTERM
    assert said[-2] == "stopped by SIGTERM; finished cells are kept. To run the remaining cells:"
    final = texts(tmp_path)
    assert 0 < len(final) < 5
    for record in known(tmp_path):
        assert record.status == "ok" or (record.status, record.reason) == (
            "error",
            "stopped by a signal to the sweep before it ended",
        )
    again = shlex.split(said[-1])
    subprocess.run(again, cwd=tmp_path, env=stopped.env, check=True, capture_output=True)
    assert [record.status for record in known(tmp_path)] == ["ok"] * 5
    assert final.items() <= texts(tmp_path).items()


def test_ctrl_c_on_a_terminal_keeps_what_is_known(tmp_path: Path) -> None:
    """In training, whose checkpoint the next run goes on from; nothing half-measured is final."""
    train = ["measure.train_tokens=100_000_000", "measure.eval_tokens=64", "measure.checkpoint_seconds=0"]
    quick = ["measure.time_seconds=0", "measure.history_targets=0", *train]
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    command = [sys.executable, "-m", "bench", *CELL, *quick]
    pid, terminal = pty.fork()
    if not pid:
        heed_signals()
        os.chdir(tmp_path)
        os.execve(sys.executable, command, apart(tmp_path))
    try:
        wait_until(lambda: [*tmp_path.glob("results/adhoc/checkpoints/*.pt")])
        os.write(terminal, b"\x03")
        said = drained(terminal)
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert "SIGINT: ending the current cell; a second signal stops at once" in said
    assert said.split("To run the remaining cells:")[1].split() == command
    (record,) = known(tmp_path)
    assert record.status == "error"
    assert record.step_seconds_median is not None
    assert record.nll is None
    assert [path.stem for path in tmp_path.glob("results/adhoc/checkpoints/*")] == [record.cell_id]


def drained(terminal: int) -> str:
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # Linux ends a pseudo-terminal so
            return said.decode()


@pytest.mark.slow
def test_what_is_predicted_not_to_fit_is_not_run_unless_it_checks_the_prediction(tmp_path: Path) -> None:
    line = ["variant.impl=naive", "seq_len=3072,3200", "measure=quick", "measure.time_seconds=0"]
    line += ["measure.limit_bytes=150MB", "measure.min_samples=1"]

    def measured(*overrides: str) -> list[Record]:
        one = Sweep(tmp_path, *line, *overrides, stderr=subprocess.PIPE)
        said = one.end()
        assert one.process.returncode == 0, said
        return sorted(known(tmp_path), key=lambda record: record.seq_len)

    checked, longer = measured("audit_oom=1")
    assert (checked.status, checked.audited) == ("oom", True)
    assert (checked.peak_bytes_predicted or 0) > 150_000_000
    assert longer.status == "predicted_oom"
    assert f"seq_len=3072 ran out of memory (cell {checked.cell_id})" in str(longer.reason)
    assert longer.seconds_total is None

    before = texts(tmp_path)
    again = measured("rerun=oom", "audit_oom=0")
    assert [(r.status, r.audited) for r in again] == 2 * [("predicted_oom", False)]
    assert f"{again[0].peak_bytes_predicted:,} bytes, of 150,000,000" in str(again[0].reason)
    assert again[0].peak_bytes is None
    assert before.keys() == texts(tmp_path).keys()

    fitting, _ = measured("rerun=oom", "measure.limit_bytes=8GB")
    assert (fitting.status, fitting.audited) == ("ok", None)


def cell_of(seq_len: int = 8, **changed: Any) -> Cell:
    spec = CellSpec(
        variant="dense",
        variant_params={"impl": "sdpa"},
        seq_len=seq_len,
        depth=1,
        batch_size=1,
        replicate=changed.pop("replicate", 0),
        objective="clm",
        device="cpu",
        dtype="float32",
        activations="keep",
        model=ModelSizes(),
        data=DataSpec(name="stdlib", params={}),
        measure=MeasureSpec(),
    )
    return Cell(**{"spec": spec, "folder": Path("results/x"), "name": "x", "force": False, **changed})


def record_of(cell: Cell, status: Any, **changed: Any) -> Record:
    return Record(**{**prepare.identity(cell), "status": status, **changed})


def test_longer_cells_of_a_line_are_not_tried_and_no_others() -> None:
    cells = [cell_of(seq_len) for seq_len in (64, 32, 16)]
    skip = OutOfMemorySkip((cell, record_of(cell, "oom")) for cell in cells[:2])
    assert "seq_len=32 ran" in str(skip.reason(cell_of(33)))
    assert "skip_after_oom=false" in str(skip.reason(cell_of(128)))
    for tried in (cell_of(32), cell_of(16), cell_of(33, replicate=1), cell_of(33, skip_after_oom=False)):
        assert skip.reason(tried) is None
    for status in ("predicted_oom", "timeout", "error", "ok", "unsupported"):
        assert OutOfMemorySkip([(cells[2], record_of(cells[2], status))]).reason(cells[1]) is None


def test_which_records_stand() -> None:
    def standing(**knobs: Any) -> set[str]:
        cell = cell_of(**knobs)
        return {s for s in records.STATUSES if prepare.is_up_to_date(record_of(cell, s), cell)}

    assert standing() == FINAL
    assert standing(rerun="oom") == {"ok", "unsupported"}
    assert standing(rerun="contaminated") == FINAL
    assert not standing(force=True)


def test_an_audit_takes_the_share_it_is_told_and_always_the_same() -> None:
    from bench.scenarios.plan import is_audited

    ids = [f"{random.Random(n).getrandbits(64):016x}" for n in range(2000)]
    assert not any(is_audited(cell, 0) for cell in ids)
    assert all(is_audited(cell, 1) for cell in [*ids, "f" * 16])
    some = [cell for cell in ids if is_audited(cell, 0.05)]
    assert 60 < len(some) < 140
    assert some == [cell for cell in ids if is_audited(cell, 0.05)]
    assert {*some} < {cell for cell in ids if is_audited(cell, 0.2)}


CLAIM = """
import sys, time
from pathlib import Path
from bench.run.locks import CellLocks
with CellLocks(Path(sys.argv[1])).lock(sys.argv[2]) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_a_claim_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    ours, cell, other = CellLocks(tmp_path), "f" * 16, "0" * 15 + "4"
    with subprocess.Popen([sys.executable, "-c", CLAIM, tmp_path, cell], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"True\n"
        for claimed, wanted in ((cell, False), (other, True)):
            with ours.lock(claimed) as got:
                assert got == wanted
        holder.kill()
        holder.wait()
        with ours.lock(cell) as got:
            assert got
    ours.close()


def test_a_folder_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    locks = CellLocks(tmp_path)
    for cell in ("0" * 16, "1" * 16):
        with locks.lock(cell) as ours:
            assert ours
    locks.close()
    assert capsys.readouterr().err == "no file locks here (No locks available): run one sweep at a time\n"


HOLD = """
import time
from bench.process.signals import Interrupts, Stopped
try:
    with Interrupts() as interrupts:
        with interrupts.deferred():
            print("held", flush=True)
            {held}
        print("never", flush=True)
except Stopped as stop:
    print(stop.signal.name, flush=True)
"""


@pytest.mark.parametrize(
    ("held", "signals", "printed", "code"),
    [
        ("select.select([interrupts.signal_fd], [], [])", [signal.SIGTERM], "SIGTERM\n", 0),
        ("select.select([interrupts.signal_fd], [], [])", [signal.SIGINT], "SIGINT\n", 0),
        ("time.sleep(600)", [signal.SIGINT, signal.SIGINT], "", -signal.SIGINT),
        ("time.sleep(600)", [signal.SIGTERM, signal.SIGINT], "", -signal.SIGINT),
    ],
)
def test_one_signal_waits_for_what_is_held_and_a_second_does_not(
    held: str, signals: list[signal.Signals], printed: str, code: int
) -> None:
    script = "import select\n" + HOLD.format(held=held)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "held\n"
        first, *more = signals
        process.send_signal(first)
        assert first.name in process.stderr.readline()
        for number in more:
            process.send_signal(number)
        assert process.stdout.read() == printed
    assert process.returncode == code


def test_only_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    write = "import os, sys; from pathlib import Path; from bench.records import atomic_writer\n"
    write += "with atomic_writer(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    path = records.path_of(tmp_path, "c0")
    with subprocess.Popen(
        [sys.executable, "-c", write, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        writer.stdout.readline()
        records.remove_abandoned(tmp_path)
        assert len([*tmp_path.rglob("*.tmp")]) == 1
        writer.kill()
        writer.wait()
    records.remove_abandoned(tmp_path)
    assert not [*tmp_path.rglob("*.tmp")]
