"""Figures of a training step by record key, for predicted and for measured steps."""

from __future__ import annotations

from typing import Any

from bench.config.spec import CellSpec
from bench.measure import gates
from bench.measure.allocator import AllocatedBytes
from bench.measure.estimate import CARDS, estimated_seconds
from bench.measure.step import StepFigures
from bench.model.language_model import LanguageModel


def flop_figures(spec: CellSpec, model: LanguageModel, figures: StepFigures, source: str) -> dict[str, Any]:
    """Return the FLOPs, launches and bytes moved of the step, the properties of the model that they depend
    on, and the estimated time on a card, if the cell names one.

    `source` says how the FLOPs were counted. Raises gates.GateFailed if the executed FLOPs of attention
    differ from the algorithmic ones without a stated reason.
    """
    work = spec.workload()
    cost = model.cost(work)
    reason, bounded = model.flop_overhead_reason, model.overhead_is_bounded
    ratio = gates.cost_ratio(figures.flops_forward, cost, reason, bounded=bounded)
    unequal = abs(ratio - 1) > gates.COST_TOLERANCE
    estimated: dict[str, Any] = {}
    if card := spec.measure.card:
        seconds = estimated_seconds(
            figures.launches_step, figures.bytes_moved_step, figures.flops_step, CARDS[card]
        )
        estimated = {"step_seconds_estimated": seconds, "estimate_card": card}
    return estimated | {
        "impl": model.impl,
        "params": sum(p.numel() for p in model.parameters()),
        "params_active": model.active_parameters(),
        "flops_algorithmic_step": cost.step,
        "flops_attention_step": cost.mixing_step,
        "flops_executed_step": figures.flops_step,
        "flops_source": source,
        "launches_step": figures.launches_step,
        "bytes_moved_step": figures.bytes_moved_step,
        "cost_ratio": ratio,
        "cost_ratio_reason": reason if unequal else None,
        "state_bytes": model.state_bytes(work),
    }


def compiled_memory_figures(figures: StepFigures, allocated: AllocatedBytes) -> dict[str, Any]:
    """Return the peak memory of a compiled step; the sizes of parameters, gradients and optimiser state are
    those of the step without compilation. What the peak consists of is not known."""
    return {
        "peak_bytes": allocated.peaks[allocated.peak_phase],
        "peak_bytes_source": allocated.source,
        "peak_phase": allocated.peak_phase,
        **{f"{phase}_peak_bytes": peak for phase, peak in allocated.peaks.items()},
        "param_bytes": figures.param_bytes,
        "grad_bytes": figures.grad_bytes,
        "optimizer_bytes": figures.optimizer_bytes,
        "activation_bytes": allocated.stored,
        "rss_peak_bytes": allocated.rss_peak,
        "cuda_reserved_bytes": allocated.reserved,
        "library_bytes": allocated.library,
    }


def memory_figures(figures: StepFigures, source: str) -> dict[str, Any]:
    """Return the peak memory of the step and its parts; `source` says how the peak was measured."""
    return {
        "peak_bytes": figures.peak_bytes,
        "peak_bytes_source": source,
        "peak_phase": figures.peak_phase,
        "forward_peak_bytes": figures.phase_peak_bytes("forward"),
        "backward_peak_bytes": figures.phase_peak_bytes("backward"),
        "optimizer_peak_bytes": figures.phase_peak_bytes("optimizer"),
        "peak_grad_bytes": figures.at_peak["gradients"],
        "peak_activation_bytes": figures.at_peak["activations"],
        "peak_workspace_bytes": figures.at_peak["workspace"],
        "param_bytes": figures.param_bytes,
        "grad_bytes": figures.grad_bytes,
        "optimizer_bytes": figures.optimizer_bytes,
        "activation_bytes": figures.activation_bytes,
        "rss_peak_bytes": figures.rss_peak_bytes,
        "cuda_reserved_bytes": figures.reserved_bytes,
        "library_bytes": figures.library_bytes,
    }
