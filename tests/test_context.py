"""Whether trained models use the context that they have: what any figure of quality must show if it is right.

Small models, trained for a minute each on one thread.
"""

from __future__ import annotations

import math
import statistics
from functools import cache
from typing import Any

import pytest
import torch

import variants
from bench import corpora
from bench.evaluate import Tally, tally
from bench.history import look_back
from bench.model import LanguageModel
from bench.tasks import text
from bench.train import optimizer_for, training_step
from bench.windows import entire, windowed
from variants.base import Dims

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
T, BATCH, STEPS, EVALUATED = 512, 4, 250, 100_000
LEARNING_RATE = 3e-3


@cache
def corpus() -> corpora.Corpus:
    try:
        return corpora.load("plays")
    except corpora.CorpusError as error:
        pytest.skip(str(error))


@cache
def trained(name: str, replicate: int, **knobs: Any) -> LanguageModel:
    """A small model after 512,000 tokens, the same for every variant; each replicate has its own."""
    torch.manual_seed(replicate)
    variant, dims = variants.load(name), Dims(batch_size=1, seq_len=T, d_model=64, heads=2)
    model = LanguageModel(
        variant,
        variant.Config.of(knobs),
        dims,
        depth=2,
        ff_mult=4,
        dropout=0.0,
        vocabulary=text.VOCABULARY,
        activations="keep",
    )
    optimizer = optimizer_for(model, LEARNING_RATE)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 25, 1 - step / STEPS)
        batch = text.train_batch(
            corpus(), seq_len=T, batch_size=BATCH, objective="clm", replicate=replicate, step=step
        )
        training_step(model, optimizer, batch, causal=True)
    return model


def tallied(model: LanguageModel, *, carried: bool) -> Tally:
    """The same targets, documents whole or in windows side by side."""
    own = text.held_out(corpus().test, seq_len=T, objective="clm", max_tokens=EVALUATED)
    batches = entire(own, 4) if carried else windowed(own, T, T, 4)
    return tally(model, batches, causal=True, device=CPU)


def rise(found: Tally, length: int) -> float:
    """By how much the first eight tokens of a segment are harder than its second half, in nats."""
    by_offset = found.by_offset(length)
    return statistics.mean(by_offset[:8]) - statistics.mean(by_offset[length // 2 :])


def test_a_larger_chunk_is_not_worse() -> None:
    """Beyond the spread over replicates."""
    perplexities = {
        chunk: [math.exp(tallied(trained("chunked", r, chunk=chunk), carried=False).nll) for r in range(3)]
        for chunk in (8, 128)
    }
    print(perplexities)
    spread = max(statistics.stdev(values) for values in perplexities.values())
    assert statistics.mean(perplexities[128]) <= statistics.mean(perplexities[8]) + spread


def test_memory_beats_chunks_of_the_same_length() -> None:
    """Same segment, same training, same targets: each replicate's memory is better than its chunks."""
    for replicate in range(2):
        memory = tallied(trained("transformer_xl", replicate, segment=32, mem_len=32), carried=True)
        chunks = tallied(trained("chunked", replicate, chunk=32), carried=False)
        print(replicate, math.exp(memory.nll), math.exp(chunks.nll), rise(memory, 32), rise(chunks, 32))
        print([round(x, 3) for x in memory.by_offset(32)], [round(x, 3) for x in chunks.by_offset(32)])
        assert memory.tokens == chunks.tokens
        assert memory.nll < chunks.nll


def test_the_loss_rises_where_chunks_start_and_not_where_segments_do() -> None:
    memory = tallied(trained("transformer_xl", 0, segment=32, mem_len=32), carried=True)
    chunks = tallied(trained("chunked", 0, chunk=32), carried=False)
    assert rise(chunks, 32) > 0.2
    assert abs(rise(memory, 32)) < 0.05


def test_chunks_look_back_no_further_than_they_are_long() -> None:
    """Not by a bit, and the figure for the effective context says so."""
    model = trained("chunked", 0, chunk=32)
    found = look_back(model, corpus().test, seq_len=T, count=256, batch_size=BATCH, device=CPU)
    assert found
    print(found)
    assert len(set(found.nll_by_history[5:])) == 1
    assert found.nll_by_history[5] < found.nll_by_history[2] < found.nll_by_history[0]
    assert found.effective is not None
    assert found.effective <= 32
