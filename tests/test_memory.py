"""Live storage is exact, equals its own prediction, and is what a fresh process really takes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import slow

import variants
from bench.measure.memory import LiveStorage, reset_rss_peak, resident_bytes, tensor_bytes
from bench.measure.step import StepFigures, Subject, on_host, predicted
from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.records import parse
from bench.tasks import text
from variants.base import Workload
from variants.ops.fused.backends import flex
from variants.ops.patterns import masks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
MIB = 2**20


# --- the meter --------------------------------------------------------------------------------


def test_known_tensors_to_the_byte() -> None:
    with LiveStorage() as storage:
        a = torch.zeros(1000)
        assert storage.live == 4000
        b = torch.zeros(10, 7, dtype=torch.float64)
        c = a.to(torch.bfloat16)
        assert storage.live == 4000 + 560 + 2000
        assert tensor_bytes([a, {"b": b}, (c, None)]) == storage.live
        del a
        assert storage.live == 560 + 2000
        assert storage.peak == 4000 + 560 + 2000
        storage.reset_peak()
        assert storage.peak == 560 + 2000
        del b, c
    assert storage.live == 0


def test_views_do_not_count_twice_and_keep_their_storage_alive() -> None:
    with LiveStorage() as storage:
        whole = torch.zeros(100, 10)
        view = whole.T[3:5]
        again = view.detach().unflatten(1, (10, 10)).unbind(1)
        whole.mul_(2)
        assert storage.live == 4000
        del whole
        assert storage.live == 4000
        del view, again
        assert storage.live == 0
    assert storage.peak == 4000


def test_what_dies_outside_is_seen() -> None:
    with LiveStorage() as storage:
        kept = torch.zeros(1000)
    del kept
    assert storage.live == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["make", "view", "drop"]), st.integers(0, 50)), max_size=40))
def test_live_is_the_sum_of_the_storages_that_somebody_holds(actions: list[tuple[str, int]]) -> None:
    """The model: tensors by storage; a storage lives while any tensor on it does."""
    held: list[tuple[int, torch.Tensor]] = []
    sizes: dict[int, int] = {}
    peak = 0
    with LiveStorage() as storage:
        for number, (action, k) in enumerate(actions):
            if action == "make":
                sizes[number] = 4 * k
                held.append((number, torch.ones(k)))
            elif held and action == "view":
                owner, tensor = held[k % len(held)]
                held.append((owner, tensor[: k // 2]))
            elif held:
                del held[k % len(held)]
            if action == "view" and held:
                del tensor  # a name is a reference too
            alive = sum(sizes[owner] for owner in {owner for owner, _ in held})
            peak = max(peak, alive)
            assert storage.live == alive
    assert storage.peak == peak


def test_compiled_kernels_stay_compiled_and_what_they_return_is_seen() -> None:
    """FlexAttention would run uncompiled under a mode that does not let it be, and refuses."""
    q = torch.randn(1, 2, 256, 16)
    rule = masks.causal
    expected = flex(q, q, q, rule)  # keeps the block mask
    with LiveStorage() as storage:
        y = flex(q, q, q, rule).clone()
    assert storage.live == tensor_bytes(y)
    assert torch.equal(y, expected)


def test_gradients_and_what_autograd_stores_are_followed() -> None:
    """y = x·x stores nothing of its own; its sum is a scalar; the gradient is as large as x, and dies."""
    with LiveStorage() as storage:
        x = torch.ones(1000, requires_grad=True)
        y = (x * x).exp()  # exp stores its result, which is y
        assert storage.live == 2 * 4000, "the square is not needed for backward"
        y.sum().backward()
        del y
        gc.collect()
        assert storage.live == 2 * 4000, "x and its gradient"
        x.grad = None
        assert storage.live == 4000


# --- the step ---------------------------------------------------------------------------------


def subject_of(name: str, *, seq_len: int, causal: bool = True, **changed: Any) -> Subject:
    others: dict[str, Any] = {"activations": "keep", "depth": 2, "dtype": torch.float32, "dropout": 0.0}
    others |= changed
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=2, seq_len=seq_len, d_model=32, heads=2)

    def build() -> LanguageModel:
        return LanguageModel(
            ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=4)),
            dims,
            vocabulary=text.VOCABULARY,
            **others,
        )

    def batch() -> text.Batch:
        tokens = torch.zeros(2, seq_len, dtype=torch.int64)
        return text.Batch(tokens, tokens.clone())

    return Subject.make(build, batch, causal=causal, device=CPU)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense", "seq_len": 200},
    "longformer, checkpoint": {"name": "longformer", "seq_len": 601, "activations": "checkpoint", "depth": 3},
    "overlapping, both sides": {"name": "overlapping", "seq_len": 601, "causal": False},
    "chunked, bfloat16, dropout": {
        "name": "chunked",
        "seq_len": 601,
        "dtype": torch.bfloat16,
        "dropout": 0.1,
    },
}


QUICK = ("dense", "transformer_xl")
"""Without and with segments, by default; `test_contract_cost` plans a step of every variant."""


def without_rss(figures: StepFigures) -> dict[str, Any]:
    return {key: value for key, value in vars(figures).items() if key != "rss_peak_bytes"}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_prediction_equals_the_real_step_in_every_figure(configuration: str) -> None:
    """Byte for byte and FLOP for FLOP: fake tensors take the code paths of real ones."""

    def make() -> Subject:
        return subject_of(**CONFIGURATIONS[configuration])

    _, figures = on_host(make)
    assert without_rss(predicted(make)) == without_rss(figures)


@pytest.mark.parametrize(
    "activations",
    [s if s == "checkpoint" else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES],
)
@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in variants.mixers() if name not in QUICK))])
def test_the_predicted_peak_is_the_measured_one_under_every_strategy(name: str, activations: str) -> None:
    """Of several segments of work, the last one shorter, where a variant cuts its work in segments."""

    def make() -> Subject:
        causal = variants.load(name).info.caps.causal
        return subject_of(name, seq_len=417, activations=activations, depth=3, causal=causal)

    _, figures = on_host(make)
    assert predicted(make).peaks == figures.peaks


def test_parameters_gradients_and_optimiser_state_in_closed_form() -> None:
    """AdamW keeps two moments as large as the parameters, and a float32 step count for each tensor."""
    subject, figures = on_host(lambda: subject_of("dense", seq_len=64))
    vocabulary, c, depth = text.VOCABULARY, 32, 2
    parameters = 2 * vocabulary * c + 2 * c + depth * (4 * c * c + 8 * c * c + 4 * c)
    assert figures.param_bytes == figures.grad_bytes == 4 * parameters
    assert figures.optimizer_bytes == 2 * 4 * parameters + 4 * len(list(subject.model.parameters()))
    held = figures.param_bytes + figures.grad_bytes + figures.optimizer_bytes
    assert figures.peak_bytes >= held


def saved_bytes(subject: Subject) -> int:
    """Bytes of the storages that autograd's own hooks see saved, parameters and batch left out."""
    known = {t.untyped_storage().data_ptr() for t in (*subject.model.parameters(), *subject.batch[:2])}
    stored: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.step()
    return sum(stored.values())


@pytest.mark.parametrize("name", ["dense", "longformer"])
def test_activation_bytes_are_what_autograd_saves(name: str) -> None:
    """Besides, only scalars live between the passes: the nll, its sums and counts."""
    subject, figures = on_host(lambda: subject_of(name, seq_len=601))
    assert 0 <= figures.activation_bytes - saved_bytes(subject) <= 64


def test_checkpointing_stores_a_blocks_input_and_little_else() -> None:
    """Each block more costs its input, (B, T, C) in float32, and the random state to repeat it with."""

    def stored(activations: str, depth: int) -> int:
        _, figures = on_host(lambda: subject_of("dense", seq_len=256, activations=activations, depth=depth))
        return figures.activation_bytes

    block_input = 2 * 256 * 32 * 4
    random_state = torch.get_rng_state().numel()
    assert stored("checkpoint", 3) - stored("checkpoint", 2) == pytest.approx(
        block_input, abs=2 * random_state
    )
    assert stored("keep", 3) - stored("keep", 2) > 8 * block_input


# --- against the operating system -------------------------------------------------------------

FRESH_PROCESS = '''
"""Resident memory that two training steps take on top of a process that has everything loaded."""
import dataclasses, gc, sys
import torch
from hydra import compose, initialize_config_dir
from bench.config import parse
from bench.measure.predict import build_model
from bench.measure.memory import reset_rss_peak, resident_bytes
from bench.measure.step import Subject
from bench.tasks import text

def train(spec):
    def batch():
        tokens = torch.randint(0, 256, (spec.batch_size, spec.seq_len))
        return text.Batch(tokens, tokens.clone())
    subject = Subject.make(lambda: build_model(spec), batch, causal=spec.causal, device=torch.device("cpu"))
    subject.step()
    subject.step()

with initialize_config_dir(sys.argv[1], version_base="1.3"):
    spec = parse.parse(compose("config", overrides=sys.argv[2:])).spec
# A step of another, tiny model first: the math libraries start their threads, read their code and make
# their tables when they are first used. That is the process's, not the step's, and tens of MiB.
tiny = dataclasses.replace(spec.model, d_model=32, heads=2)
train(dataclasses.replace(spec, seq_len=64, batch_size=1, depth=1, model=tiny))
gc.collect()
before = resident_bytes("VmRSS")
assert reset_rss_peak()
train(spec)
print(resident_bytes("VmHWM") - before)
'''


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    return out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["variant=dense", "seq_len=1024", "depth=2", "activations=keep"], id="dense"),
        pytest.param(["variant=chunked", "seq_len=1024", "depth=3", "activations=checkpoint"], id="chunked"),
    ],
)
def test_peak_bytes_are_what_a_fresh_process_grows_by(tmp_path: Path, overrides: list[str]) -> None:
    """The kernel's own peak of a process that does the same step, within 5 % or 8 MiB.

    Both are the peak of the second step with the model, its optimiser and the batch. glibc is told to give
    freed blocks back at once (`MALLOC_MMAP_THRESHOLD_`), or the peak would be that of its free lists. What is
    left between the two: blocks below the threshold, pages of code first used by these shapes, and what a
    kernel allocates for itself.
    """
    overrides = ["batch_size=4", "model=small", "measure=quick", "measure.time_seconds=0", *overrides]
    cell = run("-m", "bench", *overrides, f"results_dir={tmp_path}")
    fresh = run("-c", FRESH_PROCESS, str(ROOT / "configs"), *overrides, MALLOC_MMAP_THRESHOLD_="65536")
    record, grown = parse(Path(answer(cell)).read_text()), int(answer(fresh))
    assert record.peak_bytes_source == "live_storage"
    assert record.peak_bytes is not None
    print(f"peak_bytes {record.peak_bytes / MIB:.2f} MiB, the process grew by {grown / MIB:.2f} MiB")
    assert record.peak_bytes > 100 * MIB, "too small for 8 MiB to mean anything"
    assert grown == pytest.approx(record.peak_bytes, rel=0.05, abs=8 * MIB)


def test_resident_peak_is_forgotten_on_request() -> None:
    """A block that is touched and freed stays in the peak until the reset, and not after it."""
    block = torch.ones(64 * MIB // 4)
    del block
    high = resident_bytes("VmHWM")
    assert reset_rss_peak()
    low, now = resident_bytes("VmHWM"), resident_bytes("VmRSS")
    assert high is not None
    assert low is not None
    assert now is not None
    assert high - low > 32 * MIB
    assert abs(low - now) < 8 * MIB
    assert resident_bytes("VmNothing") is None
