"""`python -m bench.tools.check my_variant window=64`: does a variant keep its promises?

Runs the gates of the benchmark on a variant, a plug-in of another package included, at lengths that are no
multiple of any block, in each direction that it supports: no output depends on a later token; the fast path
equals the reference in outputs and gradients, in float32 and with bfloat16; strategies for activations give
the same gradients; sequences of a batch do not reach each other; the dispatched FLOPs are those of the
formula; the mixer is one graph for torch.compile; the state does not shrink with the sequence; and a long
sequence can be planned on fake tensors. If the variant can be decoded, a prompt and steps give the outputs of
the parallel pass, from states of the stated size. Every knob must have a meaning, those for numbers must have
bounds, and `unsupported` must agree with the capabilities. Exit status 1 if a check fails.

Over 300 lines: each check is a short function.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import variants
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from bench.measure import gates, predict, step
from bench.measure.decoding_gate import decoding_error
from bench.measure.gate_failed import GateFailed
from bench.measure.reference_gate import reference_error
from bench.model.decode import Decoder, decoding_bytes
from bench.scenarios.decoding import reason_not_to_decode
from bench.scenarios.figures import flop_figures
from bench.scenarios.support import Unsupported, check_supported
from bench.tasks.base import Batch
from variants.base import Workload
from variants.knobs import Knob, Knobs, as_text, knobs_of
from variants.safe_output import run

LENGTHS = (1, 64, 97, 600)
"""Tokens of the checks: one, a multiple of blocks, and two that are none; 600 is past the default windows."""
LONG = 65_536
"""Tokens of the plan."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """What came of one check: `found` is None if it failed, with the reason."""

    what: str
    found: str | None
    reason: str = ""

    def __str__(self) -> str:
        return f"ok      {self.what}: {self.found}" if self.found else f"FAILED  {self.what}: {self.reason}"


def main() -> int:
    """Print a line for each check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.check", description=__doc__)
    parser.add_argument("variant", help="its name, as python -m variants --names prints it")
    parser.add_argument("knobs", nargs="*", metavar="knob=value", help="knobs of the variant")
    parser.add_argument("--tokens", nargs="+", type=int, default=[*LENGTHS], help="lengths of the checks")
    given = parser.parse_args()
    try:
        spec = cell(given.variant, given.knobs)
    except (ConfigError, ValueError, variants.BrokenVariant, variants.PluginClash) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    failed = 0
    for outcome in outcomes(spec, given.tokens):
        print(outcome, flush=True)
        failed += outcome.found is None
    if failed:
        print(f"error: {failed} checks failed", file=sys.stderr)
    return 1 if failed else 0


def cell(variant: str, knobs: list[str]) -> CellSpec:
    """A small cell with this variant. Raises ValueError for an unknown knob or value."""
    pairs = [text.partition("=") for text in knobs]
    values = {name.removeprefix("variant."): yaml.safe_load(value) for name, _, value in pairs}
    return CellSpec(
        variant=variant,
        variant_params=variants.load(variant).Config.of(values).as_dict(),
        seq_len=LENGTHS[-1],
        depth=2,
        batch_size=2,
        replicate=0,
        objective="clm",
        device="cpu",
        dtype="float32",
        activations="keep",
        model=ModelSizes(d_model=32, heads=2),
        data=DataSpec(name="plays"),
        measure=MeasureSpec(),
    )


def outcomes(spec: CellSpec, lengths: Sequence[int] = LENGTHS) -> Iterator[Outcome]:
    """Every check of the variant, in each direction and at each length that it supports; those that take
    long at the last length only."""
    yield _tried("knobs", lambda: _knobs(spec.variant))
    yield _tried("capabilities", lambda: _capabilities(spec))
    with tempfile.TemporaryDirectory() as folder:
        for objective in ("clm", "mlm"):
            for seq_len in lengths:
                one = replace(spec, objective=objective, seq_len=seq_len)
                where = f"{'causal' if one.causal else 'bidirectional'}, {seq_len} tokens"
                try:
                    check_supported(one)
                except Unsupported as reason:
                    yield Outcome(where, f"not supported: {reason}")
                    continue
                yield from _at(one, where, Path(folder))
                if seq_len == lengths[-1]:
                    yield from _at_the_last(one, where, Path(folder))


def _at(spec: CellSpec, where: str, folder: Path) -> Iterator[Outcome]:
    yield _tried(f"{where}, gates", lambda: _gates(spec, folder))
    yield _tried(f"{where}, gates with bfloat16", lambda: _gates(replace(spec, dtype="bfloat16"), folder))
    yield _tried(f"{where}, sequences of a batch", lambda: _isolated(spec))
    yield _tried(f"{where}, FLOPs", lambda: _flops(spec))
    if spec.causal:
        yield _tried(f"{where}, decoding", lambda: _decoding(spec))


def _at_the_last(spec: CellSpec, where: str, folder: Path) -> Iterator[Outcome]:
    for activations in ("checkpoint", "reversible"):
        stored = replace(spec, activations=activations)
        yield _tried(f"{where}, activations {activations}", partial(_gates, stored, folder))
    yield _tried(f"{where}, one graph", lambda: _one_graph(spec))
    yield _tried(f"{where}, state", lambda: _state(spec))
    longer = replace(spec, seq_len=LONG, batch_size=1)
    yield _tried(f"{where.partition(',')[0]}, a plan of {LONG:,} tokens", lambda: _plan(longer))


def _tried(what: str, check: Callable[[], str]) -> Outcome:
    try:
        return Outcome(what, check())
    except Unsupported as reason:
        return Outcome(what, f"not supported: {reason}")
    except Exception as error:  # whatever the code of a variant raises
        first = (str(error).strip().splitlines() or [""])[0]
        return Outcome(what, None, f"{type(error).__name__}: {printable(first)}")


def _gates(spec: CellSpec, folder: Path) -> str:
    check_supported(spec)
    figures = gates.check(spec, folder, "")
    named = {
        "leak": figures.leak_max_abs,
        "reference": figures.reference_max_abs,
        "recomputed": figures.recompute_max_abs,
        "reference with bfloat16 (rms)": figures.dtype_reference_rms,
    }
    return ", ".join(f"{name} {value:.1e}" for name, value in named.items() if value is not None) or "equal"


def _model(spec: CellSpec) -> Any:
    return predict.build_model(spec).eval()


def _isolated(spec: CellSpec) -> str:
    """The logits of a sequence do not depend on the other sequence of its batch."""
    model = _model(spec)
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2, spec.seq_len), generator=source)
    other = tokens.clone()
    other[1] = torch.randint(256, (spec.seq_len,), generator=source)
    with torch.no_grad():
        logits = []
        for batch in (tokens, other):
            torch.manual_seed(0)
            segments = [out.logits for _, out in model.stream(batch, causal=spec.causal)]
            logits.append(torch.cat(segments, dim=1))
    error = float((logits[0][0] - logits[1][0]).abs().max())
    if error > gates.LEAK_TOLERANCE:
        raise GateFailed(f"a sequence changes by {error:.1e} with another sequence of its batch")
    return f"change {error:.1e}"


def _flops(spec: CellSpec) -> str:
    def batch() -> Batch:
        tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.int64)
        return Batch(tokens, tokens.clone())

    subject, figures = step.on_host(lambda: predict.subject(spec, batch, CPU))
    found = flop_figures(spec, subject.model, figures, source="dispatched")
    reason = f" ({found['cost_ratio_reason']})" if found["cost_ratio_reason"] else ""
    return f"{found['cost_ratio']:.3f} times the formula{reason}"


def _decoding(spec: CellSpec) -> str:
    if reason := reason_not_to_decode(spec):
        return f"not decoded: {reason}"
    _, _, dims = spec.attention()
    error = decoding_error(spec, dims, spec.depth, CPU)
    model = _model(spec)
    held = Decoder(model, spec.batch_size, spec.seq_len).nbytes
    stated = decoding_bytes(model, replace(spec.workload(), element_bytes=4))
    if held != stated:
        raise GateFailed(f"decoding gate: states of {held:,} bytes; {stated:,} are stated")
    if model.input_schedule.open_windows(spec.seq_len) == [spec.seq_len]:
        state = _state_bytes(spec)(spec.seq_len)
        one = decoding_bytes(model, replace(spec.workload(), batch_size=1, element_bytes=4))
        if one < state:
            raise GateFailed(f"state_bytes of a sequence is {state:,}, and decoding holds {one:,}")
    return f"error {error:.1e}, states of {held:,} bytes"


def _knobs(variant: str) -> str:
    declared = variants.declared(variant)
    if missing := knobs_of(declared.config).keys() - declared.meanings.keys():
        raise GateFailed(f"{', '.join(sorted(missing))}: no meaning; write a string below the field")
    check_refusals(declared.config)
    return f"{len(knobs_of(declared.config))} with a meaning and bounds"


def check_refusals(config: type[Knobs]) -> None:
    """Raise GateFailed if a knob for numbers has no bounds, accepts a number just outside of them, or refuses
    it without its name."""
    for name, knob in knobs_of(config).items():
        if knob.number is not None and not _outside(knob):
            raise GateFailed(f"{name} has no bounds; state them: knob(…, least=…)")
        for number in _outside(knob):
            bad = (number,) if knob.is_list else number
            shown = f"{name}={as_text(bad)}"
            try:
                config(**{name: bad})
            except ValueError as error:
                if str(error).startswith(f"{shown}: allowed is "):
                    continue
                raise GateFailed(f"{shown}: the message does not begin with the knob: {error}") from None
            raise GateFailed(f"{shown} is accepted")


def _outside(knob: Knob) -> list[float]:
    """Numbers that are just outside of the stated bounds of a knob."""
    declared = knob.declaration
    found = [bound for bound in (declared.above, declared.below) if bound is not None]
    for bound, way in ((declared.least, -1), (declared.most, 1)):
        if bound is not None:
            found.append(math.nextafter(bound, way * math.inf) if knob.number is float else bound + way)
    if declared.multiple not in (None, 1):
        found.append(declared.multiple + 1)
    return found


def _capabilities(spec: CellSpec) -> str:
    variant, config, dims = spec.attention()
    caps = variant.info_for(config).caps
    for causal, can in ((True, caps.causal), (False, caps.bidirectional)):
        reason = variant.unsupported(config, dims, causal=causal)
        if (reason is None) != can or (reason is not None and not reason.strip()):
            raise GateFailed(f"causal={causal}: caps say {can}, unsupported returns {reason!r}")
    return "agree with unsupported"


def _one_graph(spec: CellSpec) -> str:
    """The mixer and its gradients are traced as one graph, without code generation."""

    def traced(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

    variant, config, dims = spec.attention()
    schedule = spec.model_spec().input
    torch.compiler.reset()
    errors = [
        reference_error(
            slot.layer, slot.config, dims, 0, CPU, causal=spec.causal, schedule=schedule, wrap=traced
        )
        for slot in dict.fromkeys(variant.mixers(config))
    ]
    return f"reference {max(errors):.1e}"


def _state(spec: CellSpec) -> str:
    return f"up to {check_state(_state_bytes(spec)):,} bytes"


def _state_bytes(spec: CellSpec) -> Callable[[int], int]:
    """Return the function that gives the stated bytes of a sequence's state after so many tokens."""
    model, (_, _, dims) = _model(spec), spec.attention()

    def bytes_after(tokens: int) -> int:
        work = Workload(
            batch_size=1,
            seq_len=tokens,
            d_model=dims.d_model,
            heads=dims.heads,
            causal=spec.causal,
            element_bytes=4,
        )
        size: int = model.state_bytes(work)
        return size

    return bytes_after


def check_state(bytes_after: Callable[[int], int]) -> int:
    """Return the largest state, in bytes, of up to 4,095 tokens.

    Raises GateFailed for a size that is no whole number from 0 on, or if the largest of a stretch of lengths
    is less than that of a shorter one: within a stretch, a block that ends may be let go.
    """
    largest = 0
    for power in range(6):
        sizes = {tokens: bytes_after(tokens) for tokens in range(4**power, 4 ** (power + 1))}
        for tokens, size in sizes.items():
            if type(size) is not int or size < 0:
                raise GateFailed(
                    f"state_bytes after {tokens} tokens is {size!r}; allowed is an integer from 0"
                )
        if max(sizes.values()) < largest:
            raise GateFailed(f"state_bytes shrinks from {largest:,} after {4**power} tokens")
        largest = max(sizes.values())
    return largest


def _plan(spec: CellSpec) -> str:
    check_supported(spec)
    figures = predict.Prediction(spec).predict()
    return f"{figures.peak_bytes / 2**20:,.0f} MiB"


if __name__ == "__main__":
    run(main)
