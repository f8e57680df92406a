"""Quality figures equal what a few lines of float64 make of the model's logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import variants
from bench.evaluate import Quality, evaluate, position_buckets
from bench.model import LanguageModel
from bench.tasks.base import IGNORED, Batch
from bench.tasks.text import VOCABULARY, held_out_batches
from variants.base import Dims

T = 21
NATS = -np.log(np.random.default_rng(0).dirichlet(np.ones(256)))
WORDS_PER_BYTE = 0.17
DOCUMENTS = tuple(np.random.default_rng(k).integers(0, 256, 100 + 30 * k, dtype=np.uint8) for k in range(3))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    variant, dims = variants.load("dense"), Dims(batch_size=1, seq_len=T, d_model=32, heads=2)
    made = LanguageModel(
        variant,
        variant.Config(),
        dims,
        depth=1,
        ff_mult=2,
        dropout=0.5,
        vocabulary=VOCABULARY,
        activations="keep",
    )
    with torch.no_grad():
        made.head.weight.mul_(20)  # opinions, so that positions and batches differ
    return made


def batches(objective: str) -> list[Batch]:
    return list(held_out_batches(DOCUMENTS, seq_len=T, batch_size=4, objective=objective, max_tokens=13 * T))


def quality_of(model: LanguageModel, given_: list[Batch], objective: str) -> Quality:
    return evaluate(
        model.train(),
        given_,
        objective=objective,
        words_per_byte=WORDS_PER_BYTE,
        unigram_nats=NATS,
        device=torch.device("cpu"),
    )


def by_hand(model: LanguageModel, given_: list[Batch], objective: str) -> list[tuple[int, int, float]]:
    """(position, target, −ln p) of every scored target, from the logits, in float64."""
    scored = []
    for inputs, targets, _ in given_:
        with torch.no_grad():
            logits = model.eval()(inputs, causal=objective == "clm").logits.double()
        nll = logits.logsumexp(-1, keepdim=True) - logits
        scored += [
            (position, int(target), nll[row, position, target].item())
            for row in range(len(targets))
            for position, target in enumerate(targets[row].tolist())
            if target != IGNORED
        ]
    return scored


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_every_figure_follows_from_the_logits(model: LanguageModel, objective: str) -> None:
    """Dropout is off, although the model came in training mode; the last batch is smaller."""
    given_ = batches(objective)
    assert len({len(batch.inputs) for batch in given_}) == 2
    quality = quality_of(model, given_, objective)
    scored = by_hand(model, given_, objective)
    nats = math.fsum(nll for _, _, nll in scored) / len(scored)

    assert quality.tokens == len(scored)
    assert quality.tokens == (
        13 * T if objective == "clm" else sum(int((b.targets >= 0).sum()) for b in given_)
    )
    assert quality.nll == pytest.approx(nats, rel=1e-6)
    assert quality.perplexity == pytest.approx(math.e**nats, rel=1e-5)
    unigram = math.fsum(NATS[target] for _, target, _ in scored) / len(scored)
    assert quality.unigram_perplexity == pytest.approx(math.exp(unigram), rel=1e-9)
    if objective == "clm":
        assert quality.bits_per_byte == pytest.approx(nats * math.log2(math.e), rel=1e-6)
        words = WORDS_PER_BYTE * len(scored)
        assert quality.word_perplexity == pytest.approx(math.exp(nats * len(scored) / words), rel=1e-5)
    else:  # a masked model gives no code of the text
        assert quality.bits_per_byte is None
        assert quality.word_perplexity is None


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_positions_are_averaged_in_buckets_that_double(model: LanguageModel, objective: str) -> None:
    given_ = batches(objective)
    scored = by_hand(model, given_, objective)
    found = quality_of(model, given_, objective).nll_by_position
    edges = [0, 1, 3, 7, 15, T]
    assert len(found) == len(edges) - 1
    for lo, hi, mean in zip(edges, edges[1:], found, strict=False):
        inside = [nll for position, _, nll in scored if lo <= position < hi]
        if inside:
            assert mean == pytest.approx(math.fsum(inside) / len(inside), rel=1e-6)
        else:
            assert math.isnan(mean)


def test_a_bucket_without_a_target_is_no_number(model: LanguageModel) -> None:
    (inputs, targets, _), *_ = batches("clm")
    targets = targets.clone()
    targets[:, 3:7] = IGNORED
    quality = quality_of(model, [Batch(inputs, targets)], "clm")
    assert [math.isnan(nll) for nll in quality.nll_by_position] == [False, False, True, False, False]
    assert quality.tokens == len(inputs) * (T - 4)


def test_batches_weigh_by_their_targets(model: LanguageModel) -> None:
    """However the same windows are dealt to batches, the figures are the same."""
    whole = batches("clm")
    single = [
        Batch(i[None], t[None]) for batch in whole for i, t in zip(batch.inputs, batch.targets, strict=True)
    ]
    a, b = (quality_of(model, given_, "clm") for given_ in (whole, single))
    assert a.nll == pytest.approx(b.nll, rel=1e-6)
    assert a.nll_by_position == pytest.approx(b.nll_by_position, rel=1e-6)
    assert a.tokens == b.tokens


def test_nothing_is_learnt(model: LanguageModel) -> None:
    before: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    quality_of(model, batches("clm"), "clm")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_bucket_k_ends_where_k_plus_one_begins(seq_len: int) -> None:
    buckets = position_buckets(seq_len).tolist()
    assert all(2**k - 1 <= position <= 2 ** (k + 1) - 2 for position, k in enumerate(buckets))
