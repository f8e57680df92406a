"""Handling of failed writes to standard output and standard error, for all commands (`python -m …`).

If the reader of a pipe ends early (`| head`), the command ends without a message, with status 141: 128 +
SIGPIPE, as a shell reports for other programs. Any other failure of standard output, such as a full device,
gives one line on standard error and status 1. Failed writes to standard error are ignored: they neither end
the command nor change its status. While cells are measured, failed writes to standard output are ignored too
(`drop_failed_output`), because a measurement is worth more than its messages. A standard stream that is
closed at the start is opened on the null device. Otherwise the next opened file would get its number, and
would receive the output.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn, TextIO, cast

CLOSED_PIPE = 128 + signal.SIGPIPE


class OutputError(BaseException):
    """A write to standard output failed. A BaseException like KeyboardInterrupt, so that neither code that
    handles errors of files nor a handler of a log catches it."""


class _RaisingFile(io.FileIO):
    """A file whose failed writes raise OutputError."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError from error


class _DroppingFile(io.FileIO):
    """A file whose failed writes are ignored; their data is lost."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            if (written := super().write(data)) is not None:  # None: the write would block
                return written
        return memoryview(data).nbytes


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main`, and exit with the status that it returns, or with the status for a failed output."""
    _open_closed()
    sys.stdout = _through(sys.stdout, _RaisingFile, 1)
    sys.stderr = _through(sys.stderr, _DroppingFile, 2)
    try:
        try:
            status: Any = main()
        except SystemExit as end:  # argparse, after it has printed its help
            status = end.code
        sys.stdout.flush()
    except OutputError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the rest of the buffer
        if isinstance(cause, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        print(f"error: the output cannot be written: {cause.strerror}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status)


def drop_failed_output() -> None:
    """Ignore failed writes to standard output and error of this process from now on, also at its end.

    Streams with which a caller has replaced them are not changed.
    """
    _open_closed()
    sys.stdout = _through(sys.stdout, _DroppingFile, 1)
    sys.stderr = _through(sys.stderr, _DroppingFile, 2)


def _open_closed() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)


def _through(stream: TextIO | None, raw: type[io.FileIO], number: int) -> TextIO:
    """The standard stream with this number, written by `raw`. A stream of a caller is returned unchanged."""
    if stream is not None and not _writes_to(stream, number):
        return stream
    encoding, line_buffering, unbuffered = "utf-8", True, False
    if isinstance(stream, io.TextIOWrapper):
        encoding, line_buffering, unbuffered = stream.encoding, stream.line_buffering, stream.write_through
        with suppress(OSError, OutputError, ValueError):
            stream.flush()
    file = raw(number, "w", closefd=False)
    return io.TextIOWrapper(
        cast(BinaryIO, file) if unbuffered else io.BufferedWriter(file),  # as Python does with -u
        encoding=encoding,
        errors="backslashreplace",  # so that every text can be written
        line_buffering=line_buffering,
        write_through=unbuffered,
    )


def _writes_to(stream: TextIO, number: int) -> bool:
    with suppress(OSError, ValueError):
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    return False
