"""The store: many writers, many ages of files, many files gathered into few, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from test_records import record_of

from bench import records
from bench.records import Record
from bench.records.__main__ import main
from bench.records.check import check
from bench.records.compact import compact
from bench.records.files import ASIDE, is_abandoned, parts_of
from bench.records.migrations import MIGRATIONS, SCHEMA_VERSION, migrate

ROOT = Path(__file__).parents[1]
COMMITTED = [ROOT / "results" / name for name in ("reference-cpu", "h100")]
DEAD = "999999999"
"""No process has this number."""


def keys_of(record: Record, **changed: Any) -> dict[str, Any]:
    keys = json.loads(record.to_json())
    return {key: value for key, value in {**keys, **changed}.items() if value != "gone"}


def by_cell(folder: Path) -> dict[str, Record]:
    found, problems = records.read_all(folder)
    assert not problems
    return {record.cell_id: record for record in found}


def kinds(folder: Path) -> list[str]:
    return sorted(problem.kind for problem in check(folder))


def files(folder: Path) -> list[str]:
    """All of them below a folder, but for parts."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".jsonl")


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_records_are_read_as_they_were_meant(folder: Path) -> None:
    found = by_cell(folder)
    texts = [path.read_text() for path in (folder / "records").glob("*.json")]
    for part in (folder / "records" / "parts").glob("*.jsonl"):
        texts += part.read_text().splitlines()
    assert len(found) == len(texts) > 0
    for written in map(json.loads, texts):
        read = vars(found[written["cell_id"]])
        assert 1 <= written.pop("schema_version") <= SCHEMA_VERSION
        if "sampling_half_width" in written:  # its name up to version 3
            written["step_precision"] = written.pop("sampling_half_width")
        assert {key: read[key] for key in written} == written
        assert read["schema_version"] == SCHEMA_VERSION
        added = {key: value for key, value in read.items() if key not in written and value is not None}
        known = {"ff_chunks": 1, "twin": 0, "feed_forward": "mlp", "stack": "stack", "stack_params": {}}
        assert added.keys() <= {"schema_version", *known}, "what was not known is null"
        assert added == {key: known.get(key, SCHEMA_VERSION) for key in added}


def test_a_key_that_is_added_and_null_needs_no_version() -> None:
    keys = keys_of(record_of(reach=None), reach="gone")
    assert records.parse(json.dumps(keys)).reach is None


@pytest.mark.parametrize("key", ["twin", "ff_chunks", "variant"])
def test_version_2_must_say_what_version_1_left_to_be_guessed(key: str) -> None:
    keys = keys_of(record_of(), **{key: "gone"})
    with pytest.raises(records.RecordError, match=f"missing keys {key}"):
        records.parse(json.dumps(keys))
    if key != "variant":
        assert records.parse(json.dumps(keys | {"schema_version": 1})) == record_of()


@pytest.mark.parametrize("key", ["feed_forward", "stack"])
def test_version_3_must_say_what_fills_the_slots(key: str) -> None:
    """In older versions nothing else could; the width of the MLP is not known of them."""
    record = record_of(feed_forward_params=None, stack_params={})
    keys = keys_of(record, **{key: "gone", "stack_params": "gone"})
    with pytest.raises(records.RecordError, match=f"missing keys {key}"):
        records.parse(json.dumps(keys))
    assert records.parse(json.dumps(keys | {"schema_version": 2})) == record


def test_the_precision_of_steps_had_another_name_in_version_3() -> None:
    record = record_of(step_precision=0.0123)
    keys = keys_of(record, step_precision="gone") | {"sampling_half_width": 0.0123}
    with pytest.raises(records.RecordError, match="unknown keys sampling_half_width"):
        records.parse(json.dumps(keys))
    assert records.parse(json.dumps(keys | {"schema_version": 3})) == record


def test_every_version_leads_to_the_next() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))
    before = {"schema_version": 1, "depth": 1}
    assert migrate(before)["schema_version"] == SCHEMA_VERSION
    assert before == {"schema_version": 1, "depth": 1}, "a migration is pure"


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, True, 1.0, "2", None, [2]])
def test_a_version_that_is_not_ours_is_named(version: object) -> None:
    with pytest.raises(records.RecordError, match=r"^here: schema_version .* reads 1 to 4$"):
        records.parse(json.dumps(keys_of(record_of()) | {"schema_version": version}), "here")


# --- writers --------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_records import record_of
from bench import records
for turn in range(int(sys.argv[2])):
    samples = [turn + 1.0] * 3000
    records.write(Path(sys.argv[1]), record_of(started_at="by " + sys.argv[4], step_seconds_samples=samples))
    print(turn, flush=True)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_writers_of_one_cell_leave_one_whole_record(tmp_path: Path) -> None:
    writers = [python(WRITER, tmp_path, 25, ROOT / "tests", name) for name in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = by_cell(tmp_path)
        seen |= {record.started_at for record in found.values()}
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert by_cell(tmp_path)["c0"].step_seconds_samples == [25.0] * 3000
    assert files(tmp_path) == ["c0.json"]
    assert seen <= {"by a", "by b"}


def test_a_writer_that_is_killed_leaves_the_old_record_and_a_file_that_says_whose_it_was(
    tmp_path: Path,
) -> None:
    code = WRITER.replace(
        "records.write(", "import os; os.fsync = lambda _: os.kill(os.getpid(), 9); records.write("
    )
    records.write(tmp_path, record_of())
    writer = python(code, tmp_path, 1, ROOT / "tests", "a")
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert by_cell(tmp_path) == {"c0": record_of()}
    (left,) = records.temporary_files_of(records.path_of(tmp_path, "c0"))
    assert f".{writer.pid}." in left.name
    assert is_abandoned(left)
    assert kinds(tmp_path) == ["unfinished"]
    assert compact(tmp_path).temporaries == 1
    assert by_cell(tmp_path) == {"c0": record_of()}
    assert files(tmp_path) == []


def test_whose_temporaries_are_dead(tmp_path: Path) -> None:
    host = "".join(c if c.isalnum() else "_" for c in socket.gethostname())

    def made(name: str, hours: float) -> Path:
        path = tmp_path / name
        path.write_text("")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
        return path

    assert is_abandoned(made(f".c0-{host}.{DEAD}.0123abcd.tmp", 0)), "its process is gone"
    assert not is_abandoned(made(f".c0-{host}.{os.getpid()}.0123abcd.tmp", 0.5)), "it is being written"
    assert not is_abandoned(made(f".c0-{host}.1.0123abcd.tmp", 0.5)), "somebody else's process"
    assert not is_abandoned(made(f".c0-elsewhere.{DEAD}.0123abcd.tmp", 0.5)), "another machine's may live"
    assert is_abandoned(made(f".c0-elsewhere.{DEAD}.0123abcd.tmp", 1.5)), "but not for ever"
    assert is_abandoned(made(".c0-k3jw_h2x.tmp", 1.5)), "as an earlier version named them"
    assert not is_abandoned(made(".notes.tmp", 99)), "not one of ours"


# --- compacting -----------------------------------------------------------------------------------


@pytest.fixture
def thirty(tmp_path: Path) -> Path:
    """An experiment with the records c00 to c29 in single files."""
    for number in range(30):
        records.write(tmp_path, numbered(number))
    return tmp_path


def numbered(number: int, started: str = "2026-01-01") -> Record:
    return record_of(
        cell_id=f"c{number:02}", replicate=number, started_at=started, flops_executed_step=10**25
    )


def test_compacting_keeps_every_record_in_one_file(thirty: Path) -> None:
    before, table = by_cell(thirty), records.load(thirty)
    assert main(["compact", str(thirty)]) == 0
    assert by_cell(thirty) == before
    assert records.load(thirty).equals(table)
    assert files(thirty) == []
    (part,) = parts_of(thirty).iterdir()
    assert len(part.read_text().splitlines()) == 30
    assert records.read(thirty, "c07") == numbered(7), "a sweep finds it"
    assert records.read(thirty, "c99") is None
    assert kinds(thirty) == []
    content = part.read_bytes()
    assert compact(thirty).parts == [part], "again changes nothing"
    assert part.read_bytes() == content


def test_what_is_measured_after_compacting_counts_and_is_gathered_too(thirty: Path) -> None:
    compact(thirty)
    newer = numbered(3, "2026-02-02")
    records.write(thirty, newer)
    records.write(thirty, numbered(30))
    assert records.read(thirty, "c03") == by_cell(thirty)["c03"] == newer
    assert kinds(thirty) == ["duplicate"]
    before = by_cell(thirty)
    compact(thirty)
    assert by_cell(thirty) == before
    assert len(before) == 31
    assert files(thirty) == []
    assert len(list(parts_of(thirty).iterdir())) == 1, "small parts become one"
    assert kinds(thirty) == []


def test_an_older_copy_does_not_take_the_place_of_a_newer_record(thirty: Path) -> None:
    records.write(thirty, numbered(3, "2026-02-02"))
    compact(thirty)
    records.write(thirty, numbered(3))
    assert records.read(thirty, "c03") == by_cell(thirty)["c03"] == numbered(3, "2026-02-02")
    compact(thirty)
    assert by_cell(thirty)["c03"] == numbered(3, "2026-02-02")


def test_large_parts_are_left_as_they_are(thirty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(numbered(29).to_line())
    monkeypatch.setattr("bench.records.compact.PART_BYTES", 7 * size)
    compact(thirty)
    first = {path: path.stat().st_mtime_ns for path in parts_of(thirty).iterdir()}
    assert len(first) == 5
    assert all(len(path.read_text()) <= 7 * size for path in first)
    records.write(thirty, numbered(30))
    compact(thirty)
    kept = {path: path.stat().st_mtime_ns for path in parts_of(thirty).iterdir()}
    assert len(kept.items() & first.items()) == 4, "all but the last, which had room"
    assert len(by_cell(thirty)) == 31


def test_what_cannot_be_read_is_named_and_stays(thirty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = numbered(3).to_json()
    bad = {
        "torn.json": whole[:200],
        "foreign.json": '{"loss": 1}',
        "newer.json": json.dumps(keys_of(numbered(4), cell_id="newer", schema_version=SCHEMA_VERSION + 1)),
        "later.json": json.dumps(keys_of(numbered(5), cell_id="later", surprise=1)),
    }
    for name, text in bad.items():
        (thirty / "records" / name).write_text(text)
    assert main(["compact", str(thirty)]) == 1
    assert files(thirty) == sorted(bad)
    said = capsys.readouterr().out
    assert all(name in said for name in bad)
    assert main(["check", str(thirty)]) == 1
    assert capsys.readouterr().out.endswith("4 unreadable\n")
    assert len(records.read_all(thirty)[0]) == 30


def test_a_part_that_is_damaged_keeps_its_good_lines_and_its_name(thirty: Path) -> None:
    compact(thirty)
    (part,) = parts_of(thirty).iterdir()
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([*lines[:5], lines[5][:100] + "\n", *lines[6:20], lines[20][:50]]))
    found, problems = records.read_all(thirty)
    assert len(found) == 19
    assert [f"{part}:6: not JSON" in problems[0], f"{part}:21: not JSON" in problems[1]] == [True, True]
    assert records.read(thirty, "c07") == numbered(7)
    assert main(["compact", str(thirty)]) == 1
    assert part.exists(), "somebody may mend it"
    assert len(records.read_all(thirty)[0]) == 19


def test_version_1_is_written_anew_by_compacting(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED[1] / "records", tmp_path / "records")
    before = by_cell(tmp_path)
    assert set(kinds(tmp_path)) == {"older"}
    assert main(["check", str(tmp_path)]) == 0, "nothing is lost"
    compact(tmp_path)
    assert by_cell(tmp_path) == before
    assert kinds(tmp_path) == []


def test_check_names_every_kind_of_problem(thirty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(number: int, **other: Any) -> None:
        record = numbered(number)
        records.write(thirty, Record(**{**vars(record), **other}))

    cell(1, code_sha256="new", started_at="2026-02-01")
    cell(1, cell_id="c01-old", code_sha256="old")
    cell(1, cell_id="c01-data", code_sha256="new", data_sha256="other")
    folder = thirty / "records"
    (folder / "c02.json").rename(folder / "c02 (copy).json")
    shutil.copy(folder / "c03.json", folder / "c03b.json")
    (folder / f".c04-elsewhere.{DEAD}.0123abcd.aside").write_text(numbered(4).to_json())
    os.utime(folder / f".c04-elsewhere.{DEAD}.0123abcd.aside", (0, 0))
    for beside in ("curves/c05.csv", "curves/c98.csv", "checkpoints/c99.pt", "logs/c97.txt"):
        (thirty / beside).parent.mkdir(exist_ok=True)
        (thirty / beside).write_text("")
    assert main(["check", str(thirty)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "1 unfinished, 2 wrong name, 2 duplicate, 2 stale, 3 left over"
    listed = {line.split()[0]: line for line in said[:-1]}
    assert "c01-old.json" in "".join(said)
    assert "c01-data.json" in "".join(said)
    assert "measured with code old; the newest of its configuration with new" in "".join(said)
    assert "c05" not in listed["left"]
    before = by_cell(thirty)
    compact(thirty)
    assert by_cell(thirty) == before
    assert main(["check", str(thirty)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 stale, 3 left over"


def test_a_record_that_is_replaced_while_it_is_gathered_is_put_back(
    thirty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and removing another sweep measures the cell again."""
    newer = numbered(3, "2026-02-02")
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        if self.name == "c03.json":
            records.path_of(thirty, "c03").write_text(newer.to_json())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    assert compact(thirty).gathered == 29
    assert records.read(thirty, "c03") == by_cell(thirty)["c03"] == newer
    assert files(thirty) == ["c03.json"]


def test_a_still_newer_file_is_not_replaced_by_what_was_put_aside(
    thirty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    newest = numbered(3, "2026-03-03")

    def late(source: Path, target: Path) -> None:
        records.path_of(thirty, "c03").write_text(newest.to_json())
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        if self.name == "c03.json":
            self.write_text(numbered(3, "2026-02-02").to_json())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    compact(thirty)
    assert by_cell(thirty)["c03"] == newest
    assert len(by_cell(thirty)) == 30
    assert len(list((thirty / "records").glob(f".*{ASIDE}"))) == 1, (
        "it is there, and a record, until it is dead"
    )


KILLED = """
import os, random, sys, threading, time
from pathlib import Path
from bench.records.compact import compact
wait = float(sys.argv[2])
threading.Thread(target=lambda: (time.sleep(wait), os.kill(os.getpid(), 9)), daemon=True).start()
while True:
    compact(Path(sys.argv[1]))
"""
TRACED = """
import os, sys
from pathlib import Path
from bench.records.compact import compact
left = int(sys.argv[2])
def trace(frame, event, arg):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
    return trace
sys.settrace(trace)
compact(Path(sys.argv[1]))
sys.settrace(None)
print("whole")
"""


def test_killed_at_any_line_it_loses_nothing(thirty: Path) -> None:
    """Stopped at random lines of itself, again and again, while new records keep coming."""
    at = random.Random(0)
    ends = []
    want = by_cell(thirty)
    for turn in range(12):
        for number in at.sample(range(40), 3):
            fresh = numbered(number, f"2026-02-{turn + 1:02}")
            records.write(thirty, fresh)
            want[fresh.cell_id] = fresh
        killed = python(TRACED, thirty, int(10 ** at.uniform(3.5, 6.3)))
        ends.append(killed.communicate()[0])
        assert by_cell(thirty) == want
        for cell, record in want.items():
            if turn % 4 == 3:
                assert records.read(thirty, cell) == record
    assert len(set(ends)) == 2, "some were killed and some came to their end"
    compact(thirty)
    assert by_cell(thirty) == want
    assert files(thirty) == []


@pytest.mark.slow
def test_several_at_once_killed_at_any_moment_lose_nothing(thirty: Path) -> None:
    at = random.Random(1)
    want = by_cell(thirty)
    started = datetime(2026, 2, 1)
    for _ in range(40):
        running = [python(KILLED, thirty, at.uniform(0.2, 0.8)) for _ in range(3)]
        while any(one.poll() is None for one in running):
            started += timedelta(seconds=1)
            fresh = numbered(at.randrange(60), started.isoformat())
            records.write(thirty, fresh)
            want[fresh.cell_id] = fresh
            assert by_cell(thirty) == want
        for one in running:
            one.communicate()
    compact(thirty)
    assert by_cell(thirty) == want
    assert files(thirty) == []


@pytest.fixture(autouse=True)
def no_cached_parts() -> Iterator[None]:
    yield
    from bench.records.store import _part_index

    _part_index.cache_clear()


@pytest.mark.parametrize("command", ["check", "compact"])
def test_a_folder_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([command, str(tmp_path / "nowhere\x1b[31m")]) == 2
    said = capsys.readouterr().err
    assert said.endswith("nowhere\\x1b[31m: no such folder\n")


def test_an_experiment_without_records_is_in_order(tmp_path: Path) -> None:
    assert main(["check", str(tmp_path)]) == main(["compact", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
