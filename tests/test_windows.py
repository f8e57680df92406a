"""Windows over held-out documents: every target once, the same whatever the windows, context enough."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tasks.base import IGNORED, Batch
from bench.tasks.windows import (
    Passage,
    block_documents,
    document_batches,
    least_context,
    scored_counts,
    sliding_windows,
    text_blocks,
    window_batches,
)

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any)


def passages(lengths: list[int]) -> list[Passage]:
    """Token i of document k is 100 (k + 1) + i, in inputs and targets: a token tells where it is from."""
    tokens = [100 * (k + 1) + np.arange(length, dtype=np.int64) for k, length in enumerate(lengths)]
    return [Passage(inputs, inputs) for inputs in tokens]


def everything(lengths: list[int]) -> Counter[int]:
    return Counter(int(token) for passage in passages(lengths) for token in passage.targets)


def scored(batches: Iterable[Batch]) -> Counter[int]:
    found = [batch.targets[batch.targets != IGNORED].tolist() for batch in batches]
    return Counter(token for part in found for token in part)


def rows(batches: Iterable[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape
        yield from zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 400))
def test_as_many_targets_as_asked_for_in_turns_of_a_window(
    lengths: list[int], seq_len: int, at_most: int
) -> None:
    found = scored_counts(lengths, seq_len, at_most)
    assert sum(found) == min(max(at_most, seq_len), sum(lengths))
    assert all(0 <= share <= length for share, length in zip(found, lengths, strict=True))
    most = max(found)
    turns_before = (most - 1) // seq_len * seq_len
    for share, length in zip(found, lengths, strict=True):
        assert share >= min(length, turns_before), "one had a turn more before another had this one"


def test_the_longest_documents_come_first() -> None:
    """A length that few documents have is scored on those, not on what is left of it in short ones."""
    assert scored_counts([10, 500, 20, 400], seq_len=300, at_most=600) == [0, 300, 0, 300]
    assert scored_counts([10, 500, 20, 400], seq_len=300, at_most=100) == [0, 300, 0, 0]
    assert scored_counts([10, 500, 20, 400], seq_len=8, at_most=32) == [8, 8, 8, 8]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.data())
def test_every_target_is_scored_once_after_enough_context(
    lengths: list[int], seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    context = {}
    for window in sliding_windows(lengths, seq_len, stride):
        assert 0 <= window.start <= window.scored < window.stop <= lengths[window.document]
        assert window.length == min(seq_len, lengths[window.document])
        for target in range(window.scored, window.stop):
            assert (window.document, target) not in context
            context[window.document, target] = target - window.start + 1
    assert context.keys() == {(k, i) for k, length in enumerate(lengths) for i in range(length)}
    later = [tokens for (_, target), tokens in context.items() if target >= seq_len]
    if later:
        assert min(later) >= least_context(seq_len, stride) == seq_len - stride + 1
    if max(lengths) >= seq_len + stride:
        assert min(later) == least_context(seq_len, stride), "the promise could be a greater one"
    assert all(tokens == i + 1 for (_, i), tokens in context.items() if i < seq_len)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 5), st.data())
def test_the_targets_are_the_same_for_every_stride_batch_and_state(
    lengths: list[int], seq_len: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    own, want = passages(lengths), everything(lengths)
    assert scored(window_batches(own, seq_len, stride, batch_size)) == want
    assert scored(window_batches(own, seq_len, seq_len, 1)) == want
    assert scored(document_batches(own, batch_size)) == want


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 5), st.data())
def test_windows_read_what_precedes_their_targets_and_nothing_of_another_document(
    lengths: list[int], seq_len: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    batches = list(window_batches(passages(lengths), seq_len, stride, batch_size))
    assert all(1 <= len(batch.inputs) <= batch_size for batch in batches)
    for inputs, targets in rows(batches):
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs))), "nothing is padded"
        assert inputs[0] // 100 == inputs[-1] // 100
        assert all(target in (IGNORED, token) for token, target in zip(inputs, targets, strict=True))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_whole_documents_start_together_and_are_zeros_once_they_end(
    lengths: list[int], batch_size: int
) -> None:
    for inputs, targets in rows(document_batches(passages(lengths), batch_size)):
        document = targets[0] // 100 - 1
        length = lengths[document]
        assert inputs[:length] == targets[:length] == passages(lengths)[document].inputs.tolist()
        assert set(inputs[length:]) <= {0}
        assert set(targets[length:]) <= {IGNORED}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_of_like_length_share_a_batch(batch_size: int) -> None:
    """So that few zeros are computed on."""
    own = passages([50, 3, 49, 4, 48, 5])
    shapes = [batch.inputs.shape for batch in document_batches(own, batch_size)]
    assert shapes == ([(1, n) for n in (50, 49, 48, 5, 4, 3)] if batch_size == 1 else [(3, 50), (3, 5)])


@settings(deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=20), st.integers(1, 12))
def test_blocks_are_runs_of_one_document_or_whole_documents(lengths: list[int], most: int) -> None:
    blocks = text_blocks(lengths, most)
    assert [len(own) for own in blocks] == lengths
    every = np.concatenate(blocks)
    assert np.array_equal(np.unique(every), np.arange(every.max() + 1 if len(every) else 0))
    assert (np.diff(every) >= 0).all()
    assert len(set(every.tolist())) <= most
    filled = [own for own in blocks if len(own)]
    if len(filled) > most:
        assert all(len(set(own.tolist())) == 1 for own in filled)
        return
    assert len(set(every.tolist())) == min(most, len(every))
    shared = [set(a.tolist()) & set(b.tolist()) for a, b in itertools.combinations(filled, 2)]
    assert not any(shared)
    for own in filled:
        sizes = np.unique(own, return_counts=True)[1]
        assert np.ptp(sizes) <= 1
    want = [document for document, own in enumerate(filled) for _ in set(own.tolist())]
    assert block_documents(passages(lengths), most) == want
