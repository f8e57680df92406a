"""Nyström attention against what it reduces to, its parts and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, everything, feed, make_layer, numbers, oracle
from torch import Tensor, nn

from bench.measure import reference_gate
from variants.attention.nystrom import Nystrom, NystromConfig
from variants.base import Context, SequenceMixer, Workload
from variants.ops.convolutions.depthwise import depthwise
from variants.ops.pseudo_inverse import pseudo_inverse
from variants.ops.segments.segment_means import segment_bounds, segment_means

SMALL: list[dict[str, Any]] = [{"landmarks": 5, "conv": 3}, {"landmarks": 8, "conv": 0}]


def layer_of(tokens: int, **knobs: int) -> SequenceMixer:
    return make_layer(Nystrom, NystromConfig(**knobs), dims_for(tokens))


@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_a_landmark_for_every_token_is_dense_attention(tokens: int) -> None:
    """A pinv(A) A V = A V, once the iteration has converged."""
    layer = layer_of(tokens, landmarks=13, conv=0, pinv_steps=40)
    x = numbers(2, tokens, layer.dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: oracle(layer, x, everything(tokens, causal=False)),
        [x, *layer.parameters()],
        tolerance=1e-6,
    )


def test_more_steps_come_closer_to_dense_attention() -> None:
    tokens = 24
    x, errors = numbers(2, tokens, 16).detach(), []
    for steps in (1, 3, 6, 12):
        layer = layer_of(tokens, landmarks=tokens, conv=0, pinv_steps=steps)
        assert isinstance(layer, Nystrom)
        target = layer.softmax_target(x, Context(causal=False))
        assert target is not None
        errors.append((feed(layer, x, causal=False) - target).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_the_iteration_converges_to_the_pseudo_inverse() -> None:
    a = numbers(3, 2, 9, 9).detach().softmax(dim=-1)
    assert difference(pseudo_inverse(a, 40), torch.linalg.pinv(a)) <= 1e-7
    singular = a.clone()
    singular[..., 1, :] = singular[..., 0, :]
    got = pseudo_inverse(singular, 25)
    assert difference(singular @ got @ singular, singular) <= 1e-7


def test_one_step_is_the_formula() -> None:
    a = numbers(4, 4, seed=3).detach().softmax(dim=-1)
    z = a.T / (a.sum(0).max() * a.sum(1).max())
    eye, az = torch.eye(4, dtype=a.dtype), a @ z
    want = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    assert difference(pseudo_inverse(a, 1), want) <= EXACT


@pytest.mark.parametrize(("tokens", "segments"), [(1, 4), (4, 4), (7, 3), (9, 3), (10, 4), (3, 8)])
def test_segments_partition_the_sequence_and_differ_by_one_token(tokens: int, segments: int) -> None:
    bounds = segment_bounds(tokens, segments)
    assert [t for a, b in bounds for t in range(a, b)] == list(range(tokens))
    lengths = [b - a for a, b in bounds]
    assert len(lengths) == min(tokens, segments)
    assert max(lengths) - min(lengths) <= 1
    x = numbers(2, 3, tokens, 4)
    assert_same(
        lambda: segment_means(x, segments),
        lambda: torch.stack([x[:, :, a:b].mean(2) for a, b in bounds], dim=2),
        [x],
    )


@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (1, 33), (7, 1), (7, 7), (64, 5), (67, 9), (301, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_convolution_in_blocks_is_that_of_torch(tokens: int, width: int, dtype: torch.dtype) -> None:
    """In float64, where torch's own gradients are right at every length."""
    x, filters = numbers(2, 3, tokens, 4), numbers(3, width, seed=2)

    def torchs() -> Tensor:
        return nn.functional.conv2d(x, filters[:, None, :, None], padding=(width // 2, 0), groups=3)

    tolerance = EXACT if dtype == torch.float64 else 1e-5
    given = [t.detach().to(dtype).requires_grad_() for t in (x, filters)]
    y, want = depthwise(*given), torchs()
    assert difference(y.double(), want) <= tolerance
    direction = numbers(*y.shape, seed=5).detach()
    found = torch.autograd.grad(y, given, direction.to(dtype))
    for got, right in zip(found, torch.autograd.grad(want, [x, filters], direction), strict=True):
        assert difference(got.double(), right) <= tolerance


def test_the_convolution_is_added_to_the_attention() -> None:
    """Against torch's one-dimensional convolution, head by head."""
    layer, plain = (layer_of(23, landmarks=4, conv=conv) for conv in (5, 0))
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "filters"})
    x = numbers(2, 23, layer.dims.d_model)
    filters = layer.get_parameter("filters")

    def by_hand() -> Tensor:
        weights = layer.get_parameter("projections.qkv.weight").chunk(3)[2]
        values = (x @ weights.T).unflatten(-1, (2, -1))  # (B, T, H, D)
        heads = [
            nn.functional.conv1d(
                values[:, :, h].transpose(1, 2).flatten(0, 1)[:, None], filters[h][None, None], padding=2
            )
            .unflatten(0, (2, -1))
            .squeeze(2)
            .transpose(1, 2)
            for h in range(2)
        ]
        mixed = torch.cat(heads, dim=-1) @ layer.get_parameter("projections.out.weight").T
        return mixed + feed(plain, x, causal=False)

    assert_same(lambda: feed(layer, x, causal=False), by_hand, [x, filters])


def test_a_sequence_does_not_depend_on_others_of_its_batch() -> None:
    """A start from the largest norm of the batch, as in some public code, would make it depend on them."""
    layer = layer_of(40, landmarks=7)
    x = numbers(1, 40, layer.dims.d_model).detach()
    beside = torch.cat([x, 50 * numbers(1, 40, layer.dims.d_model, seed=5).detach()])
    assert difference(feed(layer, beside, causal=False)[:1], feed(layer, x, causal=False)) <= EXACT


def test_the_pseudo_inverse_is_float32_under_autocast() -> None:
    """In bfloat16 the iteration would have errors of the size of its entries."""
    layer = layer_of(64, landmarks=32, conv=0).float()
    x = numbers(1, 64, layer.dims.d_model).detach().float()
    want = feed(layer, x, causal=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = feed(layer, x, causal=False)
    assert (got.float() - want).abs().max() <= 0.1 * want.abs().max()


def test_causal_is_refused_with_the_reason() -> None:
    layer = layer_of(20)
    with pytest.raises(ValueError, match="no causal form: landmarks are means"):
        layer(torch.zeros(1, 20, layer.dims.d_model), Context(causal=True))


def test_a_width_without_a_middle_is_refused() -> None:
    with pytest.raises(ValueError, match="conv=4: allowed is 0 or an odd number of tokens"):
        NystromConfig(conv=4)


def test_with_a_convolution_it_estimates_no_softmax_attention() -> None:
    layer = layer_of(20)
    assert isinstance(layer, Nystrom)
    assert layer.softmax_target(torch.zeros(1, 20, 16).double(), Context(causal=False)) is None


def test_it_passes_the_reference_gate() -> None:
    dims = Workload(causal=False, batch_size=2, seq_len=301, d_model=32, heads=2)
    reference_gate.reference_error(Nystrom, NystromConfig(), dims, 0, torch.device("cpu"), causal=False)
