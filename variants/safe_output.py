"""What every command of this project (`python -m …`) does where its output cannot be written.

The reader of a pipe may leave early (`| head`): the command ends quietly with status 141, which is 128 +
SIGPIPE, as a shell reports for other programs. Any other failure of standard output, such as a full device,
is one line on standard error and status 1. What standard error does not take is dropped: a message that
nobody can read stops no work and changes no status. While cells are measured the same holds for standard
output (`drop_failed_output`), because no screen is worth a measurement. A stream that is closed from the
start is opened on nothing, or the next file to be opened would have its number, and with it whatever is
written there.
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
    """Standard output takes no more. It ends the command as KeyboardInterrupt does: neither code that expects
    errors of files nor a handler of a log takes it for its own."""


class _Refusing(io.FileIO):
    """A file whose failed writes raise OutputError."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError from error


class _Dropping(io.FileIO):
    """A file that takes whatever is written to it; what cannot be kept is lost."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            if (written := super().write(data)) is not None:  # None: it would have to wait
                return written
        return memoryview(data).nbytes


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with the status that it returns, or with that of an output which failed."""
    _open_closed()
    sys.stdout = _through(sys.stdout, _Refusing, 1)
    sys.stderr = _through(sys.stderr, _Dropping, 2)
    try:
        try:
            status: Any = main()
        except SystemExit as end:  # argparse, after it has printed its help
            status = end.code
        sys.stdout.flush()
    except OutputError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is left in the buffer
        if isinstance(cause, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        print(f"error: the output cannot be written: {cause.strerror}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status)


def drop_failed_output() -> None:
    """From here on, writing to this process's standard output and error raises nothing, nor does its end.

    Streams that a caller has put in their place are left alone.
    """
    _open_closed()
    sys.stdout = _through(sys.stdout, _Dropping, 1)
    sys.stderr = _through(sys.stderr, _Dropping, 2)


def _open_closed() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(number, True)


def _through(stream: TextIO | None, raw: type[io.FileIO], number: int) -> TextIO:
    """The standard stream of this number, written by way of `raw`; another that a caller put there stays."""
    if stream is not None and not _writes_to(stream, number):
        return stream
    encoding, line_buffering, unbuffered = "utf-8", True, False
    if isinstance(stream, io.TextIOWrapper):
        encoding, line_buffering, unbuffered = stream.encoding, stream.line_buffering, stream.write_through
        with suppress(OSError, OutputError, ValueError):
            stream.flush()
    file = raw(number, "w", closefd=False)
    return io.TextIOWrapper(
        cast(BinaryIO, file) if unbuffered else io.BufferedWriter(file),  # as Python does under -u
        encoding=encoding,
        errors="backslashreplace",  # no text fails to be shown
        line_buffering=line_buffering,
        write_through=unbuffered,
    )


def _writes_to(stream: TextIO, number: int) -> bool:
    with suppress(OSError, ValueError):
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    return False
