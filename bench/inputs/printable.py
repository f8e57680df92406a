"""Untrusted text, made safe to show in a terminal, a log or a message."""

from __future__ import annotations


def printable(text: object, most: int | None = None) -> str:
    """Return the text on one line, truncated to `most` characters, without control sequences.

    White space becomes single spaces. Control characters, bidirectional marks and other non-printable
    characters are escaped: an escape character as `\\x1b`.
    """
    words = str(text)
    if most is not None:
        words = words[: 8 * most]  # sufficient, and cheap for huge texts
    line = " ".join(words.split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if most is not None and len(line) > most:
        return line[:most].rstrip() + " …"
    return line
