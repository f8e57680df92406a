"""Batches: every variant sees the same bytes, targets are where they should be, documents stay apart."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passages import scored_passages

from bench.corpora import Corpus, Document
from bench.tasks.base import IGNORED, Batch, Setting
from bench.tasks.text import MASKED_SHARE, VOCABULARY, Text
from bench.tasks.text_config import MASK, TextConfig
from bench.tasks.windows import Passage


def document(content: bytes) -> Document:
    return np.frombuffer(content, dtype=np.uint8)


def noise(seed: int, length: int) -> Document:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


CORPUS = Corpus(
    name="noise",
    train=(noise(1, 3000), noise(2, 2000)),
    validation=(noise(3, 500),),
    test=(noise(4, 700), noise(5, 90)),
    sha256="",
)


def task_of(**changed: Any) -> Text:
    given_: dict[str, Any] = {"data": "noise", "objective": "clm", "seq_len": 50, "batch_size": 3}
    given_ |= {"replicate": 0, "test_tokens": 0, **changed}
    with mock.patch("bench.tasks.text.corpora.load", return_value=CORPUS):
        return Text(TextConfig(), Setting(**given_))


def batch_of(*, step: int = 0, **changed: Any) -> Batch:
    return task_of(**changed).train_batch(step, 0.0)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@settings(deadline=None)
@given(replicate=st.integers(0, 1000), step=st.integers(0, 10_000))
def test_a_batch_is_a_function_of_replicate_and_step(objective: str, replicate: int, step: int) -> None:
    first = batch_of(objective=objective, replicate=replicate, step=step)
    batch_of(objective=objective, replicate=replicate, step=step + 1)  # another batch leaves no trace
    assert same(first, batch_of(objective=objective, replicate=replicate, step=step))
    assert not same(first, batch_of(objective=objective, replicate=replicate, step=step + 1))
    assert not same(first, batch_of(objective=objective, replicate=replicate + 1, step=step))


def test_replicate_and_step_are_not_interchangeable() -> None:
    assert not same(batch_of(replicate=1, step=2), batch_of(replicate=2, step=1))


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 50))
def test_causal_targets_are_the_inputs_shifted(seq_len: int, batch_size: int, step: int) -> None:
    inputs, targets, _ = batch_of(seq_len=seq_len, batch_size=batch_size, step=step)
    assert inputs.shape == targets.shape == (batch_size, seq_len)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = CORPUS.train_stream.tobytes()
    for row, target in zip(inputs, targets, strict=True):
        assert bytes([*row.tolist(), int(target[-1])]) in stream


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 50))
def test_masked_targets_stand_where_the_input_is_masked_and_nowhere_else(seq_len: int, step: int) -> None:
    plain = batch_of(seq_len=seq_len, step=step)
    inputs, targets, _ = batch_of(seq_len=seq_len, step=step, objective="mlm")
    masked = inputs == MASK
    assert torch.equal(masked, targets != IGNORED)
    assert torch.equal(torch.where(masked, targets, inputs), plain.inputs), (
        "other bytes than the causal batch's"
    )
    assert masked.any(dim=1).all(), "a window without a target teaches nothing"
    assert int(inputs.max()) < VOCABULARY


def test_about_the_stated_share_is_masked() -> None:
    """Five standard deviations of a binomial around 15 %."""
    assert MASKED_SHARE == 0.15
    inputs, _, _ = batch_of(seq_len=1000, batch_size=200, objective="mlm")
    masked = inputs == MASK
    assert masked.double().mean().item() == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / inputs.numel()) ** 0.5)
    by_position = masked.double().mean(dim=0)
    assert by_position.max() < 0.15 + 6 * (0.15 * 0.85 / 200) ** 0.5, "no position is favoured"


def test_training_windows_reach_the_whole_stream() -> None:
    stream = CORPUS.train_stream
    length = len(stream) - 1  # one window fits
    inputs, targets, _ = batch_of(seq_len=length, batch_size=2)
    assert bytes(inputs[0].tolist()) == stream[:-1].tobytes()
    assert bytes(targets[1].tolist()) == stream[1:].tobytes()


@settings(deadline=None)
@given(seq_len=st.integers(20, 200), batch_size=st.integers(1, 4), replicate=st.integers(0, 50))
def test_continuous_rows_go_on_where_they_stopped(seq_len: int, batch_size: int, replicate: int) -> None:
    """Until the end of the text, after which a row begins again. Windows of noise are found by their content,
    which a few bytes do not determine."""
    task = task_of(seq_len=seq_len, batch_size=batch_size, replicate=replicate, is_continuous=True)
    stream = CORPUS.train_stream.tobytes()
    places = len(stream) - seq_len
    for step in (0, 1, 7):
        before, after = (task.train_batch(k, 0.0) for k in (step, step + 1))
        starts = []
        for row, next_row, last in zip(before.inputs, after.inputs, before.targets[:, -1], strict=True):
            start = stream.index(bytes([*row.tolist(), int(last)]))
            starts.append(start)
            expected = (start + seq_len) % places
            assert bytes(next_row.tolist()) == stream[expected : expected + seq_len]
        gaps = np.diff(sorted(starts))
        assert all(gap >= places // batch_size - 1 for gap in gaps), "rows are far apart"


def test_continuous_rows_begin_somewhere_else_in_each_replicate() -> None:
    firsts = {tuple(batch_of(replicate=k, is_continuous=True).inputs[0].tolist()) for k in range(5)}
    assert len(firsts) == 5


def scored(documents: tuple[Document, ...], **changed: Any) -> list[Passage]:
    given_: dict[str, Any] = {"seq_len": 8, "objective": "clm", "max_tokens": 10**9}
    return scored_passages(documents, **{**given_, **changed})


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 200))
def test_of_held_out_documents_the_beginnings_are_scored(
    lengths: list[int], seq_len: int, max_tokens: int
) -> None:
    documents = tuple(noise(k, length) for k, length in enumerate(lengths))
    passages = scored(documents, seq_len=seq_len, max_tokens=max_tokens)
    assert len(passages) == len(documents)
    for text, (inputs, targets) in zip(documents, passages, strict=True):
        assert inputs.tolist() == text[: len(inputs)].tolist()
        assert targets.tolist() == text[1 : len(inputs) + 1].tolist()
    possible = sum(length - 1 for length in lengths)
    assert sum(len(inputs) for inputs, _ in passages) == min(max(seq_len, max_tokens), possible)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_what_is_scored_is_the_same_for_everyone(objective: str) -> None:
    """Whatever was drawn before, and whatever the state of the global generators."""
    first = scored(CORPUS.test, objective=objective)
    torch.manual_seed(7)
    batch_of(replicate=5)
    for a, b in zip(first, scored(CORPUS.test, objective=objective), strict=True):
        assert all(map(np.array_equal, a, b))


def test_masked_passages_hold_the_causal_ones_bytes() -> None:
    documents = (*CORPUS.test, noise(6, 2))
    for plain, (inputs, targets) in zip(scored(documents), scored(documents, objective="mlm"), strict=True):
        masked = inputs == MASK
        assert np.array_equal(np.where(masked, targets, inputs), plain.inputs)
        assert np.array_equal(masked, targets != IGNORED)
        assert masked.any(), "a document without a target says nothing"


def test_a_byte_is_masked_or_not_whatever_the_window() -> None:
    """So that masked models too have the same targets at every length, as far as documents are scored."""
    for a, b in zip(
        scored(CORPUS.test, objective="mlm", seq_len=8, max_tokens=200),
        scored(CORPUS.test, objective="mlm", seq_len=64, max_tokens=500),
        strict=True,
    ):
        shared = min(len(a.inputs), len(b.inputs)) - 1  # the last may be masked for want of another
        assert shared >= 64
        assert np.array_equal(a.inputs[:shared], b.inputs[:shared])


@pytest.mark.parametrize("split", ["test", "validation"])
@settings(deadline=None)
@given(st.integers(1, 6000))
def test_too_short_says_so_exactly_where_no_window_fits(split: str, seq_len: int) -> None:
    documents = CORPUS.split(split)
    train_fits = len(CORPUS.train_stream) >= seq_len + 1
    test_fits = max(map(len, documents)) >= seq_len + 1
    reason = CORPUS.too_short(seq_len, scored=None)
    assert (reason is None) == train_fits
    reason = CORPUS.too_short(seq_len, scored=split)
    assert (reason is None) == (train_fits and test_fits)
    if reason is None:
        assert batch_of(seq_len=seq_len, batch_size=1).inputs.shape == (1, seq_len)
        assert max(len(inputs) for inputs, _ in scored(documents, seq_len=seq_len)) >= seq_len
    else:
        have = len(CORPUS.train_stream) if not train_fits else max(map(len, documents))
        assert "\n" not in reason
        for part in ("noise", f"{have:,}", f"seq_len={seq_len:,}"):
            assert part in reason
