"""What comparisons with other projects share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from variants.ops import projections


@pytest.fixture
def without_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out rotary positions, which most variants here add to their method and no other project does.

    All angles become 0. Every rotation reads its angles from these two tables, wherever it is called.
    """

    def no_angles(tokens: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_ones(tokens, head_dim // 2), like.new_zeros(tokens, head_dim // 2)

    def table(seq_len: int, head_dim: int, like: Tensor, base: float = 1.0) -> tuple[Tensor, Tensor]:
        return no_angles(seq_len, head_dim, like)

    def table_at(positions: Tensor, head_dim: int, like: Tensor, base: float = 1.0) -> tuple[Tensor, Tensor]:
        return no_angles(len(positions), head_dim, like)

    monkeypatch.setattr(projections, "rotary_table", table)
    monkeypatch.setattr(projections, "rotary_table_at", table_at)
    x = torch.arange(24.0).view(1, 3, 2, 4)
    for positions in (None, torch.tensor([5, 7, 90])):
        assert torch.equal(projections.rotary(x, positions), x)
