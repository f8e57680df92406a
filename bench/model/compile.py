"""Compilation of a model's forward and backward passes with torch.compile.

`compile=block` compiles each visit of a block separately, as torchtitan does: blocks with equal shapes and
knobs share the compiled code, and compile time does not grow with depth. `compile=model` compiles all visits,
the embedding and the output projection together.

Calls are compiled, not modules, so a model has the same parameters and the same keys of its state with and
without compilation. Shapes are static: every new shape is compiled again. Random numbers are drawn as without
compilation, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel, RunSegment
from bench.model.visits import Run, VisitResult
from variants.base import Context, FFOut, MixerOut, Visit, VisitOut

F = TypeVar("F", bound=Callable[..., Any])
MAX_GRAPHS = 1024
"""Maximum number of graphs of one function. With more, torch would silently run without compilation; here it
raises an error. Each segment with a state of other shapes needs a graph, and so does each distinct layer."""


def compiled(function: F) -> F:
    """Return the compiled function; it is compiled when it is first called, and for every new shape."""
    options: dict[str, Any] = {"fallback_random": True}
    return cast(F, torch.compile(function, dynamic=False, options=options))


@cache
def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, once for each function, so that all models of a process share the compiled code."""
    return compiled(function)


class CompiledVisit:
    """A visit whose calls are compiled; see `Visit`. The compiled functions take the visit as an argument, so
    that equal visits share the code."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit

    @property
    def ff_chunks(self) -> int:
        """See `Visit`."""
        return self.visit.ff_chunks

    def __call__(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """See `Visit`."""
        out: VisitOut = _shared(_forward)(self.visit, x, state, ctx)
        return out

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """See `Visit`."""
        out: MixerOut = _shared(_attend)(self.visit, x, state, ctx)
        return out

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """See `Visit`. It is not compiled."""
        return self.visit.queries_keys(x, ctx)

    def feed(self, x: Tensor) -> FFOut:
        """See `Visit`."""
        out: FFOut = _shared(_feed)(self.visit, x)
        return out

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """See `Visit`."""
        return self.visit.parameters()


def _forward(visit: Visit, x: Tensor, state: Any, ctx: Context) -> VisitOut:
    return visit(x, state, ctx)


def _attend(visit: Visit, x: Tensor, state: Any, ctx: Context) -> MixerOut:
    return visit.attend(x, state, ctx)


def _feed(visit: Visit, x: Tensor) -> FFOut:
    return visit.feed(x)


def by_block(run: Run) -> Run:
    """Return the strategy with each visit compiled.

    A strategy that treats each visit separately is compiled together with the visit: the compiler then sees
    what is recomputed. Of other strategies, only the calls of the blocks are compiled.
    """
    if any(run is strategy.run for strategy in STRATEGIES.values() if strategy.visits_separately):
        one = _shared(run)

        def run_each(
            visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
        ) -> tuple[Tensor, list[VisitResult]]:
            results: list[VisitResult] = []
            for visit, state in zip(visits, states, strict=True):
                x, result = one([visit], x, [state], ctx)
                results += result
            return x, results

        return run_each

    def run_compiled(
        visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
    ) -> tuple[Tensor, list[VisitResult]]:
        return run([CompiledVisit(visit) for visit in visits], x, states, ctx)

    return run_compiled


@contextmanager
def compiling(model: LanguageModel, how: str) -> Iterator[None]:
    """Compile the model's calls inside the context: "block" or "model"; "off" changes nothing."""
    if how == "off":
        yield
        return
    import torch._dynamo as dynamo

    by_how: dict[str, tuple[Run, RunSegment | None]] = {
        "block": (by_block(model.run_blocks), None),
        "model": (model.run_blocks, _shared(model.run_segment)),
    }
    limits = {
        "recompile_limit": MAX_GRAPHS,
        "accumulated_recompile_limit": MAX_GRAPHS,
        "fail_on_recompile_limit_hit": True,
    }
    with dynamo.config.patch(limits), model.running(*by_how[how]):
        yield
