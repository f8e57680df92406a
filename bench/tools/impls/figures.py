"""Time, memory and errors of one implementation of a layer; runs in a child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import variants
from bench.process.limited import Refused
from bench.run.devices import Device

if TYPE_CHECKING:
    import torch

    from variants.base import SequenceMixer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes at which implementations are compared."""

    device: str
    """A type of device: cuda or cpu."""
    dtype: str
    d_model: int
    heads: int
    lengths: tuple[int, ...]
    knobs: dict[str, dict[str, Any]]
    """Variant → knobs that differ from the defaults."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One implementation of a variant."""

    variant: str
    impl: str | None
    """None for a variant with a single implementation."""
    is_auto: bool
    """Whether cells with the default knobs use it on this device."""
    untried: bool = False
    """See `variants.base.Impl.untried`."""

    @property
    def label(self) -> str:
        """A short description."""
        return self.variant if self.impl is None else f"{self.variant} impl={self.impl}"


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """Figures of one implementation at one length, of a forward and backward pass of a layer."""

    seq_len: int
    wall_seconds: float
    """Median over a few runs."""
    device_seconds: float | None
    """Time that the device is busy; None on a CPU, or if the profiler reports nothing."""
    launches: int
    peak_bytes: int
    output_error: float | None = None
    """Relative to float32; None if it was not compared."""
    gradient_error: float | None = None
    baseline_output_error: float | None = None
    """The same of the implementation that `auto` selects, in the same number format."""
    baseline_gradient_error: float | None = None
    difference: float | None = None
    """Larger relative difference, of outputs or a gradient, to that implementation in the same number format.
    """
    not_compared: str | None = None
    """Why there are no errors."""

    @property
    def seconds(self) -> float:
        """The time by which implementations are compared: the device's if it is known."""
        return self.wall_seconds if self.device_seconds is None else self.device_seconds


def cases(setting: Setting, names: list[str]) -> list[Case]:
    """Return every implementation of the variants: first the one of each variant that `auto` selects, then
    the untried ones, then the others."""
    every = []
    for name in names:
        layer = variants.load_mixer(name)
        auto = layer.resolve_impl(_config(layer, setting, name), setting.device)
        every += [
            Case(variant=name, impl=impl, is_auto=impl == auto, untried=layer.IMPLS[impl].untried)
            for impl in layer.IMPLS
        ] or [Case(variant=name, impl=None, is_auto=True)]
    return sorted(every, key=lambda case: (not case.is_auto, not case.untried))


def _config(layer: type[SequenceMixer], setting: Setting, name: str, impl: str | None = None) -> Any:
    config = layer.Config.of(setting.knobs.get(name, {}))
    return config if impl is None else replace(config, impl=impl)  # type: ignore[call-arg]


def measure(report: Callable[[LayerFigures], None], setting: Setting, case: Case, device: Device) -> None:
    """Report the figures of a case at each length, from the shortest on. Raises Missing if this machine
    cannot run it, and RuntimeError if the kernel fails."""
    device.select()
    for seq_len in setting.lengths:
        report(_Comparison(setting, case, seq_len).figures())


class Missing(Refused):
    """The machine lacks what the implementation needs; the message is the reason."""


RUNS = 3
"""Timed runs, after as many that warm up."""


class _Comparison:
    """One implementation at one length, and the one that `auto` selects."""

    def __init__(self, setting: Setting, case: Case, seq_len: int) -> None:
        import torch

        from variants.base import Dims

        self.setting, self.case, self.seq_len = setting, case, seq_len
        self.layer = variants.load_mixer(case.variant)
        self.dims = Dims(
            seq_len=seq_len, d_model=setting.d_model, heads=setting.heads, device_type=setting.device
        )
        self.device, self.dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        self.causal = self.layer.info.caps.causal

    def figures(self) -> LayerFigures:
        """Measure, then compare with the implementation that `auto` selects."""
        import torch

        mine = self._config(self.case.impl)
        if reason := self._missing(mine, self.dtype):
            raise Missing(reason)
        figures = self._measured(self._make(mine))
        try:
            return replace(figures, **self._errors(mine))
        except torch.OutOfMemoryError:
            return replace(figures, not_compared="float32 runs out of memory")

    def _config(self, impl: str | None) -> Any:
        return _config(self.layer, self.setting, self.case.variant, impl)

    def _missing(self, config: Any, dtype: torch.dtype) -> str | None:
        if reason := self.layer.unsupported(config, self.dims, causal=self.causal):
            return reason
        return self.layer.missing(config, self.dims, device=self.device, dtype=dtype)

    def _make(self, config: Any) -> SequenceMixer:
        import torch

        torch.manual_seed(0)
        return self.layer(config, self.dims).to(self.device).train()

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        source = torch.Generator(self.device).manual_seed(0)
        shape = 1, self.seq_len, self.setting.d_model
        x, direction = (torch.randn(shape, device=self.device, generator=source) for _ in range(2))
        return x, direction

    def _measured(self, layer: SequenceMixer) -> LayerFigures:
        import statistics
        import time

        from bench.measure import device_time, timing
        from bench.measure.flops import CountFlops
        from bench.measure.layer import step

        x, _ = self._inputs()

        def work() -> None:
            step(layer, x, causal=self.causal, dtype=self.dtype)

        for _ in range(RUNS):
            work()
        peak_bytes = self._peak(work)
        seconds = []
        for _ in range(RUNS):
            timing.synchronize(self.device)
            begun = time.perf_counter()
            work()
            timing.synchronize(self.device)
            seconds.append(time.perf_counter() - begun)
        busy = device_time.busy_seconds(work, self.device)
        with CountFlops() as counter:
            work()
        return LayerFigures(
            seq_len=self.seq_len,
            wall_seconds=statistics.median(seconds),
            device_seconds=busy,
            launches=counter.counts.launches,
            peak_bytes=peak_bytes,
        )

    def _peak(self, work: Callable[[], None]) -> int:
        import torch

        from bench.measure import timing
        from bench.measure.memory import LiveStorage

        if self.device.type == "cpu":
            with LiveStorage() as storage:
                work()
            return int(storage.peak)
        module = torch.get_device_module(self.device)
        timing.synchronize(self.device)
        module.reset_peak_memory_stats(self.device)
        work()
        timing.synchronize(self.device)
        return int(module.max_memory_allocated(self.device))

    def _errors(self, mine: Any) -> dict[str, Any]:
        """Return the errors of the outputs and gradients against float32, by key of `LayerFigures`.

        The reference is the implementation that `auto` selects, or the first one that runs in float32.
        """
        import torch

        from bench.measure.layer import outcome, relative_errors

        auto = self._config(self.layer.resolve_impl(self._config(None), self.setting.device))
        others = [auto, *map(self._config, self.layer.IMPLS)]
        exact = next((c for c in others if not self._missing(c, torch.float32)), None)
        if exact is None:
            return {"not_compared": "no implementation runs in float32"}
        x, direction = self._inputs()

        def results(config: Any, dtype: torch.dtype) -> list[torch.Tensor]:
            return outcome(self._make(config), x, direction, causal=self.causal, dtype=dtype)

        want = results(exact, torch.float32)
        got = results(mine, self.dtype)
        output, gradient = relative_errors(got, want)
        errors: dict[str, Any] = {"output_error": output, "gradient_error": gradient}
        if not self._missing(auto, self.dtype):
            baseline = results(auto, self.dtype)
            of_auto = relative_errors(baseline, want)
            errors |= dict(zip(("baseline_output_error", "baseline_gradient_error"), of_auto, strict=True))
            errors["difference"] = max(relative_errors(got, baseline))
        return errors
