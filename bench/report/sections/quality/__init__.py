"""How well the variants model text: bits per byte, how far back they look, loss by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import SETTING
from bench.report.data.ranking import Ranking
from bench.report.data.statistics import quality as quality_of
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.quality.by_position import by_answer, by_history, by_position
from bench.report.sections.quality.plots import context, losses
from bench.report.sections.quality.tables import comparable, families, quality
from bench.report.text.marks import LEAK, NO_BASELINE, UNDERTRAINED, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table


@dataclass(frozen=True)
class Trained:
    """The models with their ranks, of text and of tasks that ask for an answer, and the records they come
    from."""

    ranking: Ranking
    records: pd.DataFrame

    @property
    def cells(self) -> pd.DataFrame:
        """The `statistics.quality_cells`."""
        return self.ranking.cells


class Quality(Section[Trained]):
    """Its tables are of text; answers are a section of their own."""

    name = "quality"
    order = 100
    title = "Quality"
    lead = (
        "Bits per byte and perplexity (per token) are means ± standard deviations over replicates. Rows "
        "that say *baseline* are no models: *n-gram tables* count the bytes that the models were trained "
        "on, and compressors read only the scored bytes, with a window as long as the models' context. "
        "What is worse than the 3-gram table beside it is not ranked. A *rank* is a range: from one more "
        "than the number of models that are certainly better to the number of those that are not "
        "certainly worse, with 95 % for all pairs together (Holm's correction). Models whose ranges do "
        "not meet are certainly different; differences.csv has every pair. *− dense* is the mean "
        "difference to dense on the same targets and replicates, in bits per byte (of masked text in nats "
        "per token), with its 95 % interval over replicates and text, which holds for this row alone. "
        "Ranks hold within one length, model and training budget, and one *stride*: by so many tokens "
        "each window of a document starts after the one before, and past a window's length into a "
        "document every target has *context* of at least so many tokens. A *state* that is carried is "
        "carried over whole documents; *reset* are the bits per byte of the same model with state fresh "
        "in every window. *looks back*: the shortest history from which on the loss is within 0.01 nats "
        "of the full one, with its 95 % interval over targets, the widest of any replicate's; *hurt by "
        "more than* so many tokens: with the full history the loss is certainly higher, by the nats that "
        "follow. *unigram* is the perplexity of a model that knows only how often each token occurs: what "
        "does not beat it has learnt nothing from context. *tokens dropped*: the share of tokens for which "
        "their expert has no room; *busiest expert*: the share of tokens that are sent to the most used "
        "expert of a layer, at most. *visits / token*: the blocks that a token goes through, where the depth "
        "schedule decides this for each token."
    )
    marks = meanings(LEAK, UNDERTRAINED, NO_BASELINE)
    figures_alone = False
    csv = ("differences",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Trained:
        """One row a cell, training and state policy."""
        return Trained(quality_of(records.kinds.plain), records.kinds.plain)

    def tables(self, data: Trained) -> list[Table]:
        """A table a data set, leak-free cells first, best first."""
        text = data.cells[data.cells["accuracy_mean"].isna()]
        return [
            Table(
                quality(group),
                heading,
                note=" ".join(filter(None, (families(group), comparable(group)))),
                caption=f"Quality: {heading}. Mean and standard deviation over replicates",
            )
            for _, heading, group in (headed(text, ("objective", "corpus")) if len(text) else ())
        ]

    def csv_tables(self, data: Trained) -> dict[str, pd.DataFrame]:
        """A row for each comparison of two models of a pool."""
        return {"differences": data.ranking.pairs} if len(data.ranking.pairs) else {}

    def figures(self, data: Trained) -> list[FigureSpec]:
        """Dots by variant, and curves by position and by history."""
        kinds = (
            ("held_out_loss", "Loss on held-out text", data.cells, losses),
            ("effective_context", "How far back it looks", data.cells, context),
            ("nll_by_position", "Loss by position", data.records, by_position),
            ("nll_by_history", "Loss by how far back is read", data.records, by_history),
            ("nll_by_answer", "Loss by answer of a dialogue", data.records, by_answer),
        )
        return [
            FigureSpec(stem, title, cells, draw, SETTING, all_variants=draw in (losses, context))
            for stem, title, cells, draw in kinds
        ]


SECTIONS: Sequence[Section[Any]] = (Quality(),)
