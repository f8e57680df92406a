"""`python -m bench.tools.launches`: what a training step launches and moves, and its estimated time.

Every variant is planned on fake tensors, with its work cut as for an accelerator, at the sizes of the
committed round on a GPU: width 768, 12 heads, depth 4, batch 1, bfloat16. No GPU is needed. The estimate for
a card is that of `bench.measure.estimate`, not a measurement.

With `--against FOLDER` the cells are those of an experiment's records, and each estimate stands beside the
measured time. A record was measured with the code of its day: where the FLOPs or the predicted peak have
changed since, the row says so and does not count towards the error.

Over 300 lines: the table and the comparison plan the same cells.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import variants
from bench import records
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.inputs.errors import ConfigError, choose
from bench.inputs.printable import printable
from bench.measure.estimate import CARDS, Card, estimated_seconds
from bench.records import write_atomically
from bench.report.text import markdown, units
from bench.report.text.columns import Column
from variants.knobs import knobs_of
from variants.safe_output import run

if TYPE_CHECKING:
    from bench.measure.step import StepFigures

LENGTHS = (1024, 16384, 65536)
DEPTH = 4
DEVICE = "cuda"
"""The type of device for which work is cut."""
SIZES = ModelSizes(size="base", d_model=768, heads=12)
SAME = 0.005
"""Relative difference of FLOPs and predicted peak up to which a record's code counts as today's."""


@dataclass(frozen=True)
class Planned:
    """A cell and the figures of its step."""

    spec: CellSpec
    figures: StepFigures

    def seconds(self, card: Card) -> float:
        """Return the estimated time of the step."""
        figures = self.figures
        return estimated_seconds(figures.launches_step, figures.bytes_moved_step, figures.flops_step, card)


def accelerator_spec(
    name: str,
    seq_len: int,
    *,
    params: Mapping[str, Any] | None = None,
    objective: str | None = None,
    depth: int = DEPTH,
) -> CellSpec:
    """Return a cell of the round on an accelerator; by default causal if the variant can be."""
    from bench import tasks

    variant = variants.load(name)
    config = variant.Config.of(params or {})
    causal = variant.info_for(config).caps.causal
    data = DataSpec(name="plays", params=tasks.load("plays").Config().as_dict())
    return CellSpec(
        variant=name,
        variant_params=config.as_dict(),
        seq_len=seq_len,
        depth=depth,
        batch_size=1,
        replicate=0,
        objective=objective or ("clm" if causal else "mlm"),
        device=DEVICE,
        dtype="bfloat16",
        activations="keep",
        model=SIZES,
        data=data,
        measure=MeasureSpec(preset="plan", execute=False, time_seconds=0.0, min_samples=1),
    )


def plan(spec: CellSpec) -> Planned:
    """Plan a step on fake tensors."""
    from bench.measure.predict import Prediction

    return Planned(spec, Prediction(spec).predict())


def launches_a_layer(planned: Planned) -> int:
    """Return the launches that the last layer of a cell adds to its step."""
    without = plan(replace(planned.spec, depth=planned.spec.depth - 1))
    return planned.figures.launches_step - without.figures.launches_step


@dataclass(frozen=True)
class Row:
    """A variant with some knobs, as a row of the table."""

    variant: str
    params: Mapping[str, Any]
    """Knobs that are not defaults, without `impl`."""
    impl: str | None
    """None for a variant with one implementation."""
    note: str = ""
    """`auto` for the implementation that the default knobs select, `untried` for one that no device has run.
    """

    @property
    def impl_label(self) -> str:
        """The implementation in words."""
        return f"{self.impl or ''} {f'({self.note})' if self.note else ''}".strip()

    @property
    def knobs_label(self) -> str:
        """The knobs in words."""
        return ", ".join(f"{name}={value}" for name, value in self.params.items())


def rows_of(name: str, only: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a variant: the implementation that an accelerator gets, then the others whose
    kernels have shape functions, so that a plan knows what they launch. Those of which the first selects one
    have the same counts, and no row. `only` names implementations instead.

    A variant that can train several segments at once has a row for all at once, too.
    """
    layer = variants.load_mixer(name)
    auto = layer.resolve_impl(layer.Config.of({}), DEVICE)
    selected = layer.IMPLS[auto].selects if auto else ()
    several = "segments_at_once" in knobs_of(layer.Config)
    rows = []
    for params in ({}, {"segments_at_once": "all"}) if several else ({},):
        if not layer.IMPLS and not only:
            rows.append(Row(name, params, None))
        for impl, declared in sorted(layer.IMPLS.items(), key=lambda item: item[0] != auto):
            planned = impl == auto or (declared.has_shape_functions and impl not in selected)
            if impl in only if only else planned:
                note = "auto" if impl == auto else "untried" if declared.untried else ""
                rows.append(Row(name, params, impl, note))
    return rows


def table(rows: Sequence[Row], lengths: Sequence[int], card: Card) -> str:
    """Return a line for each row and length that can be planned."""
    columns: dict[str, list[str]] = {}
    for row in rows:
        params = dict(row.params) | ({"impl": row.impl} if row.impl and row.note != "auto" else {})
        for seq_len in lengths:
            print(f"{row.variant} {row.impl_label} T={seq_len}", file=sys.stderr, flush=True)
            spec = accelerator_spec(row.variant, seq_len, params=params)
            if reason := unplannable(spec):
                print(f"left out: {reason}", file=sys.stderr, flush=True)
                continue
            planned = plan(spec)
            figures = planned.figures
            cells = {
                "variant": row.variant,
                "impl": row.impl_label,
                "knobs": row.knobs_label,
                "length": units.length(seq_len),
                "launches": f"{figures.launches_step:,}",
                "launches a layer": f"{launches_a_layer(planned):,}",
                "bytes moved": units.size(figures.bytes_moved_step),
                "executed FLOPs": units.flops(figures.flops_step),
                f"estimate, {card.title}": units.seconds(planned.seconds(card)),
                "limit": limit(planned, card),
            }
            for title, cell in cells.items():
                columns.setdefault(title, []).append(cell)
    text = ("variant", "impl", "knobs", "limit")
    return markdown.table([Column(title, cells, right=title not in text) for title, cells in columns.items()])


def unplannable(spec: CellSpec) -> str | None:
    """Return why a cell cannot be planned on this machine, or on any; None if it can."""
    import torch

    from bench.measure.predict import CPU

    variant, config, dims = spec.attention()
    return variant.unsupported(config, dims, causal=spec.causal) or variant.missing(
        config, dims, device=CPU, dtype=getattr(torch, spec.dtype)
    )


def limit(planned: Planned, card: Card) -> str:
    """Return which of the three times is the longest."""
    figures = planned.figures
    times = {
        "launches": card.seconds_per_step + figures.launches_step * card.seconds_per_launch,
        "bytes": figures.bytes_moved_step / card.bytes_per_second,
        "FLOPs": figures.flops_step / card.flops_per_second,
    }
    if times["launches"] >= times["bytes"] + times["FLOPs"]:
        return "launches"
    return max(("bytes", "FLOPs"), key=lambda name: times[name])


def page(rows: Sequence[Row], lengths: Sequence[int], card: Card) -> str:
    """Return the page: the table and what it means."""
    launch, rate = units.seconds(card.seconds_per_launch), units.flops(card.flops_per_second)
    fixed = units.seconds(card.seconds_per_step)
    moved = f"{card.bytes_per_second / 1e12:.2f} TB"
    return f"""# Launches, bytes and estimated time of a training step

Forward, backward and optimiser: depth {DEPTH}, width {SIZES.d_model}, {SIZES.heads} heads, batch 1, bfloat16,
default knobs, work cut as for an accelerator. Counted on fake tensors; `results/README.md` defines
`launches_step` and `bytes_moved_step`. *launches a layer* is what one more layer adds. *impl*: `auto` is what
the default knobs select on an accelerator; no device has run an *untried* implementation yet, and the table
counts what it would launch.

**The times are estimates for {card.title}**, not measurements: the longer of {fixed} + launches × {launch}
and bytes ÷ {moved}/s + FLOPs ÷ {rate}/s; *limit* is the term that decides. The constants were fitted to one
round on a virtual machine with an H100, where single cells were off by −28 to +29 %. Data sheet:
{card.source}.

`make launches` writes this page.

{table(rows, lengths, card)}"""


@dataclass(frozen=True)
class Compared:
    """A measured cell beside its estimate."""

    variant: str
    seq_len: int
    measured: float
    estimated: float
    changed: bool
    """Whether the code has changed since: its FLOPs or its predicted peak differ."""

    @property
    def error(self) -> float:
        """The relative error of the estimate."""
        return self.estimated / self.measured - 1


def compare(folder: Path, card: Card) -> list[Compared]:
    """Return today's estimate of every timed cell of an experiment at the sizes of the round."""
    frame = records.load(folder)
    timed = frame[frame["step_seconds_median"].notna()].sort_values(["variant", "seq_len"])
    compared = []
    for record in timed.to_dict("records"):
        print(f"{record['variant']} T={record['seq_len']}", file=sys.stderr, flush=True)
        spec = accelerator_spec(
            record["variant"],
            record["seq_len"],
            params=record["variant_params"],
            objective=record["objective"],
            depth=record["depth"],
        )
        sizes = replace(SIZES, d_model=record["d_model"], heads=record["heads"])
        planned = plan(
            replace(
                spec,
                model=sizes,
                batch_size=record["batch_size"],
                dtype=record["dtype"],
                activations=record["activations"],
            )
        )
        pairs = (
            (planned.figures.flops_step, record["flops_executed_step"]),
            (planned.figures.peak_bytes, record["peak_bytes_predicted"]),
        )
        changed = any(abs(now / then - 1) > SAME for now, then in pairs)
        compared.append(
            Compared(
                record["variant"],
                record["seq_len"],
                record["step_seconds_median"],
                planned.seconds(card),
                changed,
            )
        )
    return compared


def rms(errors: Sequence[float]) -> float:
    """Return the root mean square."""
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def comparison(cells: Sequence[Compared], card: Card) -> str:
    """Return a row a cell, and the error over the cells whose code is today's."""
    columns = [
        Column("variant", [cell.variant for cell in cells], right=False),
        Column("length", [units.length(cell.seq_len) for cell in cells]),
        Column("measured", [units.seconds(cell.measured) for cell in cells]),
        Column(f"estimate, {card.title}", [units.seconds(cell.estimated) for cell in cells]),
        Column("error", [f"{cell.error:+.0%}" for cell in cells]),
        Column("code", ["changed since" if cell.changed else "same" for cell in cells], right=False),
    ]
    same = [cell.error for cell in cells if not cell.changed]
    summary = f"{rms(same):.1%} over {len(same)} cells" if same else "no cell has the code of today"
    return f"{markdown.table(columns)}\nRoot mean square error where the code is the same: {summary}.\n"


def main() -> int:
    """Print the table, or write it to a file. Returns the exit status: 2 for an invalid command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.launches", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="plan only these variants")
    parser.add_argument(
        "--impl",
        nargs="+",
        default=(),
        metavar="NAME",
        help="plan these implementations; by default auto's choice and others with shape functions",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--card", default="h100", help=f"one of {', '.join(CARDS)} (default h100)")
    parser.add_argument("--out", help="write the page to this file")
    parser.add_argument(
        "--against", metavar="FOLDER", help="compare with the measured cells of an experiment"
    )
    arguments = parser.parse_args()
    try:
        card = CARDS[choose("--card", arguments.card, list(CARDS))]
        names = [choose("--only", name, variants.mixers()) for name in arguments.only or variants.mixers()]
        if arguments.against:
            text = comparison(compare(Path(arguments.against), card), card)
        else:
            impls = {impl for name in variants.mixers() for impl in variants.load_mixer(name).IMPLS}
            only = [choose("--impl", impl, sorted(impls)) for impl in arguments.impl]
            rows = [row for name in names for row in rows_of(name, only)]
            text = page(rows, arguments.lengths, card)
        if arguments.out:
            write_atomically(Path(arguments.out), text)
    except (ConfigError, ValueError, OSError) as error:
        print(f"bench.tools.launches: {printable(error)}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    run(main)
