"""Records: what is written is what is read, a file is whole or absent, and nothing foreign is fatal."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import records
from bench.records import KEYS, SCHEMA_VERSION, Record, RecordError


def record_of(**changed: Any) -> Record:
    known: dict[str, Any] = {
        "cell_id": "c0",
        "name": "test",
        "variant": "dense",
        "variant_params": {"impl": "sdpa", "window": [1, 2]},
        "seq_len": 8,
        "depth": 1,
        "d_model": 4,
        "heads": 2,
        "batch_size": 1,
        "activations": "keep",
        "objective": "clm",
        "data": "plays",
        "data_sha256": "ab",
        "dtype": "float32",
        "device": "cpu",
        "replicate": 0,
        "status": "ok",
    }
    return Record(**{**known, **changed})


def strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return loaded


losses = st.floats(0, 1e100)
times = st.floats(1e-100, 1e100)


@given(
    nll=losses, peak=st.integers(1, 2**63 - 1), samples=st.lists(times), reason=st.text(), dirty=st.booleans()
)
def test_a_record_comes_back_as_it_was(
    nll: float, peak: int, samples: list[float], reason: str, dirty: bool
) -> None:
    record = record_of(nll=nll, peak_bytes=peak, step_seconds_samples=samples, reason=reason, git_dirty=dirty)
    assert records.parse(record.to_json()) == record
    assert list(strict(record.to_json())) == list(KEYS)


@given(st.lists(st.floats(), min_size=1))
def test_what_is_not_finite_is_null(values: list[float]) -> None:
    written = strict(record_of(nll=values[0], nll_by_position=values, variant_params={"x": values}).to_json())
    want = [value if abs(value) < float("inf") else None for value in values]  # NaN is less than nothing
    assert written["nll"] == want[0]
    assert written["nll_by_position"] == written["variant_params"]["x"] == want


def test_what_was_not_taken_is_null() -> None:
    written = strict(record_of().to_json())
    assert written["nll"] is None
    assert written["peak_bytes"] is None


def test_written_and_read_by_cell(tmp_path: Path) -> None:
    path = records.write(tmp_path, record_of())
    assert path == tmp_path / "records" / "c0.json"
    assert records.read(tmp_path, "c0") == record_of()
    assert records.read(tmp_path, "c1") is None
    assert path.stat().st_mode & 0o044 == 0o044, "a team may read it"


def altered(**changed: Any) -> str:
    data = json.loads(record_of().to_json())
    return json.dumps({key: value for key, value in {**data, **changed}.items() if value != "gone"})


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "truncated": (record_of().to_json().encode()[:-40], "not JSON"),
    "no text": (b"\xff\xfe\x00", ""),
    "too deep": (b"[" * 200_000, ""),
    "a list": (b"[]", "schema_version"),
    "foreign": (b'{"loss": 1}', "schema_version"),
    "other version": (altered(schema_version=SCHEMA_VERSION + 1).encode(), str(SCHEMA_VERSION + 1)),
    "unknown key": (altered(surprise=1).encode(), "surprise"),
    "missing key": (altered(variant="gone").encode(), "variant"),
    "unknown status": (altered(status="fine").encode(), "fine"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_record_is_named_and_skipped(tmp_path: Path, kind: str) -> None:
    content, why = DAMAGED[kind]
    records.write(tmp_path, record_of())
    bad = records.path_of(tmp_path, "bad")
    bad.write_bytes(content)
    found, problems = records.read_all(tmp_path)
    assert found == [record_of()]
    (problem,) = problems
    assert str(bad) in problem
    assert why in problem
    assert "\n" not in problem
    assert records.read(tmp_path, "bad") is None, "its cell is measured again"


def test_what_cannot_be_opened_is_named_and_skipped(tmp_path: Path) -> None:
    """A folder, a link to nothing, and a file that fails as it is read."""
    records.write(tmp_path, record_of())
    records.path_of(tmp_path, "folder").mkdir()
    records.path_of(tmp_path, "link").symlink_to(tmp_path / "nothing")
    records.path_of(tmp_path, "memory").symlink_to("/proc/self/mem")
    found, problems = records.read_all(tmp_path)
    assert found == [record_of()]
    assert len(problems) == 3
    for name, problem in zip(("folder", "link", "memory"), problems, strict=True):
        assert str(records.path_of(tmp_path, name)) in problem
        assert records.read(tmp_path, name) is None


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x)).map(json.dumps))
def test_whatever_the_text_only_record_errors_are_raised(text: str) -> None:
    with pytest.raises(RecordError, match=r"^somewhere: "):
        records.parse(text, "somewhere")


def test_records_come_oldest_first(tmp_path: Path) -> None:
    for cell, started in [("a", "2024-03-02"), ("b", None), ("c", "2024-03-01"), ("d", "2024-03-02")]:
        records.write(tmp_path, record_of(cell_id=cell, started_at=started))
    found, problems = records.read_all(tmp_path)
    assert [record.cell_id for record in found] == ["b", "c", "a", "d"]
    assert not problems


def test_an_experiment_without_records_has_none(tmp_path: Path) -> None:
    assert records.read_all(tmp_path / "nowhere") == ([], [])
    assert list(records.load(tmp_path).columns) == list(KEYS)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        records.load(tmp_path / "nowhere")


def test_a_table_has_a_row_a_record_and_a_column_a_key(tmp_path: Path) -> None:
    for cell in "abc":
        records.write(tmp_path, record_of(cell_id=cell, peak_bytes=7))
    records.path_of(tmp_path, "bad").write_text("{")
    with pytest.warns(UserWarning, match="left out: .*bad.json: not JSON"):
        table = records.load(str(tmp_path))
    assert list(table.columns) == list(KEYS)
    assert sorted(table["cell_id"]) == ["a", "b", "c"]
    assert (table["peak_bytes"] == 7).all()


def test_a_reader_beside_a_writer_sees_whole_files_alone(tmp_path: Path) -> None:
    """One cell written over and over, at sizes that differ; a reader never sees a part of either."""
    sizes = [1, 20_000]
    path = records.write(tmp_path, record_of(step_seconds_samples=[1.0]))
    done = threading.Event()
    seen: list[int] = []
    problems: list[str] = []

    def read() -> None:
        while not done.is_set():
            found, bad = records.read_all(tmp_path)
            problems.extend(bad)
            seen.extend(len(record.step_seconds_samples or []) for record in found)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(60):
            records.write(tmp_path, record_of(step_seconds_samples=[1.0] * sizes[turn % 2]))
    finally:
        done.set()
        reader.join()
    assert not problems
    assert set(seen) == set(sizes), "the reader saw both"
    assert list(path.parent.iterdir()) == [path], "nothing temporary is left"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = records.write(tmp_path, record_of())
    with pytest.raises(UnicodeEncodeError):
        records.write_atomically(path, "half of it " * 10_000 + "\ud800")
    assert records.read(tmp_path, "c0") == record_of()
    assert list(path.parent.iterdir()) == [path]


def test_final_statuses_are_statuses() -> None:
    assert set(records.STATUSES) - records.FINAL == {"error", "timeout", "diverged"}
    assert set(records.STATUSES) > records.FINAL
