"""How a model's weights are spread and how far estimates of them are off, against loops in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import variants
from bench.evaluate import attention_stats
from bench.evaluate.attention_stats import AttentionStats
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from variants.base import Context, Workload

CPU = torch.device("cpu")
T = 24
VOCABULARY = 17


def model_of(name: str, *, seq_len: int = T, scale: float = 2, **knobs: Any) -> LanguageModel:
    """float64, with weights of `scale`/√fan-in: at 2 some terms of a row are much larger than others."""
    torch.manual_seed(0)
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=16, heads=2)
    sizes: dict[str, Any] = {"dropout": 0.5, "vocabulary": VOCABULARY, "activations": "keep"}
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=1)),
        dims,
        depth=2,
        **sizes,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=scale * parameter.shape[1] ** -0.5)
    return model


def batches(count: int = 2, *, seq_len: int = T) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (count, 2, seq_len), generator=source)
    return [Batch(batch, batch) for batch in tokens]


def looked(model: LanguageModel, *, causal: bool, seq_len: int = T) -> AttentionStats:
    return attention_stats.measure_attention(model, batches(seq_len=seq_len), causal=causal, device=CPU)


@torch.no_grad()
def weights_of(model: LanguageModel, *, causal: bool) -> Iterator[np.ndarray]:
    """(T, T) of every window, layer and head of a dense model, gone through block by block."""
    model.eval()
    for batch in batches():
        x = model.embedding(batch.inputs)
        for block in model.blocks:
            h = block.mixer_norm(x)
            weight = block.mixer.projections.qkv.weight.double().numpy().reshape(3, 2, 8, 16)
            for sequence, head in itertools.product(h.numpy(), range(2)):
                q, k = (turned(sequence @ weight[part, head].T) for part in (0, 1))
                found = np.zeros((len(q), len(q)))
                for i in range(len(q)):
                    keys = k[: i + 1] if causal else k
                    terms = np.exp(keys @ q[i] / math.sqrt(8))
                    found[i, : len(keys)] = terms / terms.sum()
                yield found
            x = block(x, None, Context(causal=causal)).x


def turned(x: np.ndarray) -> np.ndarray:
    """(T, D): channels i and i + D/2 turned by position · 10000^(−2i/D)."""
    half = x.shape[1] // 2
    turn = np.exp(1j * np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half)))
    both = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([both.real, both.imag], axis=1)


def rows_of(weights: np.ndarray, *, causal: bool) -> Iterator[np.ndarray]:
    """The rows that count, each with the terms that it may have."""
    tokens = len(weights)
    for i, row in enumerate(weights):
        if not causal:
            yield row
        elif i + 1 > tokens / 2:
            yield row[: i + 1]


@pytest.mark.parametrize("causal", [True, False])
def test_mass_of_the_largest_terms(causal: bool) -> None:
    model = model_of("dense")
    found = looked(model, causal=causal)
    maps = list(weights_of(model, causal=causal))
    assert len(maps) == 2 * 2 * 2 * 2
    rows = [row for weights in maps for row in rows_of(weights, causal=causal)]
    few = [1, 2, 4, 8]
    want = [np.mean([np.sort(row)[-n:].sum() for row in rows]) for n in few]
    assert found.attention_mass == pytest.approx(want, rel=1e-4)
    assert found.attention_mass_uniform == pytest.approx(
        [np.mean([n / len(row) for row in rows]) for n in few]
    )
    assert found.attention_mass[0] > 3 * found.attention_mass_uniform[0], "these rows would tell nothing"


@pytest.mark.parametrize("causal", [True, False])
def test_mass_on_the_first_tokens(causal: bool) -> None:
    model = model_of("dense")
    found = looked(model, causal=causal)
    rows = [row for weights in weights_of(model, causal=causal) for row in rows_of(weights, causal=causal)]
    assert found.sink_mass == pytest.approx(np.mean([row[:4].sum() for row in rows]), rel=1e-4)
    assert found.sink_mass_uniform == pytest.approx(np.mean([4 / len(row) for row in rows]))


def test_rank_errors_are_those_of_the_best_matrix() -> None:
    model = model_of("dense")
    want = []
    for weights in weights_of(model, causal=False):
        left, values, right = np.linalg.svd(weights)
        near = [(left[:, :r] * values[:r]) @ right[:r] for r in (1, 2, 4, 8, 16)]
        want.append([np.linalg.norm(weights - n) / np.linalg.norm(weights) for n in near])
    assert looked(model, causal=False).attention_rank_error == pytest.approx(np.mean(want, axis=0), rel=1e-4)


def test_what_clusters_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clusters given: queries and keys of even positions in one, of odd ones in the other."""
    parity = torch.arange(T) % 2
    monkeypatch.setattr(
        attention_stats, "clusters", lambda q, k: (parity.expand(len(q), -1), parity.expand(len(q), -1))
    )
    model = model_of("dense")
    found = looked(model, causal=True)
    own, uniform, best = [], [], []
    for weights in weights_of(model, causal=True):
        for i, row in enumerate(weights):
            if i + 1 > T / 2:
                mine = [j for j in range(i + 1) if j % 2 == i % 2]
                own.append(row[mine].sum())
                uniform.append(len(mine) / (i + 1))
                best.append(np.sort(row)[-len(mine) :].sum())
    assert found.cluster_mass == pytest.approx(np.mean(own), rel=1e-4)
    assert found.cluster_mass_uniform == pytest.approx(np.mean(uniform))
    assert found.cluster_mass_best == pytest.approx(np.mean(best), rel=1e-4)


def test_clusters_find_what_belongs_together() -> None:
    """Four directions, of which each query and key is a noisy copy in whatever order."""
    source = torch.Generator().manual_seed(0)
    directions = 3 * torch.linalg.qr(torch.randn(8, 8, generator=source)).Q[:4]
    of_query, of_key = (torch.randint(0, 4, (2, 16), generator=source) for _ in range(2))
    of_key[:, ::4] = torch.arange(4)  # the keys from which centroids start
    q, k = (directions[of] + 0.05 * torch.randn(2, 16, 8, generator=source) for of in (of_query, of_key))
    found = torch.cat(attention_stats.clusters(q, k), dim=1)
    truth = torch.cat([of_query, of_key], dim=1)
    for mine, given in zip(found, truth, strict=True):
        assert torch.equal(mine[:, None] == mine, given[:, None] == given)


@torch.no_grad()
def errors_by_hand(model: LanguageModel, want: Any, *, causal: bool) -> float:
    """The distance of each layer's outputs to `want` of the layer's inputs, block by block."""
    model.eval()
    off = []
    inputs = [model.embedding(batch.inputs) for batch in batches()]
    for block in model.blocks:
        wrong = whole = 0.0
        for place, x in enumerate(inputs):
            h = block.mixer_norm(x)
            y, wanted = block.mixer(h, Context(causal=causal)).y, want(block.mixer, h)
            wrong += float((y - wanted).square().sum())
            whole += float(wanted.square().sum())
            inputs[place] = block(x, None, Context(causal=causal)).x
        off.append(math.sqrt(wrong / whole))
    return sum(off) / len(off)


def softmax_by_hand(layer: Any, h: Tensor, *, causal: bool) -> Tensor:
    """Full softmax attention with the layer's projections, row by row."""
    qkv, out = layer.projections.qkv.weight.numpy().reshape(3, 2, 8, 16), layer.projections.out.weight.numpy()
    found = np.zeros(tuple(h.shape))
    for place, sequence in enumerate(h.numpy()):
        heads = []
        for head in range(2):
            q, k = (turned(sequence @ qkv[part, head].T) for part in (0, 1))
            v = sequence @ qkv[2, head].T
            terms = np.exp(q @ k.T / math.sqrt(8))
            terms = np.tril(terms) if causal else terms
            heads.append(terms / terms.sum(axis=1, keepdims=True) @ v)
        found[place] = np.concatenate(heads, axis=1) @ out.T
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("name", "causal", "knobs"),
    [("performer", True, {"n_features": 16, "chunk": 8}), ("linformer", False, {"k": 6})],
)
def test_error_of_an_estimate(name: str, causal: bool, knobs: dict[str, Any]) -> None:
    model = model_of(name, **knobs)
    found = looked(model, causal=causal)
    want = errors_by_hand(model, lambda layer, h: softmax_by_hand(layer, h, causal=causal), causal=causal)
    assert found.softmax_error == pytest.approx(want, rel=1e-4)
    assert found.softmax_error > 0.01
    assert found.attention_mass is None, "its weights are no softmax"


def test_more_features_estimate_better() -> None:
    errors = [looked(model_of("performer", scale=0.3, n_features=n), causal=True) for n in (16, 1024)]
    few, many = (found.softmax_error or math.nan for found in errors)
    assert 4 < few / many < 12, "a root of 64 times as many"


def test_hashing_into_one_bucket_estimates_without_error() -> None:
    """A token and all before it, but for itself: what any number of rounds comes closer to."""
    exact = looked(model_of("reformer", n_buckets=1, chunk=T), causal=True).softmax_error
    hashed = [
        looked(model_of("reformer", n_buckets=8, chunk=4, n_hashes=n), causal=True).softmax_error
        for n in (1, 8)
    ]
    assert exact == pytest.approx(0, abs=1e-6)
    assert hashed[0] > 2 * hashed[1] > 0.02


@pytest.mark.parametrize("name", ["transformer_xl", "longformer"])
def test_what_a_variant_cannot_say_is_none(name: str) -> None:
    assert looked(model_of(name), causal=True) == AttentionStats()


def test_relu_features_estimate_no_softmax() -> None:
    assert looked(model_of("performer", features="relu"), causal=True).softmax_error is None


def test_a_plan_of_chunks_is_looked_at_chunk_by_chunk() -> None:
    """A sequence of three chunks and a rest looks as its chunks do, the rest left out."""
    whole = looked(model_of("chunked", chunk=8, seq_len=3 * 8 + 3), causal=True, seq_len=3 * 8 + 3)
    assert whole.attention_mass is not None
    assert len(whole.attention_mass) == 3  # 1, 2 and 4 of 8
    assert whole.attention_mass_uniform == pytest.approx(
        np.mean([[n / t for n in (1, 2, 4)] for t in (5, 6, 7, 8)], axis=0)
    )


def test_a_model_is_left_as_it_was() -> None:
    model = model_of("dense").train()
    state = torch.random.get_rng_state()
    looked(model, causal=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in model.layers)
