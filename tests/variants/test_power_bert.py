"""PoWER-BERT against a selection by the whole matrix of weights."""

from __future__ import annotations

import math

import pytest
import torch
from test_depth_lengths import hidden, model_of, run
from torch import Tensor

from bench.model.decode import no_decoding
from variants.base import Context
from variants.depth import power_bert
from variants.depth.power_bert import kept, received


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Queries and keys (H, T, D) → (H, T, T)."""
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_received_attention_is_the_sum_of_a_column(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of queries of any size."""
    monkeypatch.setattr(power_bert, "BLOCK_WEIGHTS", size)
    monkeypatch.setattr(power_bert, "LEAST_QUERIES", 1)
    source = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 7, 4, generator=source)
    got = received(q, k)
    for one, *heads in zip(got, q, k, strict=True):
        torch.testing.assert_close(one, weights(*heads).sum((0, 1)))
    torch.testing.assert_close(got.sum(1), torch.full((2,), 3.0 * 7))


@pytest.mark.parametrize("tokens", [13, 2, 1])
@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_dropped_tokens_keep_their_last_state(tokens: int, keep: float) -> None:
    """Token by token, in outputs and gradients of the input."""
    model, x = model_of("power_bert", tokens, knobs={"keep": keep}), hidden(tokens).requires_grad_()
    rows = []
    for sequence in x:
        last, left = [*sequence], [*range(tokens)]
        for place, block in enumerate(model.visits):
            before = torch.stack([last[t] for t in left])
            after = block(before[None], None, Context(causal=False)).x[0]
            for t, state in zip(left, after, strict=True):
                last[t] = state
            if place + 1 < len(model.visits):
                q, k = model.layers[place].queries_keys(  # type: ignore[attr-defined]
                    block.mixer_norm(before[None]), Context(causal=False)
                )
                score = weights(q[0], k[0]).sum((0, 1)).tolist()
                best = sorted(range(len(left)), key=lambda n: -score[n])[: math.ceil(keep * len(left))]
                left = [left[n] for n in sorted(best)]
        rows.append(torch.stack(last))
    want, got = torch.stack(rows), run(model, x, causal=False)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_without_dropping_it_is_a_stack(causal: bool) -> None:
    model, stack = model_of("power_bert", 13, knobs={"keep": 1.0}), model_of("stack", 13)
    stack.load_state_dict(model.state_dict())
    assert torch.equal(run(model, hidden(13), causal=causal), run(stack, hidden(13), causal=causal))
    assert no_decoding(model) is None
    assert model_of("power_bert", 13).spec.no_form(causal=True) is not None


def test_numbers_of_tokens_are_a_series() -> None:
    assert kept(10, 0.5, 5) == [10, 5, 3, 2, 1]
    assert kept(1, 0.1, 3) == [1, 1, 1]
    assert kept(7, 1.0, 2) == [7, 7]
