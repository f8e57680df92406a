"""What is text and what is not: real files of each kind, made by the programs that make them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import py_compile
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
from bench.corpora import Corpus, CorpusError
from bench.corpora.base import SPLITS
from bench.corpora.plain import HEAD_BYTES, not_text

PROSE = "It is a truth universally acknowledged, that a naïve reader – or two – wants “text”.\n" * 40
TABLE = pa.table({"text": PROSE.splitlines()})


def load(path: Path | str) -> Corpus:
    """Past the cache of `load`: these files change."""
    return corpora.load.__wrapped__("files", str(path))


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
    "parquet": (lambda path: pa.parquet.write_table(TABLE, path), "a Parquet file; write its texts"),
    "arrow": (lambda path: pa.feather.write_feather(TABLE, path), "an Arrow file"),
    "arrows": (stream, "an Arrow file"),
    "npy": (array(np.save, np.arange(9)), "a NumPy array"),
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


@pytest.mark.parametrize("kind", TEXT)
def test_text_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(TEXT[kind])
    corpus = load(tmp_path / "book")
    assert b"".join(corpus.split(split)[0].tobytes() for split in SPLITS) == TEXT[kind]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_no_text_in_utf_8_is_refused(text: str) -> None:
    assert not_text(text.encode()) is None


@pytest.mark.parametrize("below", ["", "**/*", "**"], ids=["folder", "glob", "glob of all"])
def test_one_that_is_not_text_among_others_is_named_with_how_many_there_are(
    below: str, tmp_path: Path
) -> None:
    for k in range(12):
        (tmp_path / f"{k:02}.txt").write_text(f"{k} {PROSE}")
    (tmp_path / "__pycache__").mkdir()
    compiled(tmp_path / "__pycache__" / "a.pyc")
    np.save(tmp_path / "05.npy", np.arange(3))
    message = refusal(f"{tmp_path}/{below}" if below else tmp_path)
    assert f"2 of 14 files are not text, first {tmp_path}/05.npy: a NumPy array" in message
    assert "a glob such as" in message
    assert sum(len(load(f"{tmp_path}/**/*.txt").split(split)) for split in SPLITS) == 12


def test_an_empty_file_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert refusal(tmp_path / "empty.txt").endswith("the corpus is empty")
    (tmp_path / "prose.txt").write_text(PROSE)
    assert load(tmp_path).sha256 == load(tmp_path / "prose.txt").sha256
