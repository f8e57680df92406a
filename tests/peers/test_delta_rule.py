"""The chunked delta rule beside the references of fla-core, without decays and with them."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same
from torch import Tensor

from peers.test_gated_scan import naive
from variants.ops.recurrences.delta_rule import delta_rule

pytestmark = pytest.mark.peers
FLOAT32 = 1e-5
"""Their references compute in float32."""


def drawn(tokens: int, decays: int) -> list[Tensor]:
    """Queries, unit keys, values, strengths and decays, heads after tokens."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 3, width) for width in (8, 8, 5))
    k = torch.nn.functional.normalize(k, dim=-1)
    g = torch.randn(2, tokens, 3, decays).sigmoid().log()
    return [x.requires_grad_() for x in (q, k, v, torch.rand(2, tokens, 3), g)]


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Tensor:
    """Layout (B, T, H, D)."""
    first = [x.transpose(1, 2) for x in (q, k, v, beta[..., None])]
    logs = None if g is None else g.transpose(1, 2)
    return delta_rule(*first, logs, chunk=32, device_type="cpu").transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_without_decays_it_is_the_delta_rule(tokens: int) -> None:
    """Their queries are divided by √D."""
    q, k, v, beta, _ = drawn(tokens, 1)

    def theirs() -> Tensor:
        first = (x.transpose(1, 2) for x in (q * 8**0.5, k, v, beta))
        return naive("delta_rule").delta_rule_recurrence(*first)[0].transpose(1, 2)

    assert_same(lambda: ours(q, k, v, beta, None), theirs, [q, k, v, beta], tolerance=FLOAT32)


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_with_decays_it_is_the_gated_delta_rule(tokens: int) -> None:
    inputs = q, k, v, beta, g = drawn(tokens, 1)

    def theirs() -> Tensor:
        found = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
            q, k, v, beta, g[..., 0], scale=1.0
        )
        return found[0]

    assert_same(lambda: ours(*inputs), theirs, inputs, tolerance=FLOAT32)


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_with_decays_of_channels_it_is_kda(tokens: int) -> None:
    inputs = q, k, v, beta, g = drawn(tokens, 8)
    assert_same(
        lambda: ours(*inputs),
        lambda: naive("kda").naive_recurrent_kda(q, k, v, g, beta, scale=1.0)[0],
        inputs,
        tolerance=FLOAT32,
    )
