"""Quality figures equal what a few lines of float64 make of the model's logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import byte_model
from passages import scored_passages
from torch import Tensor

import variants
from bench.corpora import Document
from bench.evaluate.nll import TextQuality, evaluate, position_buckets, tally
from bench.measure.memory import LiveStorage
from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch
from bench.tasks.text import VOCABULARY
from bench.tasks.text_config import MASK
from bench.tasks.windows import Numbered, Passage, document_batches, numbered, window_batches

CPU = torch.device("cpu")
T = 21
TOKENS = 200
NATS = -np.log(np.random.default_rng(0).dirichlet(np.ones(256)))
WORDS_PER_BYTE = 0.17
DOCUMENTS = tuple(
    np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    for length in (100, 160, 15, 2, 131)
)
"""Two are shorter than a window."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return byte_model("dense", T)


@pytest.fixture(scope="module")
def memory_model() -> LanguageModel:
    """Segments that end neither where windows nor where documents do."""
    return byte_model("transformer_xl", T, segment=8, mem_len=13)


def passages(objective: str = "clm") -> list[Passage]:
    return scored_passages(DOCUMENTS, seq_len=T, objective=objective, max_tokens=TOKENS)


def batches(objective: str, stride: int = T) -> list[Batch]:
    return list(window_batches(passages(objective), T, stride, 4))


def quality_of(
    model: LanguageModel, given_: Iterable[Batch], objective: str = "clm", documents: Any = None
) -> TextQuality:
    return evaluate(
        model.train(),
        given_,
        documents=documents,
        objective=objective,
        words_per_byte=WORDS_PER_BYTE,
        unigram_nats=NATS,
        device=CPU,
    )


class Score(NamedTuple):
    """One target, scored by hand."""

    position: int
    """Of its input in its window."""
    target: int
    nll: float


def score(logits: Tensor, position: int, target: int) -> Score:
    """By the logits (V,) after its input, in float64."""
    wide = logits.double()
    return Score(position, target, float(wide.logsumexp(0) - wide[target]))


@torch.no_grad()
def by_hand(model: LanguageModel, stride: int, documents: list[tuple[Document, int]]) -> list[Score]:
    """Every target of the documents' first bytes, one after the other, each by a window of its own.

    The window is the first that holds the target's input, of those that start at 0, S, 2S, … and, where
    such a one would end past the last input, of that which ends there.
    """
    found = []
    for document, count in documents:
        tokens = torch.from_numpy(document.astype(np.int64))
        for at in range(count):
            later = 0 if at < T else -(-(at + 1 - T) // stride)  # windows passed
            start = max(0, min(later * stride, count - T))
            window = tokens[None, start : min(start + T, count)]
            # bypasses the model's way through a sequence: segments are cut here
            states, length = None, getattr(model.layers[0].config, "segment", T)
            for begin in range(0, at - start + 1, length):
                out = model.eval()(window[:, begin : begin + length], causal=True, states=states)
                states = out.states
            found.append(score(out.logits[0, at - start - begin], at - start, int(document[at + 1])))
    return found


@torch.no_grad()
def by_hand_carried(model: LanguageModel, documents: list[tuple[Document, int]]) -> list[Score]:
    """Every target, by one pass through its document."""
    found = []
    for document, count in documents:
        tokens, states = torch.from_numpy(document.astype(np.int64)), None
        for begin in range(0, count, 8):
            out = model.eval()(tokens[None, begin : min(begin + 8, count)], causal=True, states=states)
            states = out.states
            found += [
                score(logits, begin + i, int(document[begin + i + 1]))
                for i, logits in enumerate(out.logits[0])
            ]
    return found


def dealt() -> list[tuple[Document, int]]:
    return [(document, len(passage.inputs)) for document, passage in zip(DOCUMENTS, passages(), strict=True)]


def mean(scores: list[Score]) -> float:
    return math.fsum(s.nll for s in scores) / len(scores)


def check(quality: TextQuality, scores: list[Score]) -> None:
    """Every figure that is not by position."""
    nats = mean(scores)
    assert quality.tokens == len(scores) == TOKENS
    assert quality.nll == pytest.approx(nats, rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(nats), rel=1e-6)
    assert quality.bits_per_byte == pytest.approx(nats * math.log2(math.e), rel=1e-6)
    words = WORDS_PER_BYTE * len(scores)
    assert quality.word_perplexity == pytest.approx(math.exp(nats * len(scores) / words), rel=1e-5)
    unigram = math.fsum(NATS[s.target] for s in scores) / len(scores)
    assert quality.unigram_perplexity == pytest.approx(math.exp(unigram), rel=1e-9)


def check_positions(found: list[float], scores: list[Score]) -> None:
    edges = [0, 1, 3, 7, 15, T]
    assert len(found) == len(edges) - 1
    for lo, hi, bucket in zip(edges, edges[1:], found, strict=False):
        inside = [s for s in scores if lo <= s.position < hi]
        assert bucket == pytest.approx(mean(inside), rel=1e-6)


@pytest.mark.parametrize("stride", [T, 8, 1])
def test_every_figure_follows_from_the_logits(model: LanguageModel, stride: int) -> None:
    """Dropout is off, although the model came in training mode."""
    given_ = batches("clm", stride)
    assert len({batch.inputs.shape for batch in given_}) > 2, "short documents and a short last batch"
    quality, scores = quality_of(model, given_), by_hand(model, stride, dealt())
    check(quality, scores)
    check_positions(quality.nll_by_position, scores)
    assert quality.nll_reset is None


@pytest.mark.parametrize("stride", [T, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_memory_model_is_judged_by_whole_documents_and_by_windows(
    memory_model: LanguageModel, stride: int, batch_size: int
) -> None:
    """Carried state is the headline; a document is not touched by those beside it in a batch."""
    documents = document_batches(passages(), batch_size)
    quality = quality_of(memory_model, batches("clm", stride), documents=documents)
    carried, reset = by_hand_carried(memory_model, dealt()), by_hand(memory_model, stride, dealt())
    assert abs(mean(carried) - mean(reset)) > 1e-3, "this model would not tell"
    check(quality, carried)
    assert quality.nll_reset == pytest.approx(mean(reset), rel=1e-6)
    check_positions(quality.nll_by_position, reset)


def test_a_masked_models_figures_follow_from_its_logits(model: LanguageModel) -> None:
    scores = []
    for document, (inputs, _) in zip(DOCUMENTS, passages("mlm"), strict=True):
        count = len(inputs)
        for at in np.flatnonzero(inputs == MASK).tolist():
            start = max(0, min(at // T * T, count - T))
            window = torch.from_numpy(inputs[None, start : start + T])
            with torch.no_grad():
                logits = model.eval()(window, causal=False).logits[0, at - start]
            scores.append(score(logits, at - start, int(document[at])))
    quality = quality_of(model, batches("mlm"), "mlm")
    assert quality.tokens == len(scores)
    assert quality.nll == pytest.approx(mean(scores), rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(mean(scores)), rel=1e-6)
    check_positions(quality.nll_by_position, scores)
    # a masked model gives no code of the text
    assert quality.bits_per_byte is None
    assert quality.word_perplexity is None


def of_all_variants() -> list[tuple[str, str]]:
    found = []
    for name in variants.mixers():
        caps = variants.load(name).info.caps
        found += [(name, "clm")] * caps.causal + [(name, "mlm")] * caps.bidirectional
    return found


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_every_variant_scores_the_same_targets(objective: str) -> None:
    """Each byte occurs once in these documents, so that which were targets tells which positions were.

    Every variant reads the short documents too, those with parameters for a fixed length included.
    """
    bytes_ = np.random.default_rng(0).permutation(256).astype(np.uint8)
    own = scored_passages(
        (bytes_[:120], bytes_[120:130], bytes_[130:]), seq_len=32, objective=objective, max_tokens=180
    )
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    for passage in own:
        counts[passage.targets[passage.targets != IGNORED]] += 1
    assert counts.max() == 1
    assert counts.sum() == 180 if objective == "clm" else 15 < counts.sum() < 40
    knobs: dict[str, dict[str, Any]] = {
        "linformer": {"k": 16},
        "transformer_xl": {"segment": 8, "mem_len": 8},
    }
    for name, stated in of_all_variants():
        if stated != objective:
            continue
        model = byte_model(name, 32, **knobs.get(name, {}))
        ways = [window_batches(own, 32, stride, 2) for stride in ((32, 8) if objective == "clm" else (32,))]
        if variants.load(name).info.caps.stateful:
            ways.append(document_batches(own, 2))
        for way in ways:
            found = tally(model, way, causal=objective == "clm", device=CPU)
            assert np.array_equal(found.symbols, counts), name
            assert np.isfinite(found.nll), name


def test_a_bucket_without_a_target_is_no_number(model: LanguageModel) -> None:
    (inputs, targets, _), *_ = batches("clm")
    targets = targets.clone()
    targets[:, 3:7] = IGNORED
    quality = quality_of(model, [Batch(inputs, targets)])
    assert [math.isnan(nll) for nll in quality.nll_by_position] == [False, False, True, False, False]
    assert quality.tokens == int((targets != IGNORED).sum())


def test_batches_weigh_by_their_targets(model: LanguageModel) -> None:
    """However the same windows are dealt to batches, the figures are the same."""
    whole = batches("clm")
    single = [
        Batch(i[None], t[None]) for batch in whole for i, t in zip(batch.inputs, batch.targets, strict=True)
    ]
    a, b = (quality_of(model, given_) for given_ in (whole, single))
    assert a.nll == pytest.approx(b.nll, rel=1e-6)
    assert a.nll_by_position == pytest.approx(b.nll_by_position, rel=1e-6)
    assert a.tokens == b.tokens


def test_evaluation_takes_no_random_numbers_from_others() -> None:
    """Its figures depend on the weights alone, and what is drawn after it does not depend on it."""
    model, given_ = byte_model("reformer", T, n_hashes=1, n_buckets=8, chunk=2), batches("clm")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = quality_of(model, given_)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert quality_of(model, given_) == first
    model.train()
    with torch.no_grad():
        a, b = (model(given_[0].inputs, causal=True).logits for _ in range(2))
    assert not torch.equal(a, b), "this model would not tell"


@pytest.mark.parametrize(
    ("name", "objective"), list(of_all_variants()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_documents_loss_does_not_depend_on_its_neighbours(name: str, objective: str) -> None:
    """Whatever the batch size, and in whatever order the documents come."""
    few = {"chunk": 4, "n_buckets": 8} if name == "reformer" else {}
    model = byte_model(name, 32, **few)
    source = np.random.default_rng(0)
    rows = [Passage(*source.integers(0, 256, (2, 32))) for _ in range(5)]

    def losses(order: list[int], size: int) -> list[float]:
        """Of each document, where the others of its batch are read and not scored."""
        found = [0.0] * len(rows)
        for scored in order:
            silent = [
                row if k == scored else row._replace(targets=np.full_like(row.targets, IGNORED))
                for k, row in enumerate(rows)
            ]
            dealt_ = window_batches([silent[k] for k in order], 32, 32, size)
            found[scored] = float(tally(model, dealt_, causal=objective == "clm", device=CPU).nats.sum())
        return found

    want = losses([0, 1, 2, 3, 4], 1)
    for order, size in (([0, 1, 2, 3, 4], 2), ([0, 1, 2, 3, 4], 5), ([4, 2, 0, 1, 3], 3)):
        assert losses(order, size) == pytest.approx(want, rel=1e-5), size


def test_a_model_of_nans_has_figures_that_are_none() -> None:
    """And is not taken for one that scored nothing."""
    model = byte_model("dense", T)
    with torch.no_grad():
        model.head.weight[3, 3] = math.nan
    quality = quality_of(model, batches("clm"))
    assert math.isnan(quality.nll)
    assert math.isnan(quality.perplexity)
    assert math.isnan(quality.word_perplexity or 0.0)
    assert quality.tokens == TOKENS


def test_a_loss_too_large_for_its_exponential_is_infinite() -> None:
    model = byte_model("dense", T)
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    quality = quality_of(model, batches("clm"))
    assert quality.nll > 800
    assert quality.perplexity == quality.word_perplexity == math.inf


def test_by_offset_folds_positions(memory_model: LanguageModel) -> None:
    """Position 8 is the first of the second segment."""
    scores = by_hand_carried(memory_model, dealt())
    found = tally(memory_model, document_batches(passages(), 2), causal=True, device=CPU).by_offset(8)
    assert len(found) == 8
    for offset, nll in enumerate(found):
        inside = [s for s in scores if s.position % 8 == offset]
        assert nll == pytest.approx(mean(inside), rel=1e-6)


def test_by_place_leaves_the_first_part_out_and_halves_the_rest(memory_model: LanguageModel) -> None:
    """Of a period of 8: place 0, place 1, places 2 and 3, places 4 to 7; tokens 0 to 7 come before all."""
    scores = by_hand_carried(memory_model, dealt())
    found = tally(memory_model, document_batches(passages(), 2), causal=True, device=CPU).by_place(8)
    for bucket, places in zip(found, ([0], [1], [2, 3], [4, 5, 6, 7]), strict=True):
        inside = [s for s in scores if s.position >= 8 and s.position % 8 in places]
        assert bucket == pytest.approx(mean(inside), rel=1e-6)


def test_by_place_of_a_single_part_is_empty(memory_model: LanguageModel) -> None:
    length = max(s.position for s in by_hand_carried(memory_model, dealt())) + 1
    assert (
        tally(memory_model, document_batches(passages(), 2), causal=True, device=CPU).by_place(length) == []
    )


def test_logits_of_a_long_document_are_never_held_together() -> None:
    """Of what a document four times as long adds, tokens stay and logits go."""

    def peak(tokens: int) -> int:
        model = byte_model("transformer_xl", 64, segment=64, mem_len=64)
        document = np.random.default_rng(0).integers(0, 256, tokens + 1).astype(np.int64)
        rows = list(document_batches([Passage(document[:-1], document[1:])], 1))
        with LiveStorage() as live:
            tally(model, rows, causal=True, device=CPU)
        return live.peak

    assert peak(4096) - peak(1024) < 3072 * VOCABULARY * 4 / 10


def test_nothing_is_learnt(model: LanguageModel) -> None:
    before: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    quality_of(model, batches("clm"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_bucket_k_ends_where_k_plus_one_begins(seq_len: int) -> None:
    buckets = position_buckets(seq_len).tolist()
    assert all(2**k - 1 <= position <= 2 ** (k + 1) - 2 for position, k in enumerate(buckets))


@pytest.mark.parametrize("stride", [T, 8])
def test_losses_by_block_are_those_of_the_targets_in_it(
    model: LanguageModel, memory_model: LanguageModel, stride: int
) -> None:
    """A block is a run of targets of one document, however windows and batches cut the text."""
    own = passages()
    blocks = numbered(own, 12)
    every = np.concatenate([passage.targets for passage in blocks])
    for judged, scored in (
        (model, by_hand(model, stride, dealt())),
        (memory_model, by_hand_carried(memory_model, dealt())),
    ):
        quality = evaluate(
            judged,
            window_batches(own, T, stride, 4),
            documents=document_batches(own, 3) if judged is memory_model else None,
            objective="clm",
            words_per_byte=WORDS_PER_BYTE,
            unigram_nats=NATS,
            device=CPU,
            blocks=Numbered(window_batches(blocks, T, stride, 4), document_batches(blocks, 3)),
        )
        nats = np.array([s.nll for s in scored])
        assert quality.nll_by_block is not None
        assert quality.nll_by_block == pytest.approx([nats[every == k].mean() for k in range(12)], rel=1e-6)
        assert quality.block_targets == np.bincount(every).tolist()
        weighted = np.average(quality.nll_by_block, weights=quality.block_targets)
        assert quality.nll == pytest.approx(weighted, rel=1e-12)
        if quality.nll_reset is not None:
            assert quality.nll_reset_by_block is not None
            weighted = np.average(quality.nll_reset_by_block, weights=quality.block_targets)
            assert quality.nll_reset == pytest.approx(weighted, rel=1e-12)
