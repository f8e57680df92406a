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
from passages import scored_passages

import variants
from bench import corpora
from bench.evaluate.context_use import measure_context_use
from bench.evaluate.nll import Tally, tally
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks import text
from bench.tasks.base import Setting
from bench.tasks.text_config import TextConfig
from bench.tasks.windows import document_batches, window_batches
from bench.train.step import optimizer_for, training_step
from variants.base import Workload

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
T, EVALUATED = 512, 100_000
LENGTH = 32
"""Of segments, memories and chunks: short, so that their starts weigh."""
LEARNING_RATE = 3e-3


@cache
def corpus() -> corpora.Corpus:
    try:
        return corpora.load("plays")
    except corpora.CorpusError as error:
        pytest.skip(str(error))


@cache
def trained(name: str, replicate: int, *, batch_size: int, steps: int, **knobs: Any) -> LanguageModel:
    """A small model in its last state; a replicate has its own weights and batches, which variants share."""
    torch.manual_seed(replicate)
    variant, dims = variants.load(name), Workload(causal=True, batch_size=1, seq_len=T, d_model=64, heads=2)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=4)),
        dims,
        depth=2,
        dropout=0.0,
        vocabulary=text.VOCABULARY,
        activations="keep",
    )
    optimizer = optimizer_for(model, LEARNING_RATE)
    setting = Setting(
        data="plays",
        objective="clm",
        seq_len=T,
        batch_size=batch_size,
        replicate=replicate,
        test_tokens=0,
    )
    task = text.Text(TextConfig(), setting)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(10 * (step + 1) / steps, 1 - step / steps)
        batch = task.train_batch(step, step / steps)
        training_step(model, optimizer, batch, causal=True)
    return model


def tallied(model: LanguageModel, *, carried: bool) -> Tally:
    """The same targets, documents whole or in windows side by side."""
    own = scored_passages(corpus().test, seq_len=T, objective="clm", max_tokens=EVALUATED)
    batches = document_batches(own, 4) if carried else window_batches(own, T, T, 4)
    return tally(model, batches, causal=True, device=CPU)


def memory_and_chunks(replicate: int) -> tuple[Tally, Tally]:
    """Transformer-XL with its state carried and chunks, of one length, after 512,000 tokens each."""
    knobs = {"batch_size": 4, "steps": 250}
    memory = trained("transformer_xl", replicate, segment=LENGTH, mem_len=LENGTH, **knobs)
    chunks = trained("chunked", replicate, chunk=LENGTH, **knobs)
    return tallied(memory, carried=True), tallied(chunks, carried=False)


def rise(found: Tally) -> float:
    """By how much the first four tokens of a segment are harder than its second half, in nats."""
    by_offset = found.by_offset(LENGTH)
    return statistics.mean(by_offset[:4]) - statistics.mean(by_offset[LENGTH // 2 :])


def test_a_larger_chunk_is_not_worse() -> None:
    """Beyond the spread over replicates, after 614,400 tokens. Long before that it is: eight tokens are
    sooner learnt to be used than 128."""
    perplexities = {
        chunk: [
            math.exp(tallied(trained("chunked", r, chunk=chunk, batch_size=1, steps=1200), carried=False).nll)
            for r in range(2)
        ]
        for chunk in (8, 128)
    }
    print(perplexities)
    spread = max(statistics.stdev(values) for values in perplexities.values())
    assert statistics.mean(perplexities[128]) <= statistics.mean(perplexities[8]) + spread


@pytest.mark.parametrize("replicate", [0, 1])
def test_memory_beats_chunks_of_the_same_length(replicate: int) -> None:
    """Same segment, same training, same targets."""
    memory, chunks = memory_and_chunks(replicate)
    print(math.exp(memory.nll), math.exp(chunks.nll))
    assert memory.tokens == chunks.tokens == EVALUATED
    assert memory.nll < chunks.nll


@pytest.mark.parametrize("replicate", [0, 1])
def test_the_loss_rises_where_chunks_start_and_not_where_segments_do(replicate: int) -> None:
    """0.05 nats are five standard errors, and a fifth of what a chunk's start costs."""
    memory, chunks = memory_and_chunks(replicate)
    print(rise(memory), rise(chunks))
    assert rise(chunks) > 0.1
    assert rise(memory) < 0.05


def test_chunks_look_back_no_further_than_they_are_long() -> None:
    """Not by a bit, and the figure for the effective context says so."""
    model = trained("chunked", 0, chunk=LENGTH, batch_size=4, steps=250)
    found = measure_context_use(model, corpus().test, seq_len=T, count=256, batch_size=4, device=CPU)
    assert found
    print(found)
    beyond = found.nll_by_history[int(math.log2(LENGTH)) :]
    assert beyond == beyond[:1] * 5
    assert beyond[0] < found.nll_by_history[2] < found.nll_by_history[0]
    assert found.effective is not None
    assert found.effective <= LENGTH
