"""Negative log-likelihood on held-out documents, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from bench.model import LanguageModel
from bench.tasks.base import IGNORED, Batch


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one evaluation. nll in nats a scored token; the rest follows from it."""

    nll: float
    perplexity: float
    bits_per_byte: float | None
    word_perplexity: float | None
    unigram_perplexity: float
    nll_by_position: list[float]
    tokens: int


def position_buckets(seq_len: int) -> npt.NDArray[np.int64]:
    """(T,) bucket of each position: bucket k holds positions 2^k − 1 to 2^(k+1) − 2."""
    return np.asarray(np.floor(np.log2(np.arange(1, seq_len + 1))), dtype=np.int64)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    objective: str,
    words_per_byte: float,
    unigram_nats: npt.NDArray[np.float64],
    device: torch.device,
) -> Quality:
    """Sum the nll of every scored target in float64 and divide once.

    Bits per byte and word-level perplexity describe a code of the text and exist for clm alone;
    the latter uses the corpus's fixed words per byte, as PG-19's authors do (arXiv:1911.05507, §4.1).
    A bucket without a scored target is NaN. `unigram_perplexity` is that of byte frequencies in the
    training split on the same targets: what a model that reads no context reaches.
    """
    model.eval()
    sums = counts = np.zeros(0)
    unigram = 0.0
    for batch in batches:
        scored = batch.targets != IGNORED
        if not sums.size:
            sums, counts = np.zeros(scored.shape[1]), np.zeros(scored.shape[1])
        for segment, out in model.stream(batch.inputs.to(device), causal=objective == "clm"):
            targets = batch.targets[:, segment].to(device)
            nll = F.cross_entropy(
                out.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
            )
            sums[segment] += nll.view_as(targets).double().sum(dim=0).cpu().numpy()
        counts += scored.sum(dim=0).numpy()
        unigram += float(unigram_nats[batch.targets[scored].numpy()].sum())
    tokens = int(counts.sum())
    nats = float(sums.sum()) / tokens
    buckets = position_buckets(len(sums))
    by_position = np.bincount(buckets, sums) / np.where(found := np.bincount(buckets, counts), found, np.nan)
    causal = objective == "clm"
    return Quality(
        nll=nats,
        perplexity=math.exp(nats),
        bits_per_byte=nats / math.log(2) if causal else None,
        word_perplexity=math.exp(nats / words_per_byte) if causal else None,
        unigram_perplexity=math.exp(unigram / tokens),
        nll_by_position=[float(x) for x in by_position],
        tokens=tokens,
    )
