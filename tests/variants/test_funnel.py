"""Funnel and Hourglass against means and visits that are written out token by token."""

from __future__ import annotations

from pathlib import Path as File

import pytest
import torch
from test_depth_lengths import cell, hidden, model_of, run
from torch import Tensor

from bench.measure import gates
from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from variants.base import Context
from variants.depth.funnel import Funnel, FunnelConfig, FunnelPath, pooled


def groups(tokens: int, stride: int, *, causal: bool) -> list[list[int]]:
    """The tokens of each group, from the definition."""
    starts = range(0, tokens, stride)
    if causal:
        return [[*range(max(0, g - stride + 1), g + 1)] for g in starts]
    return [[*range(g, min(g + stride, tokens))] for g in starts]


def visit(model: LanguageModel, places: range, x: Tensor, *, causal: bool) -> Tensor:
    for place in places:
        x = model.visits[place](x, None, Context(causal=causal)).x
    return x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "stride"), [(12, 3), (13, 3), (7, 1), (1, 2), (2, 5), (24, 4)])
def test_the_path_is_that_of_the_papers(tokens: int, stride: int, causal: bool) -> None:
    """Outputs and gradients of the input."""
    model, x = model_of("funnel", tokens, knobs={"stride": stride}), hidden(tokens).requires_grad_()
    full = visit(model, range(1), x, causal=causal)
    means = [full[:, group].mean(1) for group in groups(tokens, stride, causal=causal)]
    middle = visit(model, range(1, 3), torch.stack(means, 1), causal=causal)
    joined = torch.stack([full[:, t] + middle[:, t // stride] for t in range(tokens)], 1)
    want = visit(model, range(3, 4), joined, causal=causal)
    got = run(model, x, causal=causal)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_with_stride_1_it_is_a_stack_with_one_more_residual_connection(causal: bool) -> None:
    model, stack = model_of("funnel", 13, knobs={"stride": 1}), model_of("stack", 13)
    stack.load_state_dict(model.state_dict())
    x = hidden(13)
    full = visit(stack, range(1), x, causal=causal)
    want = visit(stack, range(3, 4), full + visit(stack, range(1, 3), full, causal=causal), causal=causal)
    assert torch.equal(run(model, x, causal=causal), want)


@pytest.mark.parametrize("depth", range(1, 8))
def test_the_middle_is_what_two_thirds_leave(depth: int) -> None:
    lengths = [*Funnel(FunnelConfig(stride=4), depth).lengths(10)]
    whole = depth // 3
    assert lengths == [10] * whole + [3] * (depth - 2 * whole) + [10] * whole


def test_outputs_of_a_prefix_are_those_of_the_sequence() -> None:
    """No mean depends on the length of the sequence, as it would if the last group were cut short."""
    model, x = model_of("funnel", 24, knobs={"stride": 4}), hidden(24)
    whole = run(model, x, causal=True)
    for tokens in range(1, 24):
        torch.testing.assert_close(run(model, x[:, :tokens], causal=True), whole[:, :tokens])


def test_means_that_are_not_shifted_leak(monkeypatch: pytest.MonkeyPatch, tmp_path: File) -> None:
    spec = cell("funnel")
    assert gates.check(spec, tmp_path, "code").leak_max_abs is not None
    monkeypatch.setattr(FunnelPath, "pool", lambda self, x, causal: pooled(x, self.stride))
    with pytest.raises(gates.GateFailed, match=r"^causality gate: stack=funnel: changing later tokens"):
        gates.check(spec, tmp_path, "other code")


def test_it_is_decoded_where_nothing_is_pooled() -> None:
    model = model_of("funnel", 13, knobs={"stride": 1})
    ids = torch.arange(26).view(2, 13) % 11
    decoder = Decoder(model, 2, 13)
    got = [decoder.read_all(ids[:, :5]), *map(decoder.read_all, ids[:, 5:].split(1, 1))]
    with torch.no_grad():
        want = model(ids, causal=True).logits
    torch.testing.assert_close(torch.cat(got, 1).float(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^stack=funnel makes one visit in the middle for 3 tokens"):
        Decoder(model_of("funnel", 13), 2, 13)
