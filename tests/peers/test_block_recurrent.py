"""Block-recurrent attention's state beside that of block-recurrent-transformer-pytorch, block by block.

Taken away: our window, which theirs combines with another scheme of positions; the mean that their layer
normalisation subtracts, by states whose mean is 0; one of their two matrices of the update, which follow each
other. Their gate opens by σ(β), ours closes by σ(b). Their heads share one head of keys and values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.block_recurrent import BlockRecurrent, BlockRecurrentConfig
from variants.ops.segments import state_scan

pytestmark = pytest.mark.peers


def centred(weight: Tensor) -> Tensor:
    """Outputs of a matrix, or a vector of channels, with the mean 0."""
    return weight - weight.mean(0)


@pytest.mark.parametrize(("tokens", "window", "states"), [(40, 8, 5), (21, 4, 3), (7, 7, 2), (5, 9, 4)])
def test_equals_block_recurrent_transformer_pytorch(tokens: int, window: int, states: int) -> None:
    package = peer("block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch")
    dims = replace(dims_for(tokens, 2), kv_heads=1)
    config = BlockRecurrentConfig(window=window, states=states, weights="separate")
    layer = make_layer(BlockRecurrent, config, dims)
    assert isinstance(layer, BlockRecurrent)
    other = package.StateContainer(
        dims.d_model, num_state_vectors=states, dim_head=dims.head_dim, heads=dims.heads
    ).double()
    cell = layer.cell
    with torch.no_grad():
        cell.initial.copy_(centred(cell.initial.T).T)
        cell.update.weight.copy_(centred(cell.update.weight))
        cell.bias.copy_(centred(numbers(dims.d_model)))
        cell.gate.fill_(0.3)  # a gate that differs by channel would change the mean
        own, of_block, key_value = cell.project.weight.split(
            [dims.inner_dim, dims.inner_dim, 2 * dims.key_dim]
        )
        for theirs, ours in (
            (other.init_state, cell.initial),
            (other.state_pos_ids, cell.identity),
            (other.state_norm.gamma, cell.scale),
            (other.state_to_q.weight, own),
            (other.q_from_state.weight, of_block),
            (other.state_to_kv.weight, key_value),
            (other.to_state_out.weight, concatenated_by_head(cell.update.weight, dims.head_dim)),
            (other.state_out_to_gate.weight, torch.eye(dims.d_model)),
            (other.state_out_to_gate.bias, cell.bias),
            (other.learned_ema_beta, -cell.gate),
            (other.q_to_state.weight, layer.get_parameter("reading.weight")),
        ):
            theirs.copy_(ours)
    x = numbers(2, tokens, dims.d_model)
    k, v = (numbers(2, 1, tokens, dims.head_dim, seed=seed) for seed in (1, 2))

    def ours() -> Tensor:
        weights = cell.weights(layer.projections, k.dtype)
        ended = (tokens - 1) // window * window
        found = state_scan.scan(cell.start(k.dtype), k[:, :, :ended], v[:, :, :ended], weights, window)
        return layer._read(layer._asking(x, x), *found)

    def theirs() -> Tensor:
        state, outputs = None, []
        for block in torch.arange(tokens).split(window):
            other.set_next_read_state(state)
            outputs.append(other.read(x[:, block]))
            state = other.write(memories=(k[:, 0, block], v[:, 0, block]))
        return torch.cat(outputs, dim=1)

    assert_same(ours, theirs, [x, k, v])


def concatenated_by_head(update: Tensor, head_dim: int) -> Tensor:
    """Our update reads both kinds of attention one after the other, theirs both of each head."""
    kinds = update.unflatten(1, (2, -1, head_dim))
    return kinds.transpose(1, 2).flatten(1)
