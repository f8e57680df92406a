"""Axial attention equals attention over the rows and the columns of a grid, drawn token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same, assert_same_layer, drawn, everything, feed, make_layer, numbers, oracle
from torch import Tensor

from bench.measure import gates
from variants.attention.axial import Axial, AxialConfig
from variants.attention.dense import Dense, DenseConfig
from variants.base import Context, MixerOut, Workload
from variants.ops.patterns.masked_attention import attention_or_zero
from variants.ops.patterns.masks import Rule, SameBlock, composed

SMALL: list[dict[str, Any]] = [{"row": 8}, {"row": 5}, {"row": 1}, {"row": 100}]

both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=3)


def grid(tokens: int, row: int, index: int, *, causal: bool) -> Tensor:
    """(T, T) bool, by coordinates."""

    def may_read(i: int, j: int) -> bool:
        (y, x), (key_y, key_x) = divmod(i, row), divmod(j, row)
        if index % 2:
            return x == key_x and (key_y <= y or not causal)
        if not causal:
            return y == key_y
        return key_y == y - 1 or (key_y == y and key_x <= x)

    return drawn(tokens, may_read)


@both_directions
@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 60), row=st.integers(1, 20), batch=st.integers(1, 2), index=st.integers(0, 3))
@example(tokens=64, row=8, batch=2, index=0)
@example(tokens=64, row=8, batch=2, index=1)
@example(tokens=9, row=12, batch=1, index=0)
@example(tokens=9, row=12, batch=1, index=1)
def test_equals_a_grid_drawn_by_coordinates(
    causal: bool, tokens: int, row: int, batch: int, index: int
) -> None:
    layer = make_layer(Axial, AxialConfig(row=row), dims_of(tokens), index=index)
    assert isinstance(layer, Axial)
    x = numbers(batch, tokens, 12)
    allowed = grid(tokens, row, index, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: oracle(layer, x, allowed[None]),
        [x, *layer.parameters()],
    )
    assert torch.equal(layer.attention_mask(tokens, causal=causal), allowed)
    flops = layer.cost(replace(dims_of(tokens, batch), causal=causal))
    assert flops.mixing == batch * 3 * 4 * 4 * int(allowed.sum())


@pytest.mark.parametrize(
    ("causal", "index", "row"),
    [(True, 0, 40), (True, 0, 25), (True, 1, 1), (False, 0, 40), (False, 1, 1)],
)
def test_one_row_or_one_column_is_dense(causal: bool, index: int, row: int) -> None:
    """Causal also two rows, because a token reads the row above."""
    layer = make_layer(Axial, AxialConfig(row=row), dims_of(40), index=index)
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    assert_same_layer(layer, dense, numbers(2, 40, 12), causal=causal)


@both_directions
@pytest.mark.parametrize("tokens", [64, 61])
def test_two_layers_connect_all_tokens(causal: bool, tokens: int) -> None:
    """A row, then a column: with rows that are only causal, nothing would move to the left. A last row that
    is shorter has no token in the other columns, through which a bidirectional row would be read."""
    layers = [make_layer(Axial, AxialConfig(row=8), dims_of(tokens), index=n) for n in range(2)]
    read = composed([layer.attention_mask(tokens, causal=causal) for layer in layers])
    wanted = everything(tokens, causal=causal)
    full = tokens // 8 * 8
    if not causal:
        read, wanted = read[:, :full], wanted[:, :full]
    assert torch.equal(read, wanted)


def test_the_grid_is_that_of_the_longest_sequence() -> None:
    """So a prefix is read in the same way."""
    layer = make_layer(Axial, AxialConfig(), dims_of(1000))
    assert isinstance(layer, Axial)
    assert layer.row == 32
    assert torch.equal(layer.allowed(300, causal=True)[:, :90, :90], layer.allowed(90, causal=True))


class UnshiftedRows(Axial):
    """Rows without a mask and without the shift: a token reads the end of its own row."""

    def mask(self, seq_len: int, *, causal: bool) -> Rule:
        return super().mask(seq_len, causal=causal) if self.along_columns else SameBlock(self.row)


class BothPasses(Axial):
    """The paper's decoder in one layer: complete rows, then a column of their outputs, which consists of
    earlier rows; and the own row, causal."""

    least = 1
    """Rows between a token and the nearest one that the column reads."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        index = torch.arange(x.shape[1])
        row, column = index // self.row, index % self.row
        same_row, earlier = row[:, None] == row, row[:, None] - row >= self.least
        of_rows = attention_or_zero(q, k, v, same_row)
        outer = attention_or_zero(q, k, of_rows, (column[:, None] == column) & earlier)
        inner = attention_or_zero(q, k, v, same_row.tril())
        return MixerOut(self.projections.merge(outer + inner))


class UnshiftedColumns(BothPasses):
    """The column contains the own row, which has read later tokens."""

    least = 0


@pytest.mark.parametrize(("right", "leaking"), [(Axial, UnshiftedRows), (BothPasses, UnshiftedColumns)])
def test_the_gate_sees_a_pass_that_is_not_shifted(right: type[Axial], leaking: type[Axial]) -> None:
    dims, config = replace(dims_of(70, 2), d_model=24), AxialConfig(row=9, impl="dense")
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(right, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(leaking, config, *given)
