"""How far back a causal model looks: the loss on the same targets with the history before them cut short.

Shapes: B batch, L tokens of history, K histories, n targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.corpora import Document
from bench.evaluate.nll import Floats, evaluating, token_nll
from bench.model.language_model import LanguageModel

TOLERANCE = 0.01
"""Nats a token by which a loss may exceed that of the full history and count as not worse: a perplexity
that is a hundredth higher."""
CONFIDENCE = 0.95
RESAMPLES = 2_000
"""Of the bootstrap: enough for the ends of the interval, whose whole-octave steps ask for no more."""


@dataclass(frozen=True, kw_only=True)
class LookBack:
    """Loss by history, and the shortest history, in tokens, from which on it no longer improves."""

    nll_by_history: list[float]
    """Element k: the mean, in nats a target, where 2^k tokens are read; the last is the full history."""
    effective: int | None
    """By the mean over the targets; None where a loss is not a number."""
    low: int | None
    """By the lower end of the mean's interval: half as many tokens are too few, not just on these targets."""
    high: int | None
    """By its upper end: so many are enough, not just on these targets."""


def targets_of(lengths: Sequence[int], seq_len: int, count: int) -> list[tuple[int, int]]:
    """(document, position) of up to `count` tokens with T before them, evenly over all that have as many.

    Fewer where there are fewer.
    """
    possible = np.maximum(0, np.asarray(lengths, dtype=np.int64) - seq_len)
    ends = np.cumsum(possible)
    count = min(count, int(ends[-1]))
    places = (2 * np.arange(count, dtype=np.int64) + 1) * ends[-1] // (2 * count) if count else ends[:0]
    document = np.searchsorted(ends, places, side="right")
    position = places - (ends - possible)[document] + seq_len
    return list(zip(document.tolist(), position.tolist(), strict=True))


def nll_after(
    model: LanguageModel,
    documents: Sequence[Document],
    targets: Sequence[tuple[int, int]],
    length: int,
    *,
    batch_size: int,
    device: torch.device,
) -> Floats:
    """(n,) −ln p of each target, read after a window of the L tokens before it and nothing else."""
    found = []
    with evaluating(model):
        for i in range(0, len(targets), batch_size):
            batch = targets[i : i + batch_size]
            read = np.stack([documents[document][at - length : at] for document, at in batch])
            inputs = torch.from_numpy(read.astype(np.int64)).to(device)
            *_, (_, out) = model.stream(inputs, causal=True)
            wanted = torch.tensor([int(documents[document][at]) for document, at in batch])
            rows = torch.arange(len(batch))
            found.append(token_nll(out.logits, wanted, rows, torch.full_like(rows, out.logits.shape[1] - 1)))
    return np.concatenate(found)


def look_back(
    model: LanguageModel,
    documents: Sequence[Document],
    *,
    seq_len: int,
    count: int,
    batch_size: int,
    device: torch.device,
) -> LookBack | None:
    """Score up to `count` targets after 2^k tokens each; None where fewer than two have T tokens before them.

    The full history is T, or the largest power of two below it. State is fresh at the start of every window,
    which ends at the target. A batch has as many windows as hold the tokens of
    `batch_size` sequences, so memory does not depend on the history.
    """
    targets = targets_of([len(document) for document in documents], seq_len, count)
    if len(targets) < 2:
        return None
    lengths = [2**k for k in range(seq_len.bit_length())]
    nll = np.stack(
        [
            nll_after(
                model, documents, targets, n, batch_size=max(1, batch_size * seq_len // n), device=device
            )
            for n in lengths
        ]
    )
    return summary(nll)


def summary(nll: Floats) -> LookBack:
    """The figures of nll (K, n), of n ≥ 2 targets after histories of 2^k tokens, k = 0 … K − 1.

    Each history is compared with the longest on the same targets, n of them drawn again and again with
    replacement: a paired bootstrap, which gives the mean excess an interval. The shortest history from
    which on the excess is within the tolerance is told by the mean and by either end.
    """
    means = [float(mean) for mean in nll.mean(axis=1)]
    if not np.isfinite(nll).all():
        return LookBack(nll_by_history=means, effective=None, low=None, high=None)
    from scipy.stats import bootstrap  # half a second, which cells without this figure need not wait for

    excess = nll - nll[-1]
    interval = bootstrap(
        (excess,),
        np.mean,
        axis=1,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=100,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    low, effective, high = map(_from_there_on, (interval.low, excess.mean(axis=1), interval.high))
    return LookBack(nll_by_history=means, effective=effective, low=low, high=high)


def _from_there_on(excess: npt.ArrayLike) -> int:
    """The shortest of the histories for which neither it nor a longer one exceeds the tolerance."""
    worse = np.flatnonzero(np.asarray(excess) > TOLERANCE)
    return 2 ** (int(worse[-1]) + 1) if worse.size else 1
