"""The needle: where it lies, what is asked, what guessing reaches, and where a window loses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import variants
from bench import tasks
from bench.evaluate.receptive_field import reach
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import IGNORED, Batch, Setting
from bench.tasks.needle import START_DISTANCE, Needle, NeedleConfig
from bench.train.loop import train
from bench.train.schedule import Budget
from variants.base import Workload

T = 32


def task_of(
    *, seq_len: int = T, batch_size: int = 8, replicate: int = 0, rounds: int = 1, **knobs: Any
) -> Needle:
    """A needle with room for this many rounds in its test."""
    config = NeedleConfig(**knobs)
    setting = Setting(
        data="needle",
        objective="recall",
        seq_len=seq_len,
        batch_size=batch_size,
        replicate=replicate,
        test_tokens=rounds * config.n_depths * seq_len,
    )
    return Needle(config, setting)


def test_it_is_found_by_name() -> None:
    assert "needle" in tasks.names()
    assert tasks.load("needle") is Needle


def whole_test(task: Needle) -> Batch:
    batches = list(task.test_batches())
    assert all(len(batch.inputs) <= task.setting.batch_size for batch in batches)
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))  # type: ignore[arg-type]


def first_value(config: NeedleConfig) -> int:
    """The first symbol that is a value."""
    return config.n_filler + config.n_keys


def read(row: list[int], config: NeedleConfig) -> dict[int, tuple[int, int]]:
    """Key → (value, where the value lies), from the tokens alone; the query is not a pair."""
    pairs = {}
    for t, token in enumerate(row[:-1]):
        if config.n_filler <= token < first_value(config):
            assert token not in pairs, "a key stands twice"
            assert row[t + 1] >= first_value(config), "a key without a value"
            pairs[token] = (row[t + 1], t + 1)
        if token >= first_value(config):
            assert config.n_filler <= row[t - 1] < first_value(config), "a value without a key"
    return pairs


def check(batch: Batch, task: Needle) -> None:
    """Every sequence is a needle, told by looking for the query's key."""
    config, seq_len = task.config, task.setting.seq_len
    assert batch.distances is not None
    assert {part.dtype for part in batch} == {torch.int64}
    assert batch.inputs.shape == batch.targets.shape == batch.distances.shape
    assert batch.inputs.shape[1] == seq_len
    assert int(batch.inputs.min()) >= 0
    assert int(batch.inputs.max()) < task.vocabulary
    assert (batch.targets[:, :-1] == IGNORED).all()
    for row, target, distance in zip(
        batch.inputs.tolist(), batch.targets[:, -1].tolist(), batch.distances[:, -1].tolist(), strict=True
    ):
        pairs = read(row, config)
        assert len(pairs) == config.n_distractors + 1
        assert pairs[row[-1]] == (target, seq_len - 1 - distance)


@st.composite
def tasks_drawn(draw: st.DrawFn) -> Needle:
    distractors, depths = draw(st.integers(0, 5)), draw(st.integers(2, 9))
    shortest = max(depths + 2, 2 * distractors + 4)
    return task_of(
        seq_len=draw(st.integers(shortest, shortest + 20)),
        batch_size=draw(st.integers(1, 9)),
        replicate=draw(st.integers(0, 3)),
        rounds=draw(st.integers(1, 5)),
        n_depths=depths,
        n_distractors=distractors,
        n_keys=draw(st.integers(distractors + 1, 8)),
        n_values=draw(st.integers(2, 5)),
        n_filler=draw(st.integers(1, 4)),
    )


@settings(deadline=None, max_examples=60)
@given(task=tasks_drawn(), step=st.integers(0, 1000))
def test_the_key_asks_for_the_value_that_follows_it(task: Needle, step: int) -> None:
    assert task.unsupported() is None
    check(task.train_batch(step, 0.5), task)
    check(whole_test(task), task)


@given(seq_len=st.integers(1, 30), n_depths=st.integers(2, 12), n_distractors=st.integers(0, 12))
def test_what_does_not_fit_is_refused(seq_len: int, n_depths: int, n_distractors: int) -> None:
    """The distances must differ, and the worst place of the needle leave room for the other pairs."""
    task = task_of(seq_len=seq_len, n_depths=n_depths, n_distractors=n_distractors)
    starts = range(seq_len - 2)  # of pairs before the query
    alike = [len([start for start in starts if start % 2 == parity]) for parity in (0, 1)]
    fits = min(alike) > n_distractors and len(set(task.distance_edges)) == n_depths
    assert (task.unsupported() is None) == fits
    if not fits:
        assert f"seq_len={seq_len}" in str(task.unsupported())


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"n_depths": 1}, "n_depths=1: allowed is 2 or more"),
        ({"n_distractors": -1}, "n_distractors=-1: allowed is 0 or more"),
        ({"n_distractors": 4, "n_keys": 4}, "n_keys=4: allowed is more than n_distractors=4"),
        ({"n_values": 1}, "n_values=1: allowed is 2 or more"),
        ({"n_filler": 0}, "n_filler=0: allowed is 1 or more"),
        ({"curriculum": 1.5}, "curriculum=1.5: allowed is 0 to 1"),
    ],
)
def test_bad_knobs_are_refused_by_name(knobs: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NeedleConfig(**knobs)


def test_training_takes_every_distance_and_value_alike() -> None:
    task = task_of(seq_len=18, batch_size=4000, n_values=4)
    batch = task.train_batch(0, 0.0)
    assert batch.distances is not None
    distances = np.bincount(batch.distances[:, -1].numpy(), minlength=17)[1:]
    values = np.bincount(batch.targets[:, -1].numpy() - first_value(task.config))
    assert len(distances) == 16
    for counts in (distances, values):
        expected = counts.sum() / len(counts)
        assert (abs(counts - expected) < 5 * expected**0.5).all(), "more than five standard deviations off"


def test_a_curriculum_moves_needles_back_to_the_first_token() -> None:
    task = task_of(seq_len=66, batch_size=500, curriculum=0.5)
    reached = [task.reached(done) for done in np.linspace(0, 0.5, 400, endpoint=False)]
    assert reached == sorted(reached)
    assert {*reached} == {*range(START_DISTANCE, 64)}
    assert {task.reached(done) for done in (0.5, 0.8, 0.999)} == {64}
    for done in (0.0, 0.25, 0.6):
        distances = task.train_batch(3, done).distances
        assert distances is not None
        assert distances[:, -1].max() == task.reached(done)
    assert task_of(seq_len=66).reached(0.0) == 64
    assert task_of(seq_len=10, curriculum=0.5).reached(0.0) == 8
    plain, grown = (whole_test(task_of(seq_len=66, curriculum=share)) for share in (0.0, 0.5))
    assert torch.equal(plain.inputs, grown.inputs)


def test_a_test_takes_each_depth_and_value_in_turn() -> None:
    task = task_of(rounds=11, n_depths=4, n_values=5)
    batch = whole_test(task)
    assert batch.distances is not None
    cells = list(zip(batch.distances[:, -1].tolist(), batch.targets[:, -1].tolist(), strict=True))
    assert task.distance_edges == (1, 11, 20, 30)
    assert sorted(cells) == sorted(
        [(d, first_value(task.config) + v) for d in task.distance_edges for v in range(5)] * 2
    )
    assert len(batch.inputs.unique(dim=0)) == len(cells)


@pytest.mark.parametrize("n_distractors", [0, 3])
def test_contexts_are_the_same_under_every_value(n_distractors: int) -> None:
    """So that nothing but the needle tells which value is right."""
    task = task_of(rounds=10, n_depths=4, n_values=5, n_distractors=n_distractors, batch_size=7)
    batch = whole_test(task)
    assert batch.distances is not None
    hidden = batch.inputs.scatter(1, T - 1 - batch.distances[:, -1:], -1)
    contexts, counts = hidden.unique(dim=0, return_counts=True)
    assert len(contexts) == 2 * 4
    assert (counts == 5).all()


@pytest.mark.parametrize(("n_distractors", "expected"), [(0, 0.2), (1, 0.6), (3, 0.4)])
def test_guessing_is_worked_out(n_distractors: int, expected: float) -> None:
    """Among the values in the context, by drawing them; without distractors, among all values."""
    task = task_of(n_distractors=n_distractors, n_values=5, batch_size=2000)
    assert task.guess_accuracy == pytest.approx(expected)
    if n_distractors:
        batch, generator = task.train_batch(0, 0.0), np.random.default_rng(0)
        rows = [[value for value, _ in read(row, task.config).values()] for row in batch.inputs.tolist()]
        right = generator.permuted(np.array(rows), axis=1)[:, 0] == batch.targets[:, -1].numpy()
        assert right.mean() == pytest.approx(expected, abs=0.05)


def test_batches_are_the_same_again_and_differ_where_they_should() -> None:
    def inputs(replicate: int, step: int, done: float = 0.0) -> Tensor:
        return task_of(replicate=replicate).train_batch(step, done).inputs

    assert torch.equal(inputs(1, 2), inputs(1, 2, 0.9))
    assert not torch.equal(inputs(1, 2), inputs(2, 1))
    assert not torch.equal(inputs(1, 2), inputs(1, 3))
    tests = [whole_test(task_of(replicate=r, batch_size=b, rounds=9)) for r, b in ((0, 8), (3, 8), (0, 3))]
    for other in tests[1:]:
        for mine, theirs in zip(tests[0], other, strict=True):
            assert torch.equal(mine, theirs), "replicate or batch size changes the test"


def model_of(name: str, task: Needle, *, depth: int = 2, **knobs: Any) -> LanguageModel:
    torch.manual_seed(0)
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=task.setting.seq_len, d_model=32, heads=2)
    others: dict[str, Any] = {"dropout": 0.0, "activations": "keep"}
    return LanguageModel(
        ModelSpec.of(variant, variant.Config(**knobs), feed_forward=feed_forward(mult=2)),
        dims,
        depth=depth,
        vocabulary=task.vocabulary,
        **others,
    )


@torch.no_grad()
def accuracy_by_distance(model: LanguageModel, task: Needle) -> dict[int, float]:
    """Distance → how often the likeliest of the values is right: an untrained model would name a filler."""
    model.eval()
    right: dict[int, list[bool]] = {distance: [] for distance in task.distance_edges}
    for batch in task.test_batches():
        *_, (_, out) = model.stream(batch.inputs, causal=True)
        assert batch.distances is not None
        named = out.logits[:, -1, first_value(task.config) :].argmax(dim=-1) + first_value(task.config)
        hits = named == batch.targets[:, -1]
        for distance, hit in zip(batch.distances[:, -1].tolist(), hits.tolist(), strict=True):
            right[distance].append(hit)
    return {distance: float(np.mean(hits)) for distance, hits in right.items()}


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("longformer", {"window": (6,)}),
        ("longformer", {"window": (4, 9), "dilation": (1, 2)}),
        ("chunked", {"chunk": 12}),
        ("overlapping", {"chunk": 12}),
        ("transformer_xl", {"segment": 6, "mem_len": 3}),
    ],
)
def test_beyond_its_reach_a_model_is_right_once_in_n_values(name: str, knobs: dict[str, Any]) -> None:
    """Not about as often: exactly, whatever its weights are."""
    task = task_of(seq_len=T, n_depths=30, rounds=15, n_values=5, n_distractors=1, batch_size=50)
    model = model_of(name, task, **knobs)
    found = reach(model, T, causal=True)
    assert found is not None
    beyond = [a for d, a in accuracy_by_distance(model, task).items() if d > found]
    assert len(beyond) == T - 2 - found
    assert beyond == pytest.approx([1 / 5] * len(beyond))


@pytest.mark.slow
def test_a_trained_window_finds_it_within_its_reach_and_not_beyond() -> None:
    """Two layers relay it: the reach is twice a window less one, and that is where accuracy drops."""
    task = task_of(seq_len=T, batch_size=64, n_depths=30, rounds=8, n_values=4, n_filler=4)
    model = model_of("longformer", task, window=(8,))
    assert reach(model, T, causal=True) == 14
    train(
        model,
        task.train_batch,
        budget=Budget(steps=300),
        learning_rate=1e-2,
        causal=True,
        step_tokens=64 * T,
    )
    found = accuracy_by_distance(model, task)
    assert min(a for d, a in found.items() if d <= 14) >= 0.75, found
    assert [a for d, a in found.items() if d > 14] == pytest.approx([1 / 4] * 16)
