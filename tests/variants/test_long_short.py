"""Long-short attention against what it reduces to, its parts, and a planted leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import causality_gate
from bench.measure.gate_failed import GateFailed
from variants.attention.long_short import LongShort, LongShortConfig
from variants.base import Context, Workload
from variants.ops.patterns.segment_rows import BLOCK, all_rows, earlier_rows, row_pairs
from variants.ops.patterns.strided_parts import Part

SMALL: list[dict[str, Any]] = [
    {"window": 5, "rank": 2, "segment": 7},
    {"window": 3, "rank": 3, "segment": 2},
]


def layer_of(tokens: int, **knobs: Any) -> LongShort:
    layer = make_layer(LongShort, LongShortConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, LongShort)
    with torch.no_grad():  # 1 at first, which would hide that it is left out
        layer.window_norm.weight.copy_(1 + 0.1 * torch.randn(16))
        layer.row_norm.weight.copy_(1 + 0.1 * torch.randn(16))
    return layer


def normed(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, position: float) -> Tensor:
    """(B, H, D) at one position."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([y.real, y.imag], dim=-1)


def by_hand(layer: LongShort, x: Tensor, window: int, rank: int, segment: int, causal: bool) -> Tensor:
    """Token by token: a list of the keys that it reads."""
    tokens = x.shape[1]
    q, k, v = (einsum("btc,dc->btd", x, w) for w in layer.projections.qkv.weight.chunk(3))
    logits = einsum("btc,dc->btd", x, layer.dynamic.weight).unflatten(-1, (2, rank))
    heads = [normed(t, layer.window_norm.weight).unflatten(-1, (2, -1)) for t in (k, v)]
    queries, keys, values = rotated(q.unflatten(-1, (2, -1))), rotated(heads[0]), heads[1]
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for s, a in enumerate(range(0, tokens, segment)):
        b = min(a + segment, tokens)
        weights = logits[:, a:b].exp() / logits[:, a:b].exp().sum(1, keepdim=True)
        for i in range(rank):
            row_k, row_v = (
                normed(
                    einsum("blh,blhd->bhd", weights[..., i], t[:, a:b].unflatten(-1, (2, -1))).flatten(1),
                    layer.row_norm.weight,
                ).unflatten(-1, (2, -1))
                for t in (k, v)
            )
            rows.setdefault(s, []).append((turned(row_k, (a + b - 1) / 2), row_v))
    outputs = []
    for t in range(tokens):
        near = [j for j in range(tokens) if (0 <= t - j < window if causal else abs(t - j) < window)]
        read = [(keys[:, j], values[:, j]) for j in near]
        read += [row for s, some in rows.items() if not causal or s < t // segment for row in some]
        some_keys, some_values = (torch.stack(each, dim=1) for each in zip(*read, strict=True))
        scores = einsum("bhd,bjhd->bjh", queries[:, t], some_keys) / math.sqrt(8)
        outputs.append(einsum("bjh,bjhd->bhd", scores.softmax(1), some_values).flatten(1))
    return einsum("btc,dc->btd", torch.stack(outputs, dim=1), layer.projections.out.weight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("tokens", "window", "rank", "segment"), [(1, 2, 1, 3), (12, 3, 2, 4), (31, 4, 1, 3), (9, 2, 2, 20)]
)
def test_it_reads_a_window_and_rows(tokens: int, window: int, rank: int, segment: int, causal: bool) -> None:
    layer = layer_of(tokens, window=window, rank=rank, segment=segment)
    x = numbers(2, tokens, layer.dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_hand(layer, x, window, rank, segment, causal),
        [x, *layer.parameters()],
    )


def test_without_a_complete_segment_it_is_a_window_of_normalised_keys() -> None:
    layer, wide = (layer_of(20, window=4, segment=s) for s in (20, 1000))
    wide.load_state_dict(layer.state_dict())
    x = numbers(2, 20, layer.dims.d_model).detach()
    assert difference(feed(layer, x, causal=True), feed(wide, x, causal=True)) <= EXACT


def drawn(parts: list[Part], tokens: int, rows: int) -> Tensor:
    """How often each pair (token, row) is in a part."""
    count = torch.zeros(tokens, rows, dtype=torch.int64)
    for part in parts:
        for group in range(part.queries.groups):
            i, j = (
                cut.tokens(torch.device("cpu")) + group * cut.group_step for cut in (part.queries, part.keys)
            )
            mask = torch.ones(len(i), len(j), dtype=torch.bool) if part.mask is None else part.mask
            count[i[:, None], j - tokens] += mask.int()
    return count


@pytest.mark.parametrize("tokens", [1, 3, 8, 47, 48, 49, 97, 150, 333])
@pytest.mark.parametrize(("segment", "rank"), [(1, 1), (2, 3), (6, 2)])
def test_parts_hold_each_row_of_earlier_segments_once(tokens: int, segment: int, rank: int) -> None:
    rows = tokens // segment * rank
    if not rows:
        return
    parts = earlier_rows(tokens, segment, rank, 2, torch.device("cpu"), "cpu")
    count = drawn(parts, tokens, rows)
    before = (torch.arange(rows) // rank) < (torch.arange(tokens)[:, None] // segment)
    assert torch.equal(count, before.long())
    assert int(before.sum()) == row_pairs(tokens, segment, rank, causal=True)


def test_large_rectangles_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "variants.ops.patterns.segment_rows.SCORES", type("S", (), {"on": lambda self, _: 50})()
    )
    parts = all_rows(100, 12, 2, "cpu")
    assert all(part.queries.length * part.keys.length <= 50 for part in parts)
    assert torch.equal(drawn(parts, 100, 12), torch.ones(100, 12, dtype=torch.int64))
    earlier = earlier_rows(100, 2, 1, 2, torch.device("cpu"), "cpu")
    assert drawn(earlier, 100, 50).max() == 1


class ReadsItsOwnSegment(LongShort):
    """A token reads the rows of its own segment too, which is not complete at this token."""

    def row_parts(self, seq_len: int, rows: int, causal: bool, device: torch.device) -> list[Part]:
        length, heads = self.segment(seq_len, causal=True), (0, self.dims.heads)
        right = super().row_parts(seq_len, rows, causal, device)
        own = [
            Part(
                heads=heads,
                queries=right[0].queries.__class__(start=s * length, run=length),
                keys=right[0].keys.__class__(start=seq_len + s * self.config.rank, run=self.config.rank),
            )
            for s in range(seq_len // length)
        ]
        return [*right, *own]


def test_the_gate_finds_a_segment_that_is_read_before_it_is_complete() -> None:
    config = LongShortConfig(window=5, rank=2, segment=7)
    dims, cpu = dims_for(140, 2), torch.device("cpu")
    assert causality_gate.leak(LongShort, config, dims, 2, cpu) <= causality_gate.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        causality_gate.leak(ReadsItsOwnSegment, config, dims, 2, cpu)


def test_segments_grow_with_the_root_of_the_length() -> None:
    layer = layer_of(900)
    assert layer.segment(900, causal=True) == 30
    assert layer.segment(17, causal=False) == 17
    assert layer_of(900, segment=8).segment(900, causal=False) == 8


def test_pairs_computed_exceed_those_allowed_by_little() -> None:
    """Rows: only within a block of segments."""
    tokens, segment, rank = 256 * BLOCK, 16, 2
    parts = earlier_rows(tokens, segment, rank, 1, torch.device("cpu"), "cpu")
    allowed = row_pairs(tokens, segment, rank, causal=True)
    assert allowed <= sum(part.pairs for part in parts) <= 1.15 * allowed


@pytest.mark.parametrize("causal", [True, False])
def test_plain_and_fused_are_one_computation(causal: bool) -> None:
    plain, fused = (layer_of(67, window=5, rank=2, segment=6, impl=impl) for impl in ("plain", "fused"))
    fused.load_state_dict(plain.state_dict())
    x = numbers(2, 67, plain.dims.d_model)
    assert_same(
        lambda: feed(plain, x, causal=causal),
        lambda: feed(fused, x, causal=causal),
        [x, *plain.parameters()],
        [x, *fused.parameters()],
    )


def test_its_state_is_smaller_than_the_sequence() -> None:
    work = Workload(causal=True, batch_size=1, seq_len=900, d_model=16, heads=2)
    state = layer_of(900, window=10, rank=2).state_bytes(work)
    assert state == (2 * (9 + 30 * 2) * 16) * 4  # no segment is open


def test_a_bidirectional_sequence_is_one_segment_by_default() -> None:
    """A permutation of the tokens outside of the window of a token changes only their distances to it."""
    layer = layer_of(30, window=2)
    x = numbers(1, 30, layer.dims.d_model).detach()
    still = Context(causal=False, positions=torch.zeros(30, dtype=torch.int64))
    want = layer(x, still).y[:, 0]
    moved = torch.cat([x[:, :2], x[:, 2:].flip(1)], dim=1)
    assert difference(layer(moved, still).y[:, 0], want) <= EXACT
