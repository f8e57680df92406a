"""Longer than trained: the loss of a trained causal model on sequences longer than those of training.

Shapes: T tokens of a training sequence, F the largest factor, S = T / 4 targets of a group, G groups.

    targets of a document      0 1 2 3 4 5 6 7 8 9 …       T = 4, F = 2, S = 1; a dot is read, not compared
    at length 1·T, group 0             . . . 7
    at length 2·T, group 0     . . . . . . . 7
    at length 1·T, group 1               . . . 8
    at length 2·T, group 1       . . . . . . . 8

Every length is compared on the same targets: groups of S consecutive tokens, each of which ends its window.
So the figure at length f·T is the loss at the positions f·T − S to f·T − 1, and that at 1·T is the ordinary
evaluation with a stride of S, restricted to these targets. State is fresh at the start of a window.

Dai 2019 (arXiv:1901.02860, §4) and Press 2021 (ALiBi, arXiv:2108.12409, §2) evaluate in this way: the first
with longer memories than in training, the second with longer sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bench.config.spec import CellSpec
from bench.corpora.tokens import TokenText
from bench.evaluate.context_use import target_positions
from bench.evaluate.nll import Floats, tally
from bench.model.language_model import LanguageModel
from bench.process.memory_errors import out_of_memory
from bench.tasks.text import Text
from bench.tasks.windows import Passage, Window, batches_of
from variants.base import HasMemory

PARTS = 4
"""A group of targets is this part of the training length."""
MEMORY_FACTORS = (1, 2, 4)
"""Lengths of memory at test, as multiples of that in training."""


@dataclass(frozen=True, kw_only=True)
class Longer:
    """Losses on the same targets in nats per token, by length; the first length is that of training."""

    lengths: list[int] = field(default_factory=list)
    """T, 2·T, 4·T, … tokens."""
    nll: list[float] = field(default_factory=list)
    """The mean over the targets, for each length."""
    error: list[float] | None = None
    """The standard error, over groups, of its difference to the first length; None for a single group."""
    by_position: list[float] = field(default_factory=list)
    """At the longest length, by position: element k covers the positions ⌈k·T/4⌉ to ⌈(k + 1)·T/4⌉ − 1. Its
    elements have different targets, and the last one those of `nll`."""
    memory_positions: list[int] = field(default_factory=list)
    """Lengths of memory, in positions of a layer; the first is that of training. Empty without memory."""
    nll_memory: list[float] = field(default_factory=list)
    """The mean over the same targets with each memory, at the longest length."""
    error_memory: list[float] | None = None
    """As `error`, of the differences to the memory of training."""
    targets: int = 0
    bytes: int = 0
    """The bytes that the targets stand for."""
    reason: str | None = None
    """Why there is no figure, or none for longer sequences or memories."""

    def bits_per_byte(self) -> list[float]:
        """The nll as bits per byte of the targets' own bytes."""
        return [nats * self.targets / self.bytes / math.log(2) for nats in self.nll]


def group_windows(lengths: Sequence[int], *, seq_len: int, longest: int, count: int) -> list[Window]:
    """Return the longest windows of up to `count` groups, or of one, evenly spaced over all possible groups.

    `lengths` are the numbers of targets of the documents. Groups of a document follow each other without a
    gap, and the first one ends the document's first `longest` tokens.
    """
    size = seq_len // PARTS
    possible = [(length - longest) // size + 1 if length >= longest else 0 for length in lengths]
    ends = [
        (document, longest + place * size) for document, place in target_positions(possible, 0, max(1, count))
    ]
    return [Window(document, end - longest, end, end - size) for document, end in ends]


def tokens_read(seq_len: int, largest: int, targets: int, *, has_memory: bool) -> int:
    """Return how many tokens the windows of all lengths contain and, if there is a memory, those that are
    read again with longer ones."""
    groups = max(1, targets // max(1, seq_len // PARTS))
    again = (len(MEMORY_FACTORS) - 1) * largest if has_memory else 0
    return groups * seq_len * (2 * largest - 1 + again)


def memories(model: LanguageModel) -> list[HasMemory]:
    """Return the layers that read a memory."""
    return [layer for layer in model.layers if isinstance(layer, HasMemory) and layer.memory_positions]


def memory_positions(model: LanguageModel) -> int:
    """Return the length of the memory in positions, of the layer with the longest one; 0 without memory."""
    return max((layer.memory_positions for layer in memories(model)), default=0)


def memory_factors(model: LanguageModel, tokens: int) -> list[int]:
    """Return the factors with which memories are evaluated: those whose memory `tokens` can fill, if they are
    several. A memory that is never full is as good as a shorter one."""
    factors = [factor for factor in MEMORY_FACTORS if 0 < factor * memory_positions(model) <= tokens]
    return factors if len(factors) > 1 else []


def longer_memory(model: LanguageModel, factor: int) -> ExitStack:
    """Return a context inside which the memory of every layer is `factor` times as long."""
    stack = ExitStack()
    for layer in memories(model):
        stack.enter_context(layer.longer_memory(factor))
    return stack


def measure_longer(
    model: LanguageModel,
    documents: Sequence[TokenText],
    *,
    seq_len: int,
    largest: int,
    count: int,
    device: torch.device,
) -> Longer:
    """Score about `count` targets at the lengths T, 2·T, … largest·T, and with longer memories.

    Windows are processed one by one, so that memory grows with the length only. If memory runs out at a
    length, the figures are those of the shorter ones, and `reason` says so.
    """
    size, longest = seq_len // PARTS, largest * seq_len
    if not size:
        return Longer(reason=f"seq_len={seq_len}: a quarter of it is scored; allowed is 4 or more")
    passages = [Passage(document.ids[:-1], document.ids[1:]) for document in documents]
    lengths = [len(passage.targets) for passage in passages]
    groups = group_windows(lengths, seq_len=seq_len, longest=longest, count=count // size)
    if not groups:
        have = f"no held-out document has over {max(lengths, default=0):,} tokens after its first"
        return Longer(reason=f"{have}; measure.longer={largest} at seq_len={seq_len:,} needs {longest:,}")

    def score(length: int) -> Floats:
        """(G, L) nats by group and position, in windows of L tokens that end as the groups do."""
        starts = [window.stop - length for window in groups]
        windows = [w._replace(start=start, scored=start) for w, start in zip(groups, starts, strict=True)]
        return np.stack(
            [
                tally(model, [batch], causal=True, device=device).nats
                for batch in batches_of(passages, windows, 1)
            ]
        )

    found = Longer(
        targets=len(groups) * size,
        bytes=sum(_bytes(documents[window.document], window) for window in groups),
    )
    means: list[Floats] = []  # (G,) of each length
    try:
        length = seq_len
        while length <= longest:
            nats = score(length)
            means.append(nats[:, -size:].mean(axis=1))
            found = replace(
                found,
                lengths=[*found.lengths, length],
                nll=[float(mean.mean()) for mean in means],
                error=_errors(means),
                by_position=_by_position(nats, seq_len),
            )
            length *= 2
        means = means[-1:]
        for factor in memory_factors(model, longest - size):
            if factor > 1:
                with longer_memory(model, factor):
                    means.append(score(longest)[:, -size:].mean(axis=1))
            found = replace(
                found,
                memory_positions=[*found.memory_positions, factor * memory_positions(model)],
                nll_memory=[float(mean.mean()) for mean in means],
                error_memory=_errors(means),
            )
    except Exception as failure:
        if not out_of_memory(failure):
            raise
        return replace(found, reason=f"memory ran out after {len(found.lengths)} lengths")
    return found


def _by_position(nats: Floats, seq_len: int) -> list[float]:
    """Return the mean of nats (G, L) over each quarter of T positions."""
    part = np.arange(nats.shape[1]) * PARTS // seq_len
    return [float(mean) for mean in np.bincount(part, nats.mean(axis=0)) / np.bincount(part)]


def _errors(means: Sequence[Floats]) -> list[float] | None:
    """Return the standard error of the difference of each length to the first, over groups."""
    groups = len(means[0])
    if groups < 2:
        return None
    return [float((mean - means[0]).std(ddof=1) / math.sqrt(groups)) for mean in means]


def _bytes(text: TokenText, window: Window) -> int:
    """Return the bytes of the scored targets of a window; target i is token i + 1 of the text."""
    begin, end = text.begin(np.array([window.scored + 1, window.stop + 1])).tolist()
    return int(end - begin)


def unsupported(spec: CellSpec) -> str | None:
    """Return why a cell's model is not evaluated on longer sequences, or None."""
    variant, config, dims = spec.attention()
    if reason := variant.longer_unsupported(config):
        return reason
    if spec.objective != "clm":
        return f"objective={spec.objective}: only causal models are evaluated on longer sequences"
    longest = replace(dims, seq_len=spec.measure.longer * spec.seq_len)
    return variant.unsupported(config, longest, causal=True)


def of_cell(spec: CellSpec, model: LanguageModel, task: Text, device: torch.device) -> dict[str, Any]:
    """Return the figures of a cell's trained model by the keys of its record."""
    figures: dict[str, Any] = {"positions": model.position_scheme}
    reason = unsupported(spec)
    if reason is None and task.history_targets() is not None:
        reason = f"data={spec.data.name}: not all tokens are scored, and longer sequences score all"
    if reason is not None:
        return {**figures, "longer_reason": reason}
    found = measure_longer(
        model,
        task.token_texts,
        seq_len=spec.seq_len,
        largest=spec.measure.longer,
        count=spec.measure.longer_targets,
        device=device,
    )
    return {
        **figures,
        "longer_lengths": found.lengths or None,
        "nll_longer": found.nll or None,
        "nll_longer_error": found.error,
        "bits_per_byte_longer": found.bits_per_byte() or None if task.bytes_per_target() else None,
        "nll_longer_by_position": found.by_position or None,
        "longer_memory_positions": found.memory_positions or None,
        "nll_longer_memory": found.nll_memory or None,
        "nll_longer_memory_error": found.error_memory,
        "tokens_evaluated_longer": found.targets if found.lengths else None,
        "longer_reason": found.reason,
    }
