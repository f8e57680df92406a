"""`python -m bench.tools.bench_layers`: the cost of one attention layer compared with dense attention.

It measures forward and backward of one layer with its projections, with batch 1 and float32, for every
variant, in its causal form if it has one. Each time comes from a separate process. Rounds interleave the
variants, and a ratio is relative to dense attention in the same round. Peak memory is measured from live
storages at the lengths that run, and predicted with fake tensors at one longer length. configs/layers.yaml
contains the sizes; a variant that it does not list uses its default knobs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

import variants
from bench import CONFIGS
from bench.config.spec import MeasureSpec
from bench.inputs.errors import ConfigError, choose
from bench.inputs.paths import user_path
from bench.inputs.printable import printable
from bench.process import forkserver
from bench.records import write_atomically
from bench.report.text import markdown, units
from bench.report.text.columns import Column
from bench.run import devices, provenance
from bench.run.locks import on_device
from variants.safe_output import run

if TYPE_CHECKING:
    import torch

    from variants.base import SequenceMixer

SAMPLE_SECONDS = 1.0
"""Time budget of the samples of one process; at least three are taken."""
FEW_SEGMENTS = 8
"""Maximum number of segments in a prediction, because a layer keeps no memory of finished segments."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The content of configs/layers.yaml."""

    d_model: int
    heads: int
    lengths: list[int]
    predicted_length: int
    knobs: dict[str, dict[str, Any]]


class Figures(NamedTuple):
    """Results of one process: seconds of a forward and backward pass (None if predicted),
    and its peak bytes."""

    seconds: float | None
    peak_bytes: int


def measure(sizes: Sizes, name: str, seq_len: int, *, fake: bool) -> Figures | str:
    """Return the figures of one layer at one length, or the reason why there are none."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.measure import timing
    from bench.measure.layer import step
    from bench.measure.memory import LiveStorage
    from variants.base import Dims

    variant = variants.load_mixer(name)
    config = _config(sizes, name)
    causal = variant.info.caps.causal
    dims = Dims(seq_len=seq_len, d_model=sizes.d_model, heads=sizes.heads)
    cpu = torch.device("cpu")
    if reason := variant.unsupported(config, dims, causal=causal):
        return reason
    if reason := variant.missing(config, dims, device=cpu, dtype=torch.float32):
        return reason
    length = variant.input_schedule(config).segments(seq_len)[:FEW_SEGMENTS][-1].stop if fake else seq_len

    def once() -> tuple[SequenceMixer, torch.Tensor, int]:
        with LiveStorage() as storage:
            torch.manual_seed(0)
            layer = variant(config, dims)
            x = torch.randn(1, length, sizes.d_model)
            step(layer, x, causal=causal)
        return layer, x, storage.peak

    if fake:
        with FakeTensorMode():
            return Figures(None, once()[2])
    layer, x, peak_bytes = once()
    samples = timing.sample(
        lambda: step(layer, x, causal=causal),
        cpu,
        seconds=SAMPLE_SECONDS,
        at_least=3,
        precision=MeasureSpec.precision,
    )
    return Figures(samples.median, peak_bytes)


def _child(theirs: Connection, sizes: Sizes, name: str, seq_len: int, fake: bool) -> None:
    theirs.send(measure(sizes, name, seq_len, fake=fake))


def in_child(sizes: Sizes, name: str, seq_len: int, *, fake: bool) -> Figures | str:
    """Run `measure` in a separate process that has exclusive use of the device."""
    ours, theirs = Pipe(duplex=False)
    with on_device(devices.CPU):
        child = forkserver.context().Process(target=_child, args=(theirs, sizes, name, seq_len, fake))
        child.start()
        theirs.close()
        try:
            figures: Figures | str = ours.recv()
        except EOFError:
            figures = "the process ended without a figure"
        child.join()
    return figures


Results = dict[tuple[str, int], list[Figures | str]]
"""(variant, length) → the result of each round."""


def collect(sizes: Sizes, names: list[str], rounds: int, keep: Callable[[Results], None]) -> None:
    """Measure every variant at every length in each round, then make the predictions; `keep` is called with
    all results so far after each figure."""
    results: Results = defaultdict(list)
    todo = [(length, name, False) for _ in range(rounds) for length in sizes.lengths for name in names]
    todo += [(sizes.predicted_length, name, True) for name in names]
    for done, (length, name, fake) in enumerate(todo, 1):
        figures = in_child(sizes, name, length, fake=fake)
        results[name, length].append(figures)
        keep(results)
        print(f"[{done}/{len(todo)}] {name} T={length}: {figures}", file=sys.stderr, flush=True)


def table(sizes: Sizes, names: list[str], results: Results) -> str:
    """Return a table with a row per variant: time relative to dense, peak memory, its growth, the claimed
    growth and the prediction."""
    shorter, longest = sizes.lengths[-2:]
    predicted = sizes.predicted_length
    columns: dict[str, list[str]] = defaultdict(list)
    for name in names:
        variant = variants.load_mixer(name)
        config = _config(sizes, name)
        columns["variant"].append(name)
        columns["knobs"].append(", ".join(f"{k}={v}" for k, v in sizes.knobs.get(name, {}).items()))
        for length in sizes.lengths:
            pairs = list(zip(results[name, length], results["dense", length], strict=False))
            columns[f"time / dense at {units.length(length)}"].append(_share(pairs))
        before, after, ahead = (_peak(results[name, length]) for length in (shorter, longest, predicted))
        columns[f"peak at {units.length(longest)}"].append(units.size(after))
        grown = f"{math.log(after / before) / math.log(longest / shorter):.2f}" if before and after else ""
        columns["memory grows as T^"].append(grown)
        columns["fixed + a token"].append(_affine(before, after, shorter, longest))
        columns["claimed"].append(f"{variant.info.complexity.memory:g}")
        part = "*" if len(variant.input_schedule(config).segments(predicted)) > FEW_SEGMENTS else ""
        columns[f"predicted peak at {units.length(predicted)}"].append(units.size(ahead) + part)
    text = ("variant", "knobs")
    return markdown.table([Column(title, cells, right=title not in text) for title, cells in columns.items()])


def _affine(before: int | None, after: int | None, shorter: int, longest: int) -> str:
    """Return the peak as a fixed workspace plus bytes per token, from two lengths."""
    if not before or not after:
        return ""
    token = (after - before) / (longest - shorter)
    return f"{units.size(max(0.0, after - token * longest))} + {units.size(token)}"


def _config(sizes: Sizes, name: str) -> Any:
    return variants.load_mixer(name).Config.of(sizes.knobs.get(name, {}))


def _share(pairs: list[tuple[Figures | str, Figures | str]]) -> str:
    """Return the median and range of the time ratio over rounds, or the reason why there is none."""
    shares = [
        own.seconds / dense.seconds
        for own, dense in pairs
        if isinstance(own, Figures) and isinstance(dense, Figures) and own.seconds and dense.seconds
    ]
    if not shares:
        return markdown.escape(pairs[0][0]) if pairs else ""
    return f"{statistics.median(shares):.3f} ({min(shares):.3f}–{max(shares):.3f})"


def _peak(results: list[Figures | str]) -> int | None:
    peaks = [figures.peak_bytes for figures in results if isinstance(figures, Figures)]
    return max(peaks, default=None)


def page(sizes: Sizes, names: list[str], rounds: int, results: Results) -> str:
    """Return the page with the table of all results so far and its description."""
    return f"""# One layer compared with dense attention

Forward and backward, with projections; batch 1, width {sizes.d_model}, {sizes.heads} heads, float32,
{provenance.cpu_model()}; {rounds} rounds, one process per figure. Times: median (range) of the
ratio to dense sdpa in the same round. A star marks a prediction over {FEW_SEGMENTS} segments: a layer
keeps no memory of finished segments. If memory grows more slowly than claimed, part of it is a
workspace of a fixed size, or scores that the claim includes are not stored.

{table(sizes, names, results)}"""


def main() -> int:
    """Measure everything, print a line per figure, and rewrite the table after each. Returns the exit status:
    2 for an invalid command, before anything is measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.bench_layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes per figure (default 3)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="measure only these variants and dense")
    parser.add_argument("--out", default="results/layers", help="folder of the table")
    arguments = parser.parse_args()
    loaded: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "layers.yaml"))
    sizes = Sizes(**loaded)
    names = list(dict.fromkeys(["dense", *(arguments.only or variants.mixers())]))
    try:
        if arguments.rounds < 1:
            raise ConfigError(f"--rounds={arguments.rounds}: allowed is 1 or more")
        for name in names:
            _config(sizes, choose("--only", name, variants.mixers()))
        out = user_path("--out", arguments.out) / "layers.md"
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ConfigError, variants.BrokenVariant, OSError) as error:
        print(f"bench.tools.bench_layers: {printable(error)}", file=sys.stderr)
        return 2
    collect(
        sizes,
        names,
        arguments.rounds,
        lambda results: write_atomically(out, page(sizes, names, arguments.rounds, results)),
    )
    print(out.read_text())
    print(out)
    return 0


if __name__ == "__main__":
    run(main)
