"""Time that torch.compile takes for a training step, its graph breaks and its repeated compilations."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.measure.step import Subject
from bench.measure.timing import synchronize
from bench.model.compile import compiled

MAX_STEPS = 8
"""Maximum number of steps in which something may be compiled, before the time is measured."""


class Compilations:
    """What torch compiles from the construction of this object on, by torch's own counters."""

    def __init__(self) -> None:
        self._before = _frames()
        self._breaks_before = _breaks()

    @property
    def total(self) -> int:
        """Number of compilations of functions, repeated ones included."""
        return sum(self._added().values())

    @property
    def repeated(self) -> int:
        """Number of compilations of functions that had been compiled before, for other inputs or layers."""
        return sum(added - int(not self._before[frame]) for frame, added in self._added().items())

    @property
    def graph_breaks(self) -> int:
        """Number of places where the compiler leaves a function to Python, and continues behind them."""
        return _breaks() - self._breaks_before

    def _added(self) -> Counter[Any]:
        return _frames() - self._before


def _frames() -> Counter[Any]:
    """Number of compilations so far by function."""
    from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER  # only cells that are compiled import it

    return Counter(FRAME_COMPILE_COUNTER)


def _breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _trivial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x


def start_compiler(device: torch.device) -> None:
    """Forget what was compiled, and compile a trivial function: what the compiler does once in a process
    (imports, checks of the machine, headers) is not part of the time of a step."""
    torch.compiler.reset()
    x = torch.ones(8, device=device, requires_grad=True)
    compiled(_trivial)(x).sum().backward()


class CompiledStep:
    """The compilation of a subject's step, in the context of `bench.model.compile.compiling`."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        """Compile the step and the forward pass: run steps until nothing is compiled."""
        start_compiler(device)
        self.seconds: float
        """Time of the steps in which something was compiled, beyond that of equally many later steps."""
        compilations = Compilations()
        spent, steps = 0.0, 0
        while True:
            before, begun = compilations.total, time.perf_counter()
            subject.step()
            synchronize(device)
            elapsed = time.perf_counter() - begun
            if compilations.total == before or steps == MAX_STEPS:
                break
            spent, steps = spent + elapsed, steps + 1
        self.seconds = max(0.0, spent - steps * elapsed)
        self.graph_breaks, self.recompiles = compilations.graph_breaks, compilations.repeated
        subject.model.eval()
        subject.forward()
        subject.model.train()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is compiled inside the context, too."""
        compilations = Compilations()
        yield
        self.graph_breaks += compilations.graph_breaks
        self.recompiles += compilations.total
