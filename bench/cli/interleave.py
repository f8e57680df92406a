"""The baseline between other cells: the key `interleave` of a grid.

The speed of a machine drifts within a round. A ratio to a baseline is only free of this drift if both were
measured one after the other. With `interleave: {every: 2, cell: {variant: dense}}` the baseline of a setting
is measured before the cells of this setting, after every two of them, and after the last one. The repeated
cells are twins of the baseline, with all other knobs of the cells around them, and with their objective: a
variant that exists only with a masked objective is between baselines of this objective. Grids with the same
rule are treated as one, because their cells may have the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from bench.cli import overrides
from bench.config.spec import Cell
from bench.inputs.errors import ConfigError, choose

KEY = "interleave"
"""The key of a grid. It is not a knob, because it adds cells."""

Line = list[str]
"""The overrides of a cell."""


@dataclass
class _Group:
    """The cells of one setting, objective and replicate."""

    baseline: Cell
    line: Line
    """The overrides of the baseline, without `twin`."""
    members: list[tuple[Cell, Line]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Interleave:
    """A baseline, and how often it is measured."""

    every: int
    """At most so many other cells between two measurements of the baseline."""
    cell: Mapping[str, Any]
    """The overrides that make a baseline of a cell; other knobs of the groups that they choose get their
    defaults."""

    @classmethod
    def of(cls, given: Any) -> Self | None:
        """Return the checked value of a grid's key; None if it is null. Raises ConfigError."""
        if given in (None, "null"):
            return None
        if not isinstance(given, Mapping):
            raise ConfigError(f"{KEY}={given}: allowed are null, or a mapping with every and cell")
        for name in given:
            choose(f"key of {KEY}", str(name), ["every", "cell"])
        every, cell = given.get("every"), given.get("cell")
        if not str(every).isdecimal() or not int(str(every)):
            raise ConfigError(f"{KEY}.every={every}: allowed are whole numbers of at least 1")
        if not isinstance(cell, Mapping) or not cell:
            raise ConfigError(f"{KEY}.cell={cell}: allowed are knobs of the baseline and their values")
        return cls(every=int(str(every)), cell=cell)

    def apply(
        self, cells: Sequence[tuple[Cell, Line]], compose: Callable[[Line], Cell]
    ) -> list[tuple[Cell, Line]]:
        """Return the cells of grids with their overrides, ordered by setting, with the baselines between
        them."""
        groups: dict[str, dict[str, _Group]] = {}  # by setting, and by objective
        for cell, line in cells:
            line_of_baseline = self.baseline(cell, line)
            baseline = compose(line_of_baseline)
            objective = baseline.spec.objective
            setting = groups.setdefault(repr((baseline.folder, replace(baseline.spec, objective=""))), {})
            setting.setdefault(objective, _Group(baseline, line_of_baseline)).members.append((cell, line))
        return [
            placed
            for setting in groups.values()
            for group in setting.values()
            for placed in self._around(group, compose)
        ]

    def baseline(self, cell: Cell, line: Line) -> Line:
        """Return the overrides of the baseline that is compared with a cell, which has these overrides."""
        chosen = {"objective": cell.spec.objective, **self.cell}
        sections = tuple(f"{key}." for key in chosen)

        def is_kept(override: str) -> bool:
            key = override.lstrip("+").partition("=")[0]
            return key not in chosen and key != "twin" and not key.startswith(sections)

        own = [overrides.quote_text(f"{key}={value}") for key, value in chosen.items()]
        return [*filter(is_kept, line), *own]

    def _around(self, group: _Group, compose: Callable[[Line], Cell]) -> list[tuple[Cell, Line]]:
        spec = group.baseline.spec
        others = [member for member in group.members if replace(member[0].spec, twin=0) != spec]
        if not others:
            return group.members
        ordered = [(group.baseline, group.line)]
        twin = 0
        for start in range(0, len(others), self.every):
            twin += 1
            line = [*group.line, f"twin={twin}"]
            ordered += [*others[start : start + self.every], (replace(compose(line), placed=True), line)]
        further = [m for m in group.members if m not in others and m[0].spec.twin > twin]
        return [*ordered, *further]
