"""Halting of the Universal Transformer: against a loop over tokens, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants
from bench.evaluate import needed_visits
from bench.measure.flops import CountFlops
from bench.model.activations import STRATEGIES
from bench.model.block import BlockOptions
from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, Dims, Workload
from variants.depth.universal import HaltingPath

T, VOCABULARY, DEPTH, THRESHOLD, PONDER = 12, 11, 4, 0.9, 0.3
SIZES = Dims(seq_len=T, d_model=16, heads=2)
HALTING: dict[str, Any] = {"halting": True, "halt_threshold": THRESHOLD, "ponder": PONDER}
SMALLER: dict[str, dict[str, Any]] = {
    "dense": {"impl": "naive"},
    "longformer": {"window": [5]},
    "transformer_xl": {"segment": 4, "mem_len": 4},
}


def model_of(
    depth: int = DEPTH, variant: str = "dense", *, halting: bool = True, spread: float = 12.0, **changed: Any
) -> LanguageModel:
    """`spread`: scale of the unit's weights, so that tokens halt in different visits."""
    torch.manual_seed(0)
    layer = variants.load(variant)
    schedule = depth_schedule("universal", **(HALTING if halting else {}))
    spec = ModelSpec.of(
        layer,
        layer.Config.of(SMALLER[variant]),
        feed_forward=feed_forward(mult=2),
        depth=schedule,
        block=changed.pop("block", BlockOptions()),
    )
    given: dict[str, Any] = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep"}
    model = LanguageModel(spec, SIZES, depth=depth, **(given | changed)).double()
    if isinstance(model.path, HaltingPath) and model.path.unit is not None:
        with torch.no_grad():
            unit(model).weight.mul_(spread)
            unit(model).bias.fill_(-0.5)
    return model


def unit(model: LanguageModel) -> nn.Linear:
    assert isinstance(model.path, HaltingPath)
    assert model.path.unit is not None
    return model.path.unit


def ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.eval().stream(tokens, causal=True)], dim=1)


def by_token(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the ponder cost and the visits of each token, as Graves 2016, §2 writes it for one token."""
    s = model.embed(tokens)
    outputs = [[torch.zeros(16, dtype=s.dtype) for _ in range(T)] for _ in range(2)]
    probabilities: dict[tuple[int, int], list[Tensor]] = {(b, t): [] for b in range(2) for t in range(T)}
    made, costs = torch.zeros(2, T), torch.zeros(2, T, dtype=s.dtype)
    halted: set[tuple[int, int]] = set()
    for n in range(1, DEPTH + 1):
        after = model.blocks[0](s, None, Context(causal=True)).x
        new = [[s[b, t] for t in range(T)] for b in range(2)]
        for b, t in sorted({*probabilities} - halted):
            earlier = probabilities[b, t]
            p = torch.sigmoid(s[b, t] @ unit(model).weight[0] + unit(model).bias[0])
            remainder = 1 - sum(earlier, torch.zeros(()))
            if n == DEPTH or float(sum(earlier, p).detach()) > THRESHOLD:
                halted.add((b, t))
                made[b, t] = n
                costs = costs.clone()
                costs[b, t] = n + remainder
                p = remainder
            earlier.append(p)
            new[b][t] = after[b, t]
            outputs[b][t] = outputs[b][t] + p * after[b, t]
        s = torch.stack([torch.stack(row) for row in new])
    return torch.stack([torch.stack(row) for row in outputs]), costs.mean(), made


def test_outputs_costs_and_gradients_are_those_of_a_loop_over_tokens() -> None:
    model = model_of()
    with needed_visits.counting(model) as counted:
        out = model(ids(), causal=True)
    y, cost, made = by_token(model, ids())
    assert len(made.unique()) >= 3, "tokens halt in different visits"
    torch.testing.assert_close(out.logits, model.read_out(y).float())
    (ponder,) = out.aux_losses
    torch.testing.assert_close(ponder, PONDER * cost)
    shares = counted.shares()
    assert shares is not None
    assert sum(shares) == pytest.approx(made.mean().item())
    assert shares == pytest.approx([(made >= n).double().mean().item() for n in range(1, DEPTH + 1)])

    weights = torch.randn(2, T, VOCABULARY, generator=torch.Generator().manual_seed(3))
    losses = ((out.logits * weights).sum() + ponder, (model.read_out(y) * weights).sum() + PONDER * cost)
    got, want = (torch.autograd.grad(loss, [*model.parameters()]) for loss in losses)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # logits are float32
    assert all(grad.abs().max() > 0 for grad in got)


def test_the_unit_begins_as_in_tensor2tensor() -> None:
    fresh = LanguageModel(
        model_of().spec, SIZES, depth=DEPTH, dropout=0.0, vocabulary=VOCABULARY, activations="keep"
    )
    assert unit(fresh).bias.item() == 1.0


def test_a_unit_that_never_halts_leaves_the_whole_weight_to_the_last_visit() -> None:
    model, plain = model_of(), model_of(halting=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        unit(model).weight.zero_()
        unit(model).bias.fill_(-1000)
    assert torch.equal(logits_of(model, ids()), logits_of(plain, ids()))


def test_one_visit_has_no_unit_and_is_the_plain_model() -> None:
    model, plain = model_of(1), model_of(1, halting=False)
    assert isinstance(model.path, HaltingPath)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert torch.equal(logits_of(model, ids()), logits_of(plain, ids()))
    assert model(ids(), causal=True).aux_losses == []


def test_without_halting_nothing_has_changed() -> None:
    names = {*model_of().state_dict()} - {*model_of(halting=False).state_dict()}
    assert names == {"path.unit.weight", "path.unit.bias"}


def test_halting_does_not_depend_on_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a unit that reads the mean over the sequence is seen."""
    model, changed = model_of(), ids()
    changed[:, 6:] = ids(2)[:, 6:]

    def same() -> bool:
        return torch.equal(logits_of(model, changed)[:, :6], logits_of(model, ids())[:, :6])

    assert same()
    own = nn.Linear.forward

    def leaks(self: nn.Linear, x: Tensor) -> Tensor:
        return own(self, x + x.mean(1, keepdim=True) if self.out_features == 1 else x)

    monkeypatch.setattr(nn.Linear, "forward", leaks)
    assert not same()


@pytest.mark.parametrize("variant", SMALLER)
def test_decoding_halts_as_the_parallel_pass(variant: str) -> None:
    model = model_of(variant=variant)
    want = logits_of(model, ids())
    decoder = Decoder(model, 2, T)
    got = [decoder.read_all(ids()[:, :5]), *map(decoder.read_all, ids()[:, 5:].split(1, 1))]
    torch.testing.assert_close(torch.cat(got, 1).float(), want)


def gradients(model: LanguageModel) -> list[Tensor | None]:
    torch.manual_seed(1)
    training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), ids(1)), causal=True)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("activations", ["checkpoint", "sqrt", "selective"])
@pytest.mark.parametrize("block", [BlockOptions(), BlockOptions(norm_position="post")])
def test_strategies_hold_with_halting(activations: str, block: BlockOptions) -> None:
    model = model_of(activations=activations, dropout=0.1, block=block)
    got = gradients(model)
    with model.running(STRATEGIES["keep"].run):
        want = gradients(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_reversible_network_has_no_state_between_visits() -> None:
    assert (model_of().spec.conflict(4, "reversible") or "").startswith(
        "activations=reversible with stack=universal: its two"
    )
    assert model_of().spec.conflict(1, "reversible") is None
    assert model_of(halting=False).spec.conflict(4, "reversible") is None


def test_the_formula_has_the_flops_of_the_unit() -> None:
    model, plain = model_of().eval(), model_of(halting=False)
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=False)
    with CountFlops() as counter, torch.no_grad():
        model(ids(), causal=False)
    assert counter.total == model.cost(work).total
    assert model.cost(work).total - plain.cost(work).total == (DEPTH - 1) * 2 * 2 * T * 16
    assert model.cost(work).mixing == plain.cost(work).mixing
