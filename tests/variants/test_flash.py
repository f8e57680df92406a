"""The operator of flash attention: its implementation for the CPU keeps the contract of the CUDA kernels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure.flops import CountFlops
from variants.ops.fused import flash, flash_operators
from variants.ops.fused.flash import Packing, flash_attention, flash_backward, flash_forward

H, D = 2, 8
WINDOWS: list[flash.Window] = [(None, None), (3, None), (None, 2), (3, 2), (0, 0)]


def tensors(queries: int, keys: int, *batch: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(*batch, tokens, H, D) for tokens in (queries, keys, keys)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def allowed(queries: int, keys: int, causal: bool, window: flash.Window) -> Tensor:
    """Pair by pair, from the words of the contract."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i, j in itertools.product(range(queries), range(keys)):
        ahead = j - (i + keys - queries)
        left, right = window
        too_far = (left is not None and -ahead > left) or (right is not None and ahead > right)
        mask[i, j] = not (too_far or (causal and ahead > 0))
    return mask


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H, D) → outputs, and logsumexp (H, T) with +∞ for rows without a key; by torch's softmax."""
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
    has_key = mask.any(-1)
    weights = scores.masked_fill(~(mask | ~has_key[:, None]), -torch.inf).softmax(-1) * has_key[:, None]
    rows = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).masked_fill(~has_key, torch.inf)
    return torch.einsum("hts,shd->thd", weights, v), rows


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 1), (5, 9), (9, 5)])
def test_outputs_logsumexp_and_gradients_equal_a_masked_softmax(
    queries: int, keys: int, causal: bool, window: flash.Window
) -> None:
    q, k, v = tensors(queries, keys, 3)
    if queries > keys and not causal and window != (None, None):
        with pytest.raises(ValueError, match="allowed are no more queries than keys"):
            flash_forward(q, k, v, causal=causal, window=window)
        return
    mask = allowed(queries, keys, causal, window)
    y, lse = flash_forward(q, k, v, causal=causal, window=window)
    wanted = [softmax_attention(*(t[b] for t in (q, k, v)), mask) for b in range(3)]
    torch.testing.assert_close(y, torch.stack([each for each, _ in wanted]))
    torch.testing.assert_close(lse, torch.stack([each for _, each in wanted]))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (q, k, v), dy)
    torch.testing.assert_close(
        found, torch.autograd.grad(torch.stack([each for each, _ in wanted]), (q, k, v), dy)
    )


PACKED = {True: Packing((4, 1, 0, 6), (5, 3, 2, 0)), False: Packing((4, 1, 0, 3), (5, 3, 2, 3))}
"""By whether causal: only then may a sequence have more queries than keys."""


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_one_call_for_each(causal: bool) -> None:
    packing = PACKED[causal]
    q, k, v = tensors(sum(packing.queries), sum(packing.keys))
    y, lse = flash_forward(q, k, v, causal=causal, window=(2, 3), packing=packing)
    parts = zip(q.split(packing.queries), k.split(packing.keys), v.split(packing.keys), strict=True)
    alone = [flash_forward(*(t[None] for t in part), causal=causal, window=(2, 3)) for part in parts]
    wanted = torch.cat([each[0] for each, _ in alone])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(lse, torch.cat([rows[0] for _, rows in alone], dim=-1))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (q, k, v), dy))


def test_gradients_of_parts_with_the_merged_softmax_add_up_to_the_whole() -> None:
    """Some queries have no key in a part, and one has none at all."""
    q, k, v = tensors(6, 10, 2)
    mask = torch.cat([allowed(6, 4, True, (None, None)), allowed(6, 6, True, (1, None))], dim=1)
    assert not mask[:2, :4].any()
    mask_of_both = mask.clone()
    wanted = torch.stack([softmax_attention(*(t[b] for t in (q, k, v)), mask_of_both)[0] for b in range(2)])
    cuts = [(slice(0, 4), (None, None)), (slice(4, 10), (1, None))]
    parts = [flash_forward(q, k[:, at], v[:, at], causal=True, window=window) for at, window in cuts]
    y, lse = flash.merge(parts)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    dq, dk, dv = torch.autograd.grad(wanted, (q, k, v), dy)
    found = [
        flash_backward(dy, q, k[:, at], v[:, at], y, lse, causal=True, window=window) for at, window in cuts
    ]
    torch.testing.assert_close(sum(part[0] for part in found), dq)
    torch.testing.assert_close(torch.cat([part[1] for part in found], dim=1), dk)
    torch.testing.assert_close(torch.cat([part[2] for part in found], dim=1), dv)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (4, 9), (9, 4)])
def test_allowed_pairs_are_those_of_the_contract(queries: int, keys: int) -> None:
    sides = [None, 0, 1, 3, 20]
    for left, right in itertools.product(sides, sides):
        numbers = [flash_operators.UNLIMITED if side is None else side for side in (left, right)]
        mask = allowed(queries, keys, False, (left, right))
        assert flash_operators.allowed_pairs(queries, keys, *numbers) == int(mask.sum())


def test_a_merged_query_without_a_key_gives_zero() -> None:
    q, k, v = tensors(5, 2, 1)
    parts = [flash_forward(q, k, v, causal=True), flash_forward(q, k, v, causal=True)]
    y, lse = flash.merge(parts)
    assert torch.equal(y[:, :3], torch.zeros_like(y[:, :3]))
    assert torch.equal(lse.isinf(), torch.tensor([[[True] * 3 + [False] * 2] * H]))
    torch.testing.assert_close(y, parts[0][0])


def test_the_scale_of_the_scores() -> None:
    q, k, v = tensors(5, 5, 1)
    scaled = flash_attention(q, k, v, causal=True, scale=0.5)
    torch.testing.assert_close(scaled, flash_attention(q * (0.5 * math.sqrt(D)), k, v, causal=True))


def test_strided_views_are_read_where_they_are() -> None:
    wide = torch.randn(2, 9, 3, H, D, dtype=torch.float64)
    views = [t.requires_grad_() for t in wide.unbind(2)]
    copies = [t.detach().contiguous().requires_grad_() for t in views]
    results = []
    for inputs in (views, copies):
        y = flash_attention(*inputs, causal=True, window=(4, None))
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in tensors(400, 400, 1, dtype=dtype))
    y, lse = flash_forward(q, k, v, causal=False)
    exact, rows = flash_forward(q.double(), k.double(), v.double(), causal=False)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def on_device(packing: Packing) -> flash.DevicePacking:
    """The same sequences with offsets, and bounds that are too high."""
    queries, keys = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (packing.queries, packing.keys)
    )
    return flash.DevicePacking(queries=queries, keys=keys, most_queries=99, most_keys=77, pairs=5)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_the_device_equal_lengths_of_the_host(causal: bool) -> None:
    packing = PACKED[causal]
    q, k, v = tensors(sum(packing.queries), sum(packing.keys))
    results = []
    for packed in (packing, on_device(packing)):
        y, lse = flash_forward(q, k, v, causal=causal, window=(2, 3), packing=packed)
        results.append((y, lse, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_rows_after_the_last_sequence_reach_no_result() -> None:
    packing = on_device(Packing((4, 1), (5, 3)))
    q, k, v = tensors(5, 8)
    wanted = flash_forward(q, k, v, causal=True, packing=packing)
    spoilt = [torch.cat([t.detach(), torch.full_like(t[:3], torch.nan)]) for t in (q, k, v)]
    y, lse = flash_forward(*spoilt, causal=True, packing=packing)
    torch.testing.assert_close((y[:5], lse[:, :5]), wanted)


@pytest.mark.parametrize("packing", [None, Packing((2, 3), (4, 1)), on_device(Packing((2, 3), (4, 1)))])
def test_the_operators_pass_the_checks_of_torch(packing: Packing | flash.DevicePacking | None) -> None:
    batch = () if packing else (2,)
    q, k, v = tensors(5, 5, *batch)
    arguments = flash.arguments(q, k, True, (2, None), packing, None)
    torch.library.opcheck(flash_operators.forward, (q, k, v, *arguments))
    y, lse = (t.detach() for t in flash_forward(q, k, v, causal=True, window=(2, None), packing=packing))
    inputs = [t.detach() for t in (y, q, k, v)]
    torch.library.opcheck(flash_operators._backward, (*inputs, y, lse, *arguments))


def test_the_logsumexp_has_no_gradient() -> None:
    y, lse = flash_forward(*tensors(3, 3, 1), causal=True)
    assert (y.requires_grad, lse.requires_grad) == (True, False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packing", [None, Packing((2, 5), (2, 7))])
@pytest.mark.parametrize("window", WINDOWS)
def test_allowed_pairs_are_counted_forward_and_backward(
    causal: bool, packing: Packing | None, window: flash.Window
) -> None:
    lengths = list(zip(packing.queries, packing.keys, strict=True)) if packing else [(9, 9)] * 2
    q, k, v = tensors(7, 9) if packing else tensors(9, 9, 2)
    pairs = sum(int(allowed(*each, causal, window).sum()) for each in lengths)
    with CountFlops() as forward:
        y = flash_attention(q, k, v, causal=causal, window=window, packing=packing)
    dy = torch.ones_like(y)
    with CountFlops() as backward:
        y.backward(dy)
    assert forward.total == 4 * pairs * H * D
    assert backward.total == 10 * pairs * H * D
    rows = 2 * y.shape[-3] * H if packing is None else y.shape[0] * H
    of_queries, of_keys, row_bytes, sums = q.nbytes, k.nbytes, 8 * rows, 4 * rows
    assert forward.counts[1:] == (1, 2 * of_queries + 2 * of_keys + row_bytes)
    extra = of_queries + 2 * sums + 4 * q.numel() * 4  # dy again, row sums, the float32 gradient of q
    assert backward.counts[1:] == (3, 4 * of_queries + 4 * of_keys + row_bytes + extra)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "word"),
    [
        ("cpu", torch.bfloat16, 64, "CUDA"),
        ("cuda", torch.float32, 64, "float32"),
        ("cuda", torch.bfloat16, 12, "12 channels"),
        ("cuda", torch.float16, 264, "264 channels"),
    ],
)
def test_what_the_kernel_lacks_is_named(device: str, dtype: torch.dtype, head_dim: int, word: str) -> None:
    reason = flash.missing_flash(torch.device(device), dtype, head_dim)
    assert reason is not None
    assert word in reason
    assert "\n" not in reason


def test_a_machine_without_a_card_may_plan_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.missing_flash(torch.device("cuda"), torch.bfloat16, 64) is None


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_cards_are_refused(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = flash.missing_flash(torch.device("cuda"), torch.bfloat16, 64)
    assert (reason is None) == runs


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: flash_attention(q, k, v, causal=True, window=(-1, None)),
        lambda q, k, v: flash_attention(q[0], k, v, causal=True),
        lambda q, k, v: flash_attention(q, k[:1], v[:1], causal=True),
        lambda q, k, v: flash_attention(q, k, v[:, 1:], causal=True),
        lambda q, k, v: flash_attention(q[0], k[0], v[0], causal=True, packing=Packing((4, 2), (3, 2))),
        lambda q, k, v: flash_attention(
            *(t.expand(2**16, 5, H, D) for t in (q[:1], k[:1], v[:1])), causal=True
        ),
        lambda q, k, v: Packing((1, 2), (3,)),
    ],
)
def test_wrong_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"window|allowed|sizes|packed|lengths"):
        call(*tensors(5, 5, 2))


SIGNATURE = (
    "query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask; "
    "scale, window_size_left, window_size_right"
)


def test_this_torch_has_the_kernels_with_the_arguments_that_are_given() -> None:
    forward = torch.ops.aten._flash_attention_forward.default._schema
    backward = torch.ops.aten._flash_attention_backward.default._schema
    positional, _, named = SIGNATURE.partition("; ")
    given = [argument.name for argument in forward.arguments if not argument.kwarg_only]
    assert given == positional.split(", ")
    names = {argument.name for argument in forward.arguments if argument.kwarg_only}
    assert names >= {*named.split(", ")}
    given = [argument.name for argument in backward.arguments if not argument.kwarg_only]
    assert given[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert given[6:12] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert len(given) == 14
