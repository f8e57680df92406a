"""Multi-query associative recall: what every sequence holds, and who may see an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tasks.base import IGNORED, Batch, Setting
from bench.tasks.mqar import MIN_PAIRS, Mqar, MqarConfig


def task_of(*, seq_len: int = 32, batch_size: int = 8, **changed: Any) -> Mqar:
    setting: dict[str, Any] = {"replicate": 0, "test_tokens": 10 * seq_len}
    setting |= {key: changed.pop(key) for key in tuple(setting) if key in changed}
    sizes = Setting(data="mqar", objective="recall", seq_len=seq_len, batch_size=batch_size, **setting)
    return Mqar(MqarConfig(**changed), sizes)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(batch: Batch, n_pairs: int, n_symbols: int, asks: int | None = None) -> None:
    """Read each sequence as a person would: pairs first, then each key, all as often or one time more; all
    else is blank. `asks` is how often in all, by default once each."""
    inputs, targets, distances = batch
    assert distances is not None
    half, blank = n_symbols // 2, n_symbols
    for row, wanted, back in zip(inputs.tolist(), targets.tolist(), distances.tolist(), strict=True):
        pairs = dict(zip(row[: 2 * n_pairs : 2], row[1 : 2 * n_pairs : 2], strict=True))
        assert len(pairs) == len({*pairs.values()}) == n_pairs, "keys and values differ"
        assert all(0 <= key < half <= value < n_symbols for key, value in pairs.items())
        scored = [t for t, target in enumerate(wanted) if target != IGNORED]
        times, more = divmod(asks or n_pairs, n_pairs)
        assert len(scored) == times * n_pairs + more
        assert {row[t] for t in scored} == {*pairs}
        assert {sum(row[t] == key for t in scored) for key in pairs} <= {times, times + bool(more)}
        assert all(wanted[t] == pairs[row[t]] for t in scored)
        assert all(row[t - back[t]] == wanted[t] for t in scored), "the value lies so far back"
        others = {*range(2 * n_pairs, len(row))} - {*scored}
        assert all(row[t] == blank for t in others)


@settings(deadline=None)
@given(st.data())
def test_every_sequence_holds_pairs_and_a_query_of_each(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9), "n_pairs")
    symbols = 2 * data.draw(st.integers(n, 2 * n), "n_symbols / 2")
    seq_len = data.draw(st.integers(4 * n, 8 * n), "seq_len")
    power = data.draw(st.sampled_from([0.01, 0.3, 1.0]), "power_a")
    task = task_of(seq_len=seq_len, n_pairs=n, n_symbols=symbols, power_a=power)
    assert task.unsupported() is None
    batch = task.train_batch(data.draw(st.integers(0, 100), "step"), 0.0)
    assert batch.inputs.shape == (8, seq_len)
    assert int(batch.inputs.max()) < task.vocabulary == symbols + 1
    check(batch, n, symbols)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 80))
def test_a_length_is_refused_exactly_where_pairs_and_queries_do_not_fit(n_pairs: int, seq_len: int) -> None:
    task = task_of(n_pairs=n_pairs, seq_len=seq_len)
    reason = task.unsupported()
    assert (reason is None) == (seq_len >= 4 * n_pairs)
    if reason:
        assert f"seq_len={seq_len}" in reason
        assert f"n_pairs={n_pairs}" in reason
        assert f"{4 * n_pairs} tokens" in reason
    else:
        task.train_batch(0, 0.0)


def test_no_input_at_or_after_a_query_holds_its_answer() -> None:
    """So that a bidirectional model is asked for the same as a causal one."""
    inputs, targets, _ = task_of(n_pairs=8, seq_len=64, batch_size=64).train_batch(0, 0.0)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        for t, answer in enumerate(wanted):
            assert answer == IGNORED or answer not in row[t:]


def test_a_training_batch_is_a_function_of_replicate_and_step() -> None:
    first = task_of().train_batch(3, 0.5)
    torch.manual_seed(1)
    assert same(first, task_of().train_batch(3, 0.5))
    assert not same(first, task_of().train_batch(4, 0.5))
    assert not same(first, task_of(replicate=1).train_batch(3, 0.5))


def test_test_sequences_are_the_same_for_every_replicate_and_batch_size() -> None:
    whole = list(task_of(batch_size=4).test_batches())
    assert [len(batch.inputs) for batch in whole] == [4, 4, 2]
    for changed in ({"batch_size": 3}, {"replicate": 5}, {"batch_size": 100}):
        again = list(task_of(**changed).test_batches())
        for k in range(3):
            parts = (torch.cat([batch[k] for batch in batches]) for batches in (whole, again))  # type: ignore[misc]
            assert torch.equal(*parts)


def test_nothing_that_is_tested_was_trained_on() -> None:
    tested = {tuple(row) for batch in task_of().test_batches() for row in batch.inputs.tolist()}
    seen = {
        tuple(row)
        for replicate in range(3)
        for step in range(50)
        for row in task_of(replicate=replicate).train_batch(step, 0.0).inputs.tolist()
    }
    assert len(tested) == 10
    assert not tested & seen


def test_queries_stand_by_the_power_law() -> None:
    """With one pair a place is one draw: its share is its weight's, to five standard deviations."""
    for power in (0.01, 0.5, 1.0):
        task = task_of(n_pairs=1, seq_len=18, batch_size=20_000, power_a=power)
        scored = task.train_batch(0, 0.0).targets != IGNORED
        share = scored.double().mean(dim=0)[2::2]
        weight = torch.arange(1, 9).double() ** (power - 1)
        expected = weight / weight.sum()
        assert (share - expected).abs().max() < 5 * 0.5 / 20_000**0.5
        assert not scored[:, 3::2].any()


def test_a_query_may_ask_for_any_pair_wherever_it_stands() -> None:
    """Else the place of a query would tell its pair, and with it the value's, without any recall."""
    task = task_of(n_pairs=4, seq_len=16, batch_size=4000)
    distances = task.train_batch(0, 0.0).distances
    assert distances is not None
    for place in (8, 10, 12, 14):
        pair = (place - 1 - distances[:, place]) // 2
        counts = torch.bincount(pair, minlength=4)
        assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_every_symbol_is_as_likely_in_every_pair() -> None:
    """To five standard deviations of a binomial."""
    rows = 20_000
    inputs = task_of(n_pairs=3, n_symbols=8, seq_len=12, batch_size=rows).train_batch(0, 0.0).inputs
    for place, low in ((0, 0), (2, 0), (4, 0), (1, 4), (3, 4), (5, 4)):
        counts = torch.bincount(inputs[:, place] - low, minlength=4)
        assert (counts - rows / 4).abs().max() < 5 * (rows * 0.25 * 0.75) ** 0.5


def test_a_curriculum_grows_to_all_pairs_and_test_batches_hold_them_all() -> None:
    task = task_of(n_pairs=16, seq_len=64, curriculum=0.5)
    grown = [task.pairs(done) for done in np.linspace(0, 0.5, 400, endpoint=False)]
    assert grown == sorted(grown)
    assert {*grown} == {*range(MIN_PAIRS, 16)}
    assert [task.pairs(done) for done in (0.5, 0.7, 0.999)] == [16, 16, 16]
    check(task.train_batch(0, 0.0), MIN_PAIRS, 64, asks=(64 - 2 * MIN_PAIRS) // 2 // 2)
    check(task.train_batch(0, 0.49), 15, 64, asks=15)
    check(task.train_batch(0, 0.6), 16, 64)
    for batch in task.test_batches():
        check(batch, 16, 64)
    without = task_of(n_pairs=16, seq_len=64)
    assert {without.pairs(done) for done in (0.0, 0.3)} == {16}
    assert task_of(n_pairs=1, curriculum=0.5).pairs(0.0) == 1


def test_buckets_hold_every_distance() -> None:
    task = task_of(n_pairs=4, seq_len=50, batch_size=500, power_a=1.0)
    batch = task.train_batch(0, 0.0)
    assert batch.distances is not None
    back = batch.distances[batch.targets != IGNORED]
    assert task.distance_edges == (1, 2, 4, 8, 16, 32)
    assert int(back.min()) >= 1
    assert int(back.max()) >= 32
    assert task.guess_accuracy == 1 / 4


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"n_pairs": 0}, ("n_pairs=0", "1 or more")),
        ({"n_pairs": 40}, ("n_symbols=64", "n_pairs=80", "or more")),
        ({"n_symbols": 63}, ("n_symbols=63", "a multiple of 2")),
        ({"power_a": 0.0}, ("power_a=0.0", "more than 0")),
        ({"power_a": 1.5}, ("power_a=1.5", "up to 1")),
        ({"power_a": float("nan")}, ("power_a=nan",)),
        ({"curriculum": -0.1}, ("curriculum=-0.1", "0 to 1")),
    ],
)
def test_a_knob_that_cannot_be_is_refused_by_name(knobs: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="allowed is") as caught:
        MqarConfig(**knobs)
    assert all(part in str(caught.value) for part in parts)
