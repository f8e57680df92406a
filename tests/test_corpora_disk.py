"""Odd things on a disk, where corpora lie: each is one line that names it, at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import corpora
from bench.corpora import CorpusError, CorpusOptions, plays
from bench.corpora.base import SPLITS
from bench.inputs.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 120
"""What nobody waits for but a process that hangs."""
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may enter: pytest's own is for one user alone."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        yield Path(temporary)
        for place in Path(temporary).rglob("*"):
            if place.is_dir() and not place.is_symlink():
                place.chmod(0o755)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions stop: root reads everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def refusal(name: str, path: Path | str | None = None) -> str:
    with pytest.raises(CorpusError) as caught, unprivileged():
        corpora.load.__wrapped__(name, CorpusOptions(path=None if path is None else str(path)))
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def unreadable(path: Path) -> None:
    path.write_text("x = 1\n")
    path.chmod(0)


def fails_when_read(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (fifo, "is a fifo, not a file"),
    "socket": (socket_at, "is a socket, not a file"),
    "device": (device, "is a device, not a file"),
    "dangling link": (dangling, "is a broken link (gone)"),
    "circle": (circle, "Too many levels of symbolic links"),
    "unreadable": (unreadable, "Permission denied"),
    "input error": (fails_when_read, "x.py: "),
}
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    **ODD,
    "unlistable folder": (lambda path: path.mkdir(mode=0), "Permission denied"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["files", "enwik8", "pg19"])
def test_an_odd_path_is_one_line(name: str, odd: str, folder: Path) -> None:
    make, says = ODD[odd]
    make(folder / "x.py")
    if name == "pg19":  # which is given a folder, and opens no other
        says = says.replace("not a file", "not a folder")
        says = "is a file, not a folder" if odd in ("unreadable", "input error") else says
    message = refusal(name, folder / "x.py")
    assert message.startswith(f"data.path={folder}/x.py: ")
    assert says in message


@pytest.mark.parametrize("odd", FOLDERS)
@pytest.mark.parametrize("asked", ["files", "files by glob", "pg19", "stdlib"])
def test_an_odd_thing_in_a_folder_is_one_line(
    asked: str, odd: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, says = FOLDERS[odd]
    (folder / "deep").mkdir()
    (folder / "deep" / "good.py").write_text("print('a good file')\n" * 9)
    make(folder / "deep" / "x.py")
    name = asked.split()[0]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    path = {"files by glob": f"{folder}/**/*.py", "stdlib": None}.get(asked, str(folder))
    if asked == "pg19" and odd in ("unreadable", "input error"):
        pytest.skip("a file that is no split of the data set is not opened")
    message = refusal(name, path)
    assert message.startswith(f"data={name}: " if path is None else f"data.path={path}: ")
    assert says in message
    assert f"{folder}/deep/x.py" in message


@pytest.mark.parametrize("name", ["files", "stdlib"])
def test_links_in_circles_end_and_are_read_once(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two circles: by way of both, there are more paths than can ever be listed."""
    (folder / "a").mkdir()
    (folder / "a" / "x.py").write_text("print('once')\n" * 9)
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "again").symlink_to(".")
    (folder / "folder.py").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    paths = [str(folder), f"{folder}/**/*.py", f"{folder}/**"] if name == "files" else [None]
    for path in paths:
        corpus = corpora.load.__wrapped__(name, CorpusOptions(path=path))
        assert b"".join(corpus.split(split)[0].tobytes() for split in SPLITS) == b"print('once')\n" * 9


def test_a_glob_finds_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute and relative, `**` in the middle, at the beginning and the end, hidden files left out."""
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.md", "b/.hidden/g.txt", "b/.h.txt", "x[1]/i.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"the text of {name} . " * 9)
    monkeypatch.chdir(folder)
    everything = ["a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.md", "x[1]/i.txt"]
    for pattern, wanted in {
        "*.txt": ["a.txt"],
        "**/*.txt": [name for name in everything if name.endswith("txt")],
        "b/**/*.txt": ["b/c.txt", "b/d/e.txt"],
        "b/**/d/*": ["b/d/e.txt", "b/d/f.md"],
        "**/d/**/*.txt": ["b/d/e.txt"],
        "**": everything,
        "b/**": ["b/c.txt", "b/d/e.txt", "b/d/f.md"],
        "x[[]1]/*": ["x[1]/i.txt"],
        "?.txt": ["a.txt"],
    }.items():
        for asked in (pattern, f"{folder}/{pattern}"):
            corpus = corpora.load.__wrapped__("files", CorpusOptions(path=asked))
            found = sorted(bytes(text).split()[3].decode() for text in corpus.train)
            assert found == wanted, asked


# --- the cache --------------------------------------------------------------------------------


CACHES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda path: path.write_text("no folder"), "cannot write to the cache, {0}: "),
    "unwritable": (lambda path: None, "cannot write to the cache, {0}: "),
    "below a file": (
        lambda path: (path.parent.rmdir(), path.parent.write_text("")),
        "cannot write to the cache, {0}: ",
    ),
    "dangling": (dangling, "{0} is a broken link"),
    "circle": (circle, "Too many levels of symbolic links"),
    "wheel is a folder": (lambda path: (path / plays.WHEEL).mkdir(parents=True), "is a folder, not a file"),
    "wheel is a fifo": (lambda path: (path.mkdir(), fifo(path / plays.WHEEL)), "is a fifo, not a file"),
    "wheel dangles": (lambda path: (path.mkdir(), dangling(path / plays.WHEEL)), "is a broken link"),
    "nobody's home": (lambda path: None, "the home folder ~nosuchuser is not known"),
}


@pytest.mark.parametrize("odd", CACHES)
@pytest.mark.parametrize("command", ["fetch", "show"])
def test_an_odd_cache_is_one_line(command: str, odd: str, tmp_path: Path) -> None:
    make, says = CACHES[odd]
    cache = tmp_path / "inside" / "cache"
    cache.parent.mkdir()
    make(cache)
    if odd == "unwritable":
        cache = Path("/proc/cache")  # where nobody makes a folder, root included
    value = "~nosuchuser/cache" if odd == "nobody's home" else str(cache)
    done = subprocess.run(
        [sys.executable, "-m", "bench.corpora", command, "plays"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=ROOT,
        env={**os.environ, "LONGCTX_BENCH_CACHE": value},
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    unfetched = command == "show" and ("cannot write" in says or odd == "dangling")
    assert ("not fetched yet" if unfetched else says.format(cache)) in line


def test_the_cache_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    shutil.copy(corpora.cache_dir() / plays.WHEEL, tmp_path / "kept")
    wanted = corpora.load("plays").sha256
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", "~/kept")
    assert corpora.load.__wrapped__("plays").sha256 == wanted


def test_data_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("from home " * 9)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~", "~/book.txt", "~/*.txt"):
        assert b"from home" in corpora.load.__wrapped__("files", CorpusOptions(path=path)).train[0].tobytes()


def test_without_a_home_the_cache_is_the_account_s_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LONGCTX_BENCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert corpora.cache_dir().is_absolute()
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 3)  # an account that the system does not know
    with pytest.raises(ConfigError, match=r"^LONGCTX_BENCH_CACHE.* is not known"):
        corpora.cache_dir()
