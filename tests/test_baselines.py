"""Baselines: n-gram tables against the formula written out, compressors against their commands, and both on
the bytes that a cell trains on and is scored on."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import CORPUS, document

from bench.corpora import Corpus
from bench.evaluate import baselines, compressors, ngram
from bench.evaluate.ngram import Piece
from bench.tasks.base import IGNORED, Setting
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig

letters = st.binary(min_size=1, max_size=60).map(lambda text: bytes(97 + byte % 4 for byte in text))
texts = st.lists(letters, min_size=1, max_size=5)


class Counts:
    """Witten–Bell by the formula, with dictionaries of byte strings: no integers, no sorting, no chunks."""

    def __init__(self, learnt: Sequence[bytes], max_order: int) -> None:
        self.after: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        for text in learnt:
            for end, byte in enumerate(text):
                for length in range(min(max_order, end + 1)):
                    self.after[text[end - length : end]][byte] += 1

    def probability(self, context: bytes, byte: int) -> float:
        lower = self.probability(context[1:], byte) if context else 1 / 256
        found = self.after.get(context)
        if not found:
            return lower
        return (found[byte] + len(found) * lower) / (found.total() + len(found))

    def bits(self, scored: Sequence[tuple[bytes, int]], order: int) -> float:
        each = [
            -math.log2(self.probability(text[max(0, end - order + 1) : end], text[end]))
            for text, start in scored
            for end in range(start, len(text))
        ]
        return math.fsum(each) / len(each)


@pytest.mark.parametrize("chunk", [3, 2**22])
@settings(deadline=None)
@given(learnt=texts, scored=texts, start=st.integers(0, 8))
def test_tables_equal_the_formula(chunk: int, learnt: list[bytes], scored: list[bytes], start: int) -> None:
    """In chunks of 3 bytes nearly every gram crosses from one into the next."""
    windows = [(text, min(start, len(text) - 1)) for text in scored]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "CHUNK", chunk)
        tables = ngram.learn([Piece(document(text)) for text in learnt])
        found = ngram.bits_per_byte(tables, [Piece(document(text), first) for text, first in windows])
    counts = Counts(learnt, 5)
    assert found == pytest.approx([counts.bits(windows, order) for order in range(1, 6)], rel=1e-12)


@settings(deadline=None)
@given(learnt=texts, context=letters)
def test_probabilities_sum_to_one(learnt: list[bytes], context: bytes) -> None:
    tables = ngram.learn([Piece(document(text)) for text in learnt])
    each = [
        ngram.bits_per_byte(tables, [Piece(document(context + bytes([byte])), len(context))])
        for byte in range(256)
    ]
    assert np.exp2(-np.array(each)).sum(axis=0) == pytest.approx(np.ones(5), rel=1e-9)


def test_a_table_of_nothing_known_is_uniform() -> None:
    tables = ngram.learn([Piece(document(b"a"))])
    assert ngram.bits_per_byte(tables, [Piece(document(b"zz"), 1)])[1:] == pytest.approx(
        [math.log2(2 * 256)] * 4  # of order 1: half of the mass is for bytes that were not seen
    )


def played(length: int) -> bytes:
    """Text with structure at all distances, of a fixed generator."""
    words = [bytes(w) for w in np.random.default_rng(7).integers(97, 123, (300, 5), dtype=np.uint8)]
    picks = np.random.default_rng(8).zipf(1.3, length) % 300
    return b" ".join(words[k] for k in picks)[:length]


COMMANDS = {
    "gzip": (["gzip", "-9", "-n", "-c"], compressors.gzip_bytes, 2**15),
    "xz": (["xz", "-9e", "-c", "--lzma2=preset=9e,dict=8KiB"], compressors.xz_bytes, 2**13),
    "zstd": (["zstd", "-q", "-19", "-c", "--zstd=wlog=13", "--no-check"], compressors.zstd_bytes, 2**13),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_compressor_gives_the_size_that_its_command_gives(name: str) -> None:
    """Releases differ by a few bytes: within 0.5 %."""
    command, size, context = COMMANDS[name]
    if shutil.which(command[0]) is None or (name == "zstd" and not compressors.has_zstd()):
        pytest.skip(f"{name} is not installed")
    text = played(60_000)
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    assert size(text, context) == pytest.approx(len(done.stdout), rel=0.005)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_compressor_sees_no_further_than_the_context(name: str) -> None:
    """Noise that repeats after 12,000 bytes is half as large only if the window reaches so far."""
    _, size, _ = COMMANDS[name]
    if name == "zstd" and not compressors.has_zstd():
        pytest.skip("zstandard is not installed")
    noise = np.random.default_rng(0).bytes(12_000)
    short, long = (size(2 * noise, context) for context in (4096, 16_384))
    assert short is not None
    assert long is not None
    assert short > 24_000 > 13_000 > long


def test_a_window_is_the_shortest_that_is_as_long_as_the_context() -> None:
    limits = compressors.GZIP_LOG
    found = [compressors.window_log(context, limits) for context in (1, 512, 513, 1024, 1025, 10**9)]
    assert found == [9, 9, 10, 10, 11, 15]


def text_task(monkeypatch: pytest.MonkeyPatch, corpus: Corpus = CORPUS, **changed: object) -> Text:
    monkeypatch.setattr("bench.tasks.text.corpora.load", lambda *_: corpus)
    given_ = {"data": "noise", "objective": "clm", "seq_len": 50, "batch_size": 3, "replicate": 1}
    return Text(TextConfig(), Setting(**{**given_, "test_tokens": 400, **changed}))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_continuous", [False, True])
@pytest.mark.parametrize(("seq_len", "steps"), [(50, 1), (50, 30), (20, 200)])
def test_the_text_learnt_is_that_of_the_training_batches(
    monkeypatch: pytest.MonkeyPatch, seq_len: int, steps: int, is_continuous: bool
) -> None:
    """Every byte of every batch, each once. Windows of noise are found in the stream by their content."""
    task = text_task(monkeypatch, seq_len=seq_len, is_continuous=is_continuous)
    stream = CORPUS.train_stream.tobytes()
    seen = np.zeros(len(stream), dtype=bool)
    for step in range(steps):
        inputs, targets, _ = task.train_batch(step, 0.0)
        for row, last in zip(inputs, targets[:, -1], strict=True):
            window = bytes([*row.tolist(), int(last)])
            assert stream.count(window) == 1
            seen[stream.index(window) :][: len(window)] = True
    parts = [part.tobytes() for part in task.train_text(steps)]
    ends = [0]
    for part in parts:  # in the order of the stream
        ends.append(stream.index(part, ends[-1]) + len(part))
    assert b"".join(parts) == document(stream)[seen].tobytes()
    assert len(parts) < 3 * steps or steps == 1


@pytest.mark.parametrize("stride", [50, 7])
def test_the_text_scored_is_the_targets_of_the_models(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    task = text_task(monkeypatch)
    expected = Counter()
    for inputs, targets, _ in task.test_batches(stride):
        for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            for place, answer in enumerate(answers):
                if answer != IGNORED:
                    expected[bytes([*row[: place + 1], answer])] += 1
    found = Counter(
        text[: end + 1].tobytes()
        for text, first in task.scored_text(stride)
        for end in range(first, len(text))
    )
    assert found == expected
    assert found.total() == 400


def test_baselines_of_a_cell_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = text_task(monkeypatch)
    first = baselines.of_cell(task, tmp_path, steps=20, stride=50)
    assert first.ngram_train_bytes == sum(map(len, task.train_text(20)))
    assert len(first.ngram_bits_per_byte) == 5
    assert first.gzip_bits_per_byte > 8  # noise does not compress
    (cached,) = (tmp_path / "baselines").glob("*.json")
    changed = json.loads(cached.read_text()) | {"gzip_bits_per_byte": 1.0}
    cached.write_text(json.dumps(changed))
    assert baselines.of_cell(task, tmp_path, steps=20, stride=50).gzip_bits_per_byte == 1.0
    for other in (
        baselines.of_cell(task, tmp_path, steps=21, stride=50),
        baselines.of_cell(task, tmp_path, steps=20, stride=49),
        baselines.of_cell(text_task(monkeypatch, replicate=2), tmp_path, steps=20, stride=50),
    ):
        assert other.gzip_bits_per_byte > 8


def test_the_window_of_a_compressor_is_as_long_as_the_context_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A context of 50 tokens of two bytes is one of 100 bytes."""
    seen = []
    monkeypatch.setattr(compressors, "gzip_bytes", lambda _, context: seen.append(context) or 1)
    monkeypatch.setattr(Text, "bytes_per_target", lambda _: 2.0)
    baselines.measure(text_task(monkeypatch), steps=2, stride=50)
    assert seen == [100]
