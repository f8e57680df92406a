"""Negative log-likelihood on held-out documents, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """Sums over the targets that were scored, by the position of their input in its row of a batch."""

    nats: Floats
    """(T,) negative log-likelihood."""
    counts: Floats
    """(T,) number of targets."""
    symbols: npt.NDArray[np.int64]
    """(V,) how often each token was the target."""

    @property
    def tokens(self) -> int:
        """Targets scored."""
        return int(self.counts.sum())

    @property
    def nll(self) -> float:
        """Mean over all targets."""
        return float(self.nats.sum() / self.counts.sum())

    def by(self, bucket: npt.NDArray[np.int64]) -> list[float]:
        """The mean over each bucket, given the bucket (T,) of each position; NaN where one has no target."""
        counts = np.bincount(bucket, self.counts)
        means = np.bincount(bucket, self.nats) / np.where(counts, counts, np.nan)
        return [float(mean) for mean in means]

    def by_offset(self, length: int) -> list[float]:
        """The mean at each place of a chunk or segment of `length` tokens, where they start at position 0."""
        return self.by(np.arange(len(self.nats)) % length)

    def by_place(self, period: int) -> list[float]:
        """The mean by place in parts of `period` tokens, over all of a window's parts but the first.

        Element 0 is the first place and element k > 0 places 2^(k − 1) to 2^k − 1, so where the period is a
        power of two, the last element is the second half. The first part is left out because nothing
        comes before it, however a model is fed. Empty where there is no other.
        """
        later = replace(self, nats=self.nats[period:], counts=self.counts[period:])
        place = np.arange(len(later.nats)) % period
        return later.by(np.frexp(place)[1].astype(np.int64)) if len(place) else []


def position_buckets(seq_len: int) -> npt.NDArray[np.int64]:
    """(T,) bucket of each position: bucket k holds positions 2^k − 1 to 2^(k+1) − 2."""
    return np.asarray(np.floor(np.log2(np.arange(1, seq_len + 1))), dtype=np.int64)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """No gradients and no dropout, and what a variant draws is the same each time."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def token_nll(logits: Tensor, targets: Tensor, row: Tensor, column: Tensor) -> Floats:
    """(n,) −ln p of n targets, by logits (B, T, V) at their rows and columns."""
    device = logits.device
    whole = len(row) == logits.shape[0] * logits.shape[1]  # then nothing has to be copied
    picked = logits.flatten(0, 1) if whole else logits[row.to(device), column.to(device)]
    nll = F.cross_entropy(picked, targets.to(device), reduction="none")
    return np.asarray(nll.double().cpu().numpy(), dtype=np.float64)


def tally(model: LanguageModel, batches: Iterable[Batch], *, causal: bool, device: torch.device) -> Tally:
    """Score every target of the batches, state fresh in every row and carried to its end.

    Rows may be of any length: a plan of segments is gone through segment by segment, and the logits of
    one are all that is held. Sums are float64, since many numbers are added.
    """
    nats, counts = np.zeros(0), np.zeros(0)
    symbols = np.zeros(model.vocabulary, dtype=np.int64)
    with evaluating(model):
        for batch in batches:
            length = batch.targets.shape[1]
            if length > len(nats):
                nats, counts = (np.pad(sums, (0, length - len(sums))) for sums in (nats, counts))
            for segment, out in model.stream(batch.inputs.to(device), causal=causal):
                targets = batch.targets[:, segment]
                row, column = (targets != IGNORED).nonzero(as_tuple=True)
                if not len(row):
                    continue
                wanted = targets[row, column]
                nll = token_nll(out.logits, wanted, row, column)
                place = segment.start + column.numpy()
                nats += np.bincount(place, nll, minlength=len(nats))
                counts += np.bincount(place, minlength=len(counts))
                symbols += np.bincount(wanted.numpy(), minlength=len(symbols))
    return Tally(nats, counts, symbols)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one evaluation. nll in nats a scored token; the rest follows from it."""

    nll: float
    """With state carried over whole documents, for a model that has any."""
    nll_reset: float | None
    """The same targets with state fresh in every window; None for a model without state."""
    perplexity: float
    bits_per_byte: float | None
    word_perplexity: float | None
    unigram_perplexity: float
    nll_by_position: list[float]
    """By position in the window, with state fresh in every window."""
    nll_by_place: list[float] | None
    """By `Tally.by_place`, over the same windows; None where no period was given."""
    tokens: int


def evaluate(
    model: LanguageModel,
    windows: Iterable[Batch],
    *,
    documents: Iterable[Batch] | None = None,
    objective: str,
    words_per_byte: float,
    unigram_nats: Floats,
    device: torch.device,
    place_period: int = 0,
) -> Quality:
    """Sum the nll of every scored target in float64 and divide once.

    `documents` are the same targets again, in rows that are whole documents: for models that carry
    state. Their nll is the one of `documents`; that of `windows`, in each of which state starts afresh,
    is what compares with other models at an equal context.

    The nll by position is over windows, whichever the model. A position is the number of tokens of the
    window before a target's own input, so bucket k has seen 2^k to 2^(k+1) − 1 tokens. Where windows
    overlap, each scores the targets that no window before it had: early positions are then those of a
    document's first T tokens alone, and have fewer targets.

    Bits per byte and word-level perplexity describe a code of the text and exist for clm alone;
    the latter uses the corpus's fixed words per byte, as PG-19's authors do (arXiv:1911.05507, §4.1).
    A bucket without a scored target is NaN. `unigram_perplexity` is that of byte frequencies in the
    training split on the same targets: what a model that reads no context reaches.
    """
    causal = objective == "clm"
    reset = tally(model, windows, causal=causal, device=device)
    carried = None if documents is None else tally(model, documents, causal=causal, device=device)
    assert carried is None or np.array_equal(carried.symbols, reset.symbols)  # the same targets
    nats = (carried or reset).nll
    unigram = float(reset.symbols[: len(unigram_nats)] @ unigram_nats) / reset.tokens
    return Quality(
        nll=nats,
        nll_reset=reset.nll if carried else None,
        perplexity=_exp(nats),
        bits_per_byte=nats / math.log(2) if causal else None,
        word_perplexity=_exp(nats / words_per_byte) if causal else None,
        unigram_perplexity=_exp(unigram),
        nll_by_position=reset.by(position_buckets(len(reset.nats))),
        nll_by_place=reset.by_place(place_period) if place_period else None,
        tokens=reset.tokens,
    )


def _exp(nats: float) -> float:
    """e^nats; infinite where no float is as large."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))
