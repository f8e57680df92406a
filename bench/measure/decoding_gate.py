"""The decoding gate: a prompt, steps of one token and a block give the logits of the parallel pass."""

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch

from bench.config.spec import CellSpec
from bench.measure.cached import load_or_measure
from bench.measure.gate_failed import GateFailed
from bench.measure.gates import Sizes
from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from bench.tasks.text import VOCABULARY
from variants.base import Dims

DECODING_TOLERANCE = 1e-5
"""Maximum error of a logit, relative to the largest. Computed in float64, because rounding in lower precision
moves tokens between buckets, so that single outputs differ; logits are float32."""
SEQUENCES = 2
"""Batch size of the gate."""
STEPS = 40
"""Tokens that are read one by one, from the first on and after a prompt."""


def check(spec: CellSpec, folder: Path, code_sha256: str) -> float:
    """Return `decoding_error` for small sizes. It is measured once for each experiment, code and device, and
    cached in `folder`. Raises GateFailed."""
    sizes = Sizes.of(spec)
    layers = spec.model_spec().representative_depth(spec.depth, spec.activations)
    decides = [spec.variant, spec.variant_params, asdict(sizes.small), layers, spec.activations, spec.device]
    decides += [spec.stack.name, spec.stack.params, spec.feed_forward.name, spec.feed_forward.params]
    decides += [spec.model.tie_embeddings, repr(spec.model_spec().block), spec.model.embedding_size]
    decides += [code_sha256]
    measured = load_or_measure(
        folder / "gates",
        ["decoding", *decides],
        lambda: {"error": decoding_error(spec, sizes.small, layers, sizes.device)},
        {"error"},
    )
    return float(measured["error"])


def decoding_error(spec: CellSpec, dims: Dims, layers: int, device: torch.device) -> float:
    """Return the maximum error of a logit of the cell's network with these sizes, relative to the largest.

    Raises GateFailed if it is above `DECODING_TOLERANCE`.
    """
    torch.manual_seed(0)
    with device:
        model = LanguageModel(
            spec.model_spec(),
            dims,
            depth=layers,
            dropout=0.0,
            vocabulary=VOCABULARY,
            tie_embeddings=spec.model.tie_embeddings,
            embedding_size=spec.model.embedding_size,
            activations=spec.activations,
        )
    model.open_branches()
    model = model.double().eval()
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, dims.seq_len), generator=source).to(device)
    with torch.no_grad():
        want = torch.cat([out.logits for _, out in model.stream(tokens, causal=True)], dim=1)
    worst = 0.0
    for sizes in _ways(dims.seq_len):
        decoder = Decoder(model, SEQUENCES, dims.seq_len)
        for end, size in zip(accumulate(sizes), sizes, strict=True):
            got = decoder.read_all(tokens[:, end - size : end])
            worst = max(worst, (got - want[:, end - size : end]).abs().max().item())
    worst /= want.abs().max().item()
    if not worst <= DECODING_TOLERANCE:
        raise GateFailed(f"decoding gate: steps changed a logit by {worst:.2e} of the largest")
    return worst


def _ways(tokens: int) -> list[list[int]]:
    """Numbers of tokens of the steps: from the first token on, and after a prompt."""
    few = min(STEPS, tokens)
    first = [1] * few + [tokens - few]
    prompt = max(0, tokens - 2 * few - 1)
    rest = tokens - prompt
    after = [prompt, *[1] * (rest // 2), rest - rest // 2]
    return [[size for size in sizes if size] for sizes in (first, after)]
