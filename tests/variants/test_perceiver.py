"""Perceiver AR and Perceiver IO against attention that is written out token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_depth_lengths import cell, hidden, model_of, run
from torch import Tensor
from torch.nn import functional as F

from bench.config.spec import DataSpec
from bench.evaluate.nll import tally
from bench.model.language_model import LanguageModel
from bench.model.outputs import every_output
from bench.scenarios.support import Unsupported, check_supported
from bench.tasks.base import IGNORED, Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, Dims, Workload
from variants.depth.perceiver_ar import PerceiverAR, PerceiverARConfig, PerceiverARPath
from variants.ops.cross_attention import CrossAttention

CPU = torch.device("cpu")


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotary positions of one vector (D,), by complex numbers."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def read(
    layer: CrossAttention, query: Tensor, others: Tensor, positions: tuple[int, list[int]] | None = None
) -> Tensor:
    """One vector (C,), whose norm was taken, reads others (n, C): head by head."""
    heads, size, inner = [], layer.head_dim, layer.q.weight.shape[0]
    for begin in range(0, inner, size):
        rows = slice(begin, begin + size)
        q = layer.q.weight[rows] @ query
        k = others @ layer.kv.weight[:inner][rows].T
        v = others @ layer.kv.weight[inner:][rows].T
        if positions:
            q = rotated(q, positions[0])
            k = torch.stack([rotated(one, at) for one, at in zip(k, positions[1], strict=True)])
        heads.append((k @ q / math.sqrt(size)).softmax(0) @ v)
    return layer.out.weight @ torch.cat(heads)


def visited(model: LanguageModel, x: Tensor, *, causal: bool) -> Tensor:
    for block in model.visits:
        x = block(x, None, Context(causal=causal)).x
    return x


@pytest.mark.parametrize(("tokens", "latents"), [(9, 4), (9, 1), (5, 5), (3, 8), (1, 1)])
def test_latents_read_all_tokens_up_to_their_own(tokens: int, latents: int) -> None:
    """Outputs, and gradients of the input."""
    model, x = model_of("perceiver_ar", tokens, knobs={"latents": latents}), hidden(tokens).requires_grad_()
    layer: Any = model.path.read
    count = min(latents, tokens)
    rows = []
    for sequence in x:
        q, kv = layer.norm(sequence), layer.read_norm(sequence)
        rows.append(
            torch.stack(
                [
                    sequence[t] + read(layer, q[t], kv[: t + 1], (t, [*range(t + 1)]))
                    for t in range(tokens - count, tokens)
                ]
            )
        )
    want = visited(model, torch.stack(rows), causal=True)
    got = run(model, x, causal=True)
    assert got.shape[1] == count
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


def position(t: int, channels: int) -> Tensor:
    """The sinusoids of a position: sines, then cosines."""
    angle = t * 10_000.0 ** (-2 * torch.arange(channels // 2, dtype=torch.float64) / channels)
    return torch.cat([angle.sin(), angle.cos()])


@pytest.mark.parametrize(("tokens", "latents"), [(7, 3), (2, 5), (1, 1)])
def test_tokens_read_latents_that_read_all_tokens(tokens: int, latents: int) -> None:
    model, x = model_of("perceiver_io", tokens, knobs={"latents": latents}), hidden(tokens).requires_grad_()
    path: Any = model.path
    places = torch.stack([position(t, 16) for t in range(tokens)])
    rows = []
    for sequence in x:
        kv, q = path.encode.read_norm(sequence) + places, path.encode.norm(path.latents)
        rows.append(torch.stack([one + read(path.encode, q[n], kv) for n, one in enumerate(path.latents)]))
    z = visited(model, torch.stack(rows), causal=False)
    out = []
    for sequence, learnt in zip(x, z, strict=True):
        q, kv = path.decode.norm(sequence) + places, path.decode.read_norm(learnt)
        out.append(torch.stack([sequence[t] + read(path.decode, q[t], kv) for t in range(tokens)]))
    want, got = torch.stack(out), run(model, x, causal=False)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


def batch(tokens: int, *, scored: int = 0) -> Batch:
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (3, tokens + 1), generator=source)
    targets = ids[:, 1:].clone()
    targets[:, :scored] = IGNORED
    return Batch(ids[:, :-1], targets)


@pytest.mark.parametrize(("tokens", "latents", "first"), [(13, 4, 0), (12, 4, 5), (3, 5, 0), (9, 1, 8)])
def test_every_target_is_scored_once_with_all_tokens_before_it(tokens: int, latents: int, first: int) -> None:
    """As the model with as many latents as tokens up to it scores it, and in the same place."""
    model = model_of("perceiver_ar", 16, knobs={"latents": latents})
    given = batch(tokens, scored=first)
    found = tally(model, [given], causal=True, device=CPU)
    assert found.counts.tolist() == [0.0] * first + [3.0] * (tokens - first)
    want = np.zeros(tokens)
    with torch.no_grad():
        for t in range(first, tokens):
            stop = min(tokens, -(-(t + 1) // latents) * latents)
            logits = model(given.inputs[:, :stop], causal=True).logits
            row = logits[:, t - stop]
            want[t] = F.cross_entropy(row, given.targets[:, t], reduction="sum").double()
    np.testing.assert_allclose(found.nats, want, rtol=1e-6)


def test_the_logits_of_all_tokens_are_those_of_a_model_that_has_them() -> None:
    """Of a stack: one call, and nothing is computed twice."""
    model, ids = model_of("stack", 13), batch(13).inputs
    with torch.no_grad():
        ((place, out),) = every_output(model, ids, causal=True)
        assert place == slice(0, 13)
        assert torch.equal(out.logits, model(ids, causal=True).logits)


def test_a_step_trains_on_the_targets_that_have_an_output() -> None:
    model, given = model_of("perceiver_ar", 13, knobs={"latents": 4}), batch(13)
    got = training_step(model, optimizer_for(model, 0.0), given, causal=True).nll
    with torch.no_grad():
        logits = model(given.inputs, causal=True).logits
    assert logits.shape == (3, 4, 11)
    want = F.cross_entropy(logits.flatten(0, 1), given.targets[:, -4:].flatten())
    torch.testing.assert_close(got, want, check_dtype=False)


def test_tasks_that_score_some_tokens_only_are_refused() -> None:
    check_supported(cell("perceiver_ar"))
    few = r"^data=mqar: does not score all tokens, and stack=perceiver_ar is trained on the last 10 tokens"
    with pytest.raises(Unsupported, match=few):
        check_supported(cell("perceiver_ar", data=DataSpec(name="mqar"), objective="recall"))
    refused = r"^stack=perceiver_ar has outputs for the last tokens of a sequence, and the variant divides"
    with pytest.raises(Unsupported, match=refused):
        check_supported(cell("perceiver_ar", variant="chunked"))


def test_scores_of_later_tokens_are_the_only_overhead() -> None:
    """By the number of allowed pairs."""
    path = PerceiverARPath(Dims(seq_len=12, d_model=16, heads=2), 5)
    work = Workload(batch_size=2, seq_len=12, d_model=16, heads=2, causal=True)
    allowed = sum(t + 1 for t in range(12 - 5, 12))
    assert path.cost(work).parts["attention"] == 2 * 4 * 16 * allowed
    assert [*PerceiverAR(PerceiverARConfig(latents=5), 3).lengths(12)] == [5, 5, 5]
    assert PerceiverAR(PerceiverARConfig(latents=5), 3).outputs(2) == 2
