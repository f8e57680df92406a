"""Options of the model beside its sizes: its vocabulary, tied embeddings, the base of rotary positions, the
size of heads; and the share of a memory budget that stays free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import bench
from hydra import compose, initialize_config_dir
from test_report import record, write

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.inputs.errors import ConfigError
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.predict import Prediction, build_model
from bench.records import load
from bench.records.record import MODEL_OPTIONS
from bench.report import build
from bench.run.progress import describe
from variants.base import Context, Dims
from variants.depth.funnel import FunnelConfig
from variants.feed_forward.mlp import MLPConfig
from variants.ops.projections import rotary

TINY = ["data=stdlib", "measure=plan", "seq_len=16", "depth=1", "model.d_model=16", "device=cpu"]
ROTARY = ["dense", "chunked", "longformer", "performer", "reformer", "routing", "linformer"]

OTHER_WIDTHS = (
    "based",
    "delta_net",
    "dsa",
    "gated_delta_net",
    "gla",
    "kda",
    "latent_attention",
    "long_short",
)
OTHER_WIDTHS += ("mamba2", "poolingformer")
"""Variants with projections whose width is not that of the heads: gates, latent vectors."""


def spec_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=[*TINY, *overrides])).spec


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    untied, tied = (build_model(spec_of(f"model.tie_embeddings={flag}")) for flag in ("false", "true"))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (untied, tied)]
    assert sizes[0] - sizes[1] == untied.vocabulary * 16
    tokens, seen = torch.arange(8)[None] % 3, torch.zeros(tied.vocabulary, dtype=torch.bool)
    seen[:3] = True
    tied(tokens, causal=True).logits.logsumexp(-1).sum().backward()
    assert tied.embedding.weight.grad is not None
    row_is_used = tied.embedding.weight.grad.abs().sum(1) > 0
    assert row_is_used.all(), "the output layer reaches every row"
    untied(tokens, causal=True).logits.logsumexp(-1).sum().backward()
    assert untied.embedding.weight.grad is not None
    assert torch.equal(untied.embedding.weight.grad.abs().sum(1) > 0, seen)


def test_a_larger_vocabulary_costs_its_products_and_its_logits() -> None:
    few, many = (Prediction(spec_of(f"model.vocab_size={n}")).predict() for n in (300, 50_304))
    tokens, rows = 16 * spec_of().batch_size, 50_304 - 300
    costs = []
    for n in (300, 50_304):
        spec = spec_of(f"model.vocab_size={n}")
        costs.append(build_model(spec).cost(spec.workload()).step)
    assert costs[1] - costs[0] == 6 * tokens * 16 * rows
    logits = 4 * tokens * rows
    weights = 4 * 4 * 2 * 16 * rows  # parameters, gradients and the optimiser's two moments of both matrices
    assert many.peak_bytes - few.peak_bytes >= weights + logits


def test_the_data_must_fit_into_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=256: allowed is null, or 257 or more"):
        spec_of("model.vocab_size=256")
    assert build_model(spec_of("model.vocab_size=257")).vocabulary == 257


@pytest.mark.parametrize("base", [100.0, 10_000.0, 500_000.0])
def test_rotary_angles_have_their_base(base: float) -> None:
    """Against products of complex numbers."""
    x = torch.randn(1, 300, 2, 8, dtype=torch.float64)
    angle = torch.arange(300)[:, None] * torch.tensor(
        [base ** (-i / 4) for i in range(4)], dtype=torch.float64
    )
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert torch.allclose(rotary(x, None, base), torch.cat([turned.real, turned.imag], -1), atol=1e-12)
    later = rotary(x[:, 200:], torch.arange(200, 300), base)
    assert torch.allclose(later, rotary(x, None, base)[:, 200:], atol=1e-12)


@pytest.mark.parametrize("name", ROTARY)
def test_each_layer_and_its_reference_use_the_base(name: str) -> None:
    variant = variants.load(name)
    options = {"window": (4,), "global_tokens": 2} if name == "longformer" else {}
    config, causal = variant.Config(**options), name not in ("linformer", "longformer")
    outputs = []
    for base in (10_000.0, 20.0):
        torch.manual_seed(0)
        layer = variant(config, Dims(seq_len=24, d_model=16, heads=2, rotary_base=base)).double().eval()
        x = torch.randn(2, 24, 16, dtype=torch.float64)
        torch.manual_seed(1)
        got = layer(x, Context(causal=causal)).y
        torch.manual_seed(1)
        assert torch.allclose(got, layer.reference(x, Context(causal=causal)), atol=1e-6)
        outputs.append(got)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", variants.mixers())
def test_every_layer_has_heads_of_the_given_size(name: str, tmp_path: Path) -> None:
    """The gates of leak and reference; and the formula of FLOPs is as near to those dispatched as usual."""
    options = [f"variant={name}", "seq_len=80", "objective=auto", "model.heads=2"]
    other, usual = (spec_of(*options, f"model.head_size={size}") for size in ("12", "null"))
    variant, config, dims = other.attention()
    if "head" in (reason := variant.unsupported(config, dims, causal=other.causal) or ""):
        assert name in ("luna", "poolingformer", "sparse_qkv"), reason
        return
    assert gates.check(other, tmp_path, "code").reference_max_abs is not None
    models = [build_model(spec) for spec in (other, usual)]
    costs = [model.cost(spec.workload()) for model, spec in zip(models, (other, usual), strict=True)]
    if "projections" not in costs[0].parts:
        assert costs[0] == costs[1], "a layer without heads"
        return
    wider = costs[0].parts["projections"] / costs[1].parts["projections"]
    if name in OTHER_WIDTHS:
        assert 1 < wider < (24 / 16) ** 2
    else:
        assert wider == 24 / 16
    ratios = []
    for model, cost in zip(models, costs, strict=True):
        with CountFlops() as counter, torch.no_grad():  # as the formula, without auxiliary losses
            model(torch.zeros(other.batch_size, 80, dtype=torch.long), causal=other.causal)
        ratios.append(gates.cost_ratio(counter.total, cost, model.flop_overhead_reason, bounded=False))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.1)
    states = [model.state_bytes(spec.workload()) for model, spec in zip(models, (other, usual), strict=True)]
    keeps_hidden_states = models[0].layers[0].info.caps.stateful
    assert states[0] == states[1] if keeps_hidden_states else states[0] > states[1]


def test_a_head_size_of_width_by_heads_changes_nothing() -> None:
    given, usual = (build_model(spec_of(f"model.head_size={size}")) for size in ("8", "null"))
    assert [p.shape for p in given.parameters()] == [p.shape for p in usual.parameters()]


def test_heads_need_not_divide_the_width_if_their_size_is_given() -> None:
    assert build_model(spec_of("model.heads=3", "model.head_size=4")).layers[0].dims.inner_dim == 12
    with pytest.raises(ConfigError, match="heads=3: must divide d_model=16"):
        spec_of("model.heads=3")
    with pytest.raises(
        ConfigError, match=r"head_size=7: rotary positions need an even number.* nearest is 6"
    ):
        spec_of("model.head_size=7")


@pytest.mark.slow
def test_a_cell_records_its_options_and_keeps_the_reserve(tmp_path: Path) -> None:
    options = [
        "model.vocab_size=1000",
        "model.tie_embeddings=true",
        "model.rotary_base=500",
        "model.head_size=12",
        "model.kv_heads=1",
        "model.widen_feed_forward=true",
        "model.embedding_size=8",
        "model.norm=none",
        "model.residual=rezero",
    ]
    for reserve in ("0", "0.5"):
        to = [f"results_dir={tmp_path}", f"name=r{reserve}"]
        fits = ["measure=fits", "measure.budget=8MiB", f"measure.reserve={reserve}", "batch_size=fit"]
        assert bench(*TINY, *options, *to, *fits).returncode == 0
    full, half = (load(tmp_path / f"r{reserve}").iloc[0] for reserve in ("0", "0.5"))
    assert (full.vocab_size, full.tie_embeddings, full.rotary_base) == (1000, True, 500.0)
    assert (full.head_size, full.kv_heads, full.widen_feed_forward) == (12, 1, True)
    assert (full.embedding_size, full.norm, full.norm_position) == (8, "none", "pre")
    assert full.residual == "rezero"
    assert half.peak_bytes <= 4 * 2**20 < full.peak_bytes <= 8 * 2**20
    assert (full.reserve, half.reserve) == (0.0, 0.5)
    written = json.loads(next((tmp_path / "r0" / "records").glob("*.json")).read_text())
    assert written["budget_bytes"] == 8 * 2**20


OTHER: dict[str, tuple[Any, str]] = {
    "vocab_size": (50_304, "vocabulary 50304"),
    "tie_embeddings": (True, "embeddings tied"),
    "rotary_base": (500_000.0, "rotary base 500000"),
    "head_size": (128, "heads of 128 channels"),
    "kv_heads": (2, "key and value heads: 2"),
    "widen_feed_forward": (True, "feed-forward layers wider"),
    "embedding_size": (128, "embedding of 128 channels"),
    "norm": ("rms", "norm rms"),
    "norm_position": ("post", "post-norm"),
    "residual": ("rezero", "residual rezero"),
    "dropout": (0.1, "dropout 0.1"),
}
"""An unusual value of each option, and its words in a report."""


def test_models_with_other_options_are_never_mixed(tmp_path: Path) -> None:
    """An older record, without the keys, is one with the usual values."""
    usual = {
        "tie_embeddings": False,
        "widen_feed_forward": False,
        "rotary_base": 10_000.0,
        "norm": "layer",
        "norm_position": "pre",
        "residual": "plain",
        "dropout": 0.0,
    }
    assert OTHER.keys() == MODEL_OPTIONS.keys() >= usual.keys()
    models = [dict[str, Any](), usual, usual]
    models += [{**usual, option: value} for option, (value, _) in OTHER.items() for _ in range(3)]
    found = [
        record(cell_id=f"c{n}", replicate=n % 3, step_seconds_median=n + 1.0, **options)
        for n, options in enumerate(models)
    ]
    folder = write(tmp_path / "x", found)
    summary = pd.read_csv(build(folder, plots=False) / "summary.csv")
    assert sorted(summary["step_seconds_median"]) == [2.0 + 3 * n for n in range(1 + len(OTHER))]
    text = (folder / "report" / "summary.md").read_text()
    for _, words in OTHER.values():
        assert words in text


def test_progress_mentions_unusual_options() -> None:
    usual = {
        "vocab_size": None,
        "tie_embeddings": False,
        "rotary_base": 10_000.0,
        "head_size": None,
        "kv_heads": None,
        "widen_feed_forward": False,
        "embedding_size": None,
        "norm": "layer",
        "norm_position": "pre",
        "residual": "plain",
        "dropout": 0.0,
    }
    assert MODEL_OPTIONS.keys() == usual.keys()
    plain = describe(record(**usual))
    assert plain == describe(record())
    told = describe(record(**usual | {"vocab_size": 50_304, "tie_embeddings": True}))
    assert "d=64 vocab_size=50304 tie_embeddings=True keep" in told


def test_progress_mentions_what_fills_the_slots() -> None:
    """Entries that are not the default, and knobs that are not theirs."""
    mlp, funnel = MLPConfig().as_dict(), FunnelConfig(stride=4).as_dict()
    plain = describe(record(feed_forward="mlp", feed_forward_params=mlp, stack="stack", stack_params={}))
    assert plain == describe(record())
    relu = describe(record(feed_forward="mlp", feed_forward_params=mlp | {"activation": "relu"}))
    assert f"{record().variant} feed_forward.activation=relu T=" in relu
    told = describe(record(stack="funnel", stack_params=funnel))
    assert f"{record().variant} stack=funnel stack.stride=4 T=" in told
    assert f"{record().variant} stack=funnel T=" in describe(
        record(stack="funnel", stack_params=FunnelConfig().as_dict())
    )
