"""A plug-in whose parameters are frozen or unused, through whole cells: both are legal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import variants
from bench.model.activations import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]

MODULE = '''
from typing import Any

import torch
from torch import Tensor, nn

from variants.base import Context, Dims, MixerOut
from variants.attention.dense import Dense, DenseConfig


class Frozen(Dense):
    """Dense attention whose input is scaled and whose channels are put in order, both fixed for good."""

    def __init__(self, config: DenseConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        scale = torch.linspace(0.5, 1.5, dims.d_model).expand(1, -1)  # not contiguous, two-dimensional
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.permutation = nn.Parameter(torch.arange(dims.d_model).flip(0), requires_grad=False)  # integers
        self.unused = nn.Linear(dims.d_model, dims.d_model)
        self.unused_and_frozen = nn.Embedding(5, dims.d_model).requires_grad_(False)
        self.register_buffer("rotation", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("rows", torch.ones(4, 5).t())
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        out = super().forward((x * self.scale)[..., self.permutation], ctx, state)
        return out._replace(aux_loss=self.scale.square().mean())  # which trains nothing

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        return super().reference((x * self.scale)[..., self.permutation], ctx)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installed package with the variant leaves behind."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "frozen-1.0.dist-info"
    info.mkdir()
    (folder / "frozen.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: frozen\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{variants.ENTRY_POINTS}]\nfrozen = frozen:Frozen\n")
    return folder


@pytest.fixture(scope="module")
def rows(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A record for each strategy, of one sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    names = ",".join(name for name, strategy in STRATEGIES.items() if not strategy.needs_device)
    command = [sys.executable, "-m", "bench", "-m", "variant=frozen", f"activations={names}", "device=cpu"]
    command += ["seq_len=64", "depth=2", "model.d_model=32", "model.heads=2"]
    command += ["data=stdlib", "measure=quick", "measure.train_tokens=640", "measure.eval_tokens=64"]
    command += ["measure.time_seconds=0", "model.ff_chunks=2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "LONGCTX_BENCH_LOCKS": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(file.read_text()) for file in folder.rglob("records/*.json")]
    return {row["activations"]: row for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("activations", [name for name, s in STRATEGIES.items() if not s.needs_device])
def test_a_cell_with_frozen_and_unused_parameters_is_measured_and_trained(
    rows: dict[str, dict[str, Any]], activations: str
) -> None:
    row = rows[activations]
    assert row["status"] == "ok", row["reason"]
    assert row["perplexity"] > 1
    assert row["reference_max_abs"] < 1e-4
    assert row["peak_bytes"] == row["peak_bytes_predicted"], "no state is planned for what gets no gradient"
    assert row["optimizer_bytes"] < 2 * row["param_bytes"]


TRAIN = """
import sys, torch, variants
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.loop import Training
from bench.train.schedule import Budget
from variants.base import Dims
variant = variants.load("frozen")
def made():
    torch.manual_seed(0)
    dims = Dims(seq_len=16, d_model=8, heads=2)
    sizes = {"depth": 1, "dropout": 0.0, "vocabulary": 7}
    spec = ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=2))
    model = LanguageModel(spec, dims, activations="reversible", **sizes)
    return Training(model, budget=Budget(steps=4), learning_rate=0.1, causal=True, step_tokens=16)
def batch(step, done):
    tokens = torch.randint(7, (2, 1, 16), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[0], tokens[1])
whole, first = made(), made()
before = {name: p.clone() for name, p in whole.model.named_parameters()}
for _ in range(4):
    whole.advance(batch)
for _ in range(2):
    first.advance(batch)
torch.save(first.state_dict(), "checkpoint")
rest = made()
rest.load_state_dict(torch.load("checkpoint", weights_only=False))
for _ in range(2):
    rest.advance(batch)
rest.check()
moved = set()
for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters()):
    assert torch.equal(a, b), name
    if not torch.equal(a, before[name]):
        moved.add(name.removeprefix("blocks.0.mixer."))
assert not {"scale", "permutation", "unused.weight", "unused.bias", "unused_and_frozen.weight"} & moved, moved
assert "projections.qkv.weight" in moved
"""


def test_frozen_and_unused_parameters_stay_through_a_checkpoint(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}"}
    command = [sys.executable, "-c", TRAIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
