"""The first page of `make gpu-report`: what ran, what failed, and what to commit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import records
from bench.report.text import markdown, units
from bench.run import isolate
from bench.run.progress import duration
from bench.tools.gpu_report.command import Ran

LARGE_BYTES = 2**20
"""Files above this size are named on the page."""
COMMITTED = ("gpu-report.md", "impls.md", "impls.json", "tests.md", "records", "report")
"""What is worth a commit, in the folder of the report."""
_WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_RESULT = re.compile(rf"^(tests/\S+?::.+?) ({_WORDS})\b", re.MULTILINE)
_PARALLEL_RESULT = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_WORDS}) (tests/\S+?::.+?) *$", re.MULTILINE)
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?(?:::.+?)?)(?: - (.*))?$", re.MULTILINE)


@dataclass
class Part:
    """A part of the run and its result."""

    title: str
    seconds: float = 0.0
    is_complete: bool = False
    is_failure: bool = False
    """Whether something that ran has failed; a part for which no time was left has not."""
    lines: list[str] = field(default_factory=list)
    """The result, in Markdown."""


def write_parts(path: Path, facts: Mapping[str, str], parts: Mapping[str, Part]) -> None:
    """Store the results of the parts by name, for a later run that continues this one."""
    content = {"facts": dict(facts), "parts": {name: asdict(part) for name, part in parts.items()}}
    records.write_atomically(path, json.dumps(content, indent=1))


def read_parts(path: Path) -> tuple[dict[str, str], dict[str, Part]]:
    """Return the facts and parts that `write_parts` stored; empty without the file."""
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["facts"], {name: Part(**part) for name, part in content["parts"].items()}


@dataclass
class PytestResults:
    """Results of runs of pytest with `-v`, read line by line: a run that is stopped has no other summary."""

    results: dict[str, str] = field(default_factory=dict)
    """Name of a test → its last result."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name of a test that failed → why, in one line."""
    problems: list[str] = field(default_factory=list)
    """Runs that did not end as they should."""
    is_broken: bool = False
    """Whether a run could not do its work, for a reason other than time."""

    def add(self, ran: Ran) -> None:
        """Read the output of another run; a test that ran again has its new result."""
        new = dict(_RESULT.findall(ran.output))
        new |= {name: result for result, name in _PARALLEL_RESULT.findall(ran.output)}
        self.results |= new
        self.reasons |= dict(_SUMMARY.findall(ran.output))
        for name in self.reasons.keys() - new.keys():  # it could not be imported
            self.results.setdefault(name, "ERROR")
        if not ran.in_time:
            self.problems.append(f"stopped after {duration(ran.seconds)}; the remaining tests did not run")
        elif ran.status not in (0, 1):
            self.is_broken = True
            self.problems.append(f"pytest ended with status {ran.status}: {ran.last_line}")

    @property
    def failed(self) -> list[str]:
        """Names of the tests that failed in their last run."""
        return sorted(name for name, result in self.results.items() if result in ("FAILED", "ERROR"))

    def lines(self, most: int | None = None) -> list[str]:
        """Return the counts, the problems and at most so many failures."""
        counts = Counter(self.results.values())
        line = ", ".join(f"{count} {result.lower()}" for result, count in sorted(counts.items()))
        each = [f"- `{name}`: {self.reasons.get(name) or 'see logs/'}" for name in self.failed]
        rest = [f"- … {len(each) - most} more in tests.md"] if most is not None and len(each) > most else []
        return [line or "no test ran", *self.problems, *each[:most], *rest]


def files_with_marker(folder: Path, marker: str) -> list[str]:
    """Return the test files that contain a text. Others are not collected, which would take half a minute."""
    return [str(path) for path in sorted(folder.rglob("test_*.py")) if marker in path.read_text("utf-8")]


def remove_stopped(folder: Path) -> None:
    """Remove the records of cells that the time limit stopped: they say nothing about the variant."""
    known, _ = records.read_all(folder)
    for record in known:
        if record.reason == isolate.STOPPED:
            records.path_of(folder, record.cell_id).unlink(missing_ok=True)


def sweep(folder: Path, ran: Ran) -> list[str]:
    """Return lines about the records that a sweep has left in a folder."""
    known, problems = records.read_all(folder)
    counts = Counter(record.status for record in known)
    stopped = "" if ran.in_time else f"; stopped after {duration(ran.seconds)}"
    lines = [f"{', '.join(f'{n} {status}' for status, n in sorted(counts.items())) or 'no record'}{stopped}"]
    trained = [record for record in known if record.perplexity]
    if trained:
        lines.append(f"{len(trained)} with a perplexity")
    wrong = [record for record in known if record.status not in records.FINAL]
    lines += [f"- {record.variant} T={record.seq_len}: {record.status}, {record.reason}" for record in wrong]
    return [*lines, *(f"- {problem}" for problem in problems)]


def committed(folder: Path) -> list[str]:
    """Return lines about the files that are worth a commit, with their sizes."""
    lines, total = [], 0
    for name in COMMITTED:
        path = folder / name
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        size = sum(each.stat().st_size for each in files)
        total += size
        if files:
            lines.append(
                f"- `{name}`: {len(files)} {'file' if len(files) == 1 else 'files'}, {units.size(size)}"
            )
        lines += [
            f"  - large: `{each.relative_to(folder)}`, {units.size(each.stat().st_size)}"
            for each in files
            if each.stat().st_size > LARGE_BYTES
        ]
    return [*lines, f"- together {units.size(total)}"]


def first_page(folder: Path, facts: Mapping[str, str], parts: Sequence[Part]) -> str:
    """Return the page for what has run so far."""
    rows = "".join(f"| {key} | {markdown.escape(value)} |\n" for key, value in facts.items())
    sections = []
    for part in parts:
        state = "" if part.is_complete else " (not complete)"
        body = "\n".join(part.lines) or "did not run"
        sections.append(f"## {part.title}{state}\n\n{body}\n\nTook {duration(part.seconds)}.\n")
    return f"""# Report of this machine's device

`make gpu-report` wrote this page. `impls.md` compares the implementations, `report/summary.md` the variants.

| | |
|---|---|
{rows}
{chr(10).join(sections)}
## To commit

`git add -f` of these, or their copies in place of `results/h100`:

{chr(10).join(committed(folder))}
"""
