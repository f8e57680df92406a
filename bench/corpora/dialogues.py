"""Dialogues of the user, from JSON files, as bytes in which the turns can be told apart.

    user ␟ A room for two, please. ␞ system ␟ For which night? ␞ user ␟ …

A turn is the name of its speaker, SPEAKER_END (␟, U+001F), its text in UTF-8, and TURN_END (␞, U+001E). Texts
that hold one of these control characters are refused, so turns are found again in the bytes alone.

A file is JSON Lines, one dialogue a line; or, if its name ends in .json, a list of dialogues or an object of
dialogues by name. A dialogue is an object with a list of turns in one of the fields `TURNS`. A turn is an
object with its speaker in one of the fields `SPEAKER` and its text in one of the fields `TEXT`. Other fields
are not read. This includes MultiWOZ 2.2 and later (Zang 2020, arXiv:2007.12720: turns, speaker, utterance)
and the messages of chat models (messages, role, content). In MultiWOZ 2.0 and 2.1 (Budzianowski 2018,
arXiv:1810.00278) the turns of a `log` have no speaker: the user and the system alternate, the user first.

The split of a dialogue depends only on the hash of its bytes, and not on other dialogues. Therefore it stays
in its split when dialogues are added.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.corpora.base import (
    HELD_OUT_SHARE,
    SPLITS,
    Corpus,
    CorpusError,
    CorpusOptions,
    Document,
    Source,
)
from bench.corpora.disk import expand, file_type, nothing_found, read_file, walk
from bench.inputs.paths import user_path
from bench.inputs.printable import printable

SPEAKER_END, TURN_END = 0x1F, 0x1E
MARKS = bytes([SPEAKER_END, TURN_END])
TURNS = ("turns", "log", "messages")
SPEAKER = ("speaker", "role")
TEXT = ("text", "utterance", "content")
ALTERNATING = ("user", "system")
"""Speakers of the turns of a `log` that do not name them."""


class Turn(NamedTuple):
    """A turn of a dialogue: its speaker, and where its text and TURN_END lie in the bytes."""

    speaker: str
    start: int
    stop: int


def turns_of(document: Document) -> list[Turn]:
    """Return the turns of a dialogue, in order."""
    found, begin = [], 0
    content = document.tobytes()
    for stop in (np.flatnonzero(document == TURN_END) + 1).tolist():
        start = content.index(SPEAKER_END, begin) + 1
        found.append(Turn(content[begin : start - 1].decode(), start, stop))
        begin = stop
    return found


class Dialogues(Source):
    """The dialogues of a file, folder or glob."""

    knobs = ("path",)

    def read(self, options: CorpusOptions) -> Corpus:
        if not options.path:
            raise CorpusError(
                f"data={self.name}: data.path is missing; give a file of dialogues, one JSON object a line"
            )
        setting = f"data.path={options.path}"
        splits: dict[str, list[tuple[bytes, bytes]]] = {split: [] for split in SPLITS}
        for file in _files(user_path("data.path", options.path), setting):
            for dialogue in _dialogues(file, setting):
                digest = hashlib.sha256(dialogue).digest()
                splits[_split(digest)].append((digest, dialogue))
        # by hash, an order in which neighbours have nothing in common
        train, validation, test = ([text for _, text in sorted(splits[split])] for split in SPLITS)
        return self.corpus(train=train, validation=validation, test=test)


def _split(digest: bytes) -> str:
    """Return the split of a dialogue with this hash."""
    share = int.from_bytes(digest[:8]) / 2**64
    return "test" if share < HELD_OUT_SHARE else "validation" if share < 2 * HELD_OUT_SHARE else "train"


@lru_cache(maxsize=2)
def load(name: str, path: str | None, answers: str) -> Corpus:
    """Load the dialogues at a path; `name` is the value of `data`.

    Raises CorpusError, also if no turn is of the speaker `answers`.
    """
    corpus = Dialogues(name).read(CorpusOptions(path=path))
    documents = (document for split in SPLITS for document in corpus.split(split))
    found = sorted({turn.speaker for document in documents for turn in turns_of(document)})
    if answers not in found:
        near = difflib.get_close_matches(answers, found, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CorpusError(f"data.answers={answers}: no such speaker; there are {', '.join(found)}{hint}")
    return corpus


def _files(path: Path, setting: str) -> list[Path]:
    """Return the sorted files that a path or a glob names. Raises CorpusError if there are none."""
    kind = file_type(path, setting)
    if kind is None:
        files = {file for file in expand(str(path), setting) if file_type(file, setting) != "a folder"}
    else:
        files = {*walk(path, setting)} if kind == "a folder" else {path}
    if not files:
        raise CorpusError(nothing_found(setting, kind))
    return sorted(files)


def _dialogues(file: Path, setting: str) -> Iterator[bytes]:
    """Yield the dialogues of a file as bytes. Raises CorpusError with the place of what is wrong."""
    for place, value in _values(file, setting):
        try:
            yield _encoded(value)
        except _Refused as error:
            raise CorpusError(f"{setting}: {file.name}, {place}{error}") from None


def _values(file: Path, setting: str) -> Iterator[tuple[str, Any]]:
    """Yield what should be dialogues, each with its place in the file."""
    try:
        content = read_file(file, setting).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{setting}: {file.name}: byte {error.start:,} is not UTF-8") from None
    if file.suffix.lower() != ".json":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield f"line {number:,}", _parsed(line, f"{setting}: {file.name}, line {number:,}")
        return
    whole = _parsed(content, f"{setting}: {file.name}", "; allowed is one JSON value, or name it .jsonl")
    if isinstance(whole, dict) and not {*TURNS} & {*whole}:
        yield from ((f"dialogue {printable(name, 40)}", value) for name, value in whole.items())
    else:
        values = whole if isinstance(whole, list) else [whole]
        yield from ((f"dialogue {number:,}", value) for number, value in enumerate(values, 1))


def _parsed(text: str, place: str, remedy: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place}: not JSON: {error.msg} (column {error.colno:,}){remedy}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise CorpusError(f"{place}: not a dialogue: {error}") from None


class _Refused(ValueError):
    """A value is not a dialogue; the message follows its place."""


def _encoded(value: Any) -> bytes:
    """Return a dialogue as bytes. Raises _Refused."""
    fields = _object(value, "")
    name = _field(fields, TURNS, "")
    turns = fields[name]
    if not isinstance(turns, list) or not turns:
        raise _Refused(f": {name}={_short(turns)}; allowed is a list of one or more turns")
    return b"".join(_turn(turn, number, is_log=name == "log") for number, turn in enumerate(turns))


def _turn(value: Any, number: int, *, is_log: bool) -> bytes:
    where = f", turn {number + 1:,}"
    fields = _object(value, where)
    if is_log and not {*SPEAKER} & {*fields}:
        speaker = ALTERNATING[number % 2]
    else:
        speaker = _text(fields, _field(fields, SPEAKER, where), where).strip().lower()
        if not speaker:
            raise _Refused(f"{where}: the speaker is empty; allowed is a name")
    text = _text(fields, _field(fields, TEXT, where), where)
    parts = (_bytes(part, where) for part in (speaker, text))
    return b"".join(part + bytes([mark]) for part, mark in zip(parts, MARKS, strict=True))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = "turn" if where else "dialogue"
        raise _Refused(f"{where}: found {_short(value)}; allowed is an object, which is a {what}")
    return value


def _field(fields: dict[str, Any], allowed: Iterable[str], where: str) -> str:
    """Return the first of the allowed fields that the object has."""
    for name in allowed:
        if name in fields:
            return name
    found = ", ".join(printable(name, 40) for name in fields) or "no field"
    similar = (difflib.get_close_matches(name, [*allowed], n=1) for name in fields)
    near = next((names[0] for names in similar if names), None)
    hint = f"; did you mean {near}?" if near else ""
    raise _Refused(f"{where}: found {found}; allowed is {' or '.join(allowed)}{hint}")


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(value := fields[name], str):
        raise _Refused(f"{where}: {name}={_short(value)}; allowed is text")
    return value


def _bytes(text: str, where: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise _Refused(f"{where}: character {error.start + 1:,} of a text is half of a pair") from None
    for mark in MARKS:
        if mark in encoded:
            raise _Refused(f"{where}: a text has the control character U+{mark:04X}, which marks turns")
    return encoded


def _short(value: Any) -> str:
    return printable(json.dumps(value), 40)
