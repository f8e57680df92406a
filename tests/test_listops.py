"""ListOps: true answers by a second evaluator, the distribution by arithmetic, training and test apart."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tasks
from bench.tasks import listops
from bench.tasks.base import IGNORED, Batch, Setting
from bench.tasks.listops import Listops, ListopsConfig, evaluate, fill, grow, length_distribution, sizes

SYMBOLS = {
    **{digit: str(digit) for digit in range(10)},
    listops.MAX: "[MAX",
    listops.MIN: "[MIN",
    listops.MED: "[MED",
    listops.SM: "[SM",
    listops.END: "]",
}


def task_of(
    *,
    seq_len: int = 48,
    batch_size: int = 8,
    replicate: int = 0,
    tests: int = 20,
    config: type[ListopsConfig] = ListopsConfig,
    **knobs: Any,
) -> Listops:
    setting = Setting(
        data="listops",
        objective="listops",
        seq_len=seq_len,
        batch_size=batch_size,
        replicate=replicate,
        test_tokens=tests * seq_len,
    )
    return Listops(config(**knobs), setting)


def test_it_is_found_by_name() -> None:
    assert "listops" in tasks.names()
    assert tasks.load("listops") is Listops


def expression(row: list[int]) -> str:
    """The expression of a sequence as text: padding, then it, then the question."""
    body = row[row.count(listops.PADDING) : -1]
    assert row[-1] == listops.QUESTION
    return " ".join(SYMBOLS[token] for token in body)


def value_of(text: str) -> tuple[int, int]:
    """(value, depth) of an expression by recursive descent over its text."""
    words = iter(text.split())

    def argument(word: str) -> tuple[int, int]:
        if word.isdigit():
            return int(word), 1
        found = []
        while (following := next(words)) != "]":
            found.append(argument(following))
        values = [value for value, _ in found]
        assert len(values) >= 2
        result = {
            "[MAX": max,
            "[MIN": min,
            "[MED": lambda v: int(statistics.median(v)),
            "[SM": lambda v: sum(v) % 10,
        }[word](values)
        return result, 1 + max(depth for _, depth in found)

    found = argument(next(words))
    assert next(words, None) is None, "something follows the expression"
    return found


def check(batch: Batch, task: Listops) -> None:
    config, seq_len = task.config, task.setting.seq_len
    assert batch.distances is None
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape
    assert batch.inputs.shape[1] == seq_len
    assert (batch.targets[:, :-1] == IGNORED).all()
    assert int(batch.inputs.max()) < task.vocabulary
    shortest, longest = config.lengths(seq_len)
    for row, answer in zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), strict=True):
        text = expression(row)
        assert shortest <= len(text.split()) <= longest
        value, depth = value_of(text)
        assert value == answer
        assert 2 <= depth <= config.max_depth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 2 ]", 1),
        ("[MED 3 9 [SM 9 9 9 ] 0 ]", 5),
        ("[SM 9 [MED 5 1 8 ] 7 ]", 1),
    ],
)
def test_the_other_evaluator_knows_these_by_hand(text: str, value: int) -> None:
    assert value_of(text)[0] == value


@settings(deadline=None, max_examples=40)
@given(
    seq_len=st.integers(20, 120),
    batch_size=st.integers(1, 20),
    max_depth=st.integers(3, 12),
    max_args=st.integers(3, 12),
    growth=st.floats(0.1, 0.6),
    step=st.integers(0, 100),
)
def test_every_answer_is_the_value(step: int, **given_: Any) -> None:
    task = task_of(**given_)
    if task.unsupported() is None:
        check(task.train_batch(step, 0.5), task)
        for batch in task.test_batches():
            check(batch, task)


def test_long_range_arenas_sizes() -> None:
    task = task_of(seq_len=2048, batch_size=32, min_length=501, max_length=1999)
    assert task.unsupported() is None
    batch = task.train_batch(0, 0.0)
    check(batch, task)
    assert max(value_of(expression(row))[1] for row in batch.inputs.tolist()) > 5


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=11), min_size=1, max_size=5), st.data())
def test_operators(lists: list[list[int]], data: st.DataObject) -> None:
    operators = [data.draw(st.sampled_from([10, 11, 12, 13])) for _ in lists]
    arity = np.array([len(values) for values in lists])
    found = evaluate(
        np.array(operators), np.concatenate([np.array(v) for v in lists]), np.cumsum(arity) - arity, arity
    )
    texts = [f"{SYMBOLS[op]} {' '.join(map(str, v))} ]" for op, v in zip(operators, lists, strict=True)]
    assert found.tolist() == [value_of(text)[0] for text in texts]


@cache
def chances_by_hand(depth: int, max_args: int, growth: Fraction, longest: int) -> dict[int, Fraction]:
    """Length → probability of a tree with an operator at the root, list by list, in fractions."""
    argument = {1: Fraction(1)}
    if depth > 2:
        below = chances_by_hand(depth - 1, max_args, growth, longest)
        argument = {length: growth * length_probability for length, length_probability in below.items()}
        argument[1] = 1 - growth
    found: Counter[int] = Counter()
    several: dict[int, Fraction] = {0: Fraction(1)}
    for n in range(1, max_args + 1):
        sums: Counter[int] = Counter()
        for a, p in several.items():
            for b, q in argument.items():
                if a + b <= longest:
                    sums[a + b] += p * q  # type: ignore[assignment]
        several = dict(sums)  # type: ignore[arg-type]
        for length, length_probability in several.items():
            if n >= 2 and length + 2 <= longest:
                found[length + 2] += length_probability / (max_args - 1)  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


@pytest.mark.parametrize(("depth", "max_args", "growth"), [(2, 2, 0.25), (3, 4, 0.5), (4, 3, 0.25)])
def test_the_chances_of_lengths_are_worked_out(depth: int, max_args: int, growth: float) -> None:
    config = ListopsConfig(max_depth=depth, max_args=max_args, growth=growth)
    expected = chances_by_hand(depth, max_args, Fraction(growth), 40)
    found = length_distribution(config, 40)
    assert found == pytest.approx([float(expected.get(length, 0)) for length in range(41)], abs=1e-12)


def test_trees_have_those_lengths() -> None:
    """A chi-squared test of 20,000 trees against the chances, at one in a million."""
    from scipy.stats import chisquare

    config, trees, longest = ListopsConfig(), 20_000, 60
    found = sizes(grow(np.random.default_rng(0), config, trees, longest))[0]
    counts = np.bincount(found.clip(max=longest + 1), minlength=longest + 2)[4:]
    chances = length_distribution(config, longest)[4:]
    expected = trees * np.append(chances, 1 - chances.sum())
    assert chisquare(counts, expected).pvalue > 1e-6


def test_symbols_are_drawn_evenly() -> None:
    from scipy.stats import chisquare

    generator, config = np.random.default_rng(0), ListopsConfig(max_depth=2)
    tokens, _ = fill(generator, grow(generator, config, 5000, 12), 20)
    for symbols in (range(10), range(listops.MAX, listops.SM + 1)):
        assert chisquare([int((tokens == symbol).sum()) for symbol in symbols]).pvalue > 1e-6


def test_training_never_shows_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few expressions that without care it would."""

    @dataclass(frozen=True, kw_only=True)
    class Shorter(ListopsConfig):
        min_length: int | None = 4
        max_length: int | None = 4

    monkeypatch.setattr(listops, "MIN_LENGTH", 4)
    task = task_of(tests=200, batch_size=400, seq_len=8, config=Shorter, max_depth=2, max_args=2)
    assert task.unsupported() is None
    tested = {expression(row) for batch in task.test_batches() for row in batch.inputs.tolist()}
    trained = {expression(row) for step in range(3) for row in task.train_batch(step, 0.0).inputs.tolist()}
    assert len(tested) == 200, "a test holds no expression twice"
    assert len(trained | tested) > 380, "of 400 there are"
    assert not trained & tested


def test_batches_are_the_same_again_and_differ_where_they_should() -> None:
    def inputs(replicate: int, step: int, done: float = 0.0) -> torch.Tensor:
        return task_of(replicate=replicate).train_batch(step, done).inputs

    def whole_test(**changed: Any) -> torch.Tensor:
        return torch.cat([batch.inputs for batch in task_of(**changed).test_batches()])

    assert torch.equal(inputs(1, 2), inputs(1, 2, 0.9))
    assert not torch.equal(inputs(1, 2), inputs(2, 1))
    assert not torch.equal(inputs(1, 2), inputs(1, 3))
    assert len(whole_test()) == 20
    for changed in ({"replicate": 3}, {"batch_size": 3}, {"tests": 50}):
        assert torch.equal(whole_test(**changed)[:20], whole_test())


def test_guessing_is_the_most_frequent_answer_of_the_test() -> None:
    task = task_of(tests=300)
    answers = Counter(a for batch in task.test_batches() for a in batch.targets[:, -1].tolist())
    assert task.guess_accuracy == max(answers.values()) / 300
    assert 0.1 < task.guess_accuracy < 0.3


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"min_length": 4}, "min_length=4: allowed is null or 16 or more tokens"),
        ({"max_length": 15}, "max_length=15: allowed is null or 16 to 65,536 tokens"),
        ({"min_length": 30, "max_length": 29}, "max_length=29: allowed is min_length=30 or more"),
        ({"max_length": 70_000}, "max_length=70000: allowed is null or 16 to 65,536 tokens"),
        ({"max_depth": 1}, "max_depth=1: allowed is 2 or more"),
        ({"max_args": 1}, "max_args=1: allowed is 2 or more"),
        ({"growth": 1.0}, "growth=1.0: allowed is 0 up to below 1"),
    ],
)
def test_bad_knobs_are_refused_by_name(knobs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ListopsConfig(**knobs)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"seq_len": 16}, "expressions of 16 to 15 tokens; allowed are 16 to 15"),
        ({"seq_len": 32, "max_length": 32}, "expressions of 16 to 32 tokens; allowed are 16 to 31"),
        ({"seq_len": 100_000}, "expressions of 24,999 to 99,999 tokens; allowed are 16 to 65,536"),
        (
            {"seq_len": 60_000},
            "max_depth=10, .* expressions of 14,999 to 59,999 tokens less than once in 1,000",
        ),
        ({"seq_len": 32, "max_depth": 2, "max_args": 5}, "max_args=5 .* less than once in 1,000"),
    ],
)
def test_lengths_that_cannot_be_are_refused(knobs: dict[str, Any], complaint: str) -> None:
    reason = task_of(**knobs).unsupported()
    assert reason is not None
    assert re.search(complaint, reason), reason


def test_seq_len_17_is_the_shortest() -> None:
    task = task_of(seq_len=17)
    assert task.unsupported() is None
    check(task.train_batch(0, 0.0), task)
