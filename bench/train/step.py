"""One training step: forward and backward over the segments, gradient clipping, and the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute

from bench.model.language_model import LanguageModel
from bench.tasks.base import IGNORED, Batch
from variants.base import AuxiliaryLoss, UpdatesAfterStep

CLIP_NORM = 1.0
WEIGHT_DECAY = 0.1


def decayed_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the parameters to which weight decay applies: parameters of two or more dimensions whose name
    contains `weight`, as torch's modules name the matrices that they multiply by.

    Weight decay does not apply to biases, norms, embeddings and parameters with other names: position tables,
    vectors per head, mixtures over positions. A parameter that is shared with an embedding is an embedding.
    """
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    tables = {p for m in model.modules() if isinstance(m, embeddings) for p in m.parameters(recurse=False)}
    matrices = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "weight" in name and parameter.dim() >= 2
    }
    return matrices - tables


def optimizer_for(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return a fused AdamW (Loshchilov 2017, arXiv:1711.05101), which needs no temporary tensors of the
    model's size.

    Frozen parameters are excluded. Weight decay applies to `decayed_parameters`.
    """
    decayed = decayed_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


Phase = Literal["forward", "backward", "optimizer"]


def parameters_by_loss(model: LanguageModel) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the parameters that the task's loss trains, and those that only auxiliary losses train."""
    auxiliary = {
        parameter
        for layer in model.layers
        if isinstance(layer, AuxiliaryLoss)
        for parameter in layer.auxiliary_parameters()
    }
    both = list(model.parameters())
    return [p for p in both if p not in auxiliary], [p for p in both if p in auxiliary]


class StepOut(NamedTuple):
    """The result of a training step."""

    nll: torch.Tensor
    """() mean nll of the batch in nats, still on the device."""
    states: list[Any] | None
    """The state of each visit after the last token, detached; None if no segment ran."""


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """() the sum over the targets (B · T,), from logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")


def _nll_at(model: LanguageModel, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`_nll` of hidden states (B, T, C)."""
    return _nll(model.logits(x), targets)


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    causal: bool,
    states: list[Any] | None = None,
    segments: Iterable[slice] | None = None,
    on_phase_end: Callable[[Phase], None] | None = None,
) -> StepOut:
    """Run forward, backward, gradient clipping and update, from `states`, which an earlier step returned.

    If the input schedule has segments, each segment runs forward and backward in turn and the gradients
    accumulate; `segments` selects segments, by default all. Auxiliary losses are additional roots of the
    backward pass, summed over the segments. They are not part of the nll, and the gradients of parameters
    that only they train are clipped separately. If the depth schedule has exits, the loss that is trained is
    the mean over them with its weights; the nll is still that of the output. `on_phase_end` is called at the
    end of each phase; after a forward pass, everything that the backward pass needs is stored.
    """
    done = on_phase_end or (lambda _: None)
    optimizer.zero_grad(set_to_none=True)
    device = batch.inputs.device
    outputs = model.depth_schedule.outputs(batch.targets.shape[1])  # of the last tokens, usually of all
    total, scored = torch.zeros((), device=device), (batch.targets[:, -outputs:] != IGNORED).sum()
    weights = model.depth_schedule.exit_weights() if model.training else ()
    for segment in segments or model.input_schedule.segments(batch.inputs.shape[1]):
        out = model(batch.inputs[:, segment], causal=causal, states=states)
        states, losses = out.states, out.aux_losses
        targets = batch.targets[:, segment][:, -out.logits.shape[1] :].flatten()
        nll = _nll(out.logits, targets)
        exits = [*zip(weights, out.exits, strict=True)]
        del out  # backward needs only the log-probabilities; keeping the logits would waste memory
        # the logits are computed again in the backward pass: those of one exit are in memory at a time
        early = [
            weight * recompute(_nll_at, model, x, targets, use_reentrant=False, preserve_rng_state=False)
            for weight, x in exits
        ]
        trained = sum(early, (1 - sum(weights)) * nll) if early else nll
        del exits, early
        done("forward")
        torch.autograd.backward([trained / scored, *(loss for loss in losses if loss.requires_grad)])
        total += nll.detach() / scored
        done("backward")
    for parameters in parameters_by_loss(model):
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)  # on fake tensors as on others
    optimizer.step()
    for layer in model.layers:
        if isinstance(layer, UpdatesAfterStep):
            layer.after_step()
    done("optimizer")
    return StepOut(total, tree_map(lambda leaf: leaf.detach() if torch.is_tensor(leaf) else leaf, states))
