"""Decoding with a whole model: the logits of steps are those of the parallel pass, and the states have the
stated size."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from tiers import tiered

import variants
from bench.model.activations import STRATEGIES
from bench.model.decode import Decoder, decoding_bytes, no_decoding
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule
from variants.base import Dims, Workload

TOKENS, BATCH, DEPTH = 61, 2, 3
MODELS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in variants.names()],
    *[("chunked", {"chunk": c}) for c in (1, 5, 8, 50)],
    *[("overlapping", {"chunk": c}) for c in (4, 8, 12, 64)],
    ("hybrid", {"layers": ("longformer(window=5)", "dense")}),
    ("hybrid", {"layers": ("transformer_xl(segment=7, mem_len=9)", "dense")}),
    ("hybrid", {"layers": ("dense", "compressive(segment=6, mem_len=5, comp_len=3, rate=2)", "longformer")}),
]
"""Every variant with its defaults, and models whose windows and segments end at different tokens."""


def model_of(
    name: str, knobs: dict[str, Any], *, activations: str = "keep", stack: str = "stack"
) -> LanguageModel:
    """A float64 model, or a skip with the reason why it is not decoded."""
    variant = variants.load(name)
    config, dims = variant.Config(**knobs), Dims(seq_len=90, d_model=16, heads=2)
    if reason := variant.unsupported(config, dims, causal=True):
        pytest.skip(reason)
    torch.manual_seed(0)
    spec = replace(ModelSpec.of(variant, config), depth=depth_schedule(stack))
    model = LanguageModel(spec, dims, depth=DEPTH, dropout=0.0, vocabulary=19, activations=activations)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    if reason := no_decoding(model):
        pytest.skip(reason)
    return model


def whole(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([out.logits for _, out in model.stream(tokens, causal=True)], dim=1).double()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The parallel pass rounds logits to float32."""
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


PROMPTS = [24, 0, 1, 7, 14, 40]


def with_prompts() -> list[Any]:
    """Every model after one prompt; after the others, one model of each variant whose borders are near."""
    cases = []
    for name, knobs in MODELS:
        for prompt in PROMPTS:
            group = (name, str(knobs), prompt) if prompt == PROMPTS[0] else (name, prompt) if knobs else None
            cases.append((group, pytest.param(name, knobs, prompt, id=f"{name}-{knobs}-{prompt}")))
    return tiered(cases)


@pytest.mark.parametrize(("name", "knobs", "prompt"), with_prompts())
def test_steps_give_the_logits_of_the_parallel_pass(name: str, knobs: dict[str, Any], prompt: int) -> None:
    model = model_of(name, knobs)
    tokens = torch.randint(19, (BATCH, TOKENS))
    want = whole(model, tokens)
    decoder = Decoder(model, BATCH, TOKENS)
    assert decoder.nbytes == decoding_bytes(model, work())
    if prompt:
        torch.testing.assert_close(
            decoder.read(tokens[:, :prompt]), want[:, prompt - 1], atol=1e-5, rtol=1e-5
        )
    steps = [1] * (TOKENS - prompt - 9) + [4, 5]
    for end, size in zip(accumulate(steps, initial=prompt), [*steps, 0], strict=True):
        if size:
            got = decoder.read_all(tokens[:, end : end + size])
            assert_close(got, want[:, end : end + size])


def work() -> Workload:
    return Workload(batch_size=BATCH, seq_len=TOKENS, d_model=16, heads=2, causal=True, element_bytes=8)


@pytest.mark.parametrize("stack", ["stack", "universal", "layer_drop"])
@pytest.mark.parametrize("activations", [name for name in STRATEGIES if name != "offload"])
def test_every_strategy_and_depth_schedule_decodes_the_network_it_trains(
    activations: str, stack: str
) -> None:
    model = model_of("longformer", {"window": (5,)}, activations=activations, stack=stack)
    tokens = torch.randint(19, (BATCH, TOKENS))
    decoder = Decoder(model, BATCH, TOKENS)
    got = torch.cat([decoder.read_all(tokens[:, :30]), *map(decoder.read_all, tokens[:, 30:].split(1, 1))], 1)
    assert_close(got, whole(model, tokens))


@pytest.mark.parametrize("name", ["dense", "longformer", "sparse_fixed", "performer", "transformer_xl"])
def test_in_bfloat16_steps_are_as_near_as_the_parallel_pass(name: str) -> None:
    """Both round differently; neither is farther from float32 than twice the other."""
    exact = model_of(name, {}).float()
    half = model_of(name, {}).float()
    half.dtype = torch.bfloat16
    tokens = torch.randint(19, (BATCH, TOKENS))
    decoder = Decoder(half, BATCH, TOKENS)
    steps = torch.cat(
        [decoder.read_all(tokens[:, :20]), *map(decoder.read_all, tokens[:, 20:].split(1, 1))], 1
    )
    want = whole(exact, tokens)
    errors = [(got - want).square().mean().sqrt() for got in (steps, whole(half, tokens))]
    assert 0 < errors[0] <= 2 * errors[1]


def test_what_a_decoder_has_no_room_for_is_one_line() -> None:
    decoder = Decoder(model_of("dense", {}), 1, 5)
    decoder.read(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^2 tokens after 4: the decoder was made for at most 5$"):
        decoder.read(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="1 or more tokens"):
        decoder.read(torch.zeros(1, 0, dtype=torch.long))


def test_a_model_that_cannot_be_decoded_says_why() -> None:
    variant = variants.load("linformer")
    spec = ModelSpec.of(variant, variant.Config(k=4))
    dims = Dims(seq_len=90, d_model=16, heads=2)
    model = LanguageModel(spec, dims, depth=1, dropout=0.0, vocabulary=19, activations="keep")
    with pytest.raises(
        ValueError, match="has no causal form: every projected key and value mixes all positions"
    ):
        Decoder(model, 1, 5)
