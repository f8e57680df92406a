"""`python -m bench.tools.bench_layers`: what one attention layer costs beside dense attention.

Forward and backward of one layer with its projections, batch 1, float32, for every variant, in its
causal form where it has one. Each time comes from a process of its own; rounds interleave the
variants, and a ratio is to dense attention in the same round. Peak memory is live storage at the
lengths that are run, and predicted with fake tensors at the one that is not. The sizes stand in
configs/layers.yaml; a variant that it does not name is measured with its default knobs.
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
from bench.run import provenance
from bench.run.locks import on_device
from variants.safe_output import run

if TYPE_CHECKING:
    import torch

    from variants.base import Attention

SAMPLE_SECONDS = 1.0
"""Budget of the samples of one process; there are at least three."""
FEW_SEGMENTS = 8
"""Segments that a prediction covers: a layer keeps nothing of a segment that it is through with."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What configs/layers.yaml holds."""

    d_model: int
    heads: int
    lengths: list[int]
    predicted_length: int
    knobs: dict[str, dict[str, Any]]


class Figures(NamedTuple):
    """Of one process: seconds of a forward and backward pass (None: predicted), and its peak bytes."""

    seconds: float | None
    peak_bytes: int


def measure(sizes: Sizes, name: str, seq_len: int, *, fake: bool) -> Figures | str:
    """The figures of one layer at one length, or why it has none."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.measure import timing
    from bench.measure.memory import LiveStorage
    from variants.base import Dims

    variant = variants.load(name)
    config = _config(sizes, name)
    causal = variant.caps.causal
    dims = Dims(batch_size=1, seq_len=seq_len, d_model=sizes.d_model, heads=sizes.heads)
    cpu = torch.device("cpu")
    if reason := variant.unsupported(config, dims, causal=causal):
        return reason
    if reason := variant.missing(config, dims, device=cpu, dtype=torch.float32):
        return reason
    length = variant.plan(config).segments(seq_len)[:FEW_SEGMENTS][-1].stop if fake else seq_len

    def once() -> tuple[Attention, torch.Tensor, int]:
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


def step(layer: Attention, x: torch.Tensor, *, causal: bool) -> None:
    """Forward and backward of each segment in turn, as in training; gradients of x and the parameters."""
    import torch

    plan, state = layer.plan(layer.config), None
    losses: list[torch.Tensor] = []
    layer.zero_grad(set_to_none=True)

    def network(window: torch.Tensor) -> torch.Tensor:
        nonlocal state
        out = layer(window, causal=causal, state=state)
        state = out.state
        losses.extend(loss for loss in [out.aux_loss] if loss is not None and loss.requires_grad)
        y: torch.Tensor = out.y
        return y

    for segment in plan.segments(x.shape[1]):
        y = plan.apply(network, x[:, segment].detach().requires_grad_(), causal=causal)
        torch.autograd.backward([y, *losses], [torch.ones_like(y), *(None for _ in losses)])
        losses.clear()


def _child(theirs: Connection, sizes: Sizes, name: str, seq_len: int, fake: bool) -> None:
    theirs.send(measure(sizes, name, seq_len, fake=fake))


def in_child(sizes: Sizes, name: str, seq_len: int, *, fake: bool) -> Figures | str:
    """`measure` in a process of its own, alone on the device."""
    ours, theirs = Pipe(duplex=False)
    with on_device("cpu"):
        child = forkserver.context().Process(target=_child, args=(theirs, sizes, name, seq_len, fake))
        child.start()
        theirs.close()
        try:
            figures: Figures | str = ours.recv()
        except EOFError:
            figures = "the process ended without a figure"
        child.join()
    return figures


Found = dict[tuple[str, int], list[Figures | str]]
"""(variant, length) → what each round found."""


def collect(sizes: Sizes, names: list[str], rounds: int, keep: Callable[[Found], None]) -> None:
    """Every variant at every length, round after round, then the predictions; `keep` is called with what is
    found so far, a figure at a time."""
    found: Found = defaultdict(list)
    todo = [(length, name, False) for _ in range(rounds) for length in sizes.lengths for name in names]
    todo += [(sizes.predicted_length, name, True) for name in names]
    for done, (length, name, fake) in enumerate(todo, 1):
        figures = in_child(sizes, name, length, fake=fake)
        found[name, length].append(figures)
        keep(found)
        print(f"[{done}/{len(todo)}] {name} T={length}: {figures}", file=sys.stderr, flush=True)


def table(sizes: Sizes, names: list[str], found: Found) -> str:
    """A row a variant: time as a share of dense, peak memory, its growth beside the claim, the prediction."""
    shorter, longest = sizes.lengths[-2:]
    predicted = sizes.predicted_length
    columns: dict[str, list[str]] = defaultdict(list)
    for name in names:
        variant = variants.load(name)
        config = _config(sizes, name)
        columns["variant"].append(name)
        columns["knobs"].append(", ".join(f"{k}={v}" for k, v in sizes.knobs.get(name, {}).items()))
        for length in sizes.lengths:
            pairs = list(zip(found[name, length], found["dense", length], strict=False))
            columns[f"time / dense at {units.length(length)}"].append(_share(pairs))
        before, after, ahead = (_peak(found[name, length]) for length in (shorter, longest, predicted))
        columns[f"peak at {units.length(longest)}"].append(units.size(after))
        grown = f"{math.log(after / before) / math.log(longest / shorter):.2f}" if before and after else ""
        columns["memory grows as T^"].append(grown)
        columns["fixed + a token"].append(_affine(before, after, shorter, longest))
        columns["claimed"].append(f"{variant.complexity.memory:g}")
        part = "*" if len(variant.plan(config).segments(predicted)) > FEW_SEGMENTS else ""
        columns[f"predicted peak at {units.length(predicted)}"].append(units.size(ahead) + part)
    text = ("variant", "knobs")
    return markdown.table([Column(title, cells, right=title not in text) for title, cells in columns.items()])


def _affine(before: int | None, after: int | None, shorter: int, longest: int) -> str:
    """The peak as a work space of a fixed size and what each token adds, from two lengths."""
    if not before or not after:
        return ""
    token = (after - before) / (longest - shorter)
    return f"{units.size(max(0.0, after - token * longest))} + {units.size(token)}"


def _config(sizes: Sizes, name: str) -> Any:
    return variants.load(name).Config.of(sizes.knobs.get(name, {}))


def _share(pairs: list[tuple[Figures | str, Figures | str]]) -> str:
    """Median and range over rounds of the time's ratio, or why there is none."""
    shares = [
        mine.seconds / dense.seconds
        for mine, dense in pairs
        if isinstance(mine, Figures) and isinstance(dense, Figures) and mine.seconds and dense.seconds
    ]
    if not shares:
        return markdown.escape(pairs[0][0]) if pairs else ""
    return f"{statistics.median(shares):.3f} ({min(shares):.3f}–{max(shares):.3f})"


def _peak(found: list[Figures | str]) -> int | None:
    peaks = [figures.peak_bytes for figures in found if isinstance(figures, Figures)]
    return max(peaks, default=None)


def page(sizes: Sizes, names: list[str], rounds: int, found: Found) -> str:
    """The table of what is found so far, and what it is a table of."""
    return f"""# One layer beside dense attention

Forward and backward, projections included; batch 1, width {sizes.d_model}, {sizes.heads} heads, float32,
{provenance.cpu_model()}; {rounds} rounds, a process a figure. Times: median (range) of the
ratio to dense sdpa in the same round. A star marks a prediction over {FEW_SEGMENTS} segments: a layer
keeps nothing of a segment that it is through with. Where memory grows more slowly than claimed, part of
it is a work space of a fixed size, or scores that the claim counts are not stored.

{table(sizes, names, found)}"""


def main() -> int:
    """Measure everything, print a line a figure, and write the table anew with each; returns the exit status:
    2 for a mistake in the command, before anything is measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.bench_layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes a figure (default 3)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these and dense, instead of all")
    parser.add_argument("--out", default="results/layers", help="folder of the table")
    arguments = parser.parse_args()
    loaded: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "layers.yaml"))
    sizes = Sizes(**loaded)
    names = list(dict.fromkeys(["dense", *(arguments.only or variants.names())]))
    try:
        if arguments.rounds < 1:
            raise ConfigError(f"--rounds={arguments.rounds}: allowed is 1 or more")
        for name in names:
            _config(sizes, choose("--only", name, variants.names()))
        out = user_path("--out", arguments.out) / "layers.md"
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ConfigError, variants.BrokenVariant, OSError) as error:
        print(f"bench.tools.bench_layers: {printable(error)}", file=sys.stderr)
        return 2
    collect(
        sizes,
        names,
        arguments.rounds,
        lambda found: write_atomically(out, page(sizes, names, arguments.rounds, found)),
    )
    print(out.read_text())
    print(out)
    return 0


if __name__ == "__main__":
    run(main)
