"""Texts in tables of a user: real files, made by the libraries; the same texts are the same corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import corpora
from bench.corpora import Corpus, CorpusError, CorpusOptions, rows, splits
from bench.corpora.base import SPLITS

TEXTS = [f"document {k}: {'naïve words, ' * (k % 7)}end\n" for k in range(40)]
SPLIT = {"train": TEXTS[:30], "validation": TEXTS[30:35], "test": TEXTS[35:]}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all tests of this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGCTX_BENCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts in every format, by the libraries themselves."""
    folder = tmp_path_factory.mktemp("tables")
    table = pa.table({"id": list(range(40)), "text": TEXTS})
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(TEXTS))
    )
    pa.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    pa.csv.write_csv(table, folder / "a.csv")
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    by_split = {name: datasets.Dataset.from_dict({"text": own}) for name, own in SPLIT.items()}
    datasets.DatasetDict(by_split).save_to_disk(folder / "saved-splits")
    datasets.enable_progress_bars()
    snapshot = folder / "datasets--someone--books" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    for place in (snapshot / "data", blobs, snapshot.parents[1] / "refs"):
        place.mkdir(parents=True)
    for name, own in SPLIT.items():
        pa.parquet.write_table(pa.table({"text": own}), blobs / name)
        link = snapshot / "data" / f"{name}-00000-of-00001.parquet"
        link.symlink_to(os.path.relpath(blobs / name, link.parent))
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return folder


def load(path: Path | str, **options: object) -> Corpus:
    """Past the cache in memory."""
    return corpora.load.__wrapped__("rows", CorpusOptions(path=str(path), **options))  # type: ignore[arg-type]


def texts(corpus: Corpus, split: str) -> list[str]:
    return [document.tobytes().decode() for document in corpus.split(split)]


def refusal(path: Path | str, **options: object) -> str:
    with pytest.raises(CorpusError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.arrow", "saved"])
def test_the_same_texts_are_the_same_corpus_in_every_format(name: str, made: Path) -> None:
    corpus = load(made / name)
    assert sorted(text for split in SPLITS for text in texts(corpus, split)) == sorted(TEXTS)
    assert corpus.sha256 == load(made / "a.parquet").sha256
    assert corpus.notes == ("test and validation held out by the hash of each document",)


@pytest.mark.parametrize("name", ["saved-splits", "datasets--someone--books"])
def test_splits_of_the_data_are_kept(name: str, made: Path) -> None:
    corpus = load(made / name)
    assert {split: texts(corpus, split) for split in SPLITS} == SPLIT
    assert corpus.notes == ("its own splits",)


def test_one_split_is_read_and_divided(made: Path) -> None:
    corpus = load(made / "saved-splits", split="train")
    assert sorted(text for split in SPLITS for text in texts(corpus, split)) == sorted(SPLIT["train"])
    assert "data.split=trian: unknown; there are train, validation, test; did you mean train?" in refusal(
        made / "saved-splits", split="trian"
    )


def test_a_wrong_column_names_those_there_are(made: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "saved"):
        message = refusal(made / name, field="txt")
        columns = "text" if name == "saved" else "id, text"
        assert message.startswith(
            f"data.path={made / name}: data.field=txt: no such column; there are {columns}"
        )
        assert message.endswith("did you mean text?")
    assert "data.field=id: holds int64; expected text" in refusal(made / "a.parquet", field="id")


def test_what_is_no_table_is_refused_in_a_line(made: Path, tmp_path: Path) -> None:
    assert "data.path is missing" in refusal_without_path()
    assert "has Arrow and CSV and JSON and Parquet files; choose one kind" in refusal(f"{made}/a.*")
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert "no table (there are: 1 .pkl, 1 hidden); allowed are .jsonl" in refusal(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    assert "cannot be read (" in refusal(tmp_path)
    assert "hf download someone/books --repo-type dataset" in refusal("someone/books")


def refusal_without_path() -> str:
    with pytest.raises(CorpusError) as caught:
        corpora.load.__wrapped__("rows")
    return str(caught.value)


def test_rows_without_text_are_counted_and_other_files_too(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": [*TEXTS, None, "", None]}), tmp_path / "a.parquet")
    (tmp_path / "notes.md").write_text("no table")
    corpus = load(tmp_path)
    assert corpus.skipped == {"row without text": 3, ".md": 1}
    assert sum(len(corpus.split(split)) for split in SPLITS) == len(TEXTS)


@pytest.mark.parametrize("at_most", [1, 100, 10**6])
def test_the_training_text_is_bounded(at_most: int, made: Path) -> None:
    corpus = load(made / "saved-splits", max_bytes=at_most)
    assert b"".join(text.tobytes() for text in corpus.train) == "".join(SPLIT["train"]).encode()[:at_most]
    assert texts(corpus, "test") == SPLIT["test"]


def test_a_table_is_read_once_and_again_when_it_changes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell is a process that must not read it again, nor load `datasets`."""
    table = tmp_path / "a.jsonl"
    table.write_bytes((made / "a.jsonl").read_bytes())
    first = load(table)
    assert isinstance(first.train[0], np.memmap)
    read: list[str] = []

    def columns(*arguments: object) -> Callable[..., object]:
        read.append("again")
        return original(*arguments)

    original = rows.columns
    monkeypatch.setattr(rows, "columns", columns)
    assert load(table).sha256 == first.sha256
    assert not read
    table.write_text(json.dumps({"text": "more " * 9}) + "\n" + table.read_text())
    assert load(table).sha256 != first.sha256
    assert read == ["again"]


# --- splits -----------------------------------------------------------------------------------


def divided(hashes: list[float], names: list[str], own: list[int], length: int = 20) -> dict[int, int]:
    """Document → split, where documents stay whole."""
    lengths = np.full(len(hashes), length)
    found = splits.divide(names, np.array(own), lengths, np.array(hashes), "data")
    assert (found.pieces[:, 3] - found.pieces[:, 2] == length).all()
    return {int(document): int(split) for split, document, *_ in found.pieces}


HASHES = st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=60, unique=True)


@settings(deadline=None)
@given(HASHES, HASHES, st.randoms())
def test_a_document_keeps_its_split_when_others_come_and_the_order_changes(
    hashes: list[float], more: list[float], random: object
) -> None:
    """But for a split that would be empty, which takes a document."""
    both = list(dict.fromkeys([*hashes, *more]))
    random.shuffle(both)  # type: ignore[attr-defined]
    before, after = (divided(one, ["train"], [0] * len(one)) for one in (hashes, both))
    assert sorted(before) == list(range(len(hashes))), "each in one split"
    for k, value in enumerate(hashes):
        expected = 2 if value < 0.1 else 1 if value < 0.2 else 0
        if before[k] != expected:
            held_out = sum(low <= one < low + 0.1 for low in [{2: 0.0, 1: 0.1}[before[k]]] for one in hashes)
            assert not held_out
        if before[k] == expected and expected:
            assert after[both.index(value)] == before[k]


def test_shares_are_a_tenth_each() -> None:
    hashes = np.random.default_rng(0).random(20_000)
    found = divided(hashes.tolist(), ["anything"], [0] * 20_000)
    counts = np.bincount(list(found.values())) / 20_000
    assert counts == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_missing_splits_come_out_of_the_training_documents() -> None:
    hashes = [k / 40 for k in range(40)]
    own = [0] * 30 + [1] * 10
    found = divided(hashes, ["train", "val"], own)
    assert {k for k, split in found.items() if split == 2} == {0, 1, 2, 3}, "hashes below a tenth"
    assert {k for k, split in found.items() if split == 1} == set(range(30, 40))


def test_a_few_documents_are_each_cut_in_order() -> None:
    lengths, hashes = np.array([100, 50]), np.array([0.5, 0.01])
    found = splits.divide(["train"], np.zeros(2, dtype=np.int64), lengths, hashes, "data")
    assert found.pieces.tolist() == [
        *([0, 0, 0, 80], [0, 1, 0, 40]),
        *([1, 0, 80, 90], [1, 1, 40, 45]),
        *([2, 0, 90, 100], [2, 1, 45, 50]),
    ]


def test_splits_without_one_for_training_are_refused_and_others_counted() -> None:
    numbers = np.arange(24) % 2
    with pytest.raises(CorpusError, match=r"has the splits en, de, none for training; data\.split=en reads"):
        splits.divide(["en", "de"], numbers, np.full(24, 9), np.linspace(0, 0.99, 24), "data")
    found = splits.divide(["train", "extra"], numbers, np.full(24, 9), np.linspace(0, 0.99, 24), "data")
    assert found.ignored == {"of split extra": 12}
    assert set(found.pieces[:, 1].tolist()) == set(range(0, 24, 2))
