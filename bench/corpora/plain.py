"""Detection of files that are not plain text and therefore must not be used as training text.

The models read bytes, so text in any encoding without NUL bytes can be used: UTF-8, Latin-1, Shift JIS.
Compressed and binary formats are rejected, even if they contain text. So is a file in which too many bytes
are not UTF-8: it may be text in another encoding or data of any kind, and only the user knows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 2**20
"""Size of the beginning of a file that is examined. Only NUL bytes are searched in the whole file."""
MOST_CONTROL = 0.01
"""Maximum share of control characters in text; in random bytes the share is 0.1."""
MOST_UNDECODABLE = 0.3
"""Default maximum share of bytes that are not UTF-8. German or French text in Latin-1 has 0.03, Russian text
in KOI8-R 0.84, Japanese in Shift JIS 0.56, Chinese in Big5 0.48, and random bytes have 0.43."""


class Other(NamedTuple):
    """A file that is not text."""

    kind: str
    """A word or two, by which such files are counted."""
    description: str
    """Its apparent format and the remedy."""


_UTF = "text in {0}; convert it to UTF-8 (iconv -f {0} -t UTF-8)"
_UNPACK = "{}; unpack it"
_EXTRACT = "{}; write its texts into text files"
_ROWS = "{}; data=rows reads the text of its rows, and data=ids reads token ids"
_IDS = "{}; data=ids reads token ids"
_OTHER = "{}"
_FORMATS: tuple[tuple[bytes, str, str, str], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", _UTF, "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", _UTF, "UTF-16"),
    (rb"PAR1[\0-\x1f]", "Parquet", _ROWS, "a Parquet file"),
    (rb"ARROW1\0|FEA1[\0-\x1f]|\xff\xff\xff\xff.{3}\0", "Arrow", _ROWS, "an Arrow file"),
    (rb"Obj\x01", "Avro", _EXTRACT, "an Avro file"),
    (rb"SQLite format 3\0", "database", _EXTRACT, "an SQLite database"),
    (rb"\x89HDF\r\n", "HDF5", _EXTRACT, "an HDF5 file"),
    (rb"%PDF-", "PDF", _EXTRACT, "a PDF document"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office", _EXTRACT, "an Office document"),
    (
        rb"PK\x03\x04|PK\x05\x06",
        "archive",
        _UNPACK,
        "a zip archive, or a format based on zip (docx, epub, npz, pt, whl)",
    ),
    (rb"\x1f\x8b", "archive", _UNPACK, "a gzip file"),
    (rb"BZh[1-9]1AY&SY", "archive", _UNPACK, "a bzip2 file"),
    (rb"\xfd7zXZ\0", "archive", _UNPACK, "an xz file"),
    (rb"\x28\xb5\x2f\xfd", "archive", _UNPACK, "a Zstandard file"),
    (rb"7z\xbc\xaf\x27\x1c", "archive", _UNPACK, "a 7z archive"),
    (rb"Rar!\x1a\x07", "archive", _UNPACK, "a RAR archive"),
    (rb".{257}ustar[\0 ]", "archive", _UNPACK, "a tar archive"),
    (rb"\x93NUMPY", "NumPy", _IDS, "a NumPy array"),
    (rb"..\r\n.{12}[\xe3\x63]", "program", _OTHER, "compiled Python"),
    (rb"\x80[\x02-\x05](?:\x95|[\}\]cX(K])", "pickle", _OTHER, "a Python pickle"),
    (rb"\x7fELF", "program", _OTHER, "a program or library"),
    (
        rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a.{4}[\x80-\xff]|BM.{4}\0{4}|RIFF.{4}WEBP",
        "image",
        _OTHER,
        "an image",
    ),
    (rb"ID3[\x02-\x04]\0|OggS\0|fLaC\0|RIFF.{4}WAVE|.{4}ftyp", "sound or video", _OTHER, "sound or video"),
)
"""(Pattern of the first bytes, kind, remedy, name of the format). No text begins with these bytes."""
_PATTERNS = [
    (re.compile(begin, re.DOTALL), Other(kind, remedy.format(name))) for begin, kind, remedy, name in _FORMATS
]
_CONTROL = bytes({*range(32), 127} - {*b"\a\b\t\n\v\f\r\x1b"})


def not_text(head: bytes, most_undecodable: float = MOST_UNDECODABLE) -> Other | None:
    """Return what the beginning of a file seems to be; None if it is text or empty."""
    for pattern, other in _PATTERNS:
        if pattern.match(head):
            return other
    if b"\0" in head:
        return nul_at(head.index(b"\0"))
    control = len(head) - len(head.translate(None, _CONTROL))
    if control > MOST_CONTROL * len(head):
        share = f"{control / len(head):.0%} of its bytes are control characters"
        return Other("binary", f"binary data ({share}); if it holds token ids, use data=ids")
    if (share_not_utf8 := undecodable(head)) > most_undecodable:
        return Other(
            "not UTF-8",
            f"data of which {share_not_utf8:.0%} is not UTF-8, over data.max_undecodable={most_undecodable:g}"
            "; if it is text in another encoding, data.max_undecodable=1 reads its bytes as they are",
        )
    return None


def undecodable(text: bytes) -> float:
    """Return the share of bytes that are in no character of UTF-8; 0 for no bytes."""
    return (len(text) - len(text.decode(errors="ignore").encode())) / max(1, len(text))


def nul_at(offset: int) -> Other:
    """Return what a file is that has a NUL byte at `offset`."""
    where = f"byte {offset:,} is NUL"
    return Other("binary", f"binary data ({where}); if it holds token ids, use data=ids")
