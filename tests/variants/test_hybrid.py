"""Mixtures by layers: what holds for the whole follows from the members."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from typing import Any

import pytest
import torch
from oracles import EXACT, difference
from tiers import slow
from torch import Tensor

import variants
from bench.measure import step
from bench.measure.flops import CountFlops
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.attention.hybrid import RECIPES, Hybrid, HybridConfig
from variants.base import Context, Dims, Workload, known_leak, scheduled_cost, scheduled_state_bytes
from variants.input_schedule import Chunks, Segments, WholeSequence

VOCABULARY, T = 11, 40
SIZES = Dims(seq_len=T, d_model=16, heads=2)
SMALL = {
    "chunked": "chunked(chunk=16)",
    "compressive": "compressive(segment=16, mem_len=8, comp_len=4, rate=2)",
    "linformer": "linformer(k=4)",
    "longformer": "longformer(window=8)",
    "overlapping": "overlapping(chunk=16)",
    "performer": "performer(n_features=8, chunk=8)",
    "reformer": "reformer(chunk=8)",
    "routing": "routing(window=8)",
    "sparse_fixed": "sparse_fixed(stride=8, c=2)",
    "sparse_strided": "sparse_strided(stride=8)",
    "transformer_xl": "transformer_xl(segment=16, mem_len=8)",
}
FED = {
    "chunked": "chunks",
    "overlapping": "overlaps",
    "compressive": "segments",
    "transformer_xl": "segments",
}
"""Variants that need an input schedule, and which; with the knobs above, segments are of one length."""
PAIRS = list(combinations_with_replacement(variants.mixers(), 2))
SHORT = [
    *pairwise(variants.mixers()),
    *((one, other) for one, other in PAIRS if one in FED and other in FED),
]
"""Every variant with its neighbours by name, and all that need an input schedule."""


def member(name: str) -> str:
    return SMALL.get(name, name)


def model_of(layers: tuple[str, ...], depth: int = 2, **changed: Any) -> LanguageModel:
    torch.manual_seed(0)
    given = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", **changed}
    return LanguageModel(
        ModelSpec.of(Hybrid, HybridConfig(layers=layers), feed_forward=feed_forward(mult=2)),
        SIZES,
        depth=depth,
        **given,
    )


def ids(rows: int = 2, tokens: int = T, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LanguageModel, tokens: Tensor, *, causal: bool) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.eval().stream(tokens, causal=causal)], dim=1)


@pytest.mark.parametrize(
    ("one", "other"), [*dict.fromkeys(SHORT), *slow(*(pair for pair in PAIRS if pair not in SHORT))]
)
def test_any_two_variants_work_together_or_are_refused_in_one_line(one: str, other: str) -> None:
    """They train, in whichever direction both have; and a causal model reads no later token."""
    layers = (member(one), member(other))
    if one in FED and other in FED and FED[one] != FED[other]:
        with pytest.raises(ValueError, match=r"^layers=.* needs .* and .* needs .*; allowed is one for all$"):
            HybridConfig(layers=layers)
        return
    config = HybridConfig(layers=layers)
    reasons = {causal: Hybrid.unsupported(config, SIZES, causal=causal) for causal in (True, False)}
    caps = Hybrid.info_for(config).caps
    assert {True: caps.causal, False: caps.bidirectional} == {c: r is None for c, r in reasons.items()}
    assert all("\n" not in reason for reason in reasons.values() if reason)
    for causal in (causal for causal, reason in reasons.items() if reason is None):
        model = model_of(layers).train()
        assert [type(layer) for layer in model.layers] == [variants.load(one), variants.load(other)]
        optimizer = optimizer_for(model, 1e-3)
        loss = training_step(model, optimizer, Batch(ids(), ids(seed=1)), causal=causal).nll
        assert loss.isfinite()
        leaks = any(known_leak(slot.layer, slot.config) for slot in Hybrid.distinct(config))
        if causal and not leaks:
            before, changed = logits_of(model, ids(), causal=True), ids()
            changed[:, 25:] = ids(seed=2)[:, 25:]
            after = logits_of(model, changed, causal=True)
            torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-5)


def test_a_mixture_of_one_variant_is_that_variant() -> None:
    """With the knobs of each of its layers counted from the lowest of its kind."""
    variant = variants.load_mixer("longformer")
    config = variant.Config(window=(4, 8))
    torch.manual_seed(0)
    plain = LanguageModel(
        ModelSpec.of(variant, config, feed_forward=feed_forward(mult=2)),
        SIZES,
        depth=3,
        dropout=0.0,
        vocabulary=VOCABULARY,
        activations="keep",
    )
    mixed = model_of(("longformer(window=[4,8])",), depth=3)
    assert torch.equal(logits_of(mixed, ids(), causal=True), logits_of(plain, ids(), causal=True))


def test_layers_repeat_and_count_those_of_their_own_kind() -> None:
    model = model_of(("sparse_strided(stride=8,head_mode=interleaved)", "dense"), depth=5)
    assert [type(layer).__name__ for layer in model.layers] == [
        "SparseStrided",
        "Dense",
        "SparseStrided",
        "Dense",
        "SparseStrided",
    ]
    assert [layer.layer for layer in model.layers] == [0, 0, 1, 1, 2]


def test_a_mixture_is_its_layers_one_after_the_other() -> None:
    model = model_of(("longformer(window=8)", "dense"))
    x = model.embedding(ids())
    want = x
    for block in model.blocks:
        want = want + block.mixer(block.mixer_norm(want), Context(causal=True)).y
        want = want + block.feed_forward(block.feed_forward_norm(want)).y
    got = model.run_visits(x, None, Context(causal=True)).y
    assert difference(got.double(), want.double()) <= 1e-6


WORK = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)


@pytest.mark.parametrize(
    ("layers", "windows", "open_tokens"),
    [
        (("longformer", "dense"), [T], T),
        (("transformer_xl", "dense"), [16, 16, 8], 8),
        (("chunked", "dense"), [16, 16, 8], 8),
        (("overlapping", "dense"), [16, 16, 16, 16], 8),
    ],
)
def test_costs_and_states_are_the_sums_of_the_members(
    layers: tuple[str, ...], windows: list[int], open_tokens: int
) -> None:
    """Each fed as the mixture is: dense attention in the windows that the other member needs."""
    model = model_of(tuple(map(member, layers)), depth=4)
    dense_flops = 4 * 2 * 16 * sum(n * (n + 1) // 2 for n in windows)
    dense_bytes = 2 * 2 * open_tokens * 16 * 4
    assert scheduled_cost(model.layers[1], model.input_schedule, WORK).mixing == dense_flops
    assert scheduled_state_bytes(model.layers[1], model.input_schedule, WORK) == dense_bytes
    other = model.layers[0]
    assert model.cost(WORK).mixing == 2 * (
        dense_flops + scheduled_cost(other, model.input_schedule, WORK).mixing
    )
    assert model.state_bytes(WORK) == 2 * (
        dense_bytes + scheduled_state_bytes(other, model.input_schedule, WORK)
    )


def test_dispatched_flops_are_those_of_the_sum() -> None:
    model = model_of(("dense", "linformer(k=4)"))
    work = replace(WORK, causal=False)
    with CountFlops() as counter, torch.no_grad():
        model(ids(), causal=False)
    assert counter.total == model.cost(work).total


def test_implementations_and_reasons_name_their_members() -> None:
    model = model_of(
        ("longformer(window=8)", "longformer(window=4)", "dense", "performer(n_features=8)"), depth=8
    )
    assert model.impl == "longformer=fused, dense=sdpa, performer=plain"
    reason = model.flop_overhead_reason
    assert reason is not None
    assert reason.startswith("longformer: ")
    assert "; performer: " in reason
    assert "dense" not in reason
    assert model_of(("performer(n_features=8)",)).impl == "plain"
    assert model_of(("linformer(k=8)",)).impl is None
    assert model_of(("dense",)).impl == "sdpa"
    assert model_of(("dense",)).flop_overhead_reason is None


@pytest.mark.parametrize(
    ("layers", "schedule"),
    [
        (("dense", "longformer"), WholeSequence()),
        (("dense", "chunked(chunk=16)", "longformer"), Chunks(16, 16)),
        (("transformer_xl(segment=16)", "dense", "compressive(segment=16)"), Segments(16)),
    ],
)
def test_the_schedule_is_the_one_that_some_member_needs(layers: tuple[str, ...], schedule: Any) -> None:
    assert Hybrid.input_schedule(HybridConfig(layers=layers)) == schedule


def test_a_stateless_layer_beside_segments_reads_its_segment_alone() -> None:
    model = model_of(("transformer_xl(segment=16, mem_len=8)", "dense")).double()
    before = logits_of(model, ids(), causal=True)
    changed = ids()
    changed[:, :8] = ids(seed=3)[:, :8]  # too far back for the memory of segment 3
    assert difference(logits_of(model, changed, causal=True)[:, 32:], before[:, 32:]) <= EXACT


def test_what_is_stateful_goes_without_state_through_chunks() -> None:
    """A window of chunks must not get the state of another one, of other sequences."""
    stateful = variants.load_mixer("transformer_xl")
    config = stateful.Config(segment=16, mem_len=8)
    spec = replace(ModelSpec.of(stateful, config, feed_forward=feed_forward(mult=2)), input=Chunks(16, 16))
    torch.manual_seed(0)
    model = LanguageModel(spec, SIZES, depth=2, dropout=0.0, vocabulary=VOCABULARY, activations="keep").eval()
    with torch.no_grad():
        whole = model(ids(), causal=True)
        alone = torch.cat([model(part, causal=True).logits for part in ids().split(16, dim=1)], dim=1)
    torch.testing.assert_close(whole.logits, alone, rtol=1e-5, atol=1e-5)
    assert whole.states == []


def test_a_plan_of_a_mixture_is_what_its_step_takes() -> None:
    def subject() -> step.Subject:
        build = lambda: model_of(("longformer(window=8)", "dense", "performer(n_features=8)"), depth=3)  # noqa: E731
        return step.Subject.make(build, lambda: Batch(ids(), ids()), causal=True, device=torch.device("cpu"))

    planned = step.predicted(subject)
    _, measured = step.on_host(subject)
    assert (planned.flops_step, planned.peak_bytes) == (measured.flops_step, measured.peak_bytes)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["dens"], r"variant=dens: unknown; there are .*; did you mean dense\?"),
        (["hybrid"], r"hybrid is itself a mixture; allowed are variants with one kind of layer"),
        (
            ["transformer_xl(segments_at_once=4)", "dense"],
            r"transformer_xl needs segments of 256 tokens, 4 at once, but dense reads one segment alone, "
            r"because it has no state; allowed is one segment at once$",
        ),
        (["longformer(windw=5)"], r"windw: longformer has no such knob; there are .*; did you mean window\?"),
        (["longformer(window=0)"], r"longformer\(window=0\): window=\[0\]: allowed is "),
        (["longformer(window=two)"], r"longformer\(window=two\): window="),
        (["dense(impl=sdpa, impl=naive)"], r"impl: given twice"),
        (["dense("], r"'dense\(' is not a layer; write it like dense or longformer\(window=512\)"),
        (["dense(impl)"], r"'impl' is not a knob; write it like window=512"),
        ([], "allowed is a list of one or more variants"),
        (
            ["gema3"],
            r"variant=gema3: unknown; there are .*; models are gemma2, gemma3.*; did you mean gemma3\\?",
        ),
        (["0xdense"], r"0xdense: allowed are 1x to 1,024x$"),
        (["2000xdense"], r"2000xdense: allowed are 1x to 1,024x$"),
        (["3x", "dense"], r"variant=3x: unknown; "),
        (
            ["chunked(chunk=64)", "transformer_xl"],
            r"chunked needs chunks of 64 tokens every 64 and transformer_xl needs segments of 256 tokens; "
            r"allowed is one for all",
        ),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(layers: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^layers.*{said}") as refusal:
        HybridConfig.of({"layers": layers})
    assert "\n" not in str(refusal.value)


def test_one_mixture_has_one_spelling() -> None:
    """Or the same cell would have several ids: spaces, defaults and lists of one entry make no difference."""
    spellings = [
        "longformer(window=512, impl=auto)",
        " longformer ( window = [512] )",
        "longformer(window=512,)",
    ]
    assert {HybridConfig(layers=(text,)).layers for text in spellings} == {("longformer(window=512)",)}
    for text in ("routing(n_clusters=null)", "performer(orthogonal=true)", "performer()"):
        assert HybridConfig(layers=(text,)).layers == (re.split(r"\(", text)[0],)
    kept = ("longformer(window=[64,128],dilation=[1,2])", "performer(features=relu,orthogonal=false)")
    again = HybridConfig.of(HybridConfig(layers=kept).as_dict())
    assert again.layers == kept
    assert again.slots[0].config.window == (64, 128)
    assert again.slots[1].config.orthogonal is False


@pytest.mark.parametrize(
    ("short", "layers"),
    [
        (["3xlongformer(window=8)", "dense"], [*["longformer(window=8)"] * 3, "dense"]),
        (["dense", " 2xperformer ", "1xdense"], ["dense", "performer", "performer", "dense"]),
        ("gemma3", [*["longformer(window=1024)"] * 5, "dense"]),
        (["2xgemma2", "dense"], [*["longformer(window=4096)", "dense"] * 2, "dense"]),
    ],
)
def test_repeated_layers_and_models_are_written_out(short: list[str] | str, layers: list[str]) -> None:
    """Records say what ran, and equal mixtures are one cell."""
    config = HybridConfig.of({"layers": short})
    assert config.as_dict() == {"layers": layers}
    assert config == HybridConfig.of({"layers": layers})


@pytest.mark.parametrize("name", RECIPES)
def test_the_layers_of_a_model_are_layers_and_no_variant_has_its_name(name: str) -> None:
    assert name not in variants.names()
    layers = HybridConfig(layers=(name,)).layers
    assert 2 <= len(layers) <= 16
    assert len({*layers}) > 1
    assert Hybrid.no_form(HybridConfig(layers=layers), causal=True) is None


def test_members_are_told_for_the_hash_of_the_code() -> None:
    assert Hybrid.members(HybridConfig(layers=("longformer", "dense", "longformer"))) == (
        "longformer",
        "dense",
    )
    assert variants.load("dense").members(variants.load("dense").Config()) == ()
