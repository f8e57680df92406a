"""A step that goes segment by segment is predicted from few of its segments, and exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure.memory import LiveStorage
from bench.measure.step import DistinctSegments, StepFigures, Subject, on_host, predicted
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks import text
from variants.base import Workload
from variants.ops.segments.compression import COMPRESSIONS

CPU = torch.device("cpu")

sizes = {
    "segment": st.integers(1, 20),
    "mem_len": st.integers(0, 30),
    "segments_at_once": st.sampled_from([1, 2, "all"]),
}
compressed = {
    "comp_len": st.integers(0, 8),
    "rate": st.integers(1, 25),
    "compression": st.sampled_from(sorted(COMPRESSIONS)),
}


configurations = st.one_of(
    st.tuples(st.just("transformer_xl"), st.fixed_dictionaries(sizes)),
    st.tuples(st.just("compressive"), st.fixed_dictionaries({**sizes, **compressed})),
)


def subject_of(name: str, knobs: dict[str, Any], *, seq_len: int, batch: int = 2, **changed: Any) -> Subject:
    others: dict[str, Any] = {"activations": "keep", "depth": 2, "dtype": torch.float32} | changed
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=batch, seq_len=seq_len, d_model=16, heads=2)

    def build() -> LanguageModel:
        config = variant.Config(**knobs)
        return LanguageModel(
            ModelSpec.of(variant, config, feed_forward=feed_forward(mult=2)),
            dims,
            dropout=0.0,
            vocabulary=11,
            **others,
        )

    def blank() -> text.Batch:
        tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
        return text.Batch(tokens, tokens.clone())

    return Subject.make(build, blank, causal=True, device=CPU)


def comparable(figures: StepFigures) -> dict[str, Any]:
    return {key: value for key, value in vars(figures).items() if key != "rss_peak_bytes"}


@st.composite
def configurations_and_lengths(draw: st.DrawFn) -> tuple[str, dict[str, Any], int]:
    """A variant, its knobs, and a length of up to 8 segments, most often with a shorter last one."""
    name, knobs = draw(configurations)
    length = draw(st.integers(0, 7)) * knobs["segment"] + draw(st.integers(1, knobs["segment"]))
    return name, knobs, length


sampled = given(
    configuration=configurations_and_lengths(),
    batch=st.sampled_from([1, 2]),
    depth=st.sampled_from([1, 2]),
    activations=st.sampled_from(["keep", "checkpoint", "reversible"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@settings(deadline=None, max_examples=1)
@sampled
@example(  # too short for any compression: its parameters have neither gradients nor optimiser state
    configuration=(
        "compressive",
        {"segment": 4, "mem_len": 22, "comp_len": 4, "rate": 5, "compression": "conv"},
        9,
    ),
    batch=2,
    depth=1,
    activations="keep",
    dtype=torch.float32,
)
@example(  # groups of two segments, the last of one and a half
    configuration=(
        "compressive",
        {
            "segment": 6,
            "mem_len": 8,
            "comp_len": 3,
            "rate": 2,
            "compression": "conv",
            "segments_at_once": 2,
        },
        69,
    ),
    batch=2,
    depth=2,
    activations="checkpoint",
    dtype=torch.float32,
)
@example(  # a last segment of one token
    configuration=("transformer_xl", {"segment": 6, "mem_len": 20}, 61),
    batch=2,
    depth=2,
    activations="keep",
    dtype=torch.float32,
)
@pytest.mark.slow
def test_a_plan_equals_the_step_for_every_knob(
    configuration: tuple[str, dict[str, Any], int], **sizes: Any
) -> None:
    """Every figure, FLOP for FLOP and byte for byte, the reconstruction loss among them."""
    assert_planned(configuration, **sizes)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@sampled
@example(  # a memory that takes 9 segments to return to its size
    configuration=(
        "compressive",
        {"segment": 10, "mem_len": 6, "comp_len": 3, "rate": 9, "compression": "conv"},
        233,
    ),
    batch=1,
    depth=1,
    activations="keep",
    dtype=torch.float32,
)
@example(  # segments after which nothing is compressed, and a memory much longer than a segment
    configuration=(
        "compressive",
        {"segment": 4, "mem_len": 21, "comp_len": 4, "rate": 7, "compression": "dilated_conv"},
        71,
    ),
    batch=2,
    depth=2,
    activations="keep",
    dtype=torch.bfloat16,
)
def test_a_plan_equals_the_step_for_many_knobs(
    configuration: tuple[str, dict[str, Any], int], **sizes: Any
) -> None:
    assert_planned(configuration, **sizes)


def assert_planned(configuration: tuple[str, dict[str, Any], int], **sizes: Any) -> None:
    name, knobs, seq_len = configuration

    def make() -> Subject:
        return subject_of(name, knobs, seq_len=seq_len, **sizes)

    _, figures = on_host(make)
    assert comparable(predicted(make)) == comparable(figures)


@pytest.mark.parametrize(
    ("name", "knobs", "gone_through"),
    [
        # two fill the memory, one begins with it full, and the last
        ("transformer_xl", {"segment": 64, "mem_len": 128}, 4),
        # two fill the memory, and two the compressed one, whose parameters then have their gradients
        ("compressive", {"segment": 64, "mem_len": 128, "comp_len": 32, "rate": 4}, 6),
    ],
)
def test_few_segments_of_many_are_gone_through(name: str, knobs: dict[str, Any], gone_through: int) -> None:
    with FakeTensorMode(), LiveStorage() as storage:
        subject = subject_of(name, knobs, seq_len=6400)
        distinct = DistinctSegments(subject, storage)
        subject.step(segments=distinct)
    assert len(distinct.counts) == gone_through
    assert sum(distinct.counts) == 100
    assert distinct.counts[-1] == 1


def test_a_period_of_several_segments_is_gone_through_once_and_what_is_left_of_it() -> None:
    """The memory holds 8 + 0, 1 or 2 positions: 64 = 3 · 21 + 1."""
    knobs = {"segment": 64, "mem_len": 8, "comp_len": 4, "rate": 3}
    with FakeTensorMode(), LiveStorage() as storage:
        subject = subject_of("compressive", knobs, seq_len=6400 + 5)
        distinct = DistinctSegments(subject, storage)
        subject.step(segments=distinct)
    assert sum(distinct.counts) == 101
    repeated = [count for count in distinct.counts if count > 1]
    assert len(repeated) == 3
    assert len(distinct.counts) <= 10
