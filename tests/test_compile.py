"""Compilation: a compiled model computes the same, compilations are counted, and what cannot be compiled is
refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_checkpoints
import torch
from oracles import dims_for
from test_memory import saved_bytes, subject_of
from tiers import slow
from torch import Tensor

import variants
from bench.measure import allocator, step
from bench.measure.allocator import PhaseEnd, peaks_of
from bench.measure.compile_time import Compilations, CompiledStep
from bench.model import compile as compiling_module
from bench.model.activations import STRATEGIES
from bench.model.compile import compiling
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule
from bench.process import compiler
from bench.tasks.base import Batch
from bench.train.loop import Training
from bench.train.step import training_step
from variants.base import Variant

CPU = torch.device("cpu")
TOKENS = 300
"""Two segments of the variants that have them by default, of different lengths."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}
"""Relative to the loss and to the largest gradient: other orders of the same sums, and in bfloat16 roundings
that compiled code leaves out between operations that it fuses."""

pytestmark = [  # torch's tracer causes these warnings, and hides them where warnings are no errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # inductor, as it is imported
]
inductor = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forward and backward passes are traced as for inductor, but run without its code, which takes long to
    make."""

    @cache
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend="aot_eager", dynamic=False)

    monkeypatch.setattr(compiling_module, "_shared", traced)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_of(
    name: str,
    activations: str,
    *,
    stack: str = "stack",
    depth: int = 2,
    switched_on: str = "",
    **changed: Any,
) -> LanguageModel:
    """A float32 model in training. `switched_on`: a knob of the depth schedule."""
    variant = variants.load(name)
    torch.manual_seed(0)
    knobs = {switched_on: True} if switched_on else {}
    spec = ModelSpec.of(variant, variant.Config(), depth=depth_schedule(stack, **knobs))
    options = {"dropout": 0.0, "activations": activations, "vocabulary": 11, **changed}
    return LanguageModel(spec, dims_for(TOKENS), depth=max(depth, len(spec.layers)), **options).train()


def is_causal(variant: type[Variant]) -> bool:
    return variant.info_for(variant.Config()).caps.causal


def gradients(model: LanguageModel, *, causal: bool, seed: int = 1) -> tuple[float, list[Tensor]]:
    """The loss of a step with dropout, and all gradients."""
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.vocabulary, (2, 2, TOKENS), generator=source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(seed)
    nll = training_step(model, optimizer, Batch(*tokens), causal=causal).nll.item()
    return nll, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_computes_the_same(name: str, activations: str, how: str, **changed: Any) -> Compilations:
    """A step of two equal models, one of which is compiled: loss, gradients and what the layers keep."""
    causal = is_causal(variants.load(name))
    plain, model = (model_of(name, activations, **changed) for _ in range(2))
    nll, want = gradients(plain, causal=causal)
    compilations = Compilations()
    with compiling(model, how):
        compiled_nll, got = gradients(model, causal=causal)
    assert compilations.total > 0
    tolerance = TOLERANCE[model.dtype]
    assert compiled_nll == pytest.approx(nll, rel=tolerance)
    largest = max(grad.abs().max() for grad in want)
    assert max((a - b).abs().max() / largest for a, b in zip(got, want, strict=True)) <= tolerance
    assert model.state_dict().keys() == plain.state_dict().keys()
    for (key, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=key)
    before = compilations.total
    gradients(model, causal=causal)
    assert compilations.total == before, "outside of the context nothing is compiled"
    return compilations


QUICK = [("dense", "keep"), ("transformer_xl", "keep")]
EVERY = [
    (name, activations)
    for name in variants.names()
    for activations, strategy in STRATEGIES.items()
    if not strategy.needs_device
]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("name", "activations"), [*QUICK, *slow(*(c for c in EVERY if c not in QUICK))])
def test_compiled_blocks_have_no_graph_break_and_the_same_gradients(name: str, activations: str) -> None:
    """Of a whole training step with dropout, with all segments of the variant."""
    assert assert_computes_the_same(name, activations, "block", dropout=0.1).graph_breaks == 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", variants.names())
def test_a_compiled_model_has_no_graph_break_and_the_same_gradients(name: str) -> None:
    assert assert_computes_the_same(name, "keep", "model", dropout=0.1).graph_breaks == 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("how", ["block", "model"])
@pytest.mark.parametrize(
    ("activations", "changed"),
    [
        ("checkpoint", {}),
        ("sqrt", {}),
        ("selective", {}),
        ("keep", {"ff_chunks": 3}),
        ("checkpoint", {"dtype": torch.bfloat16}),
        ("keep", {"stack": "universal"}),
        ("keep", {"stack": "universal", "switched_on": "signal"}),
        ("checkpoint", {"stack": "universal", "switched_on": "halting", "depth": 3}),
        ("keep", {"stack": "early_exit", "depth": 3}),
    ],
)
def test_strategies_and_schedules_can_be_compiled(how: str, activations: str, changed: Any) -> None:
    assert assert_computes_the_same("dense", activations, how, **changed).graph_breaks == 0


@pytest.mark.usefixtures("traced")
def test_equal_blocks_share_the_compiled_code() -> None:
    assert assert_computes_the_same("dense", "keep", "block", depth=3).total == 1


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("activations", ["keep", "checkpoint", *slow("sqrt", "reversible")])
def test_visits_with_a_signal_share_the_compiled_code(activations: str) -> None:
    """However many there are. A reversible network compiles both branches, with gradients and without."""
    made = assert_computes_the_same(
        "dense", activations, "block", stack="universal", switched_on="signal", depth=5
    )
    assert made.graph_breaks == 0
    assert made.total <= (4 if activations == "reversible" else 2)


@pytest.mark.usefixtures("traced")
def test_blocks_that_are_left_out_of_some_steps_share_the_compiled_code() -> None:
    plain, model = (model_of("dense", "keep", stack="layer_drop", depth=9) for _ in range(2))
    compilations, made = Compilations(), set()
    with compiling(model, "block"):
        for seed in range(3):
            nll, want = gradients(plain, causal=True, seed=seed)
            compiled_nll, got = gradients(model, causal=True, seed=seed)
            assert compiled_nll == pytest.approx(nll, rel=1e-5)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            made.add(tuple(bool(grad.any()) for grad in got))
    assert len(made) > 1
    assert compilations.total == 1
    assert compilations.graph_breaks == 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["dense", *slow("performer", "routing", "reformer", "compressive")])
def test_a_compiled_training_resumes_and_compiles_once(name: str, tmp_path: Path) -> None:
    """Killed before its fourth step, with other weights and another seed to begin with; to the same result as
    uninterrupted. No step needs code of its own."""
    knobs = test_checkpoints.KNOBS.get(name, {})

    def trained(seed: int, **options: Any) -> Training:
        model = test_checkpoints.model_of(name, seed, **knobs)
        with compiling(model, "block"):
            return test_checkpoints.run(model, **options)

    whole = trained(0)
    compilations = Compilations()
    with pytest.raises(test_checkpoints.Killed):
        trained(0, checkpoints=test_checkpoints.store_in(tmp_path), until=3)
    resumed = trained(1, checkpoints=test_checkpoints.store_in(tmp_path))
    assert compilations.total == 0
    assert [row.nll for row in resumed.curve.rows] == [row.nll for row in whole.curve.rows]
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
@inductor
@pytest.mark.parametrize(
    ("name", "activations"),
    [
        *((name, "keep") for name in variants.names()),
        *(("dense", activations) for activations in ("checkpoint", "selective", "reversible")),
    ],
)
def test_generated_code_computes_the_same_with_dropout(name: str, activations: str) -> None:
    torch.compiler.reset()
    assert assert_computes_the_same(name, activations, "block", dropout=0.1).graph_breaks == 0


# --- what is counted --------------------------------------------------------------------------------


def broken(x: Tensor) -> Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


def test_graph_breaks_and_recompiles_are_counted() -> None:
    torch.compiler.reset()
    work = torch.compile(broken, backend="eager", dynamic=False)
    compilations = Compilations()
    work(torch.ones(3))
    assert (compilations.graph_breaks, compilations.repeated) == (1, 0)
    before = compilations.total
    assert before == 2, "the code before the break and that behind it"
    work(torch.ones(3))
    assert compilations.total == before
    later = Compilations()
    work(torch.ones(4))
    assert (later.total, later.repeated) == (2, 2)
    assert compilations.repeated == 2


def test_more_graphs_than_allowed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would run the function without compilation, and only warn."""
    torch.compiler.reset()
    monkeypatch.setattr(compiling_module, "MAX_GRAPHS", 2)
    work = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with compiling(model_of("dense", "keep"), "block"):
        work(torch.ones(1))
        work(torch.ones(2))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            work(torch.ones(3))


# --- memory ---------------------------------------------------------------------------------------


def test_peaks_follow_from_allocations() -> None:
    """Two segments: 10 stored by the first, 30 by the second; 5 of gradients stay."""
    changes: list[int | PhaseEnd] = [
        *(10, PhaseEnd("forward", 0), 7, -17, 5, PhaseEnd("backward", 5)),
        *(40, -10, PhaseEnd("forward", 5), -30, PhaseEnd("backward", 5), 1, PhaseEnd("optimizer", 5)),
    ]
    peaks, stored = peaks_of(changes, 100)
    assert peaks == {"forward": 145, "backward": 135, "optimizer": 106}
    assert stored == 30


@pytest.mark.parametrize("name", ["dense", "transformer_xl"])
def test_the_profiler_sees_what_live_storage_sees(name: str) -> None:
    """Of a step without compilation, where both can see. Kernels allocate little for themselves."""
    subject, figures = step.on_host(lambda: subject_of(name, seq_len=417))
    allocated = allocator.on_host(subject, figures.held_bytes)
    for phase, peak in allocated.peaks.items():
        assert peak == pytest.approx(figures.phase_peak_bytes(phase), rel=0.01)
    assert allocated.stored == pytest.approx(figures.activation_bytes, rel=0.01)
    assert allocated.peak_phase == figures.peak_phase
    assert allocated.rss_peak > figures.peak_bytes


@pytest.mark.slow
@inductor
def test_memory_of_compiled_code_is_seen() -> None:
    """What the forward pass stores is what autograd's own hooks see saved. Strategies store less."""

    def stored(activations: str) -> int:
        subject, figures = step.on_host(lambda: subject_of("dense", seq_len=600, activations=activations))
        with compiling(subject.model, "block"):
            compilation = CompiledStep(subject, CPU)
            assert compilation.seconds > 0
            assert (compilation.graph_breaks, compilation.recompiles) == (0, 0)
            allocated = allocator.on_host(subject, figures.held_bytes)
            if activations == "keep":
                assert allocated.stored == pytest.approx(saved_bytes(subject), rel=0.01)
        return allocated.stored

    kept, products, inputs = map(stored, ("keep", "selective", "checkpoint"))
    assert inputs < products < kept
    assert inputs < 0.7 * kept


# --- what a machine lacks -------------------------------------------------------------------------


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    reason = compiler.missing("cpu")
    assert reason is not None
    assert reason.startswith("needs a C++ compiler; there is no ")
    assert "\n" not in reason
    mine = tmp_path / "my-g++"
    mine.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-g++")
    assert compiler.missing("cpu") is None or "Python.h" in str(compiler.missing("cpu"))


def test_a_device_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert compiler.missing("cuda") == "needs Triton, which is not installed"


def test_the_compilers_files_are_removed() -> None:
    with compiler.cache_folder(needed=True) as folder:
        assert folder is not None
        (folder / "inductor").mkdir()
    assert not folder.exists()
    with compiler.cache_folder(needed=False) as none:
        assert none is None


@pytest.mark.parametrize("activations", STRATEGIES)
def test_strategies_that_cannot_be_traced_are_refused_for_a_whole_model(activations: str) -> None:
    reason = STRATEGIES[activations].unsupported("cuda", "model")
    assert (reason is not None) == (activations in ("reversible", "offload"))
    assert STRATEGIES[activations].unsupported("cuda", "block") is None
    assert reason is None or "compile=model" in reason
