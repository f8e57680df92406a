"""Copying, variable tracking and aggregation: answers follow from the inputs, and from no part of them.

Each oracle reads the inputs as a person would, and knows nothing of how they were drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tasks
from bench.evaluate.accuracy import measure_accuracy
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import IGNORED, Batch, Setting, Task
from bench.train.loop import train
from bench.train.schedule import Budget
from variants import load
from variants.base import Workload

NAMES = ("copy", "variables", "frequent")


def task_of(name: str, *, seq_len: int = 40, batch_size: int = 4, test: int = 12, **knobs: Any) -> Task:
    task = tasks.load(name)
    setting = Setting(
        data=name,
        objective="recall",
        seq_len=seq_len,
        batch_size=batch_size,
        replicate=0,
        test_tokens=test * seq_len,
    )
    return task(task.Config(**knobs), setting)


def rows(batch: Batch) -> list[tuple[list[int], dict[int, int], list[int]]]:
    """Inputs, position → answer, and distances of each sequence."""
    back = batch.targets if batch.distances is None else batch.distances
    return [
        (x.tolist(), {i: int(y[i]) for i in range(len(y)) if y[i] != IGNORED}, d.tolist())
        for x, y, d in zip(batch.inputs, batch.targets, back, strict=True)
    ]


@given(
    n=st.integers(1, 6),
    symbols=st.integers(2, 5),
    spare=st.integers(0, 20),
    scattered=st.booleans(),
    step=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_copies_are_the_symbols_in_their_order(
    n: int, symbols: int, spare: int, scattered: bool, step: int
) -> None:
    task = task_of("copy", seq_len=2 * n + spare, n_tokens=n, n_symbols=symbols, scattered=scattered)
    assert task.unsupported() is None
    for inputs, answers, back in rows(task.train_batch(step, 0.0)):
        seen = [(at, token) for at, token in enumerate(inputs) if token < symbols]
        assert inputs[-n:] == [symbols + 1] * n
        assert list(answers) == list(range(len(inputs) - n, len(inputs)))
        assert [token for _, token in seen] == list(answers.values())
        assert [at - back[at] for at in answers] == [at for at, _ in seen]
        if not scattered:
            assert [at for at, _ in seen] == list(range(seen[0][0], seen[0][0] + n))


def test_a_block_is_at_every_place_and_scattered_symbols_leave_gaps() -> None:
    task = task_of("copy", n_tokens=4, seq_len=16, batch_size=200)
    starts = {min(at for at, token in enumerate(x) if token < 16) for x, _, _ in rows(task.train_batch(0, 0))}
    assert starts == set(range(9))
    spread = task_of("copy", n_tokens=4, seq_len=16, batch_size=200, scattered=True)
    places = {at for x, _, _ in rows(spread.train_batch(0, 0)) for at, token in enumerate(x) if token < 16}
    assert places == set(range(12))


N_NAMES, N_VALUES, BLANK = 12, 4, 16


def follow(inputs: list[int]) -> tuple[int, int]:
    """The value of the last variable, and where it stands, by going from assignment to assignment."""
    assigned = {}
    for at in range(0, len(inputs) - 2, 2):
        if inputs[at] != BLANK:
            assert inputs[at] not in assigned, "a variable is assigned twice"
            assigned[inputs[at]] = at + 1
    at = assigned[inputs[-1]]
    while inputs[at] < N_NAMES:
        assert assigned[inputs[at]] < at, "a variable is read before it is assigned"
        at = assigned[inputs[at]]
    return inputs[at], at


@given(
    hops=st.integers(1, 4),
    chains=st.integers(1, 3),
    spare=st.integers(1, 20),
    step=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_a_variable_is_followed_to_its_value(hops: int, chains: int, spare: int, step: int) -> None:
    seq_len = 2 * hops * chains + spare
    knobs = {"n_hops": hops, "n_chains": chains, "n_names": N_NAMES, "n_values": N_VALUES}
    task = task_of("variables", seq_len=seq_len, **knobs)
    assert task.unsupported() is None
    for inputs, answers, back in rows(task.train_batch(step, 0.0)):
        value, at = follow(inputs)
        assert answers == {seq_len - 1: value}
        assert back[-1] == seq_len - 1 - at


def test_all_chains_are_mixed() -> None:
    """The chain that is asked for is neither always first nor always last."""
    task = task_of("variables", seq_len=24, n_hops=2, n_chains=3, batch_size=200)
    firsts = [back[-1] for _, _, back in rows(task.train_batch(0, 0.0))]
    assert len({*firsts}) > 8


@given(symbols=st.integers(2, 9), tokens=st.integers(1, 60), lead=st.floats(0.01, 1), step=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_most_frequent_symbol_leads(symbols: int, tokens: int, lead: float, step: int) -> None:
    task = task_of("frequent", seq_len=tokens + 1, n_symbols=symbols, lead=lead)
    for inputs, answers, _ in rows(task.train_batch(step, 0.0)):
        counts = np.bincount(inputs[:-1], minlength=symbols)
        answer = answers[tokens]
        assert inputs[-1] == symbols
        assert counts[answer] - np.delete(counts, answer).max() >= max(1, round(lead * tokens))


def test_half_of_the_context_does_not_show_the_most_frequent_symbol() -> None:
    task = task_of("frequent", seq_len=101, n_symbols=8, lead=0.05, batch_size=300)
    right = dict.fromkeys((100, 50, 10), 0)
    for inputs, answers, _ in rows(task.train_batch(0, 0.0)):
        for share in right:
            right[share] += int(np.bincount(inputs[:share]).argmax()) == answers[100]
    assert right[100] == 300
    assert right[10] < right[50] < 285


@pytest.mark.parametrize("name", NAMES)
def test_test_sequences_do_not_depend_on_the_batch_size(name: str) -> None:
    whole = [
        torch.cat([batch.inputs for batch in task_of(name, batch_size=size).test_batches()])
        for size in (1, 5)
    ]
    assert torch.equal(*whole)
    assert len(whole[0]) == 12
    assert not torch.equal(whole[0][:4], task_of(name, batch_size=4).train_batch(0, 0.0).inputs)


@pytest.mark.parametrize(
    ("name", "knobs", "seq_len", "reason"),
    [
        ("copy", {"n_tokens": 8}, 15, "seq_len=15: data=copy with n_tokens=8 needs 16 tokens or more"),
        ("variables", {}, 8, "seq_len=8: data=variables with n_hops=2 and n_chains=2 needs 9 tokens or more"),
        ("frequent", {}, 1, "seq_len=1: data=frequent needs 2 tokens or more"),
    ],
)
def test_a_sequence_that_is_too_short_is_refused(
    name: str, knobs: dict[str, Any], seq_len: int, reason: str
) -> None:
    assert task_of(name, seq_len=seq_len, **knobs).unsupported() == reason
    assert task_of(name, seq_len=seq_len + 1, **knobs).unsupported() is None


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"n_names": 3}, "n_names=3: allowed is n_hops·n_chains=4"),
        ({"n_values": 2, "n_chains": 3}, "n_values=2"),
    ],
)
def test_too_few_symbols_are_refused(knobs: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task_of("variables", **knobs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("copy", 0.95), ("variables", 0.9), ("frequent", 0.8)])
def test_dense_attention_learns_it(name: str, least: float) -> None:
    torch.manual_seed(0)
    knobs = {"copy": {"n_tokens": 4}, "variables": {"n_chains": 1}, "frequent": {"lead": 0.2}}[name]
    task = task_of(name, seq_len=32, batch_size=64, test=200, **knobs)
    dims = Workload(causal=True, batch_size=64, seq_len=32, d_model=64, heads=2)
    variant = load("dense")
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=4)),
        dims,
        depth=2,
        dropout=0.0,
        vocabulary=task.vocabulary,
        activations="keep",
    )
    device = torch.device("cpu")
    train(
        model,
        task.train_batch,
        budget=Budget(steps=1500),
        learning_rate=0.003,
        causal=True,
        step_tokens=64 * 32,
    )
    accuracy = measure_accuracy(model, task.test_batches(), causal=True, distance_edges=(), device=device)
    assert task.guess_accuracy is not None
    assert accuracy.accuracy > max(least, 1.5 * task.guess_accuracy)
