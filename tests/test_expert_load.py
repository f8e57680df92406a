"""The load of experts in an evaluation: counted by hand, and in the records of trained cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import bench
from test_report import record, write
from torch import Tensor, nn

import variants
from bench.evaluate.expert_load import counting_loads
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.report import build
from variants.base import Dims, FFOut
from variants.ops.routed_experts import RoutedExperts

TOKENS, WIDTH = 20, 16


def model_of(name: str, knobs: dict[str, Any], stack: str = "stack", **options: Any) -> LanguageModel:
    dense = variants.load("dense")
    fed, depth = feed_forward(name, **knobs), depth_schedule(stack)
    torch.manual_seed(0)
    return LanguageModel(
        ModelSpec.of(dense, dense.Config(), feed_forward=fed, depth=depth),
        Dims(seq_len=TOKENS, d_model=WIDTH, heads=2),
        **{"depth": 3, "dropout": 0.0, "vocabulary": 11, "activations": "keep", **options},
    ).eval()


def outputs_of(model: LanguageModel, batches: list[Tensor]) -> list[tuple[RoutedExperts, Tensor, Tensor]]:
    """Each layer of experts with the input and the output of each of its calls."""
    calls = []

    def note(layer: nn.Module, args: tuple[Tensor], out: FFOut) -> None:
        assert isinstance(layer, RoutedExperts)
        calls.append((layer, args[0], out.y))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, RoutedExperts)]
    for tokens in batches:
        model(tokens, causal=True)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
@pytest.mark.parametrize("activations", ["keep", "reversible"])
@pytest.mark.parametrize("stack", ["stack", "universal"])
def test_the_share_of_tokens_whose_output_is_0(stack: str, activations: str) -> None:
    """Over all layers, also one that is visited several times, and batches of several sizes."""
    model = model_of("switch", {"capacity_factor": 1.0, "n_experts": 4}, stack, activations=activations)
    batches = [torch.randint(11, shape) for shape in ((3, TOKENS), (1, 7))]
    with counting_loads(model) as loads:
        for tokens in batches:
            model(tokens, causal=True)
    calls = outputs_of(model, batches)
    dropped = [int((~y.any(-1)).sum()) for _, _, y in calls]
    found = loads.figures()
    assert found["dropped_tokens_share"] == sum(dropped) / (3 * (3 * TOKENS + 7)) > 0
    shares = []
    for layer in {layer for layer, _, _ in calls}:
        chosen = torch.cat(
            [(x @ layer.router.weight.T).argmax(-1).flatten() for own, x, _ in calls if own is layer]
        )
        shares.append(chosen.bincount().max().item() / len(chosen))
    assert found["busiest_expert_share"] == max(shares)


@torch.no_grad()
def test_what_cannot_be_dropped_or_has_no_experts_has_no_figure() -> None:
    for name, knobs, is_routed in (
        ("switch", {}, True),
        ("top_k", {"n_experts": 3}, True),
        ("mlp", {}, False),
    ):
        with counting_loads(model := model_of(name, knobs)) as loads:
            model(torch.randint(11, (2, TOKENS)), causal=True)
        found = loads.figures()
        assert found["dropped_tokens_share"] is None
        assert (found["busiest_expert_share"] is not None) == is_routed
        if name == "top_k":
            assert 1 / 3 <= (found["busiest_expert_share"] or 0) <= 1 / 2, "a token has two different experts"


@torch.no_grad()
def test_counting_changes_nothing_and_ends_with_the_context() -> None:
    model, tokens = model_of("switch", {"capacity_factor": 1.0}), torch.randint(11, (2, TOKENS))
    before = model(tokens, causal=True).logits
    with counting_loads(model) as loads:
        assert torch.equal(model(tokens, causal=True).logits, before)
    found = loads.figures()
    model(tokens, causal=True)
    assert loads.figures() == found


def cells(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The records of a sweep."""
    small = ["data=stdlib", "seq_len=32", "depth=2", "model.d_model=16", "model.heads=2", "batch_size=2"]
    small += ["device=cpu", "measure.time_seconds=0", "measure.train_tokens=500", "measure.eval_tokens=2000"]
    done = bench("-m", *small, f"results_dir={folder}", "name=x", *overrides)
    found = [json.loads(path.read_text()) for path in (folder / "x" / "records").glob("*.json")]
    assert {one["status"] for one in found} == {"ok"}, done.stderr
    return found


def test_records_of_trained_models(tmp_path: Path) -> None:
    """A capacity of a quarter of the tokens drops three quarters of them at least."""
    (one,) = cells(tmp_path, "feed_forward=switch", "feed_forward.capacity_factor=0.25")
    assert 0.75 <= one["dropped_tokens_share"] < 1
    assert 1 / 8 <= one["busiest_expert_share"] <= 1


@pytest.mark.slow
def test_the_report_shows_them_where_a_model_has_experts(tmp_path: Path) -> None:
    experts = {"feed_forward": "switch", "dropped_tokens_share": 0.25, "busiest_expert_share": 0.5}
    found = [record(), record(cell_id="a", **experts), record(cell_id="b", replicate=1, **experts)]
    report = build(write(tmp_path / "x", found), plots=False)
    summary = pd.read_csv(report / "summary.csv").set_index("feed_forward_layer")
    assert summary.loc["switch", "dropped_tokens_share"] == 0.25
    assert summary.loc["switch", "busiest_expert_share"] == 0.5
    assert pd.isna(summary.loc["mlp", "dropped_tokens_share"])
    text = (report / "summary.md").read_text()
    (heads,) = (line for line in text.splitlines() if line.startswith("| rank"))
    assert "| tokens dropped | busiest expert |" in " ".join(heads.split())
    assert "25.0 %" in text
    text = (build(write(tmp_path / "y", [record()]), plots=False) / "summary.md").read_text()
    assert "| tokens dropped" not in text, "no model has experts"
