"""The sparse feed-forward layer against an MLP, against loops over blocks, and its gathered form against the
masked one."""

from __future__ import annotations

import pytest
import torch
from oracles import D_MODEL, EXACT, assert_same, difference, numbers

from bench.measure.flops import CountFlops
from bench.model import activations
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.step import training_step
from variants import load_mixer
from variants.base import Dims
from variants.feed_forward.mlp import MLP, MLPConfig
from variants.feed_forward.sparse import Sparse, SparseConfig

TOKENS = 9


def made(block: int = 8, **knobs: object) -> Sparse:
    torch.manual_seed(0)
    return Sparse(SparseConfig.of({"block": block, **knobs}), D_MODEL).double()


def test_blocks_of_one_channel_are_an_mlp_with_relu() -> None:
    one = made(1, hard=0.0, temperature=5.0)
    mlp = MLP(MLPConfig(activation="relu"), D_MODEL).double()
    with torch.no_grad():
        mlp.up.weight.copy_(one.up.weight)
        mlp.out.weight.copy_(one.out.weight.T)
    x = numbers(2, TOKENS, D_MODEL)
    assert_same(lambda: one(x).y, lambda: mlp(x).y, [x, one.up.weight], [x, mlp.up.weight], tolerance=EXACT)


def test_one_channel_of_each_block_is_active() -> None:
    """Token by token and block by block: the channel with the largest score of the controller."""
    one, x = made().eval(), numbers(1, TOKENS, D_MODEL).detach()
    want = torch.zeros(TOKENS, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        scores = x[0] @ (one.controller_up.weight @ one.controller_down.weight).T
        for t in range(TOKENS):
            for first in range(0, one.up.out_features, 8):
                best = first + max(range(8), key=lambda channel: float(scores[t, first + channel]))
                want[t] += (one.up.weight[best] @ x[0, t]).clamp(min=0) * one.out.weight[best]
        assert difference(one(x).y[0], want) <= EXACT


@pytest.mark.parametrize("tokens", [1, 2])
def test_gathered_channels_are_masked_channels(tokens: int) -> None:
    """In outputs and gradients, also those of the controller."""
    one, x = made().eval(), numbers(1, tokens, D_MODEL)
    assert one.reads_chosen(tokens)
    assert not one.reads_chosen(3)
    masked = made().eval()
    masked.reads_chosen = lambda tokens: False  # type: ignore[method-assign]
    assert_same(lambda: one(x).y, lambda: masked(x).y, [x, *one.parameters()], [x, *masked.parameters()])
    gradient = torch.autograd.grad(one(x).y.sum(), one.controller_up.weight)[0]
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_a_training_pass_is_hard_or_soft(hard: float) -> None:
    one, x = made(hard=hard, temperature=0.0).train(), numbers(1, TOKENS, D_MODEL).detach()
    with torch.no_grad():
        scores = x @ (one.controller_up.weight @ one.controller_down.weight).T
        soft = scores.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
        want = (soft * (x @ one.up.weight.T).clamp(min=0)) @ one.out.weight
        hard_y = made().eval()(x).y
        assert difference(one(x).y, hard_y if hard else want) <= EXACT


def test_noise_moves_choices_in_training_alone() -> None:
    one, x = made(temperature=1.0, hard=1.0), numbers(2, TOKENS, D_MODEL).detach()
    passes = [one.train()(x).y for _ in range(2)]
    assert not torch.equal(*passes)
    assert torch.equal(one.eval()(x).y, one(x).y)


def test_training_uses_chosen_channels_alone_as_often_as_stated() -> None:
    one, x = made(hard=0.3, temperature=0.0).train(), numbers(1, 1, D_MODEL).detach()
    hard_y = made().eval()(x).y
    torch.manual_seed(0)
    with torch.no_grad():
        share = sum(difference(one(x).y, hard_y) <= EXACT for _ in range(400)) / 400
    assert abs(share - 0.3) < 0.08


def test_a_few_tokens_read_the_chosen_channels_only() -> None:
    """Bytes of one token: the weights fall by the size of a block."""
    width, block = 64, 16
    one = Sparse(SparseConfig(block=block), width).eval()
    mlp = MLP(MLPConfig(activation="relu"), width).eval()
    moved = []
    for layer in (one, mlp):
        with CountFlops() as counter, torch.no_grad():
            layer(torch.zeros(1, 1, width))
        moved.append(counter.counts)
    weights = 2 * 4 * width * 4 * width
    controller = 4 * 5 * width * width // block
    assert moved[1].bytes_moved >= weights
    assert moved[0].bytes_moved < 3 * weights / block + controller + 6 * 16 * width  # and vectors
    assert moved[0].flops == 2 * (2 * 4 * width * width // block + 5 * width * width // block)


def test_blocks_must_divide_the_hidden_layer() -> None:
    reason = Sparse.unsupported(SparseConfig(block=48), D_MODEL)
    assert reason == "blocks of 48 channels do not divide a hidden layer of 64"
    assert Sparse.unsupported(SparseConfig(block=16), D_MODEL) is None


def test_a_token_needs_the_controller_and_a_share_of_the_channels() -> None:
    one = made()
    assert one.active_parameters() == 2 * (D_MODEL + 64) + 2 * 64 * D_MODEL // 8


@pytest.mark.parametrize("strategy", ["checkpoint", "sqrt", "selective", "reversible"])
def test_a_recomputed_pass_draws_the_same_noise(strategy: str) -> None:
    mixer = load_mixer("dense")
    spec = ModelSpec.of(mixer, mixer.Config(), feed_forward=feed_forward("sparse", block=8))
    tokens = torch.randint(11, (2, 2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(run: activations.Run) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = LanguageModel(
            spec,
            Dims(seq_len=12, d_model=D_MODEL, heads=2),
            depth=3,
            dropout=0.1,
            vocabulary=11,
            activations="keep",
            ff_chunks=2,
        ).double()
        torch.manual_seed(1)
        with model.running(run):
            training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), Batch(*tokens), causal=True)
        return [p.grad for p in model.parameters() if p.grad is not None]

    how = activations.STRATEGIES[strategy]
    got, want = gradients(how.run), gradients(how.stored)
    scale = max(float(g.abs().max()) for g in want)
    assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) <= 1e-9 * scale
    assert len(got) == len(want)
