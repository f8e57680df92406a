"""summary.md: the head, the tables with their plots, and the marks explained beneath them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from bench.records import STATUSES
from bench.report import (
    audits,
    budget_tables,
    findings,
    interval_cells,
    markdown,
    memory,
    memory_tables,
    noise_tables,
    rate_tables,
    recall_tables,
    tables,
)
from bench.report.collect import UNKNOWN, Collected
from bench.report.findings import Plots
from bench.report.groups import COMMON, FIT, PAYOFF, describe
from bench.report.markdown import escape
from bench.report.statistics import DRIFT_LIMIT, LEAK_LIMIT

NOTES = {
    tables.LEAK: f"the gate measured a leak of more than {LEAK_LIMIT:g}: with a causal objective it sees the "
    "future, so its perplexity is not ranked and stands after the leak-free ones",
    tables.PREDICTED: "predicted, not measured",
    tables.DRIFT: f"parameters differ from dense by more than {DRIFT_LIMIT:.0%}: not like for like",
    **interval_cells.NOTES,
}


@dataclass(frozen=True)
class Found:
    """The aggregated frames of a report, each as the module of its name makes it; any may be empty."""

    cost: pd.DataFrame
    quality: pd.DataFrame
    parts: pd.DataFrame
    recomputation: pd.DataFrame
    predictions: pd.DataFrame
    fits: pd.DataFrame
    payoff: pd.DataFrame
    rates: pd.DataFrame
    recall: pd.DataFrame
    curves: pd.DataFrame
    findings: findings.Findings
    noise: pd.DataFrame

    @property
    def answers(self) -> pd.DataFrame:
        """Of `recall`, what each variant comes to at its best learning rate."""
        return self.recall if self.recall.empty else self.recall[self.recall["best"]]


def dates(frame: pd.DataFrame) -> str:
    """The day or days on which the cells started, from the first to the last."""
    days = sorted(frame["started_at"].dropna().astype(str).str[:10].unique())
    if not days:
        return UNKNOWN
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def machines(frame: pd.DataFrame) -> str:
    """Each machine in a phrase: the device's name, the CPU and the threads."""
    found = frame.assign(cpu_model=frame["cpu_model"].fillna(UNKNOWN))
    phrases = []
    each = zip(found["machine"], found["cpu_model"], found["threads"], strict=True)
    for machine, cpu, threads in sorted(set(each)):
        same = found[found["machine"] == machine]
        if cpu == UNKNOWN and (same["cpu_model"] != UNKNOWN).any():
            continue  # a cell that failed early on a machine that others name
        words = [machine, *([f"CPU {cpu}"] if cpu not in (UNKNOWN, machine) else []), f"{threads} threads"]
        phrases.append(", ".join(words))
    return "; ".join(phrases)


def text(collected: Collected, found: Found, plots: Plots, notes: Sequence[str] = ()) -> str:
    """The whole of summary.md; `notes` are more lines of its head."""
    frame = collected.frame.assign(leaks=collected.frame["leak_max_abs"] > LEAK_LIMIT)
    parts = [
        _head(collected, found, notes),
        _cost(found.cost, plots),
        findings.text(found.findings, plots),
        _memory(found, plots.get("memory", ())),
        _fits(found.fits, plots.get("fits", ())),
        _payoff(found.payoff, plots.get("payoff", ())),
        _quality(found.quality, plots.get("quality", ())),
        _recall(found.answers, plots.get("recall", ())),
        _rates(found.rates, plots.get("rates", ())),
        _training(plots.get("training", ())),
        _section("Parameters", tables.parameters(found.cost), [tables.DRIFT]),
        _section(
            "Gates",
            tables.gates(frame),
            [tables.LEAK],
            "What was checked before anything was timed, the worst over an experiment's records. *leak*: how "
            "far outputs before a cut move when the tokens after it change. *reference error*: how far the "
            "fast path is from the readable one. *counted / formula*: FLOPs that attention dispatched "
            "in a forward pass over those of the variant's formula.",
        ),
        _section("Contaminated", noise_tables.contaminated(frame), []),
        _section("Did not finish", tables.failures(collected.frame), []),
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, body: str, marks: Sequence[str], lead: str = "") -> str:
    """A section with the marks that its body uses explained beneath; nothing for an empty body."""
    return markdown.section(title, body, {mark: NOTES[mark] for mark in marks}, lead)


def facts(collected: Collected, found: Found) -> dict[str, str]:
    """What the head says of an experiment, by name: machine, dates, versions, counts, noise."""
    frame = collected.frame
    counts = frame["status"].value_counts()
    statuses = ", ".join(f"{counts[s]} {s}" for s in STATUSES if s in counts)
    replicates = frame["replicate"].nunique()
    return {
        "machine": machines(frame),
        "dates": dates(frame),
        "torch": ", ".join(sorted(frame["torch_version"].dropna().unique())) or UNKNOWN,
        "records": f"{len(frame)}, of {replicates} replicate{'s' if replicates > 1 else ''}",
        "statuses": statuses,
        **noise_tables.facts(found.noise),
        **audits.facts(collected.every),
    }


def _head(collected: Collected, found: Found, notes: Sequence[str]) -> str:
    names = ", ".join(sorted(collected.frame["name"].unique()))
    lines = [
        f"# {escape(names)}\n",
        *(f"- {key}: {escape(value)}" for key, value in facts(collected, found).items()),
    ]
    lines += [f"- **{escape(warning)}**" for warning in (*notes, *warnings(collected))]
    lines += [f"  - {escape(problem)}" for problem in collected.problems]
    return "\n".join(lines) + "\n"


def warnings(collected: Collected) -> list[str]:
    """What a reader must know before trusting a comparison; unread files come last."""
    frame, found = collected.frame, []
    mixed = frame.groupby("variant")["code_sha256"].nunique()
    names = [str(name) for name in mixed.index[mixed > 1]]
    if names:
        found.append(f"measured by several versions of the code: {', '.join(names)}")
    if collected.stale:
        found.append(_stale(collected))
    if ahead := sum(record.in_future(time.time()) for record in collected.records):
        found.append(
            f"{ahead} records are dated in the future: a clock ran ahead as they were measured; "
            "python -m bench.records check lists them"
        )
    if collected.alike:
        found.append(
            f"{collected.alike} records share every key and the replicate with another: they differ in a "
            "setting that a record does not name, and are aggregated together"
        )
    found += noise_tables.warning(frame)
    if collected.problems:
        found.append(f"{len(collected.problems)} files that cannot be read were left out:")
    return found


def _stale(collected: Collected) -> str:
    """How many records were left out, and why."""
    counts = Counter(" ".join(why.split()[:3]) for why in collected.stale.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return (
        f"{len(collected.stale)} older records left out ({reasons} of before): their configurations were "
        "measured again since; python -m bench.records check lists them"
    )


def _cost(cells: pd.DataFrame, plots: Plots) -> str:
    lead = (
        "A step is one forward and backward over batch × length tokens. Figures are medians over replicates, "
        "each replicate a process of its own; *time / dense* is the median of the ratios within a replicate. "
        "The 95 % interval is Student's t of the logarithms. *algorithmic* FLOPs count the pairs a pattern "
        "allows, *executed* what was dispatched, recomputation and padding included, *attention* the "
        "algorithmic part that is not a projection, feed-forward or output layer."
    )
    several = cells["activations"].nunique() > 1
    parts, folded = [], []
    seen: dict[str, str] = {}
    for heading, keys, group in tables.headed(cells):
        part = f"{escape(keys)}\n\n{markdown.table(tables.cost(group))}"
        baseline = group["baseline"].dropna().unique()
        if len(baseline) and baseline[0] != "dense":
            part += f"\ndense here is {escape(baseline[0])}.\n"
        first = group.iloc[0]
        # Of a task with several knobs the costs hardly differ.
        repeated = seen.setdefault(first["data"], first["corpus"]) != first["corpus"]
        if repeated or (several and first["activations"] != memory.BASELINE):
            folded.append(markdown.folded(heading, part))
        else:
            parts.append(f"### {escape(heading)}\n\n{part}")
    pictures = [markdown.image(*plot) for plot in plots.get("cost", ())]
    linked = {"depths": "Against depth", "others": "The same with activations saved otherwise"}
    for section, words in linked.items():
        if links := ", ".join(f"[{escape(title)}]({path}.png)" for title, path in plots.get(section, ())):
            pictures.append(f"{words}: {links}.\n")
    body = "\n".join([*pictures, *parts, *folded])
    marks = [tables.LEAK, *interval_cells.NOTES, tables.PREDICTED]
    return _section("Cost", body, marks, lead)


def _memory(found: Found, plots: Sequence[tuple[str, str]]) -> str:
    lead = (
        "The peak is the most that is live at any time of a step; *saved activations* is what the forward "
        "pass leaves for the backward pass."
    )
    body = "\n".join(
        part
        for part in (
            *(markdown.image(*plot) for plot in plots),
            _recomputation(found.recomputation),
            _predictions(found.predictions),
        )
        if part
    )
    return _section("Memory", body, [interval_cells.CONTAMINATED, tables.PREDICTED], lead)


def _recomputation(cells: pd.DataFrame) -> str:
    if cells.empty:
        return ""
    lead = (
        "What each way of saving activations costs beside `keep`, at the longest length and the greatest "
        "depth that the ways share; recomputation.csv has every cell. A ratio is the median over replicates, "
        "each against `keep` in the same replicate. *rebuild error*: the largest error of a block's input "
        "as a reversible network's backward pass rebuilt it, relative to the input's largest entry, worst of "
        "all blocks. *gradient error*: the largest difference of a gradient from what stored activations "
        "give, relative to the largest entry of any."
    )
    parts = []
    for _, keys, group in tables.headed(cells, COMMON):
        at = memory.shared(group)
        where = f"{keys}, length {at['seq_len'].iloc[0]}, depth {at['depth'].iloc[0]}"
        parts.append(f"{escape(where)}\n\n{memory_tables.recomputation(at)}")
    return "\n".join([f"### Cost of recomputation\n\n{lead}\n", *parts])


def _predictions(errors: pd.DataFrame) -> str:
    body = memory_tables.predictions(errors)
    if not body:
        return ""
    lead = (
        "Peaks predicted without running, against the measured ones: the error is predicted over measured, "
        "less 1. Median and 95th percentile are without its sign. A cell is one replicate."
    )
    far = memory_tables.far_off(errors)
    named = (
        f"Further off than {memory.FAR:.0%}:\n\n{far}"
        if far
        else f"No cell is off by more than {memory.FAR:.0%}.\n"
    )
    return f"### Prediction against measurement\n\n{lead}\n\n{body}\n{named}"


def _fits(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    if cells.empty:
        return ""
    lead = (
        "The longest sequence at the given batch, and the largest batch at the given length, whose training "
        "step fits into the budget: found by prediction, to within 1 %, nothing is run. ≥ marks where the "
        "search ends."
    )
    parts = [markdown.image(*plot) for plot in plots]
    for heading, keys, group in _by_budget(cells, FIT):
        parts.append(f"### {escape(heading)}\n\n{escape(keys)}\n\n{budget_tables.fits(group)}")
    return _section("What fits", "\n".join(parts), [], lead)


def _payoff(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    if cells.empty:
        return ""
    lead = (
        "Does saved memory buy speed? Throughput at the largest batch that is predicted to fit into the "
        "budget. Figures are medians over replicates, */ keep* the median of the ratio within a replicate."
    )
    parts = [markdown.image(*plot) for plot in plots]
    for heading, keys, group in _by_budget(cells, (*PAYOFF, "depth")):
        parts.append(f"### {escape(heading)}\n\n{escape(keys)}\n\n{budget_tables.payoff(group)}")
    marks = [interval_cells.OF_TWO, interval_cells.CONTAMINATED, tables.PREDICTED]
    return _section("Batch payoff", "\n".join(parts), marks, lead)


def _by_budget(cells: pd.DataFrame, keys: Sequence[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """As tables.headed, with the budget and the length in every heading."""
    found = []
    for heading, words, group in tables.headed(cells, keys):
        fixed = [k for k in ("budget_bytes", "seq_len") if cells[k].nunique() == 1]
        first = {k: group[k].iloc[0] for k in fixed}
        found.append((", ".join(w for w in (heading, describe(first, fixed)) if w), words, group))
    return found


def _quality(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    lead = (
        "Perplexity is the mean ± standard deviation over replicates. Ranks hold within one length, model "
        "and training budget, and one *stride*: by so many tokens each window of a document starts after the "
        "one before, and past a window's length into a document every target has *context* of at least so "
        "many tokens. A *state* that is carried is carried over whole documents; *reset* is the perplexity "
        "of the same model with state fresh in every window. *looks back*: the shortest history from which "
        "on the loss is within 0.01 nats of the full one, with its 95 % interval over targets, the widest "
        "of any replicate's. *unigram* is the perplexity of a model that knows only how often each token "
        "occurs: what does not beat it has learnt nothing from context."
    )
    text = cells[cells["accuracy_mean"].isna()]  # answers are a section of their own
    body = _by_heading(
        text, ("objective", "corpus"), lambda group: markdown.table(tables.quality(group)), plots
    )
    return _section("Quality", body, [tables.LEAK], lead)


def _by_heading(
    cells: pd.DataFrame,
    keys: Sequence[str],
    show: Callable[[pd.DataFrame], str],
    plots: Sequence[tuple[str, str]],
) -> str:
    """The plots, then a table for each value of the keys; nothing without cells."""
    if cells.empty:
        return ""
    parts = [f"### {escape(heading)}\n\n{show(group)}" for _, heading, group in tables.headed(cells, keys)]
    return "\n".join([*(markdown.image(*plot) for plot in plots), *parts])


def _recall(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    lead = (
        "The share of answers that are right: the mean ± standard deviation over replicates. *guessing* is "
        "what comes of guessing among the values in the context, or of always naming the most frequent "
        "class: what does not beat it has learnt nothing of the task. *state*: the bytes that all layers "
        "carry to the next token. *reaches*: how many tokens before the last the farthest lies that its "
        "output can depend on, by the variant's pattern; a dash where the content decides. Where several "
        "learning rates were tried, all figures are at a variant's best, by the least mean loss."
    )
    body = _by_heading(cells, ("objective", "data", "d_model", "heads"), recall_tables.accuracies, plots)
    return _section("Recall", body, [tables.LEAK], lead)


def _rates(cells: pd.DataFrame, plots: Sequence[tuple[str, str]]) -> str:
    lead = (
        "Each variant's best learning rate of those tried: that of the least mean loss over replicates, none "
        "of which diverged. Where it is the lowest or the highest tried, a better one may lie beyond. On the "
        "split *validation* it is chosen on text that a comparison does not score."
    )
    body = _by_heading(cells, ("objective", "corpus", "d_model", "heads"), rate_tables.rates, plots)
    return _section("Learning rates", body, [tables.LEAK], lead)


def _training(plots: Sequence[tuple[str, str]]) -> str:
    lead = "The loss on the batches that were trained on, each before its update; curves/ has every cell's."
    return _section("Training", "\n".join(markdown.image(*plot) for plot in plots), [], lead)
