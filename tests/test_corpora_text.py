"""What is text and what is not: real files of each kind, made by the programs that make them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import py_compile
import re
import sqlite3
import sys
import tarfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import corpora
from bench.corpora import Corpus, CorpusError, CorpusOptions
from bench.corpora.base import SPLITS
from bench.corpora.plain import HEAD_BYTES, not_text, undecodable

PROSE = "It is a truth universally acknowledged, that a naïve reader – or two – wants “text”.\n" * 40
TABLE = pa.table({"text": PROSE.splitlines()})


def load(path: Path | str, max_undecodable: float | None = None) -> Corpus:
    """Past the cache of `load`: these files change."""
    return corpora.load.__wrapped__("files", CorpusOptions(path=str(path), max_undecodable=max_undecodable))


def refusal(path: Path | str) -> str:
    with pytest.raises(CorpusError) as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def packed(write: Callable[[zipfile.ZipFile], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            write(archive)

    return make


def array(save: Callable[..., object], values: npt.NDArray[Any]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with path.open("wb") as file:  # given a name, numpy adds a suffix
            save(file, values)

    return make


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("prose.txt")
        member.size = len(PROSE.encode())
        archive.addfile(member, io.BytesIO(PROSE.encode()))


def database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table texts (text)")
    connection.close()


def compiled(path: Path) -> None:
    source = path.with_suffix(".source")
    source.write_text("answer = 42\n")
    py_compile.compile(str(source), cfile=str(path), doraise=True)
    source.unlink()


def pdf(path: Path) -> None:
    matplotlib.figure.Figure().savefig(path, format="pdf")


def stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


def sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\1\2" * 999)


def image(kind: str) -> Callable[[Path], object]:
    return lambda path: PIL.Image.new("RGB", (16, 16), (200, 100, 50)).save(path, kind)


NOT_TEXT: dict[str, tuple[Callable[[Path], object], str]] = {
    "parquet": (
        lambda path: pa.parquet.write_table(TABLE, path),
        "a Parquet file; data=rows reads the text of its rows",
    ),
    "arrow": (lambda path: pa.feather.write_feather(TABLE, path), "an Arrow file; data=rows"),
    "arrows": (stream, "an Arrow file"),
    "npy": (array(np.save, np.arange(9)), "a NumPy array; data=ids reads token ids"),
    "npz": (array(np.savez, np.arange(9)), "a zip archive"),
    "pyc": (compiled, "compiled Python"),
    "so": (lambda path: path.write_bytes(Path(sys.executable).resolve().read_bytes()[:9999]), "a program"),
    "zip": (packed(lambda archive: archive.writestr("prose.txt", PROSE)), "a zip archive"),
    "empty.zip": (packed(lambda archive: None), "a zip archive"),
    "gz": (lambda path: path.write_bytes(gzip.compress(PROSE.encode())), "a gzip file; unpack it"),
    "bz2": (lambda path: path.write_bytes(bz2.compress(PROSE.encode())), "a bzip2 file"),
    "xz": (lambda path: path.write_bytes(lzma.compress(PROSE.encode())), "an xz file"),
    "tar": (tar, "a tar archive"),
    "png": (image("png"), "an image"),
    "jpg": (image("jpeg"), "an image"),
    "gif": (image("gif"), "an image"),
    "bmp": (image("bmp"), "an image"),
    "webp": (image("webp"), "an image"),
    "wav": (sound, "sound"),
    "pdf": (pdf, "a PDF document"),
    "sqlite": (database, "an SQLite database"),
    "pkl": (lambda path: path.write_bytes(pickle.dumps([PROSE] * 2)), "a Python pickle"),
    "pt": (lambda path: torch.save({"a": torch.ones(3)}, path), "a zip archive"),
    "utf-16": (lambda path: path.write_text(PROSE, "utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "utf-16-cjk": (lambda path: path.write_text("圖書館" * 99, "utf-16"), "iconv -f UTF-16"),
    "utf-16-le": (lambda path: path.write_text(PROSE, "utf-16-le"), "byte 1 is NUL"),
    "utf-32": (lambda path: path.write_text(PROSE, "utf-32"), "iconv -f UTF-32"),
    "nul": (lambda path: path.write_bytes(PROSE.encode() + b"\0"), f"byte {len(PROSE.encode()):,} is NUL"),
    "late nul": (
        lambda path: path.write_bytes(b"a" * HEAD_BYTES + b"b\0"),
        f"byte {HEAD_BYTES + 1:,} is NUL",
    ),
    "keystream": (
        lambda path: path.write_bytes(np.random.default_rng(0).integers(1, 256, 9999, np.uint8).tobytes()),
        "% of its bytes are control characters",
    ),
}

TEXT: dict[str, bytes] = {
    "utf-8": PROSE.encode(),
    "utf-8 with a mark": PROSE.encode("utf-8-sig"),
    "latin-1": PROSE.encode("latin-1", "ignore"),
    "windows-1252": PROSE.encode("cp1252"),
    "shift-jis": ("吾輩は猫である。" * 99).encode("shift-jis"),
    "koi8-r": ("Все счастливые семьи похожи друг на друга. " * 99).encode("koi8-r"),
    "gb18030": ("學而時習之,不亦說乎" * 99).encode("gb18030"),
    "dos": PROSE.encode().replace(b"\n", b"\r\n") + b"\x1a",
    "old mac": PROSE.encode().replace(b"\n", b"\r"),
    "form feeds and tabs": PROSE.encode().replace(b"\n", b"\n\f\t"),
    "colours": b"\x1b[31mred\x1b[0m\n" * 99,
    "jsonl": b'{"text": "one"}\n' * 99,
    "html": b"<!doctype html>\n<p>one\n" * 99,
    "python": Path(__file__).read_bytes(),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>\n" * 99,
    "begins as a zip's maker": b"PKZIP was a program. " * 99,
    "begins as a bzip2 file": b"BZh? said nobody. " * 99,
    "begins as Parquet": b"PAR1 is a runway in Alaska. " * 99,
    "begins as a bitmap": b"BMX bicycles are small. " * 99,
    "one long line": b"ACGT" * 999,
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_not_text_is_refused(kind: str, tmp_path: Path) -> None:
    """By the file's content: none of them has a name that says so."""
    make, looks = NOT_TEXT[kind]
    file = tmp_path / "book.txt"
    make(file)
    message = refusal(file)
    assert message.startswith(f"data.path={file}: {file} is not text but ")
    assert looks in message
    assert "allowed are text files, in UTF-8 or another encoding" in message


NOT_MOSTLY_UTF_8 = {"shift-jis", "koi8-r", "gb18030"}


@pytest.mark.parametrize("kind", TEXT)
def test_text_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(TEXT[kind])
    corpus = load(tmp_path / "book", max_undecodable=1 if kind in NOT_MOSTLY_UTF_8 else None)
    assert b"".join(corpus.split(split)[0].tobytes() for split in SPLITS) == TEXT[kind]


@pytest.mark.parametrize("kind", sorted(NOT_MOSTLY_UTF_8))
def test_what_is_mostly_not_utf_8_is_refused_with_the_knob_that_reads_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(TEXT[kind])
    message = refusal(tmp_path / "book")
    assert re.search(r"of which \d\d% is not UTF-8, over data.max_undecodable=0.3; ", message)
    assert "data.max_undecodable=1 reads its bytes as they are" in message


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=3)), max_size=9))
def test_the_undecodable_share_is_that_of_the_bytes_that_python_escapes(parts: list[bytes]) -> None:
    """Python's surrogateescape replaces each byte that is in no character by one surrogate."""
    text = b"".join(parts)
    escaped = sum("\udc80" <= character <= "\udcff" for character in text.decode(errors="surrogateescape"))
    assert undecodable(text) * max(1, len(text)) == pytest.approx(escaped)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_no_text_in_utf_8_is_refused(text: str) -> None:
    assert not_text(text.encode()) is None


def folder_of_all_kinds(folder: Path, texts: int = 12) -> None:
    for k in range(texts):
        (folder / f"{k:02}.txt").write_text(f"{k} {PROSE}")
    for hidden in (".git", "__pycache__"):
        (folder / hidden).mkdir()
        (folder / hidden / "text").write_text("never read " * 99)
    compiled(folder / "__pycache__" / "a.pyc")
    (folder / ".hidden").write_text("nor this " * 99)
    np.save(folder / "05.npy", np.arange(3))
    image("png")(folder / "page.png")
    image("gif")(folder / "page.gif")


@pytest.mark.parametrize(
    ("below", "skipped"),
    [
        ("", {"hidden": 2, "__pycache__": 1, "NumPy": 1, "image": 2}),
        ("**/*", {"__pycache__": 2, "NumPy": 1, "image": 2}),
        ("**", {"__pycache__": 2, "NumPy": 1, "image": 2}),
    ],
    ids=["folder", "glob", "glob of all"],
)
def test_what_is_not_text_among_others_is_skipped_and_counted(
    below: str, skipped: dict[str, int], tmp_path: Path
) -> None:
    """Hidden folders and `__pycache__` count as one each; a glob finds no hidden files by itself."""
    folder_of_all_kinds(tmp_path)
    corpus = load(f"{tmp_path}/{below}" if below else tmp_path)
    assert corpus.skipped == skipped
    clean = load(f"{tmp_path}/**/*.txt")
    assert clean.skipped == {}
    assert corpus.sha256 == clean.sha256, "a cell keeps its id"
    assert sum(len(clean.split(split)) for split in SPLITS) == 12


def test_a_folder_without_text_says_what_it_has(tmp_path: Path) -> None:
    folder_of_all_kinds(tmp_path, texts=0)
    message = refusal(tmp_path)
    assert "none of its files is text (skipped: 1 NumPy, 1 __pycache__, 2 hidden, 2 image)" in message
    assert f"{tmp_path}/05.npy is not text but a NumPy array; data=ids reads token ids" in message


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / ".notes").write_text(PROSE)
    named = load(tmp_path / ".config" / ".notes")
    assert named.skipped == {}
    assert load(f"{tmp_path}/.config/.*").sha256 == named.sha256


def test_an_empty_file_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert refusal(tmp_path / "empty.txt").endswith("the corpus is empty")
    (tmp_path / "prose.txt").write_text(PROSE)
    assert load(tmp_path).sha256 == load(tmp_path / "prose.txt").sha256
