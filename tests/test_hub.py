"""Data sets of the hub: the loader through `datasets`' local builders, and through a hub on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bench import CONFIGS, corpora
from bench.corpora import Corpus, CorpusError, pg19, wikitext103
from bench.corpora.base import SPLITS, CorpusOptions, sha256
from bench.corpora.hub import HubSource, truncate_documents

ROOT = Path(__file__).resolve().parents[1]
HUB_SETS = {"pg19": pg19.PG19("pg19"), "wikitext103": wikitext103.WikiText103("wikitext103")}

BOOKS = {
    "train": [f"Chapter {k} of a naïve book. " * (20 + k) for k in range(12)],
    "validation": ["held out ever since " * 9, "and so was this " * 9],
    "test": ["the last page " * 30],
}
WIKI = {
    "train": [
        *(
            "",
            " = First = \n",
            "",
            " Of the first . \n",
            " = not a heading , it has text around it = \n",
            " More . \n",
        ),
        *("", " = = Its section = = \n", "", " Of the section . \n"),
        *("", " = E = mc² = \n", "", " Of the second . \n"),
    ],
    "validation": ["", " = Third = \n", "", " Words of the third . \n"],
    "test": ["", " = Fourth = \n", "", " Words of the fourth . \n", " And more . \n"],
}
ARTICLES = [
    " \n = First = \n \n Of the first . \n = not a heading , it has text around it = \n More . \n"
    " \n = = Its section = = \n \n Of the section . \n \n",
    " = E = mc² = \n \n Of the second . \n",
]


TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"


def write(folder: Path, rows: dict[str, Any], column: str = "text") -> Path:
    """A data set of parquet files, named as the hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in rows.items():
        table = pa.table({column: texts})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=3)
    return folder


def load(name: str, path: Path | None = None, max_bytes: int | None = None) -> Corpus:
    """Past the cache of `load`: these files change."""
    options = CorpusOptions(path=str(path) if path else None, max_bytes=max_bytes)
    return corpora.load.__wrapped__(name, options)


def texts(corpus: Corpus, split: str) -> list[bytes]:
    return [document.tobytes() for document in getattr(corpus, split)]


def refusal(name: str, path: Path | None = None, max_bytes: int | None = None) -> str:
    with pytest.raises(CorpusError) as caught:
        load(name, path, max_bytes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of this process and of those that it starts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(folder))
    return folder


# --- a folder of the user's -------------------------------------------------------------------


def test_the_splits_are_the_data_sets_own(tmp_path: Path) -> None:
    corpus = load("pg19", write(tmp_path, BOOKS))
    for split in SPLITS:
        assert texts(corpus, split) == [text.encode() for text in BOOKS[split]]


def test_lines_become_articles(tmp_path: Path) -> None:
    corpus = load("wikitext103", write(tmp_path, WIKI))
    assert texts(corpus, "train") == [article.encode() for article in ARTICLES]


def test_text_files_are_the_same_corpus_as_parquet(tmp_path: Path) -> None:
    """The files that the rows were made of, through the builder for text."""
    (tmp_path / "text").mkdir()
    for split, rows in WIKI.items():
        (tmp_path / "text" / f"{split}.txt").write_text("".join(row or " \n" for row in rows))
    parquet = load("wikitext103", write(tmp_path / "parquet", WIKI))
    assert load("wikitext103", tmp_path / "text").sha256 == parquet.sha256


def test_a_copy_of_the_hubs_folder_has_the_configurations_inside(tmp_path: Path) -> None:
    write(tmp_path / "hub" / "wikitext-103-raw-v1", WIKI)
    write(tmp_path / "hub" / "wikitext-2-raw-v1", {split: ["another"] for split in SPLITS})
    there = load("wikitext103", tmp_path / "hub").sha256
    assert there == load("wikitext103", write(tmp_path / "alone", WIKI)).sha256


ODD_NAMES = ["b[1]", "a::b", "zip::x", "file:x", "st*r", "que?", "{a,b}", "a b", "it's", 'q"q', "100%20"]
ODD_NAMES += ["ünï", "new\nline", "-dash", "dot.", "#hash", "back\\slash", "~", os.fsdecode(b"not-\xff-utf8")]


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_a_folder_is_read_whatever_its_name(odd: str, tmp_path: Path) -> None:
    """And whatever those of folders and files in it."""
    folder = tmp_path / odd / f"in {odd}"
    folder.parent.mkdir()
    write(tmp_path / "plain", BOOKS).rename(folder)  # pyarrow writes no path that is not UTF-8
    (folder / TRAIN).rename(folder / f"train-{odd}.parquet")
    for asked in (folder, folder.parent):
        assert [texts(load("pg19", asked), split) for split in SPLITS] == [
            [text.encode() for text in BOOKS[split]] for split in SPLITS
        ]


def test_files_whose_names_differ_in_odd_characters_alone_are_all_read(tmp_path: Path) -> None:
    folder = write(tmp_path, BOOKS)
    (folder / TRAIN).rename(folder / "train[1.parquet")
    pq.write_table(pa.table({"text": ["one more book"]}), folder / "train]1.parquet")
    assert texts(load("pg19", folder), "train") == [
        text.encode() for text in [*BOOKS["train"], "one more book"]
    ]


READ_A_PART = """
import os, sys, threading
import datasets, fsspec, pyarrow.parquet
from bench import corpora
def others():
    return len(os.listdir("/proc/self/task")) - threading.active_count()
before = others()
corpora.load("pg19", corpora.CorpusOptions(path=sys.argv[1], max_bytes=900))
print(others() - before)
"""


def test_reading_leaves_no_thread_of_a_library(tmp_path: Path) -> None:
    """One of Arrow's that holds a file of Python's when the process ends aborts it, now and then."""
    write(tmp_path, {**BOOKS, "train": ["a page . "] * 2000})
    done = subprocess.run(
        [sys.executable, "-c", READ_A_PART, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == "0\n"


def test_reading_a_folder_leaves_nothing_in_the_librarys_cache(tmp_path: Path) -> None:
    home = tmp_path / "hf"
    folder = write(tmp_path / "set", BOOKS)
    subprocess.run(
        [sys.executable, "-m", "bench.corpora", "show", "pg19", str(folder)],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(home)},
    )
    assert not [file for file in home.rglob("*") if file.is_file()]


LINES = st.sampled_from(
    ["", " = A = \n", " = = B = = \n", " = = = C = = = \n", " a line . \n", " = = \n", " = \n"]
)


@given(st.lists(LINES, max_size=40))
def test_articles_end_to_end_are_the_file(rows: list[str]) -> None:
    """Cut at each heading that stands alone, but not before anything else was said."""
    found = HUB_SETS["wikitext103"].documents(row.encode() for row in rows)
    expected = [""]
    for k, row in enumerate(rows):
        alone = row == " = A = \n" and "".join(rows[max(0, k - 1) : k + 2]) == " = A = \n"
        if alone and expected[-1].strip():
            expected.append("")
        expected[-1] += row or " \n"
    assert [article.decode() for article in found] == expected


def test_bytes_that_are_no_text_work(tmp_path: Path) -> None:
    rows = {split: [bytes(range(256)) * 2, split.encode()] for split in SPLITS}
    corpus = load("pg19", write(tmp_path, rows))
    assert {split: texts(corpus, split) for split in SPLITS} == rows


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / TEST).unlink(), "the test split is missing; there are"),
        (lambda f: write(f, {"validation": [""]}), "the validation split is empty"),
        (lambda f: write(f, {"train": pa.array([], pa.string())}), "the train split is empty"),
        (lambda f: write(f, {"train": ["a", None]}), "its column text holds None"),
        (lambda f: write(f, {split: ["x"] for split in SPLITS}, "body"), "no column text; there are body"),
        (lambda f: (f / TRAIN).write_bytes(b"PAR1 but no more"), "cannot be read as emozilla/pg19"),
        (lambda f: [g.unlink() for g in f.iterdir()], "cannot be read as emozilla/pg19"),
        (lambda f: [g.unlink() for g in f.iterdir()] + [f.rmdir()], "no such folder"),
    ],
    ids=["split", "empty", "no rows", "null", "column", "corrupt", "no files", "no folder"],
)  # fmt: skip
def test_a_folder_that_is_not_the_data_set_is_refused(
    break_it: Any, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "set", BOOKS)
    break_it(folder)
    message = refusal("pg19", folder)
    assert says in message
    assert message.startswith((f"data.path={folder}", "data=pg19"))
    assert capfd.readouterr() == ("", ""), "the library's own complaints are not shown"


# --- how much is taken ------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20), max_size=9), st.integers(1, 60))
def test_up_to_is_a_prefix(documents: list[bytes], at_most: int) -> None:
    taken, whole = truncate_documents(at_most, documents)
    everything = b"".join(documents)
    assert b"".join(taken) == everything[:at_most]
    assert whole == (len(everything) <= at_most)
    assert [len(a) for a in taken[:-1]] == [len(a) for a in documents[: len(taken[:-1])]]
    assert truncate_documents(None, documents) == (documents, True)


def test_fewer_bytes_are_a_prefix_with_another_hash(tmp_path: Path) -> None:
    folder = write(tmp_path, BOOKS)
    whole = load("pg19", folder)
    everything = b"".join(texts(whole, "train"))
    hashes = {whole.sha256}
    for at_most in (1, 700, len(everything) - 1):
        fewer = load("pg19", folder, at_most)
        assert b"".join(texts(fewer, "train")) == everything[:at_most]
        assert [texts(fewer, split) for split in SPLITS[1:]] == [texts(whole, split) for split in SPLITS[1:]]
        hashes.add(fewer.sha256)
    assert len(hashes) == 4
    assert load("pg19", folder, len(everything)).sha256 == whole.sha256


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    """The second file of two cannot be read at all."""
    folder = write(tmp_path, {**BOOKS, "train": ["a page . "] * 200})
    (folder / TRAIN).rename(folder / "train-00000-of-00002.parquet")
    (folder / "train-00001-of-00002.parquet").write_bytes(b"no parquet")
    assert sum(map(len, load("pg19", folder, 900).train)) == 900
    assert "cannot be read" in refusal("pg19", folder, 1801)


def test_no_bytes_at_all_are_refused(tmp_path: Path) -> None:
    assert "data.max_bytes=0: allowed is 1 or more" in refusal("pg19", tmp_path, 0)


# --- words ------------------------------------------------------------------------------------


def words(corpus: Corpus) -> float:
    return corpus.words_per_byte() * sum(map(len, corpus.test))


def test_the_published_words_are_those_of_the_whole_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = {**BOOKS, "test": ["three words each"] * 100}
    assert words(load("pg19", write(tmp_path / "books", books))) == pytest.approx(6_966_499)
    books["test"].pop()
    assert words(load("pg19", write(tmp_path / "books", books))) == pytest.approx(3 * 99)

    folder = write(tmp_path / "wiki", WIKI)
    assert words(load("wikitext103", folder)) == pytest.approx(len("".join(WIKI["test"]).split()))
    file = "".join(row or " \n" for row in WIKI["test"]).encode()
    monkeypatch.setattr(wikitext103, "TEST_SHA256", sha256(file))
    assert words(load("wikitext103", folder)) == pytest.approx(245_569)


# --- the hub, on this machine -----------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub's interface as streaming a data set needs, for one folder at one commit."""

    def __init__(self, source: HubSource, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.source, self.folder = source, folder
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, file: Path) -> dict[str, Any]:
        kind = "file" if file.is_file() else "directory"
        name = file.relative_to(self.folder).as_posix()
        return {"type": kind, "path": name, "size": file.stat().st_size, "oid": "0" * 40}


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        hub, source = self.server, self.server.source
        path = unquote(urlsplit(self.path).path)
        hub.asked.append(path)
        information = f"/api/datasets/{source.repository}/revision/{source.revision}"
        listing = f"/api/datasets/{source.repository}/tree/{source.revision}"
        content = f"/datasets/{source.repository}/resolve/{source.revision}/"
        if path == information:
            self.answer(
                json.dumps({"id": source.repository, "sha": source.revision, "siblings": []}).encode()
            )
        elif path.startswith(listing) and (folder := hub.folder / path[len(listing) :].strip("/")).is_dir():
            self.answer(json.dumps([hub.entry(file) for file in sorted(folder.iterdir())]).encode())
        elif path.startswith(content) and (file := hub.folder / path[len(content) :]).is_file():
            self.answer(file.read_bytes())
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200) -> None:
        headers = {"X-Repo-Commit": self.server.source.revision, "ETag": '"as it is"'}
        if status == 404:
            headers["X-Error-Code"] = "EntryNotFound"
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if part and status == 200:
            first, last = int(part[1]), min(int(part[2]), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[Hub]:
    server = Hub(HUB_SETS[name], folder)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """PG-19 in miniature, its training documents in two files."""
    folder = write(tmp_path / "served" / "data", {**BOOKS, "train": ["a page of a naïve book . "] * 200})
    (folder / TRAIN).rename(folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["one more book " * 99]}), folder / "train-00001-of-00002.parquet")
    with serving("pg19", tmp_path / "served") as server:
        yield server


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, whose libraries read their settings anew."""
    home = os.environ["LONGCTX_BENCH_CACHE"] + "-of-hf"
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": home, **environment},
        cwd=Path(home).parent,
    )


def fetch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "bench.corpora", "fetch", *arguments, **environment)


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command is refused."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


READ_999 = """
import sys
from bench import corpora
print(corpora.load("pg19", corpora.CorpusOptions(max_bytes=999)).sha256)
assert "datasets" not in sys.modules
"""


def test_what_was_fetched_is_read_without_the_network(hub: Hub, cache: Path) -> None:
    done = fetch("pg19", "--max-bytes", "1000", HF_ENDPOINT=hub.address)
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = cache.iterdir()
    assert done.stdout == f"pg19: {file}\n"
    assert all(HUB_SETS["pg19"].revision in path for path in hub.asked if "pg19" in path), "at another commit"
    assert any("train-00000-of-00002" in path for path in hub.asked)
    assert not any("train-00001-of-00002" in path for path in hub.asked), "more than was asked for"

    hub.asked.clear()
    read = run("-c", READ_999, HF_ENDPOINT=hub.address)
    assert read.stdout.strip() == load("pg19", hub.folder / "data", 999).sha256, read.stderr
    assert load("pg19", None, 1000).sha256 == load("pg19", hub.folder / "data", 1000).sha256
    again = fetch("pg19", "--max-bytes", "999", HF_ENDPOINT=hub.address)
    assert (again.returncode, hub.asked) == (0, []), "fetched although it lies there"
    message = refusal("pg19", None, 1001)
    assert "asks for 1,001 bytes, but 1,000 were fetched" in message
    assert "fetch pg19 --max-bytes 1001`" in message

    more = fetch("pg19", HF_ENDPOINT=hub.address)
    assert more.returncode == 0, more.stderr
    assert load("pg19").sha256 == load("pg19", None, 10**9).sha256 == load("pg19", hub.folder / "data").sha256


CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - {split: test, path: wikitext-103-raw-v1/test-*}
  - {split: train, path: wikitext-103-raw-v1/train-*}
  - {split: validation, path: wikitext-103-raw-v1/validation-*}
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*}
---
"""


def test_the_hubs_card_says_which_files_are_the_configurations(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "served"
    write(folder / "wikitext-103-raw-v1", WIKI)
    write(folder / "wikitext-2-raw-v1", {"train": ["another"]})
    (folder / "README.md").write_text(CARD)
    with serving("wikitext103", folder) as hub:
        done = fetch("wikitext103", HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert load("wikitext103").sha256 == load("wikitext103", folder).sha256
    assert texts(load("wikitext103"), "train") == [article.encode() for article in ARTICLES]


def kept(folder: Path, at_most: int | None = None, **changes: Any) -> Path:
    """A corpus in the cache, as `fetch` leaves it."""
    source = HUB_SETS["pg19"]
    source._store(source._stream(at_most, str(write(folder, BOOKS))))
    if changes:
        with np.load(source._cache) as arrays:
            changed = {**arrays, **changes}
        np.savez(source._cache, **changed)
    return source._cache


def test_a_transfer_that_fails_leaves_the_cache_as_it_was(hub: Hub, cache: Path) -> None:
    kept(hub.folder / "data", at_most=500)
    before = {file.name: file.read_bytes() for file in cache.iterdir()}
    (hub.folder / "data" / TEST).write_bytes(b"PAR1 but no more")
    assert "cannot be read" in the_line(fetch("pg19", HF_ENDPOINT=hub.address))
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before


def test_a_cache_that_cannot_be_written_is_one_line(hub: Hub, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    assert f"cannot write to the cache, {cache}: " in the_line(fetch("pg19", HF_ENDPOINT=hub.address))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-100], flipped, lambda c: b"", lambda c: b"no archive"])
def test_a_damaged_cache_is_refused(damage: Any, tmp_path: Path, cache: Path) -> None:
    file = kept(tmp_path / "set")
    load("pg19")
    file.write_bytes(damage(file.read_bytes()))
    message = refusal("pg19")
    assert f"{file} is damaged" in message
    assert "fetch pg19` again" in message


def test_another_content_is_refused_by_its_hash(tmp_path: Path, cache: Path) -> None:
    file = kept(tmp_path / "set", test=np.frombuffer(b"the last pAge " * 30, dtype=np.uint8))
    message = refusal("pg19")
    assert f"{file} has sha256" in message
    assert load("pg19", tmp_path / "set").sha256 in message
    lengths = kept(tmp_path / "set", test_lengths=np.array([3]))
    assert f"{lengths} is damaged (ValueError: its lengths do not add up)" in refusal("pg19")


def test_fetching_again_mends_a_damaged_cache(hub: Hub, cache: Path) -> None:
    file = kept(hub.folder / "data")
    file.write_bytes(file.read_bytes()[:-9])
    assert fetch("pg19", HF_ENDPOINT=hub.address).returncode == 0
    assert load("pg19").sha256 == load("pg19", hub.folder / "data").sha256


# --- no network -------------------------------------------------------------------------------


@pytest.fixture(params=["refused", pytest.param("silent", marks=pytest.mark.slow), "offline", "unknown host"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings of a process that has no way to the hub."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if request.param == "silent":
            listener.listen()  # takes connections, says nothing
        yield {
            "refused": {"HF_ENDPOINT": address},
            "silent": {"HF_ENDPOINT": address},
            "offline": {"HF_HUB_OFFLINE": "1"},
            "unknown host": {"HF_ENDPOINT": "http://hub.invalid"},
        }[request.param]


def test_without_the_network_one_line_names_what_needs_none(unreachable: dict[str, str], cache: Path) -> None:
    begun = time.monotonic()
    line = the_line(fetch("wikitext103", **unreachable))
    assert time.monotonic() - begun < 15
    assert line.startswith("data=wikitext103: cannot get Salesforce/wikitext from http")
    assert all(f"data={name}" in line for name in ("plays", "stdlib", "files"))
    assert not cache.exists()


def test_a_run_says_how_to_fetch_and_writes_nothing(cache: Path) -> None:
    done = run("-m", "bench", "data=pg19", "variant=dense", "measure=quick", HF_ENDPOINT="http://hub.invalid")
    line = the_line(done)
    assert "data=pg19: not fetched yet; run `python -m bench.corpora fetch pg19` once" in line
    assert all(f"data={name}" in line for name in ("plays", "stdlib", "files"))
    assert not (cache.parent / "results").exists()


# --- configuration ----------------------------------------------------------------------------


def entry(name: str) -> dict[str, Any]:
    """The knobs under data= that a command gets by this name."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", overrides=[f"data={name}"]).data)
    assert isinstance(found, dict)
    return {str(knob): value for knob, value in found.items()}


@pytest.mark.parametrize("name", HUB_SETS)
def test_the_entry_holds_the_defaults(name: str) -> None:
    knobs = entry(name)
    corpus = {"name": name, "path": None, "max_bytes": HUB_SETS[name].max_bytes}
    others = dict.fromkeys(("bpe", "tokenizer", "max_undecodable", "field", "split"))
    assert knobs == {**corpus, **others}


@pytest.mark.parametrize("name", HUB_SETS)
def test_the_commit_is_given_in_full(name: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", HUB_SETS[name].revision)


def test_every_corpus_is_an_entry_and_refuses_no_knob_of_it() -> None:
    for name in corpora.SOURCES:
        knobs = entry(name)
        assert knobs.pop("name") == name
        of_corpus = {field.name for field in dataclasses.fields(CorpusOptions)}
        assert set(knobs) - of_corpus == {"bpe", "tokenizer"}, "knobs of the task"
        corpora.source(name, CorpusOptions(**{knob: knobs[knob] for knob in of_corpus & set(knobs)}))


@pytest.mark.slow
def test_a_cell_runs_on_a_folder_of_a_data_set(tmp_path: Path, cache: Path) -> None:
    folder = write(tmp_path / "set", BOOKS)
    small = ["seq_len=32", "depth=1", "model.d_model=16", "model.heads=1", "measure=quick", "device=cpu"]
    done = run(
        "-m", "bench", "data=pg19", f"data.path={folder}", "data.max_bytes=2000", "variant=dense", *small
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results/adhoc/records").glob("*.json")
    row = json.loads(record.read_text())
    assert (row["status"], row["data"]) == ("ok", "pg19")
    assert row["data_sha256"] == load("pg19", folder, 2000).sha256
