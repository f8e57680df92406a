"""What every model promises, whatever fills its slots: each depth schedule and each feed-forward layer with
several mixers. All are found by their files; a schedule that cannot work with a mixer says why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import pytest
import test_compile
import torch
from test_contract import small_knobs
from test_depth_lengths import KNOBS
from tiers import tiered
from torch import Tensor

import variants
from bench.measure import gates
from bench.measure.compile_time import Compilations
from bench.measure.flops import CountFlops
from bench.measure.step import Subject, predicted
from bench.model.activations import STRATEGIES
from bench.model.compile import compiling
from bench.model.decode import Decoder, no_decoding
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Dims, Workload
from variants.knobs import knobs_of
from variants.slots import FEED_FORWARD, STACK, Slot

MIXERS = ("dense", "longformer", "linformer", "linear_transformer", "transformer_xl", "gated_delta_net")
"""A mask, a projection of the length, two recurrences and a memory."""
TOKENS, LONG, DEPTH, VOCABULARY = 40, 2**16, 3, 11
SIZES = Dims(seq_len=TOKENS, d_model=16, heads=2)
OTHERS: dict[str, dict[str, Any]] = {
    "early_exit": {"threshold": 0.05},
    "hierarchical": {"segment": 12},
    "layer_drop": {"rate": 0.4},
    "perceiver_io": {"latents": 12},
    "shared": {"groups": 3},
    "sparse": {"block": 8},
    "token_learner": {"tokens": 12},
}
"""Knobs with which a schedule or a layer does what its defaults do in larger models."""

traced = test_compile.traced
pytestmark = test_compile.pytestmark


def choices(slot: Slot[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that can fill a slot, with each other word and switch of its knobs but those of an activation."""
    for name in slot.names():
        usual = KNOBS.get(name, {}) | OTHERS.get(name, {})
        yield name, usual
        for knob in knobs_of(slot.load(name).Config).values():
            words = get_args(knob.hint) if get_origin(knob.hint) is Literal else ()
            for word in (True,) if knob.default is False else words:
                if word != knob.default and knob.name != "activation":
                    yield name, usual | {knob.name: word}


@dataclass(frozen=True)
class Case:
    """What fills the slots of a model, in one direction."""

    spec: ModelSpec
    causal: bool

    @property
    def refusal(self) -> str | None:
        """Why there is no such model."""
        mixer = self.spec.at(0).mixer
        return (
            self.spec.conflict(DEPTH, "keep")
            or self.spec.no_form(causal=self.causal)
            or mixer.layer.unsupported(mixer.config, SIZES, causal=self.causal)
            or self.spec.unsupported(DEPTH, SIZES.d_model)
            or self.spec.wrong_lengths(DEPTH, SIZES, causal=self.causal)
        )

    def model(self, tokens: int = TOKENS, **changed: Any) -> LanguageModel:
        torch.manual_seed(0)
        given = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", **changed}
        return LanguageModel(self.spec, replace(SIZES, seq_len=tokens), depth=DEPTH, **given)

    def work(self, tokens: int = TOKENS) -> Workload:
        return Workload(batch_size=2, seq_len=tokens, d_model=16, heads=2, causal=self.causal)

    def logits(self, model: LanguageModel, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([out.logits for _, out in model.eval().stream(tokens, causal=self.causal)], 1)


def spec_of(mixer: str, slot: Slot[Any], name: str, knobs: dict[str, Any]) -> ModelSpec:
    variant = variants.load(mixer)
    if slot is STACK:
        fills: dict[str, Any] = {"depth": depth_schedule(name, **knobs), "feed_forward": feed_forward(mult=2)}
    else:
        fills = {"feed_forward": feed_forward(name, **knobs)}
    return ModelSpec.of(variant, variant.Config.of(next(iter(small_knobs(mixer)), {})), **fills)


def combinations() -> Iterator[tuple[str, str, list[Case]]]:
    """(what fills a slot, a mixer, the model in both directions): the mixers in another order each time."""
    for slot in (STACK, FEED_FORWARD):
        for turn, (name, knobs) in enumerate(choices(slot)):
            label = "-".join([name, *(f"{knob}={value}" for knob, value in knobs.items())])
            for place in range(len(MIXERS)):
                mixer = MIXERS[(turn + place) % len(MIXERS)]
                spec = spec_of(mixer, slot, name, knobs)
                yield label, mixer, [Case(spec, causal) for causal in (True, False)]


def cases() -> pytest.MarkDecorator:
    """The causal model, or else the bidirectional one. Of each choice one mixer is of the short tier."""
    found = []
    for label, mixer, both in combinations():
        if able := [case for case in both if case.refusal is None]:
            found.append((label, pytest.param(able[0], id=f"{label}-{mixer}")))
    return pytest.mark.parametrize("case", tiered(found))


every_case = cases()


def ids(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(case: Case, model: LanguageModel) -> list[Tensor | None]:
    """Of a step with dropout."""
    torch.manual_seed(1)
    training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), ids(1)), causal=case.causal)
    return [parameter.grad for parameter in model.parameters()]


def assert_same_gradients(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    """As close as float32 sums in another order."""
    largest = max(float(grad.abs().max()) for grad in want if grad is not None)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 1e-5 * largest


def test_what_cannot_be_is_said_in_a_line_and_every_choice_has_a_mixer() -> None:
    able = set()
    for label, mixer, both in combinations():
        for case in both:
            if (reason := case.refusal) is None:
                able.add(label)
            else:
                assert reason.strip(), (label, mixer)
                assert "\n" not in reason
    assert able == {label for label, _, _ in combinations()}


@every_case
def test_flops_are_those_of_the_formula(case: Case) -> None:
    model = case.model().eval()
    with CountFlops() as counter, torch.no_grad():
        case.logits(model, ids())
    cost = model.cost(case.work())
    if model.flop_overhead_reason is None:
        assert counter.total == cost.total
    else:
        assert 1 <= (counter.total - cost.tokenwise) / cost.mixing <= gates.COST_LIMIT


@pytest.mark.slow
@every_case
def test_long_sequences_are_planned(case: Case) -> None:
    """A training step that is never run."""

    def batch() -> Batch:
        return Batch(*(torch.zeros(1, LONG, dtype=torch.int64) for _ in range(2)))

    def subject() -> Subject:
        def model() -> LanguageModel:
            return case.model(LONG, activations="checkpoint")

        return Subject.make(model, batch, causal=case.causal, device=torch.device("cpu"))

    assert predicted(subject).peak_bytes > 0


@every_case
def test_strategies_give_the_gradients_of_stored_activations(case: Case) -> None:
    for activations, strategy in STRATEGIES.items():
        if strategy.needs_device or case.spec.conflict(DEPTH, activations):
            continue
        model = case.model(activations=activations, dropout=0.1)
        got = gradients(case, model)
        with model.running(strategy.stored):
            want = gradients(case, model)
        assert_same_gradients(got, want)


@every_case
def test_no_output_reads_a_later_token(case: Case) -> None:
    model = case.model().double()
    if not case.causal:
        return
    before = case.logits(model, ids())
    skipped = TOKENS - before.shape[1]
    for cut in (max(1, skipped), 17, 34, TOKENS - 1):
        changed = torch.cat([ids()[:, :cut], ids(1)[:, cut:]], dim=1)
        after = case.logits(model, changed)
        torch.testing.assert_close(after[:, : max(0, cut - skipped)], before[:, : max(0, cut - skipped)])


@every_case
def test_decoding_computes_the_forward_pass(case: Case) -> None:
    """A prompt, then tokens one by one and in blocks; or the reason is a sentence."""
    model = case.model().double().eval()
    if not case.causal:
        return
    if reason := no_decoding(model):
        assert reason.strip()
        return
    decoder = Decoder(model, 2, TOKENS)
    pieces = ids().split([7, 1, 1, 5, 1, 25], dim=1)
    got = torch.cat([decoder.read_all(piece) for piece in pieces], dim=1)
    torch.testing.assert_close(got.float(), case.logits(model, ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("how", ["block", "model"])
@every_case
def test_compiled_models_have_no_graph_break_and_the_same_gradients(case: Case, how: str) -> None:
    if how == "model" and case.spec.leaves_out(DEPTH):
        return  # refused: see bench.scenarios.support
    plain, model = (case.model(dropout=0.1) for _ in range(2))
    want, compilations = gradients(case, plain), Compilations()
    with compiling(model, how):
        got = gradients(case, model)
    assert compilations.total > 0
    assert compilations.graph_breaks == 0
    assert_same_gradients(got, want)
