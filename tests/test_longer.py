"""Loss on sequences that are longer than in training: which targets, by which windows, with which memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import byte_model
from torch import Tensor, nn

import variants
from bench.corpora.tokens import TokenText
from bench.evaluate.longer import Longer, group_windows, longer_memory, measure_longer, tokens_read
from bench.evaluate.nll import evaluating, tally
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec
from bench.tasks.base import IGNORED
from bench.tasks.text import VOCABULARY
from bench.tasks.windows import Passage, window_batches
from variants.attention.longformer import Longformer, LongformerConfig
from variants.base import Dims
from variants.ops.projections import Projections

CPU = torch.device("cpu")
T = 32
TEXTS = [np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8) for n in (331, 40, 270)]
DOCUMENTS = [TokenText(text) for text in TEXTS]


def found_for(model: LanguageModel, *, largest: int = 8, count: int = 64, seq_len: int = T) -> Longer:
    return measure_longer(model.train(), DOCUMENTS, seq_len=seq_len, largest=largest, count=count, device=CPU)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=5),
    st.integers(4, 20),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 12),
)
def test_groups_have_a_whole_window_before_them_and_do_not_overlap(
    lengths: list[int], seq_len: int, factor: int, count: int
) -> None:
    longest, size = factor * seq_len, seq_len // 4
    possible = [
        (document, end) for document, length in enumerate(lengths) for end in range(longest, length + 1, size)
    ]
    windows = group_windows(lengths, seq_len=seq_len, longest=longest, count=count)
    assert len(windows) == min(max(1, count), len(possible))
    assert {(w.length, w.stop - w.scored) for w in windows} <= {(longest, size)}
    places = [possible.index((w.document, w.stop)) for w in windows]
    assert places == sorted(set(places))
    assert len(places) < 3 or np.ptp(np.diff(places)) <= 1, "evenly spaced"


def test_every_length_has_the_loss_of_the_same_targets_at_its_last_positions() -> None:
    """Computed by hand, a window at a time, from logits."""
    model = byte_model("dense", T)
    found = found_for(model)
    assert found.lengths == [32, 64, 128, 256]
    assert found.targets == found.bytes == 64
    windows = group_windows([len(t) - 1 for t in TEXTS], seq_len=T, longest=256, count=8)
    assert {w.document for w in windows} == {0, 2}, "only documents that are long enough"
    for length, nll in zip(found.lengths, found.nll, strict=True):
        hand = []
        for document, _, stop, scored in windows:
            text = torch.from_numpy(TEXTS[document].astype(np.int64))
            with evaluating(model):
                logits = model(text[None, stop - length : stop], causal=True).logits[0].double()
            places = torch.arange(scored, stop)
            log_p = logits.log_softmax(-1)[places - stop + length, text[places + 1]]
            hand += (-log_p).tolist()
        assert nll == pytest.approx(math.fsum(hand) / len(hand), rel=1e-6)


def test_the_training_length_is_the_ordinary_evaluation_of_these_targets() -> None:
    """All groups of one document, against overlapping windows with the stride of a group."""
    model = byte_model("dense", T)
    (text, longest) = (TEXTS[0][:290], 2 * T)
    found = measure_longer(model, [TokenText(text)], seq_len=T, largest=2, count=10**6, device=CPU)
    inputs, targets = text[:-1].astype(np.int64), text[1:].astype(np.int64)
    end = longest + (len(targets) - longest) // 8 * 8
    targets[: longest - 8] = IGNORED
    ordinary = tally(
        model, window_batches([Passage(inputs[:end], targets[:end])], T, 8, 3), causal=True, device=CPU
    )
    assert found.targets == ordinary.tokens
    assert found.nll[0] == pytest.approx(ordinary.nll, rel=1e-6)


@pytest.mark.parametrize("seq_len", [32, 30, 5])
def test_positions_of_the_longest_windows_end_with_the_compared_targets(seq_len: int) -> None:
    model = byte_model("dense", seq_len)
    found = found_for(model, largest=4, seq_len=seq_len)
    assert len(found.by_position) == 4 * 4
    assert found.by_position[-1] == pytest.approx(found.nll[-1], rel=1e-9)
    windows = group_windows(
        [len(t) - 1 for t in TEXTS], seq_len=seq_len, longest=4 * seq_len, count=64 // (seq_len // 4)
    )
    rows = torch.tensor(np.stack([TEXTS[w.document][w.start : w.stop + 1] for w in windows]).astype(int))
    with evaluating(model):
        logits = model(rows[:, :-1], causal=True).logits.double()
    nll = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].mean(dim=0)
    for k, loss in enumerate(found.by_position):
        part = nll[math.ceil(k * seq_len / 4) : math.ceil((k + 1) * seq_len / 4)]
        assert loss == pytest.approx(float(part.mean()), rel=1e-6)


class Unrotated(Projections):
    """Projections without positions."""

    def split(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return q, k, v


class Positionless(Longformer):
    """A window whose layer knows no positions."""

    position_scheme = "none"

    def __init__(self, config: Any, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Unrotated(dims)


def window_model(layer: type[Longformer], window: int) -> LanguageModel:
    torch.manual_seed(0)
    dims = Dims(seq_len=T, d_model=32, heads=2)
    spec = ModelSpec.of(layer, LongformerConfig(window=(window,)))
    model = LanguageModel(spec, dims, depth=2, dropout=0.0, vocabulary=VOCABULARY, activations="keep")
    for key, parameter in model.named_parameters():
        if key.endswith(("out.weight", "head.weight")):
            nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("layer", [Positionless, Longformer])
def test_beyond_its_reach_a_window_has_the_same_loss_at_every_length(layer: type[Longformer]) -> None:
    """Two layers of eight tokens reach fourteen back; the first target has 24 tokens before it."""
    model = window_model(layer, 8)
    found = found_for(model)
    assert model.position_scheme == layer.position_scheme
    assert found.nll == pytest.approx([found.nll[0]] * 4, rel=1e-5)
    assert found.by_position[1:] != pytest.approx([found.nll[0]] * 31, rel=1e-3), "other targets"
    wide = found_for(window_model(layer, 64))
    assert abs(wide.nll[0] - wide.nll[1]) > 1e-3, "a wider one reads further back"


def test_the_error_is_that_of_the_difference_over_groups() -> None:
    model = byte_model("dense", T)
    found = found_for(model, largest=2, count=64)
    assert found.error
    assert found.error[0] == 0
    windows = group_windows([len(t) - 1 for t in TEXTS], seq_len=T, longest=2 * T, count=8)
    differences = []
    for w in windows:
        of_two = []
        for length in (T, 2 * T):
            text = TEXTS[w.document][w.stop - length : w.stop + 1].astype(np.int64)
            targets = text[1:].copy()
            targets[:-8] = IGNORED
            (batch,) = window_batches([Passage(text[:-1], targets)], length, length, 1)
            of_two.append(tally(model, [batch], causal=True, device=CPU).nll)
        differences.append(of_two[1] - of_two[0])
    assert found.nll[1] - found.nll[0] == pytest.approx(np.mean(differences), rel=1e-5)
    assert found.error[1] == pytest.approx(np.std(differences, ddof=1) / len(windows) ** 0.5, rel=1e-5)
    assert found_for(model, count=1).error is None, "one group has no spread"


MEMORY = {"segment": 8, "mem_len": 8, "comp_len": 3}
DOUBLE = {"mem_len": 16, "comp_len": 6}


@pytest.mark.parametrize(
    ("name", "knobs", "longer_knobs"),
    [
        ("transformer_xl", {"segment": 8, "mem_len": 5}, {"mem_len": 10}),
        ("compressive", MEMORY, DOUBLE),
        ("compressive", {**MEMORY, "rate": 2, "compression": "most_used"}, DOUBLE),
        (
            "hybrid",
            {"layers": ["transformer_xl(segment=8,mem_len=5)", "dense"]},
            {"layers": ["transformer_xl(segment=8,mem_len=10)", "dense"]},
        ),
    ],
)
def test_a_longer_memory_is_that_of_a_model_built_with_it(
    name: str, knobs: dict[str, Any], longer_knobs: dict[str, Any]
) -> None:
    """The same weights in a model with the longer memory; and nothing of it stays in the trained model."""
    model = byte_model(name, T, **knobs)
    before = copy.deepcopy(model.state_dict())
    found = found_for(model, largest=4, count=16)
    assert found == found_for(model, largest=4, count=16), "evaluating twice gives equal figures"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    positions = sum(knobs.get(key, 0) for key in ("mem_len", "comp_len")) or 5
    assert found.memory_positions == [positions, 2 * positions, 4 * positions]
    assert found.nll_memory[0] == found.nll[-1]
    other = byte_model(name, T, **{**knobs, **longer_knobs})
    other.load_state_dict(before)
    assert found_for(other, largest=4, count=16).nll[-1] == found.nll_memory[1]
    assert abs(found.nll_memory[1] - found.nll_memory[0]) > 1e-4


def test_a_memory_of_the_whole_past_is_one_long_segment() -> None:
    """Then every layer has read all earlier tokens of a token in memory, as within a segment."""
    model = byte_model("transformer_xl", T, segment=8, mem_len=20)
    oracle = byte_model("transformer_xl", T, segment=64, mem_len=0)
    oracle.load_state_dict(model.state_dict())
    found, whole = found_for(model, largest=2), found_for(oracle, largest=2)
    assert found.memory_positions == [20, 40], "64 tokens do not fill 80 positions"
    with longer_memory(model, 3):  # 60 positions are all tokens before the last segment
        assert found_for(model, largest=2).nll[-1] == pytest.approx(whole.nll[-1], rel=1e-5)
    assert abs(found.nll_memory[1] - whole.nll[-1]) < abs(found.nll_memory[0] - whole.nll[-1])
    assert (whole.memory_positions, whole.nll_memory) == ([], []), "no memory"


def test_a_memory_is_as_before_after_a_failure() -> None:
    model = byte_model("compressive", T, segment=8, mem_len=8, comp_len=4)
    layer: Any = model.layers[0]
    inside = []

    def fail() -> None:
        with longer_memory(model, 4):
            inside.append((layer.config.mem_len, layer.config.comp_len))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(32, 16)]
    assert (layer.config.mem_len, layer.config.comp_len) == (8, 4)


def test_a_mixture_names_the_member_that_cannot() -> None:
    hybrid = variants.load("hybrid")
    config = hybrid.Config(layers=("dense", "linformer"))
    assert hybrid.longer_unsupported(config) == "linformer has parameters for a fixed number of positions"
    chunks = hybrid.Config(layers=("chunked", "linformer"))
    assert hybrid.longer_unsupported(chunks) is None, "its windows do not grow"


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("dense", {}, "rotary"),
        ("chunked", {"chunk": 8}, "rotary, restarting in chunks of 8 tokens every 8"),
        ("transformer_xl", {}, "relative"),
        (
            "hybrid",
            {"layers": ["transformer_xl", "dense"]},
            "transformer_xl=relative, dense=rotary, restarting in segments of 256 tokens",
        ),
        ("hybrid", {"layers": ["longformer", "dense"]}, "rotary"),
    ],
)
def test_the_position_scheme_in_words(name: str, knobs: dict[str, Any], said: str) -> None:
    assert byte_model(name, T, **knobs).position_scheme == said


def test_documents_that_are_too_short_are_a_reason() -> None:
    model = byte_model("dense", T)
    assert found_for(model, largest=16) == Longer(
        reason="no held-out document has over 330 tokens after its first; "
        "measure.longer=16 at seq_len=32 needs 512"
    )
    assert found_for(model, seq_len=3).reason == "seq_len=3: a quarter of it is scored; allowed is 4 or more"


@dataclass
class FailsFrom:
    """A model of which a long input exhausts the memory."""

    model: LanguageModel
    tokens: int
    error: Exception

    @contextmanager
    def running(self) -> Iterator[LanguageModel]:
        before = self.model.run_segment

        def run(model: LanguageModel, tokens: Tensor, states: Any, ctx: Any) -> Any:
            if tokens.shape[1] >= self.tokens:
                raise self.error
            return before(model, tokens, states, ctx)

        with self.model.running(self.model.run_blocks, run):
            yield self.model


def test_the_lengths_before_memory_ran_out_are_kept() -> None:
    model, whole = byte_model("dense", T), found_for(byte_model("dense", T), largest=8)
    with FailsFrom(model, 128, RuntimeError("DefaultCPUAllocator: can't allocate memory")).running():
        found = found_for(model)
    assert (found.lengths, found.nll) == (whole.lengths[:2], whole.nll[:2])
    assert len(found.by_position) == 8
    assert found.reason == "memory ran out after 2 lengths"
    with FailsFrom(model, 128, RuntimeError("a defect")).running(), pytest.raises(RuntimeError):
        found_for(model)


def test_bits_per_byte_are_of_the_targets_own_bytes() -> None:
    """Tokens of one and of three bytes in turn."""
    ends = np.cumsum(np.tile([1, 3], 150))
    text = TokenText(np.tile([3, 5], 150).astype(np.uint8), ends)
    found = measure_longer(byte_model("dense", T), [text], seq_len=T, largest=2, count=20, device=CPU)
    assert (found.targets, found.bytes) == (16, 32)
    assert found.bits_per_byte() == [pytest.approx(nll / 2 / math.log(2)) for nll in found.nll]


@pytest.mark.parametrize("has_memory", [True, False])
def test_the_tokens_that_are_read_are_counted_before(has_memory: bool) -> None:
    knobs = {"segment": 8, "mem_len": 8 if has_memory else 0}
    model = byte_model("transformer_xl", T, **knobs)
    read = 0

    def run(model: LanguageModel, tokens: Tensor, states: Any, ctx: Any) -> Any:
        nonlocal read
        read += tokens.shape[1]
        return before(model, tokens, states, ctx)

    before = model.run_segment
    with model.running(model.run_blocks, run):
        found_for(model, largest=4, count=16)
    assert read == tokens_read(T, 4, 16, has_memory=has_memory)
