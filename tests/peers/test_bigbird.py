"""BigBird beside transformers' block-sparse attention, which is given the same random blocks.

Taken away: our rotary positions, their biases. transformers' is bidirectional, has a window of three blocks
and one global block at each end, and wants a length that is a multiple of the block.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.bigbird import BigBird, BigBirdConfig

pytestmark = pytest.mark.peers


def weights_of(layer: BigBird) -> dict[str, Tensor]:
    """Our weights by their names."""
    names = ("query.weight", "key.weight", "value.weight")
    return dict(zip(names, layer.get_parameter("projections.qkv.weight").chunk(3), strict=True))


@pytest.mark.usefixtures("without_rotary")
@pytest.mark.parametrize(("block", "rows", "n_random"), [(4, 8, 2), (3, 12, 3), (16, 9, 1)])
def test_equals_transformers(monkeypatch: pytest.MonkeyPatch, block: int, rows: int, n_random: int) -> None:
    transformers = peer("transformers")
    module = peer("transformers.models.big_bird.modeling_big_bird")
    tokens = block * rows
    dims = dims_for(tokens, 2)
    config = BigBirdConfig(block=block, global_blocks=2, random_blocks=n_random, seed=3)
    layer = make_layer(BigBird, config, dims, index=1)
    assert isinstance(layer, BigBird)
    head, row = torch.arange(dims.heads)[:, None], torch.arange(1, rows - 1)
    picks = torch.stack(layer.rule(tokens, causal=False).picks(head, row), dim=-1)
    assert (picks >= 0).all()

    settings = transformers.BigBirdConfig(
        **sizes(dims), block_size=block, num_random_blocks=n_random, use_bias=False
    )
    other = module.BigBirdBlockSparseAttention(settings, seed=0).double()
    monkeypatch.setattr(other, "_bigbird_block_rand_mask_with_head", lambda **_: list(picks.numpy()))
    ones = torch.ones(2, tokens, dtype=torch.float64)
    blocked, band, rows_mask, columns_mask = module.BigBirdModel.create_masks_for_block_sparse_attn(
        ones, block
    )
    given: dict[str, Any] = {
        "band_mask": band,
        "from_mask": rows_mask,
        "to_mask": columns_mask,
        "from_blocked_mask": blocked,
        "to_blocked_mask": blocked,
    }
    x = numbers(2, tokens, dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: layer.projections.out(functional_call(other, weights_of(layer), (x,), given)[0]),
        [x, *layer.parameters()],
    )
