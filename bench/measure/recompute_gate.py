"""The recomputation gate: a strategy for activations gives the same gradients as stored activations, with the
same random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.config.spec import CellSpec
from bench.measure.gate_failed import GateFailed, largest
from bench.model import activations
from bench.model.compile import compiling
from bench.model.language_model import LanguageModel
from bench.model.visits import Run
from bench.tasks.base import Batch
from bench.tasks.text import VOCABULARY
from bench.train.step import training_step
from variants.base import Dims

RECOMPUTE_TOLERANCE = {"float32": 1e-5, "bfloat16": torch.finfo(torch.bfloat16).eps}
"""Maximum error of a gradient that rounding explains, relative to the largest gradient, by dtype. Only a
reversible network has such an error, because it rebuilds its float32 streams with an error of 1e-7. The error
of float32 gradients is of the same order. In bfloat16 some of the rebuilt numbers round to a neighbouring
one, so a gradient may differ by one rounding: one unit in the last place of the largest gradient, 2⁻⁷."""
SEQUENCES = 2
"""Batch size of the gate."""


def recompute_error(spec: CellSpec, dims: Dims, layers: int, device: torch.device) -> float:
    """Return the maximum error of a parameter's gradient with the cell's strategy for activations, compared
    with stored activations, relative to the largest entry of all gradients.

    Both models run one training step with dropout, in the cell's dtype. A reversible network is compared with
    the same two-stream network whose activations are stored. Raises GateFailed if rounding cannot explain the
    error.
    """
    source = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCES, dims.seq_len), generator=source).to(device)

    # in a compiled model, the strategy with stored activations is compiled too
    def gradients(run_blocks: Run) -> list[Tensor]:
        torch.manual_seed(0)
        with device:
            model = LanguageModel(
                spec.model_spec(),
                dims,
                depth=layers,
                ff_chunks=spec.model.ff_chunks,
                dropout=0.1,
                vocabulary=VOCABULARY,
                tie_embeddings=spec.model.tie_embeddings,
                embedding_size=spec.model.embedding_size,
                activations="keep",
                dtype=getattr(torch, spec.dtype),
            )
        model.open_branches()
        torch.manual_seed(1)
        with model.running(run_blocks), compiling(model, spec.compile):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            training_step(model, optimizer, Batch(*tokens), causal=spec.causal)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    strategy = activations.STRATEGIES[spec.activations]
    want = gradients(strategy.stored)
    scale = max(grad.abs().max().item() for grad in want)
    pairs = zip(gradients(strategy.run), want, strict=True)
    worst = largest([(a - b).abs().max().item() / scale for a, b in pairs])
    if not worst <= RECOMPUTE_TOLERANCE[spec.dtype]:
        raise GateFailed(
            f"recompute gate: activations={spec.activations} changed a gradient by {worst:.2e} of the largest"
        )
    return worst
