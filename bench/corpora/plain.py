"""Detection of files that are not plain text and therefore must not be used as training text.

The models read bytes, so text in any encoding without NUL bytes is accepted: UTF-8, Latin-1, Shift JIS.
Compressed and binary formats are rejected, even if they contain text.
"""

from __future__ import annotations

import re

HEAD_BYTES = 2**20
"""Size of the beginning of a file that is examined. Only NUL bytes are searched in the whole file."""
MOST_CONTROL = 0.01
"""Maximum share of control characters in text; in random bytes the share is 0.1."""

_UTF = "text in {0}; convert it to UTF-8 (iconv -f {0} -t UTF-8)"
_UNPACK = "{}; unpack it"
_EXTRACT = "{}; write its texts into text files"
_OTHER = "{}"
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", _UTF, "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", _UTF, "UTF-16"),
    (rb"PAR1[\0-\x1f]", _EXTRACT, "a Parquet file"),
    (rb"ARROW1\0|FEA1[\0-\x1f]|\xff\xff\xff\xff.{3}\0", _EXTRACT, "an Arrow file"),
    (rb"Obj\x01", _EXTRACT, "an Avro file"),
    (rb"SQLite format 3\0", _EXTRACT, "an SQLite database"),
    (rb"\x89HDF\r\n", _EXTRACT, "an HDF5 file"),
    (rb"%PDF-", _EXTRACT, "a PDF document"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _EXTRACT, "an Office document"),
    (
        rb"PK\x03\x04|PK\x05\x06",
        _UNPACK,
        "a zip archive, or a format based on zip (docx, epub, npz, pt, whl)",
    ),
    (rb"\x1f\x8b", _UNPACK, "a gzip file"),
    (rb"BZh[1-9]1AY&SY", _UNPACK, "a bzip2 file"),
    (rb"\xfd7zXZ\0", _UNPACK, "an xz file"),
    (rb"\x28\xb5\x2f\xfd", _UNPACK, "a Zstandard file"),
    (rb"7z\xbc\xaf\x27\x1c", _UNPACK, "a 7z archive"),
    (rb"Rar!\x1a\x07", _UNPACK, "a RAR archive"),
    (rb".{257}ustar[\0 ]", _UNPACK, "a tar archive"),
    (rb"\x93NUMPY", _OTHER, "a NumPy array"),
    (rb"..\r\n.{12}[\xe3\x63]", _OTHER, "compiled Python"),
    (rb"\x80[\x02-\x05](?:\x95|[\}\]cX(K])", _OTHER, "a Python pickle"),
    (rb"\x7fELF", _OTHER, "a program or library"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a.{4}[\x80-\xff]|BM.{4}\0{4}|RIFF.{4}WEBP", _OTHER, "an image"),
    (rb"ID3[\x02-\x04]\0|OggS\0|fLaC\0|RIFF.{4}WAVE|.{4}ftyp", _OTHER, "sound or video"),
)
"""(Pattern of the first bytes, remedy, name of the format). No text begins with these bytes."""
_PATTERNS = [(re.compile(begin, re.DOTALL), remedy.format(name)) for begin, remedy, name in _FORMATS]
_CONTROL = bytes({*range(32), 127} - {*b"\a\b\t\n\v\f\r\x1b"})


def not_text(head: bytes) -> str | None:
    """Return the apparent format of a file's beginning and the remedy; None if it is text or empty."""
    for pattern, description in _PATTERNS:
        if pattern.match(head):
            return description
    if b"\0" in head:
        return nul_at(head.index(b"\0"))
    control = len(head) - len(head.translate(None, _CONTROL))
    if control > MOST_CONTROL * len(head):
        return f"binary data ({control / len(head):.0%} of its bytes are control characters)"
    return None


def nul_at(offset: int) -> str:
    """Return the description of a file that has a NUL byte at `offset`."""
    return f"binary data (byte {offset:,} is NUL)"
