"""Progress display of a sweep: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bench.config.chosen import declared
from bench.config.spec import ModelSizes
from bench.inputs.printable import printable
from bench.records import Record
from bench.records.record import MODEL_OPTIONS, NOT_COMPILED, SLOTS

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

MOST = 2000
"""Maximum characters of a cell's line, because a reason may contain long program output."""


def describe(record: Record) -> str:
    """Describe a finished cell in one line: its identity, its cost and its quality."""
    own = _knobs("variant", record.variant, record.variant_params)
    own += "".join(_slot(record, slot) for slot in SLOTS)
    options = "".join(
        f"{key}={getattr(record, key)} "
        for key in MODEL_OPTIONS
        if getattr(record, key) not in (None, getattr(ModelSizes, key))
    )
    cell = (
        f"{record.variant} {own}T={record.seq_len} depth={record.depth} d={record.d_model} "
        f"{options}{record.activations} "
        + (f"compile={record.compile} " if record.compile not in (None, NOT_COMPILED) else "")
        + f"#{record.replicate}"
        + (f" twin {record.twin}" if record.twin else "")
    )
    if record.status != "ok":
        return f"{record.status:11} {printable(f'{cell}: {record.reason}', MOST)}"
    figures = [
        f"step {record.step_seconds_median * 1e3:,.1f} ms" if record.step_seconds_median else None,
        f"peak {record.peak_bytes / 2**20:,.1f} MiB" if record.peak_bytes else None,
        f"{record.flops_executed_step / 1e9:,.2f} GFLOP" if record.flops_executed_step else None,
        _decoding(record),
        f"longest that fits T={record.longest_seq_len}" if record.longest_seq_len is not None else None,
        f"largest batch {record.largest_batch_size}" if record.largest_batch_size is not None else None,
        _loss(record),
        f"{record.objective} accuracy {record.accuracy:.1%}" if record.accuracy is not None else None,
        f"contaminated: {record.contaminated}" if record.contaminated else None,
    ]
    return f"{record.status:11} {printable(f'{cell}: ' + ', '.join(filter(None, figures)), MOST)}"


def _slot(record: Record, slot: str) -> str:
    """What fills a slot, and its knobs, where they are not the defaults: "stack=funnel stack.stride=4 "."""
    name: str = getattr(record, slot)
    own = f"{slot}={name} " if name != getattr(Record, slot) else ""
    return own + _knobs(slot, name, getattr(record, f"{slot}_params") or {}, f"{slot}.")


def _knobs(group: str, name: str, params: Mapping[str, Any], prefix: str = "") -> str:
    """The knobs of an entry that differ from their defaults: "window=64 "; none of an unknown entry."""
    found = declared(group, name)
    usual = found.config().as_dict() if found else params
    other = {key: value for key, value in params.items() if usual.get(key) != value}
    return "".join(f"{prefix}{key}={_plain(value)} " for key, value in other.items())


def _plain(value: object) -> str:
    """A list as [1,2], as on the command line."""
    return str(list(value)).replace(" ", "") if isinstance(value, list | tuple) else str(value)


def _decoding(record: Record) -> str | None:
    """The time of a token, if it was measured, and the state."""
    if record.decode_state_bytes is None:
        return None
    state = f"state {record.decode_state_bytes / 2**20:,.1f} MiB"
    seconds = record.decode_seconds_median
    return f"a token {seconds * 1e3:,.2f} ms, {state}" if seconds else state


def _loss(record: Record) -> str | None:
    """Bits per byte of text, else the perplexity; None if nothing was evaluated."""
    if record.bits_per_byte is not None:
        return f"{record.objective} {record.bits_per_byte:.3f} bits per byte"
    return f"{record.objective} perplexity {record.perplexity:.2f}" if record.perplexity else None


def duration(seconds: float) -> str:
    """Format seconds as 1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_without_device(record: Record) -> bool:
    """Return whether a cell did not run because the machine has no device of its kind."""
    return record.status == "unsupported" and (record.reason or "").startswith(f"device={record.device}:")


@dataclass
class Wait:
    """A wait for another run. All times are in seconds."""

    begun: float
    next: float = 60.0
    """When it is shown again, from its beginning."""


class Progress:
    """Context manager that shows the progress of a sweep, some of whose cells may already be finished.
    Threads that run cells on several devices share it."""

    def __init__(self, efforts: Mapping[str, float]) -> None:
        """`efforts` has every cell by its id; see `effort.efforts`."""
        self.efforts, self.total, self.done = efforts, len(efforts), 0
        self.left, self.measured = sum(efforts.values()), 0.0
        self.begun = time.monotonic()
        self.bar: RichProgress | None = None
        self.wait: Wait | None = None
        self._counting = threading.Lock()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            count, what = (
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.description}"),
            )
            # no refresh thread, which would disturb the cell that is being timed
            self.bar = RichProgress(
                count, BarColumn(), what, console=Console(stderr=True), auto_refresh=False
            )
            self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def eta(self) -> str:
        """Return the estimated time left at the average pace so far, by the efforts of the cells."""
        if not self.measured:
            return "ETA unknown"
        pace = (time.monotonic() - self.begun) / self.measured
        return f"ETA {duration(pace * self.left)}"

    def starting(self, label: str) -> None:
        """Show that a cell starts."""
        if self.bar:
            self.wait = None
            self.bar.update(self.bar.task_ids[0], description=f"{self.eta()}  {label}", refresh=True)

    def skipped(self, ended: Collection[str], disturbed: int) -> None:
        """Show the number of cells that an earlier run finished, and how many of them are measured again."""
        for cell_id in ended:
            self._count(cell_id)
        if count := len(ended):
            then = f"; of these, {disturbed} were disturbed and are measured again" if disturbed else ""
            self._say(f"{count} of {self.total} cells were finished before{then or ' and are not run again'}")

    def waiting(self, what: str) -> None:
        """Show that the sweep waits for another run, and after 1, 2, 4, … minutes for how long it has. On a
        terminal until the next cell starts; plain output shows the first wait only."""
        now = time.monotonic()
        if self.wait is None:
            self.wait = Wait(now)
            text = f"waiting: {what}"
        elif now >= self.wait.begun + self.wait.next:
            self.wait.next *= 2
            text = f"waiting for {duration(now - self.wait.begun)}: {what}"
        else:
            return
        if self.bar:
            self.bar.update(self.bar.task_ids[0], description=text, refresh=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Show a line that is not about a cell."""
        with self._counting:
            self._say(line)

    def elsewhere(self, record: Record) -> None:
        """Show a cell that another sweep has measured."""
        with self._counting:
            self._count(record.cell_id)
            self._say(f"[{self.done}/{self.total}] by another sweep: {describe(record)}")

    def finished(self, record: Record) -> None:
        """Show a finished cell."""
        with self._counting:
            self.measured += self._count(record.cell_id)
            if self.total > 1:  # a single cell is printed as the command's result
                eta = "" if self.bar else f"  ({self.eta()})"
                self._say(f"[{self.done}/{self.total}] {describe(record)}{eta}")

    def _count(self, cell_id: str) -> float:
        """Count a cell as done; returns its effort."""
        self.done += 1
        self.left -= self.efforts[cell_id]
        return self.efforts[cell_id]

    def _say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self.bar.update(self.bar.task_ids[0], completed=self.done, refresh=True)
        else:
            print(line, file=sys.stderr, flush=True)
