"""The parts of `make gpu-report`, in their order, and what they run on each type of device."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import CONFIGS, corpora, records
from bench.inputs.printable import printable
from bench.process.limited import run_limited
from bench.run.devices import Device
from bench.tools.gpu_report import environment, page
from bench.tools.gpu_report.command import Ran, run_command
from bench.tools.gpu_report.deadline import Deadline
from bench.tools.gpu_report.page import Part
from bench.tools.impls import figures, table

ROOT = Path(__file__).resolve().parents[3]
"""The checkout."""
LEAST_SECONDS = 10.0
"""No part starts with less time than this."""
REPORT_SECONDS = 75.0
"""Reserved at the end for the report of the preset, and for the end of its last cell."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What runs on a type of device."""

    dtype: str
    marker: str
    """The tests of files that contain this text run."""
    selected: str
    """Which of them, as pytest's option -m."""
    sizes: Path | None
    """File with the sizes of the comparison of implementations; None for small ones."""
    preset: tuple[str, ...]
    """Overrides of the sweep."""


PLANS = {
    "cuda": Plan(
        dtype="bfloat16",
        marker="mark.cuda",
        selected="cuda and not peers",
        sizes=CONFIGS / "impls.yaml",
        preset=("experiment=gpu", "devices=1", "report_minutes=null"),
    ),
    "cpu": Plan(
        dtype="bfloat16",
        marker="is_launch_bound",
        selected="not cuda",
        sizes=None,
        preset=("experiment=smoke", "device=cpu", "variant=dense,chunked"),
    ),
}
"""By type of device. On the CPU the same parts run in small sizes, to try the command."""
SMALL = figures.Setting(device="cpu", dtype="bfloat16", d_model=64, heads=2, lengths=(128, 256), knobs={})
PARALLEL_FILE, WORKERS = "test_cuda.py", 4
"""Tests that spend most of their time in compilers run in several processes; other tests measure times."""
TESTS_SHARE, IMPLS_SHARE = 0.15, 0.32
"""Shares of the whole time, if a later part runs, too. The preset gets what is left."""


PARTS = {
    "environment": "Environment",
    "tests": "Tests on the device",
    "host": "Host",
    "impls": "Implementations",
    "preset": "Preset",
}
"""Name of a part → its title on the page, in order."""
PARTS_FILE = "parts.json"


class NoTimeLeft(Exception):
    """There is too little time for a part to start."""


class GpuReport:
    """The parts of the run, and the page about them."""

    def __init__(
        self,
        device: Device,
        plan: Plan,
        folder: Path,
        deadline: Deadline,
        names: list[str],
        chosen: Sequence[str],
    ) -> None:
        """`chosen` parts run; the others keep the results of an earlier run in `folder`."""
        self.device, self.plan, self.folder, self.deadline = device, plan, folder, deadline
        self.names, self.chosen = names, chosen
        self.facts, known = page.read_parts(folder / PARTS_FILE)
        self.parts = {name: known.get(name, Part(title)) for name, title in PARTS.items()}
        self.parts |= {name: Part(PARTS[name]) for name in chosen}

    def run(self) -> bool:
        """Run the chosen parts; returns whether none of them failed."""
        steps = (self._environment, self._tests, self._host, self._implementations, self._preset)
        try:
            for name, step in zip(PARTS, steps, strict=True):
                if name in self.chosen:
                    with self._timed(self.parts[name]):
                        step(self.parts[name])
        finally:
            self.write()
        return not any(self.parts[name].is_failure for name in self.chosen)

    def write(self) -> None:
        """Write the first page."""
        page.write_parts(self.folder / PARTS_FILE, self.facts, self.parts)
        text = page.first_page(self.folder, self.facts, list(self.parts.values()))
        records.write_atomically(self.folder / "gpu-report.md", text)

    @contextmanager
    def _timed(self, part: Part) -> Iterator[None]:
        print(f"== {part.title}: {self.deadline.left() / 60:.1f} minutes left", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            yield
        except NoTimeLeft:
            part.lines.append("did not run: no time was left")
        except Exception as error:  # the other parts must run
            part.is_failure = True
            part.lines.append(f"failed: {type(error).__name__}: {printable(error)}")
            print(part.lines[-1], file=sys.stderr, flush=True)
        finally:
            part.seconds = time.monotonic() - begun
            self.write()

    def _environment(self, part: Part) -> None:
        outcome = run_limited(environment.facts, self.device, seconds=120)
        for facts in outcome.reported:
            self.facts |= facts
        if outcome.failure:
            part.is_failure = True
            part.lines.append(f"failed: {outcome.failure}")
        needed = environment.packages(environment.requirements(ROOT / "pyproject.toml"))
        kernels = environment.packages(environment.OPTIONAL)
        self.facts |= {name: version for name, version in kernels.items() if version}
        if missing := [name for name, version in needed.items() if version is None]:
            part.is_failure = True
            part.lines.append(f"missing packages, without which some parts fail: {', '.join(missing)}")
        absent = [name for name, version in kernels.items() if version is None]
        part.lines.append(f"kernels that are not installed: {', '.join(absent) or 'none'}")
        part.is_complete = True
        print("\n".join([*(f"{key}: {value}" for key, value in self.facts.items()), *part.lines]), flush=True)

    def _tests(self, part: Part) -> None:
        files = page.files_with_marker(ROOT / "tests", self.plan.marker)
        if not files:
            part.lines.append("there are no tests beside this package; run from a checkout")
            return
        ends = self.deadline.left() - self._share("tests", TESTS_SHARE)
        shared = [file for file in files if Path(file).name == PARALLEL_FILE]
        results = page.PytestResults()
        self._pytest(results, "tests", [file for file in files if file not in shared], ends)
        if shared:
            workers = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
            self._pytest(results, "tests-parallel", [*workers, *shared], ends)
            if again := [name for name in results.failed if name.startswith(f"tests/{PARALLEL_FILE}::")]:
                self._pytest(results, "tests-again", again, ends)  # alone, without the load of the others
        text = "\n\n".join(["# Tests on the device", *results.lines()])
        records.write_atomically(self.folder / "tests.md", f"{text}\n")
        part.lines = results.lines(20)
        part.is_complete = not results.problems
        part.is_failure = bool(results.failed) or results.is_broken

    def _pytest(self, results: page.PytestResults, log: str, arguments: list[str], ends: float) -> None:
        """Add the results of a run of pytest, which lasts until `ends` seconds of the deadline are left."""
        options = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
        options += ["--continue-on-collection-errors", "-m", self.plan.selected]
        try:
            results.add(self._command(log, ["pytest", *options, *arguments], self.deadline.left() - ends))
        except NoTimeLeft:
            results.problems.append(f"{log} did not run: no time was left")

    def _share(self, name: str, share: float) -> float:
        """Return the seconds that a part may take: its share, or all if no later part runs."""
        later = list(PARTS)[list(PARTS).index(name) + 1 :]
        return self.deadline.part(share if {*later} & {*self.chosen} else 1.0)

    def _host(self, part: Part) -> None:
        outcome = run_limited(environment.launch_time, self.folder, self.device, seconds=120)
        seconds = outcome.reported[0] if outcome.reported else None
        if seconds is not None:
            part.lines.append(f"{seconds * 1e6:.1f} µs for a launch")
        elif outcome.failure:
            part.is_failure = True
            part.lines.append(f"failed: {outcome.failure}")
        else:
            part.lines.append("a CPU has no launches")
        part.is_complete = not outcome.failure

    def _implementations(self, part: Part) -> None:
        sizes = self.plan.sizes
        setting = table.read_setting(self.device.kind, self.plan.dtype, sizes) if sizes else SMALL
        machine = self.facts.get("device") or self.facts.get("CPU") or self.device.kind
        ends = self.deadline.left() - self._share("impls", IMPLS_SHARE)
        results = table.collect(
            setting,
            figures.cases(setting, self.names),
            self.device,
            left=lambda: self.deadline.left() - ends,
            keep=lambda results: table.write(self.folder, setting, results, machine),
        )
        judged = table.verdicts(results)
        promoted = [label for label, verdict in judged.items() if verdict == "promote"]
        part.lines.append(f"may be promoted: {', '.join(promoted) or 'none'}")
        part.lines += [
            f"- {result.case.label}: {judged[result.case.label]}"
            for result in results
            if not result.case.is_auto
        ]
        part.lines += [
            f"- {result.case.label} (auto): {result.failure}"
            for result in results
            if result.case.is_auto and result.failure
        ]
        part.is_complete = not any(result.failure == table.NOT_TRIED for result in results)
        part.is_failure = any(r.case.is_auto and r.failure not in (None, table.NOT_TRIED) for r in results)

    def _preset(self, part: Part) -> None:
        corpus = corpora.best()
        overrides = [*self.plan.preset, f"data={corpus}"]
        overrides += [f"results_dir={self.folder.parent}", f"name={self.folder.name}"]
        ran = self._command("preset", ["bench", *overrides], self.deadline.left(REPORT_SECONDS))
        if not ran.in_time:
            page.remove_stopped(self.folder)
        part.lines = page.sweep(self.folder, ran)
        part.lines.append(f"data: {corpus}")
        part.is_complete = ran.in_time
        part.is_failure = ran.in_time and ran.status != 0
        if part.is_failure:
            part.lines.append(f"the sweep ended with status {ran.status}: {ran.last_line}")
        built = self._command("report", ["bench.report", str(self.folder)], max(60.0, self.deadline.left()))
        if built.status != 0:
            part.is_failure = True
            part.lines.append(f"no report of the preset: {built.last_line}")

    def _command(self, name: str, arguments: list[str], seconds: float) -> Ran:
        """Run a module of Python. Raises NoTimeLeft."""
        if seconds < LEAST_SECONDS:
            raise NoTimeLeft
        paths = [str(ROOT), str(ROOT / "bench" / "plugins"), os.environ.get("PYTHONPATH", "")]
        return run_command(
            [sys.executable, "-m", *arguments],
            log=self.folder / "logs" / f"{name}.txt",
            seconds=seconds,
            cwd=ROOT,
            environment={"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NO_COLOR": "1"},
        )
