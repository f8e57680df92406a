"""Early exit: who exits where, what is trained, and what tokens need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import variants
from bench.evaluate import needed_visits
from bench.measure.step import StepFigures, Subject, predicted
from bench.model.activations import STRATEGIES
from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import IGNORED, Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, Dims, Workload
from variants.depth import early_exit
from variants.input_schedule import Chunks, NetworkOut

T, VOCABULARY, DEPTH = 24, 11, 4
SIZES = Dims(seq_len=T, d_model=16, heads=2)
RULES: list[dict[str, Any]] = [
    {"threshold": 0.05},
    {"rule": "patience", "patience": 1},
    {"rule": "patience", "patience": 2},
]
SMALLER: dict[str, dict[str, Any]] = {
    "dense": {"impl": "naive"},
    "longformer": {"window": [5]},
    "transformer_xl": {"segment": 8, "mem_len": 8},
    "overlapping": {"chunk": 8},
}
NEVER: list[dict[str, Any]] = [{"threshold": 1}, {"rule": "patience", "patience": DEPTH - 1}]


def model_of(
    knobs: Mapping[str, Any] | None = None, stack: str = "early_exit", variant: str = "dense", **changed: Any
) -> LanguageModel:
    return built(knobs, stack, variant, **changed).double()


def built(
    knobs: Mapping[str, Any] | None = None, stack: str = "early_exit", variant: str = "dense", **changed: Any
) -> LanguageModel:
    torch.manual_seed(0)
    layer = variants.load(variant)
    config = layer.Config.of(SMALLER[variant])
    depth = depth_schedule(stack, **(knobs or {}))
    spec = ModelSpec.of(layer, config, feed_forward=feed_forward(mult=2), depth=depth)
    given: dict[str, Any] = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", "depth": DEPTH}
    return LanguageModel(spec, SIZES, **(given | changed))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.eval().stream(tokens, causal=True)], dim=1)


def states(model: LanguageModel, tokens: Tensor, knobs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states after the last visit, and the visits of each token: token by token, in words."""
    config = early_exit.EarlyExitConfig(**knobs)
    x = model.embed(tokens)
    needed = torch.full(tokens.shape, DEPTH)
    predicted: dict[tuple[int, int], list[int]] = {}
    for visit, block in enumerate(model.blocks, 1):
        after = block(x, None, Context(causal=True)).x
        x = torch.stack(
            [
                torch.stack([after[b, t] if needed[b, t] >= visit else x[b, t] for t in range(T)])
                for b in range(2)
            ]
        )
        for b, t in ((b, t) for b in range(2) for t in range(T)):
            probabilities = sorted(model.read_out(x[b : b + 1, t : t + 1]).softmax(-1).flatten().tolist())
            best = predicted.setdefault((b, t), [])
            best.append(int(model.read_out(x[b : b + 1, t : t + 1]).argmax()))
            same = len(best) > config.patience and len({*best[-1 - config.patience :]}) == 1
            sure = probabilities[-1] - probabilities[-2] > config.threshold
            if (sure if config.rule == "confidence" else same) and needed[b, t] == DEPTH:
                needed[b, t] = visit
    return x, needed


@pytest.mark.parametrize("knobs", RULES)
def test_tokens_exit_as_the_rule_says(knobs: dict[str, Any]) -> None:
    model = model_of(knobs).eval()
    with torch.no_grad():
        x, needed = states(model, ids(), knobs)
        with needed_visits.counting(model) as counted:
            got = model(ids(), causal=True).logits
        torch.testing.assert_close(got, model.read_out(x).float())
    assert len(needed.unique()) > 1, "tokens exit at different visits"
    shares = counted.shares()
    assert shares is not None
    assert sum(shares) == pytest.approx(needed.double().mean().item())
    assert shares == pytest.approx(
        [(needed >= visit).double().mean().item() for visit in range(1, DEPTH + 1)]
    )


@pytest.mark.parametrize("knobs", NEVER)
def test_where_no_token_exits_it_is_a_stack(knobs: dict[str, Any]) -> None:
    model = model_of(knobs)
    with needed_visits.counting(model) as counted:
        assert torch.equal(logits_of(model, ids()), logits_of(model_of(stack="stack"), ids()))
    assert counted.shares() == [1.0] * DEPTH


def test_with_the_largest_threshold_a_certain_token_does_not_exit() -> None:
    logits = torch.tensor([[[1000.0, 0.0, 0.0]]])
    for threshold, settled in ((0.999, True), (1, False)):
        rule = early_exit._Confidence(early_exit.EarlyExitConfig(threshold=threshold))
        assert rule.settled(logits).item() is settled


@pytest.mark.parametrize("knobs", RULES)
def test_no_exit_depends_on_later_tokens(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a rule that reads the mean over the sequence is seen."""
    model, changed = model_of(knobs), ids()
    changed[:, 12:] = ids(2)[:, 12:]

    def same() -> bool:
        return torch.equal(logits_of(model, changed)[:, :12], logits_of(model, ids())[:, :12])

    assert same()
    name = "_Patience" if "rule" in knobs else "_Confidence"
    own = getattr(early_exit, name).settled

    def leaks(self: Any, logits: Tensor) -> Tensor:
        return own(self, logits - logits.detach().mean(1, keepdim=True) * 2)

    monkeypatch.setattr(getattr(early_exit, name), "settled", leaks)
    assert not same()


@pytest.mark.parametrize("knobs", RULES)
@pytest.mark.parametrize("variant", ["dense", "longformer", "transformer_xl"])
def test_decoding_exits_as_the_parallel_pass(knobs: dict[str, Any], variant: str) -> None:
    model = model_of(knobs, variant=variant)
    want = logits_of(model, ids())
    decoder = Decoder(model, 2, T)
    got = [decoder.read_all(ids()[:, :9]), *map(decoder.read_all, ids()[:, 9:].split(1, 1))]
    torch.testing.assert_close(torch.cat(got, 1).float(), want)


def targets() -> Tensor:
    """Some are not scored."""
    return ids(1).where(ids(3) > 1, IGNORED)


def gradients(model: LanguageModel) -> tuple[float, list[Tensor | None]]:
    torch.manual_seed(1)
    out = training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), targets()), causal=True)
    return out.nll.item(), [p.grad for p in model.parameters()]


def test_the_losses_at_all_exits_are_trained_with_weights_that_grow_with_the_depth() -> None:
    """Against a stack, and the loss in one expression; the nll is that of the output alone. The gradients are
    clipped, so they are compared up to a factor."""
    nll, got = gradients(model_of())
    plain = model_of(stack="stack").train()
    x, losses = plain.embed(ids()), []
    for block in plain.blocks:
        x = block(x, None, Context(causal=True)).x
        losses.append(F.cross_entropy(plain.read_out(x).flatten(0, 1).float(), targets().flatten()))
    sum((visit / 10) * loss for visit, loss in enumerate(losses, 1)).backward()  # type: ignore[union-attr]
    assert nll == pytest.approx(losses[-1].item())
    want = [p.grad for p in plain.parameters()]
    norms = [torch.stack([g.norm() for g in each if g is not None]).norm() for each in (got, want)]
    for one, other in zip(got, want, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one / norms[0], other / norms[1], rtol=1e-5, atol=1e-7)


def test_training_does_not_depend_on_the_rule() -> None:
    nll, want = gradients(model_of())
    for knobs in (*RULES, *NEVER):
        found, got = gradients(model_of(knobs))
        assert found == nll
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["transformer_xl", "overlapping"])
def test_exits_are_trained_in_segments_and_chunks(variant: str) -> None:
    """Of overlapping chunks, the loss at an exit reads each token's state from the window of its output."""
    nll, got = gradients(model_of(variant=variant))
    assert nll > 0
    assert all(grad is not None and grad.abs().max() > 0 for grad in got)


@pytest.mark.parametrize("seq_len", [3, 8, 13, 14, 16])
def test_chunks_arrange_exits_as_outputs(seq_len: int) -> None:
    def network(window: Tensor, _: Any) -> NetworkOut:
        y = window + torch.arange(window.shape[1])[:, None] / 100
        return NetworkOut(y, None, (y.sum(),), (2 * y, 3 * y))

    x = torch.randn(2, seq_len, 5)
    for causal in (True, False):
        out = Chunks(8, 3).apply(network, x, causal=causal)
        assert out.y.shape == x.shape
        for times, y in zip((2, 3), out.exits, strict=True):
            torch.testing.assert_close(y, times * out.y)


def figures(vocabulary: int = VOCABULARY, **changed: Any) -> StepFigures:
    def subject() -> Subject:
        def batch() -> Batch:
            return Batch(torch.zeros(2, T, dtype=torch.int64), torch.zeros(2, T, dtype=torch.int64))

        def build() -> LanguageModel:
            return built(vocabulary=vocabulary, **changed)

        return Subject.make(build, batch, causal=False, device=torch.device("cpu"))

    return predicted(subject)


def test_a_forward_pass_of_a_step_has_the_flops_of_the_formula() -> None:
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=False)
    assert figures().flops_forward == model_of().cost(work).total
    read_out = 2 * 2 * T * 16 * VOCABULARY
    assert model_of().cost(work).total == model_of(stack="stack").cost(work).total + (DEPTH - 1) * read_out


def test_the_peak_has_the_logits_of_one_exit() -> None:
    """With four more exits it grows by less than one set of logits, which is much larger than the rest."""
    many = 2048
    few, more = (figures(many, depth=depth) for depth in (3, 7))
    plain = figures(many, stack="stack", depth=7)
    logits = 4 * 2 * T * many
    grows = (more.peak_bytes - more.held_bytes) - (few.peak_bytes - few.held_bytes)
    assert grows < 0.6 * logits
    table = 4 * 16 * many  # gradients of the output layer are summed over the exits
    assert more.peak_bytes - plain.peak_bytes < 1.1 * logits + table


def test_what_tokens_need_is_an_estimate_between_one_visit_and_all() -> None:
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)
    model, one = model_of(), model_of(stack="stack", depth=1)
    total = model.cost(work).total
    assert needed_visits.needed_flops(model, work, [1.0] * DEPTH) == total
    assert needed_visits.needed_flops(model, work, [1.0, 0.0, 0.0, 0.0]) == one.cost(work).total
    half = needed_visits.needed_flops(model, work, [1.0, 0.5, 0.5, 0.5])
    assert half == pytest.approx((total + one.cost(work).total) / 2)


def test_other_schedules_count_no_visits() -> None:
    model = model_of(stack="stack").eval()
    with needed_visits.counting(model) as counted:
        model(ids(), causal=True)
    assert counted.shares() is None


@pytest.mark.parametrize("activations", ["checkpoint", "sqrt", "selective"])
def test_strategies_hold_with_exits(activations: str) -> None:
    model = model_of(activations=activations, dropout=0.1)
    _, got = gradients(model)
    with model.running(STRATEGIES["keep"].run):
        _, want = gradients(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_reversible_network_has_no_state_between_visits() -> None:
    spec = model_of().spec
    assert (spec.conflict(4, "reversible") or "").startswith(
        "activations=reversible with stack=early_exit: its two streams"
    )
    assert spec.conflict(1, "reversible") is None
    assert spec.conflict(4, "checkpoint") is None
