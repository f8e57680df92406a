"""Checks before a cell is measured: does this machine, and does each layer, support its configuration?"""

from __future__ import annotations

import torch

from bench.config.spec import CellSpec
from bench.measure.predict import CPU
from bench.model.activations import STRATEGIES
from bench.tasks.text import Text


class Unsupported(Exception):
    """The cell cannot run; the message is the reason in its record."""


def check_supported(spec: CellSpec) -> None:
    """Raise Unsupported for a missing device, or for a size, strategy or dtype that is not supported."""
    device = torch.device(spec.device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_missing = device.type != "cpu" and (accelerator is None or accelerator.type != device.type)
    if is_missing and spec.measure.execute:  # a plan needs no device
        raise Unsupported(
            f"device={spec.device}: this machine has no such device, or torch does not support it"
        )
    variant, config, dims = spec.attention()
    if reason := variant.unsupported(config, dims, causal=spec.causal):
        raise Unsupported(reason)
    model = spec.model_spec()
    if reason := model.unsupported(spec.depth, dims.d_model, spec.model.ff_chunks):
        raise Unsupported(reason)
    if reason := model.no_form(causal=spec.causal):
        raise Unsupported(reason)
    if reason := model.wrong_lengths(spec.depth, dims, causal=spec.causal):
        raise Unsupported(reason)
    if spec.compile == "model" and model.leaves_out(spec.depth):
        graphs = f"stack={spec.stack.name} leaves out visits in training, and every choice of them is a model"
        raise Unsupported(f"compile=model: {graphs} of its own to compile; allowed are compile=off and block")
    if spec.is_compiled and not spec.measure.execute:
        raise Unsupported(
            f"compile={spec.compile}: a plan runs on fake tensors without compilation; allowed is compile=off"
        )
    if reason := STRATEGIES[spec.activations].unsupported(device.type, spec.compile):
        raise Unsupported(f"activations={spec.activations}: {reason}")
    task, _, _ = spec.task()
    outputs = model.outputs(spec.depth, spec.seq_len)
    scores_all = issubclass(task, Text) and task.history_targets is Text.history_targets
    if outputs < spec.seq_len and not scores_all:
        few = f"stack={spec.stack.name} is trained on the last {outputs} tokens of a sequence"
        raise Unsupported(f"data={spec.data.name}: does not score all tokens, and {few}")
    if spec.measure.carry_state and not issubclass(task, Text):
        raise Unsupported(f"measure.carry_state=true: data={spec.data.name} has no continuous text")
    needs_plan = not spec.measure.execute or spec.measure.budget is not None
    if needs_plan and (reason := missing_kernel(spec, CPU)):
        raise Unsupported(f"a plan runs on fake tensors of the CPU: {reason}")
    if reason := missing_kernel(spec, device):
        raise Unsupported(reason)


def missing_kernel(spec: CellSpec, device: torch.device) -> str | None:
    """Return why the variant cannot run on the device in the cell's dtype; None if it can. A kernel that does
    not exist in float32 is not refused: the gates then compare it in the cell's dtype only."""
    variant, config, dims = spec.attention()
    return variant.missing(config, dims, device=device, dtype=getattr(torch, spec.dtype))
