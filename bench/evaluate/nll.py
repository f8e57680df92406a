"""Negative log-likelihood on held-out documents, and the figures derived from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model.language_model import LanguageModel
from bench.model.outputs import every_output
from bench.tasks.base import IGNORED, Batch
from bench.tasks.windows import Numbered

Floats = npt.NDArray[np.float64]


class NumberSums:
    """Sums over the scored targets, by a number that each target has: (K,) `nats` and `counts`."""

    def __init__(self) -> None:
        self.nats: Floats = np.zeros(0)
        self.counts: Floats = np.zeros(0)

    def add(self, numbers: npt.NDArray[np.int64], nll: Floats) -> None:
        """Add targets (n,) with their negative log-likelihoods (n,)."""
        if (size := int(numbers.max()) + 1) > len(self.nats):
            self.nats, self.counts = _padded(self.nats, size), _padded(self.counts, size)
        self.nats += np.bincount(numbers, nll, minlength=len(self.nats))
        self.counts += np.bincount(numbers, minlength=len(self.counts))

    def means(self) -> list[float]:
        """Return the mean of each number; NaN for a number without targets."""
        return [float(mean) for mean in self.nats / np.where(self.counts, self.counts, np.nan)]


@dataclass(frozen=True)
class Tally:
    """Sums over the scored targets, by the position of their input in the row of the batch."""

    nats: Floats
    """(T,) sum of negative log-likelihoods, in nats."""
    counts: Floats
    """(T,) number of targets."""
    symbols: npt.NDArray[np.int64]
    """(V,) number of times each token was the target."""
    by_number: tuple[NumberSums, ...] = ()
    """Sums by number, for each series of numbers that `tally` was given."""

    @property
    def tokens(self) -> int:
        """Number of scored targets."""
        return int(self.counts.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood over all targets."""
        return float(self.nats.sum() / self.counts.sum())

    def by(self, bucket: npt.NDArray[np.int64]) -> list[float]:
        """Return the mean over each bucket, given the bucket (T,) of each position;
        NaN for buckets without targets."""
        counts = np.bincount(bucket, self.counts)
        means = np.bincount(bucket, self.nats) / np.where(counts, counts, np.nan)
        return [float(mean) for mean in means]

    def by_offset(self, length: int) -> list[float]:
        """Return the mean at each offset in chunks or segments of `length` tokens, the first of which starts
        at position 0."""
        return self.by(np.arange(len(self.nats)) % length)

    def by_place(self, period: int) -> list[float]:
        """Return the mean by offset in periods of `period` tokens, over all periods of a window except the
        first.

        Element 0 is offset 0, and element k > 0 covers the offsets 2^(k − 1) to 2^k − 1; if the period is a
        power of two, the last element is its second half. The first period is excluded because nothing
        precedes it, for any input schedule. Empty if there is no other period.
        """
        later = replace(self, nats=self.nats[period:], counts=self.counts[period:])
        place = np.arange(len(later.nats)) % period
        return later.by(np.frexp(place)[1].astype(np.int64)) if len(place) else []


def position_buckets(seq_len: int) -> npt.NDArray[np.int64]:
    """(T,) bucket of each position: bucket k contains the positions 2^k − 1 to 2^(k+1) − 2."""
    return np.asarray(np.floor(np.log2(np.arange(1, seq_len + 1))), dtype=np.int64)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Disable gradients and dropout, and make a variant's random draws the same in every evaluation."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def token_nll(logits: Tensor, targets: Tensor, row: Tensor, column: Tensor) -> Floats:
    """(n,) −ln p of n targets, from the logits (B, T, V) at their rows and columns."""
    device = logits.device
    whole = len(row) == logits.shape[0] * logits.shape[1]  # then no copy is needed
    picked = logits.flatten(0, 1) if whole else logits[row.to(device), column.to(device)]
    nll = F.cross_entropy(picked, targets.to(device), reduction="none")
    return np.asarray(nll.double().cpu().numpy(), dtype=np.float64)


def tally(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    causal: bool,
    device: torch.device,
    numbered: Sequence[Iterable[Batch]] = (),
) -> Tally:
    """Score every target of the batches. State is fresh at the start of every row and carried to its end.

    Rows may have any length: if the input schedule has segments, they are processed one by one, and only the
    logits of one segment are in memory. Sums are float64 because many numbers are added. Each of `numbered`
    are the same batches with a number in place of each target.
    """
    nats, counts = np.zeros(0), np.zeros(0)
    symbols = np.zeros(model.vocabulary, dtype=np.int64)
    by_number = tuple(NumberSums() for _ in numbered)
    with evaluating(model):
        for batch, *numbers in zip(batches, *numbered, strict=True):
            length = batch.targets.shape[1]
            if length > len(nats):
                nats, counts = (_padded(sums, length) for sums in (nats, counts))
            scored = (batch.targets != IGNORED).any(0).nonzero()
            first = int(scored[0]) if len(scored) else length
            for segment, out in every_output(model, batch.inputs.to(device), causal=causal, first=first):
                targets = batch.targets[:, segment]
                row, column = (targets != IGNORED).nonzero(as_tuple=True)
                if not len(row):
                    continue
                answers = targets[row, column]
                nll = token_nll(out.logits, answers, row, column)
                place = segment.start + column.numpy()
                nats += np.bincount(place, nll, minlength=len(nats))
                counts += np.bincount(place, minlength=len(counts))
                symbols += np.bincount(answers.numpy(), minlength=len(symbols))
                for sums, same in zip(by_number, numbers, strict=True):
                    sums.add(same.targets[:, segment][row, column].numpy(), nll)
    return Tally(nats, counts, symbols, by_number)


def _padded(sums: Floats, size: int) -> Floats:
    """The sums and zeros after them."""
    return np.pad(sums, (0, size - len(sums)))


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """Figures of one evaluation. nll is in nats per scored token; the other figures follow from it."""

    nll: float
    """For a model with state, with the state carried over whole documents."""
    nll_reset: float | None
    """The same targets with a fresh state in every window; None for a model without state."""
    perplexity: float
    bits_per_byte: float | None
    word_perplexity: float | None
    unigram_perplexity: float
    nll_by_position: list[float]
    """By position in the window, with a fresh state in every window."""
    nll_by_place: list[float] | None
    """By `Tally.by_place`, over the same windows; None without a period."""
    nll_by_group: list[float] | None
    """By group of targets, with the state of `nll`; None without groups."""
    tokens: int
    nll_by_block: list[float] | None
    """The mean of each block of the text, for `nll`; None without blocks."""
    nll_reset_by_block: list[float] | None
    """The same for `nll_reset`."""
    block_targets: list[int] | None
    """Targets of each block; with them as weights the means of the blocks make nll."""


def evaluate(
    model: LanguageModel,
    windows: Iterable[Batch],
    *,
    documents: Iterable[Batch] | None = None,
    objective: str,
    words_per_byte: float | None,
    bytes_per_target: float | None = 1.0,
    unigram_nats: Floats,
    device: torch.device,
    place_period: int = 0,
    blocks: Numbered | None = None,
    groups: Numbered | None = None,
) -> TextQuality:
    """Sum the nll of every scored target in float64 and divide once.

    `documents` are the same targets in rows that are whole documents, for models that carry state. The nll of
    such a model is that over `documents`. The nll over `windows`, where state is fresh in every window, is
    comparable with other models at equal context.

    The nll by position is always computed over windows. The position of a target is the number of tokens in
    the window before its input, so the targets of bucket k have 2^k to 2^(k+1) − 1 tokens of context. If
    windows overlap, each window scores only the targets that earlier windows did not; early positions then
    only occur in the first T tokens of a document, and have fewer targets.

    Bits per byte and word-level perplexity describe a compression of the text and exist only for clm. They
    are exact for any tokens: `bytes_per_target` is the number of bytes that all scored targets stand for,
    divided by the number of targets; None if the bytes of the tokens are not known, and then there is
    neither.
    Word-level perplexity uses the corpus's fixed words per byte, as PG-19's authors do (arXiv:1911.05507,
    §4.1). A bucket without a scored target is NaN. `unigram_perplexity` is the perplexity of the token
    frequencies of the training split on the same targets: that of a model without context. `blocks` and
    `groups` number the targets: by the block of the text that they belong to, and by a group of the task.
    """
    causal = objective == "clm"
    series = [one for one in (blocks, groups) if one is not None]
    reset = tally(model, windows, causal=causal, device=device, numbered=[one.windows for one in series])
    carried = None
    if documents is not None:
        again = [one.documents for one in series]
        carried = tally(model, documents, causal=causal, device=device, numbered=again)
    assert carried is None or np.array_equal(carried.symbols, reset.symbols)  # the same targets
    own = carried or reset
    nats = own.nll
    unigram = float(reset.symbols[: len(unigram_nats)] @ unigram_nats) / reset.tokens
    nats_per_byte = nats / bytes_per_target if causal and bytes_per_target else None
    nats_per_word = nats_per_byte / words_per_byte if nats_per_byte is not None and words_per_byte else None
    return TextQuality(
        nll=nats,
        nll_reset=reset.nll if carried else None,
        perplexity=_exp(nats),
        bits_per_byte=None if nats_per_byte is None else nats_per_byte / math.log(2),
        word_perplexity=None if nats_per_word is None else _exp(nats_per_word),
        unigram_perplexity=_exp(unigram),
        nll_by_position=reset.by(position_buckets(len(reset.nats))),
        nll_by_place=reset.by_place(place_period) if place_period else None,
        nll_by_group=own.by_number[-1].means() if groups else None,
        tokens=reset.tokens,
        nll_by_block=own.by_number[0].means() if blocks else None,
        nll_reset_by_block=reset.by_number[0].means() if blocks and carried else None,
        block_targets=[int(count) for count in reset.by_number[0].counts] if blocks else None,
    )


def _exp(nats: float) -> float:
    """Return e^nats; infinity on overflow."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))
