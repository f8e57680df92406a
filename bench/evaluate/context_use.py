"""Context use of a causal model: the loss on the same targets with truncated histories.

Shapes: B batch, L tokens of history, K histories, n targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.corpora.base import Ids
from bench.evaluate.nll import Floats, evaluating, token_nll
from bench.model.language_model import LanguageModel

Bools = npt.NDArray[np.bool_]
TOLERANCE = 0.01
"""Excess loss over the full history, in nats per token, that counts as equal; it corresponds to a perplexity
that is 1 % higher."""
CONFIDENCE = 0.95
RESAMPLES = 2_000
"""Bootstrap resamples. The ends of the interval are powers of two, so more precision is not needed."""


@dataclass(frozen=True, kw_only=True)
class ContextUse:
    """The loss by history length, and the effective context: the shortest history, in tokens, beyond which
    the loss does not improve."""

    nll_by_history: list[float]
    """Element k: the mean, in nats per target, with a history of 2^k tokens; the last is the full history."""
    effective: int | None
    """The effective context by the mean over the targets; None if a loss is NaN or infinite."""
    low: int | None
    """The effective context by the lower end of the mean's interval:
    half as many tokens are significantly too few."""
    high: int | None
    """The effective context by the upper end:
    this many tokens are sufficient with the interval's confidence."""
    best: int | None = None
    """The history with the lowest mean loss, in tokens. Further tokens do not help; see `harm`."""
    harm: float | None = None
    """Mean loss with the full history minus that with the best one, in nats per token. A model that does not
    use distant tokens has none; a model that is disturbed by them has."""
    harm_low: float | None = None
    """Lower confidence bound of the harm. Negative or 0: no harm is shown."""


def target_positions(
    lengths: Sequence[int], seq_len: int, count: int, allowed: Sequence[Bools] | None = None
) -> list[tuple[int, int]]:
    """Return (document, position) of `count` tokens that have T tokens before them, evenly spaced over all
    such tokens; all of them if there are fewer than `count`. If `allowed`, only tokens that it marks in their
    document are taken."""
    if allowed is None:
        possible = np.maximum(0, np.asarray(lengths, dtype=np.int64) - seq_len)
    else:
        marked = [np.flatnonzero(mask[seq_len:]) for mask in allowed]
        possible = np.array([len(places) for places in marked], dtype=np.int64)
    ends = np.cumsum(possible)
    count = min(count, int(ends[-1]))
    places = (2 * np.arange(count, dtype=np.int64) + 1) * ends[-1] // (2 * count) if count else ends[:0]
    document = np.searchsorted(ends, places, side="right")
    position = places - (ends - possible)[document]
    if allowed is not None:
        position = np.array([marked[k][n] for k, n in zip(document, position, strict=True)], dtype=np.int64)
    return list(zip(document.tolist(), (position + seq_len).tolist(), strict=True))


def nll_after(
    model: LanguageModel,
    documents: Sequence[Ids],
    targets: Sequence[tuple[int, int]],
    length: int,
    *,
    batch_size: int,
    device: torch.device,
) -> Floats:
    """(n,) −ln p of each target, given only the L tokens before it."""
    parts = []
    with evaluating(model):
        for i in range(0, len(targets), batch_size):
            batch = targets[i : i + batch_size]
            read = np.stack([documents[document][at - length : at] for document, at in batch])
            inputs = torch.from_numpy(read.astype(np.int64)).to(device)
            *_, (_, out) = model.stream(inputs, causal=True)
            answers = torch.tensor([int(documents[document][at]) for document, at in batch])
            rows = torch.arange(len(batch))
            parts.append(token_nll(out.logits, answers, rows, torch.full_like(rows, out.logits.shape[1] - 1)))
    return np.concatenate(parts)


def measure_context_use(
    model: LanguageModel,
    documents: Sequence[Ids],
    *,
    seq_len: int,
    count: int,
    batch_size: int,
    device: torch.device,
    allowed: Sequence[Bools] | None = None,
) -> ContextUse | None:
    """Score up to `count` targets after histories of 2^k tokens; None if fewer than two targets have T tokens
    before them.

    The full history is T, or the largest power of two below it. Every window ends at its target and starts
    with a fresh state. A batch has as many windows as contain the tokens of `batch_size` sequences, so memory
    does not depend on the history. `allowed` restricts the targets, as in `target_positions`.
    """
    targets = target_positions([len(document) for document in documents], seq_len, count, allowed)
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
    return summarise(nll)


def summarise(nll: Floats) -> ContextUse:
    """Summarise nll (K, n) of n ≥ 2 targets after histories of 2^k tokens, k = 0 … K − 1.

    Each history is compared with the longest one on the same targets. A paired bootstrap, which resamples the
    targets with replacement, gives the interval of the mean excess. The effective context is the shortest
    history for which it and all longer ones have an excess within the tolerance; it is computed from the mean
    and from both ends of the interval.

    Harm is bounded for every shorter history at once: of the K − 1 lower bounds, each at a level that is
    corrected by Bonferroni, the largest.
    """
    means = [float(mean) for mean in nll.mean(axis=1)]
    if not np.isfinite(nll).all():
        return ContextUse(nll_by_history=means, effective=None, low=None, high=None)
    from scipy.stats import bootstrap  # takes half a second; only cells with this figure import it

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
    low, effective, high = map(_effective_context, (interval.low, excess.mean(axis=1), interval.high))
    best = int(np.argmin(means))
    return ContextUse(
        nll_by_history=means,
        effective=effective,
        low=low,
        high=high,
        best=2**best,
        harm=means[-1] - means[best],
        harm_low=_harm_low(-excess[:-1]) if len(excess) > 1 else 0.0,
    )


def _harm_low(harm: Floats) -> float:
    """Return a lower confidence bound of the largest mean of harm (K − 1, n).

    By Student's t, because a corrected level is too far in the tail for resamples.
    """
    from scipy.stats import sem, t

    count = harm.shape[1]
    margin = t.ppf(1 - (1 - CONFIDENCE) / len(harm), count - 1) * sem(harm, axis=1)
    return float((harm.mean(axis=1) - margin).max())


def _effective_context(excess: npt.ArrayLike) -> int:
    """Return the shortest history for which neither it nor a longer one exceeds the tolerance."""
    worse = np.flatnonzero(np.asarray(excess) > TOLERANCE)
    return 2 ** (int(worse[-1]) + 1) if worse.size else 1
