"""Text from elsewhere that is about to be shown: in a terminal, in a line of a log, in a message."""

from __future__ import annotations


def printable(text: object, most: int | None = None) -> str:
    """The text on one line, at most so many characters of it, in which nothing commands a terminal.

    White space becomes single blanks. Control characters, marks that turn the direction of writing and
    whatever else leaves no ink are written out: an escape as `\\x1b`.
    """
    words = str(text)
    if most is not None:
        words = words[: 8 * most]  # enough, and little work where the text is huge
    line = " ".join(words.split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if most is not None and len(line) > most:
        return line[:most].rstrip() + " …"
    return line
