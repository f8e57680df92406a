"""The hierarchical encoder against segments that are processed one by one, and torch's recurrent layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_depth_lengths import hidden, model_of, run, work_of
from torch import Tensor, nn

from bench.measure.flops import CountFlops
from variants.base import Context
from variants.depth.hierarchical import Hierarchical, HierarchicalConfig
from variants.ops.recurrences.lstm import STEPS, BidirectionalLSTM

S = 5  # tokens of a segment in `model_of`


def reordered(rows: Tensor) -> Tensor:
    """torch's gates are in the order i, f, g, o."""
    i, f, o, g = rows.chunk(4)
    return torch.cat([i, f, g, o])


def torchs(lstm: BidirectionalLSTM) -> nn.LSTM:
    """torch's layer with the same weights."""
    state = lstm.recur.shape[1]
    made = nn.LSTM(lstm.read.in_features, state, bidirectional=True, batch_first=True).double()
    with torch.no_grad():
        for direction, suffix in enumerate(("", "_reverse")):
            rows = slice(direction * 4 * state, (direction + 1) * 4 * state)
            getattr(made, f"weight_ih_l0{suffix}").copy_(reordered(lstm.read.weight[rows]))
            getattr(made, f"bias_ih_l0{suffix}").copy_(reordered(lstm.read.bias[rows]))
            getattr(made, f"weight_hh_l0{suffix}").copy_(reordered(lstm.recur[direction].T))
            getattr(made, f"bias_hh_l0{suffix}").zero_()
    return made


@pytest.mark.parametrize(("vectors", "state"), [(1, 3), (2, 1), (7, 3), (STEPS + 7, 2)])
def test_the_recurrent_layer_is_torchs(vectors: int, state: int) -> None:
    """Outputs, and gradients of the input and of the products with the state."""
    torch.manual_seed(0)
    lstm = BidirectionalLSTM(4, state).double()
    nn.init.normal_(lstm.read.weight)
    other = torchs(lstm)
    x = torch.randn(3, vectors, 4, dtype=torch.float64, requires_grad=True)
    got, want = lstm(x), other(x)[0]
    torch.testing.assert_close(got, want)
    dx, d_recur = torch.autograd.grad(got.sin().sum(), [x, lstm.recur])
    wanted, *by_direction = torch.autograd.grad(
        want.sin().sum(), [x, other.weight_hh_l0, other.weight_hh_l0_reverse]
    )
    torch.testing.assert_close(dx, wanted)
    for mine, its in zip(d_recur, by_direction, strict=True):
        torch.testing.assert_close(reordered(mine.T), its)


def test_at_first_the_state_is_kept() -> None:
    """The forget gates are open, of both directions."""
    lstm = BidirectionalLSTM(4, 3)
    gates = lstm.read.bias.unflatten(0, (2, 4, 3))
    assert gates[:, 1].eq(1).all()
    assert gates.sum() == 6


@pytest.mark.parametrize("tokens", [1, 4, 5, 12, 15])
def test_tokens_read_their_segment_and_one_vector_of_each_other(tokens: int) -> None:
    """Outputs, and gradients of the input."""
    model, x = model_of("hierarchical", tokens), hidden(tokens).requires_grad_()
    path: Any = model.path
    recurrent = torchs(path.lstm)

    def visits(begin: int, end: int, x: Tensor) -> Tensor:
        for place in range(begin, end):
            x = model.visits[place](x[None], None, Context(causal=False)).x[0]
        return x

    def document(x: Tensor) -> Tensor:
        """(T, C) of one sequence."""
        segments = [visits(0, 2, x[begin : begin + S]) for begin in range(0, len(x), S)]
        vectors = torch.stack([sum(segment) / len(segment) for segment in segments])
        read = recurrent(path.norm(vectors)[None])[0][0] @ path.out.weight.T
        return torch.cat([visits(2, 4, segment + each) for segment, each in zip(segments, read, strict=True)])

    got, want = run(model, x, causal=False), torch.stack([document(each) for each in x])
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


def test_information_crosses_segments_in_both_directions_and_only_by_the_recurrent_layer() -> None:
    model, x = model_of("hierarchical", 15), hidden(15)
    changed = torch.cat([x[:, :S], hidden(15, 1)[:, S : 2 * S], x[:, 2 * S :]], dim=1)

    def differs() -> list[bool]:
        before, after = run(model, x, causal=False), run(model, changed, causal=False)
        return [not torch.equal(a, b) for a, b in zip(before.split(S, 1), after.split(S, 1), strict=True)]

    assert differs() == [True, True, True]
    path: Any = model.path
    nn.init.zeros_(path.out.weight)
    assert differs() == [False, True, False]


def test_attention_is_that_of_the_segments() -> None:
    """Twice as many tokens cost twice as much, with FLOPs that are counted."""
    model = model_of("hierarchical", 20)
    costs = [model.cost(work_of(tokens, causal=False)) for tokens in (10, 20)]
    assert costs[1] == costs[0] * 2
    with CountFlops() as counter, torch.no_grad():
        model.path.lstm(torch.zeros(2, 4, 16, dtype=torch.float64))  # type: ignore[union-attr,operator]
    assert counter.total == sum(BidirectionalLSTM.flops(2 * 4, 16, 8))


def test_windows_are_full_segments_and_a_shorter_one() -> None:
    schedule = Hierarchical(HierarchicalConfig(segment=4), 2)
    assert schedule.windows(11) == [[(4, 2), (3, 1)]] * 2
    assert schedule.windows(8) == [[(4, 2)]] * 2
    assert schedule.windows(3) == [[(3, 1)]] * 2
