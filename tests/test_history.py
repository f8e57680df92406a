"""How far back a model looks: which targets, what each history's loss is, and where it stops improving."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import byte_model

from bench.evaluate.context_use import (
    RESAMPLES,
    TOLERANCE,
    ContextUse,
    measure_context_use,
    nll_after,
    summarise,
    target_positions,
)
from bench.model.language_model import LanguageModel

CPU = torch.device("cpu")
T = 32
DOCUMENTS = tuple(
    np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8) for length in (90, 20, 33, 70)
)


def found_for(model: LanguageModel, count: int = 16, batch_size: int = 1) -> ContextUse:
    found = measure_context_use(
        model.train(), DOCUMENTS, seq_len=T, count=count, batch_size=batch_size, device=CPU
    )
    assert found
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 80))
def test_targets_are_spread_evenly_over_all_positions_with_a_full_history(
    lengths: list[int], seq_len: int, count: int
) -> None:
    possible = [(k, at) for k, length in enumerate(lengths) for at in range(seq_len, length)]
    found = target_positions(lengths, seq_len, count)
    assert len(found) == min(count, len(possible))
    places = [possible.index(target) for target in found]
    assert places == sorted(set(places))
    if len(found) > 1:
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1
        assert abs(places[0] - (len(possible) - 1 - places[-1])) <= 1, "as far from the start as from the end"


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("dense", {}), ("longformer", {"window": [4]}), ("transformer_xl", {"segment": 8, "mem_len": 5})],
)
def test_a_historys_loss_is_that_of_the_last_position_after_it(name: str, knobs: dict[str, Any]) -> None:
    """State is fresh at the window's start, dropout is off, and nothing before the window is read."""
    model = byte_model(name, T, **knobs)
    found = found_for(model).nll_by_history
    assert len(found) == 6
    for k, nll in enumerate(found):
        hand = []
        for document, at in target_positions([len(d) for d in DOCUMENTS], T, 16):
            text = DOCUMENTS[document].copy()
            text[: at - 2**k] = 0
            text[at + 1 :] = 0
            window = torch.from_numpy(text[at - 2**k : at].astype(np.int64))[None]
            with torch.no_grad():
                *_, (_, out) = model.eval().stream(window, causal=True)
            logits = out.logits[0, -1].double()
            hand.append(float(logits.logsumexp(0) - logits[int(text[at])]))
        assert nll == pytest.approx(math.fsum(hand) / len(hand), rel=1e-6)


def test_batches_change_nothing() -> None:
    model = byte_model("dense", T)
    one, three = found_for(model, 15), found_for(model, 15, batch_size=3)
    assert one.nll_by_history == pytest.approx(three.nll_by_history, rel=1e-6)


def test_a_chunk_is_all_that_chunked_reads() -> None:
    """Histories of whole chunks end where a chunk ends: beyond one chunk they change nothing at all."""
    model = byte_model("chunked", T, chunk=8)
    targets = target_positions([len(document) for document in DOCUMENTS], T, 16)
    losses = {
        n: nll_after(model, DOCUMENTS, targets, n, batch_size=T // n, device=CPU) for n in (4, 8, 16, 32)
    }
    assert np.abs(losses[16] - losses[8]).max() == 0.0
    assert np.abs(losses[32] - losses[8]).max() == 0.0
    assert np.abs(losses[4] - losses[8]).min() > 1e-4
    assert found_for(model).effective in (1, 2, 4, 8)


def test_a_window_of_one_layer_is_all_that_it_reads() -> None:
    """Two layers of four tokens reach seven back."""
    model = byte_model("longformer", T, window=[4])
    losses = found_for(model).nll_by_history
    assert losses[3:] == pytest.approx([losses[-1]] * 3, rel=1e-6)
    assert abs(losses[2] - losses[3]) > 1e-3


def excess(*means: float, n: int = 256, spread: float = 0.0) -> np.ndarray[Any, Any]:
    """nll of n targets by history; the last is the full history, of loss 3 on average."""
    source = np.random.default_rng(0)
    full = 3 + source.normal(size=n)
    noise = spread * source.normal(size=(len(means), n))
    return np.stack([full + mean + e for mean, e in zip((*means, 0.0), (*noise, 0 * full), strict=True)])


def test_the_effective_context_is_where_the_loss_stops_improving() -> None:
    near, far = TOLERANCE / 2, TOLERANCE * 2
    assert summarise(excess(1.0, far, near, 0.0)).effective == 4
    assert summarise(excess(1.0, far, far, far)).effective == 16
    assert summarise(excess(near, -far, 0.0, near)).effective == 1
    assert summarise(excess(near, near, far, near)).effective == 8, "a longer history that is worse counts"
    assert summarise(excess()).effective == 1


def test_the_interval_holds_what_the_targets_cannot_tell() -> None:
    """Of 256 targets of this spread, 0.4 is an excess for sure; 0.03 and 0, each ± 0.02, may be one."""
    means = (0.4, 0.03, 0.0, 0.0)
    loose = summarise(excess(*means, spread=0.3))
    assert (loose.low, loose.high) == (2, 16)
    assert loose.low <= loose.effective <= loose.high  # type: ignore[operator]
    tight = summarise(excess(*means, spread=0.01))
    assert (tight.low, tight.effective, tight.high) == (4, 4, 4)
    paired = summarise(excess(*means))
    assert paired.nll_by_history == pytest.approx([paired.nll_by_history[-1] + m for m in (*means, 0.0)])


def test_the_interval_is_wrong_as_rarely_as_it_says() -> None:
    """One token's loss in truth exceeds the full history's by the tolerance and a hair: that it is enough
    is claimed in one of forty samples, and that it is too little in as many."""
    ends = []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=64)
        found = summarise(np.stack([1.0001 * TOLERANCE + 0.1 * noise, np.zeros(64)]))
        ends.append((found.low, found.high))
    assert 1 <= sum(high == 1 for _, high in ends) <= 12
    assert 1 <= sum(low == 2 for low, _ in ends) <= 12


def test_context_that_hurts_is_not_context_that_is_unused() -> None:
    """Both look back one token; only the second is better with less."""
    unused, hurt = (summarise(excess(0.0, *means, spread=0.1)) for means in ((0.0, 0.0), (-0.4, -0.2)))
    assert unused.effective == hurt.effective == 1
    assert unused.harm_low is not None
    assert unused.harm_low < TOLERANCE
    assert hurt.best == 2
    assert hurt.harm == pytest.approx(0.4, abs=0.03)
    assert hurt.harm_low is not None
    assert 0.3 < hurt.harm_low < hurt.harm
    assert summarise(excess()).harm == summarise(excess()).harm_low == 0


def test_harm_is_claimed_of_harmless_context_as_rarely_as_it_says() -> None:
    """Of five histories that are equal in truth, the best is always better by chance."""
    claimed = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(size=(5, 64))
        found = summarise(np.concatenate([0.1 * noise, np.zeros((1, 64))]))
        assert found.harm is not None
        assert found.harm_low is not None
        assert found.harm_low <= found.harm
        claimed += found.harm_low > 0
    assert 1 <= claimed <= 24


def test_a_loss_that_is_no_number_has_no_effective_context() -> None:
    nll = excess(0.4, 0.0)
    nll[1, 3] = math.nan
    found = summarise(nll)
    assert (found.effective, found.low, found.high) == (None, None, None)
    assert (found.best, found.harm, found.harm_low) == (None, None, None)
    assert [math.isnan(value) for value in found.nll_by_history] == [False, True, False]


def test_the_same_targets_give_the_same_interval() -> None:
    nll = excess(0.4, 0.03, 0.0, spread=0.3)
    torch.manual_seed(1)
    first = summarise(nll)
    np.random.default_rng(3).normal()
    assert summarise(nll) == first
    assert RESAMPLES >= 1000


@pytest.mark.parametrize("count", [1, 16])
def test_without_two_targets_there_are_no_figures(count: int) -> None:
    documents = DOCUMENTS[1:3] if count > 1 else DOCUMENTS  # one target has T tokens before it
    model = byte_model("dense", T)
    assert measure_context_use(model, documents, seq_len=T, count=count, batch_size=1, device=CPU) is None
