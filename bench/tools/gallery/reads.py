"""Which tokens each token reads, through one and several layers, from gradients of the real module.

A query position reads a key position if the gradient of its output with respect to that input is larger than
float64's epsilon times the largest gradient of this output. For unread pairs, most variants give exactly 0.0,
because they never gather the key or its weight is 0. With weights of order 1/√fan-in, the gradients of read
pairs are ten orders of magnitude above the threshold.

The selection of keys has no gradient. If a later token changes the selection of an earlier one, only the
causality gate (`bench.measure.gates`) detects it, by perturbation.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.overrides import TorchFunctionMode

import variants
from bench import CONFIGS
from bench.evaluate.receptive_field import dependence
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.report.figures.style import variant_rank
from variants.base import Context, Dims, SequenceMixer, VariantConfig, sequence_mask
from variants.input_schedule import NetworkOut
from variants.knobs import knobs_of

EPSILON = torch.finfo(torch.float64).eps
"""Gradients smaller than this share of a query's largest gradient count as zero."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The content of configs/gallery.yaml."""

    seq_len: int
    layers: int
    inputs: int
    """Number of random inputs over which a picture is averaged if the mask depends on content."""
    d_model: int
    heads: int
    knobs: dict[str, list[dict[str, Any]]]
    """Variant → one set of knobs for each of its pictures; the others have their `scaled` defaults."""
    scale: int
    """Divisor of the defaults of variants that `knobs` does not list."""

    @classmethod
    def configured(cls, **changed: int) -> Sizes:
        """Return the sizes of configs/gallery.yaml, with some values changed."""
        loaded: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "gallery.yaml"))
        return cls(**{**loaded, **changed})


@dataclass(frozen=True)
class Panel:
    """One map of queries (rows) and keys (columns)."""

    layers: int
    share: Tensor
    """(T, T) share of the inputs for which the query reads the key, through `layers` layers."""
    example: Tensor
    """(T, T) bool: the pairs that are read for the first input."""
    rule: Tensor | None
    """(T, T) bool: the variant's attention mask; None if it depends on content."""


@dataclass(frozen=True)
class Direction:
    """A causal or bidirectional variant: its panels, or the reason why there are none.

    The panels are for 1, 2, … layers if there is a mask, and for one and all layers if the mask depends on
    content.
    """

    causal: bool
    panels: tuple[Panel, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Picture:
    """A variant with one set of knobs, causal and bidirectional."""

    variant: str
    knobs: Mapping[str, Any]
    paper: str
    inputs: int
    """Number of inputs of the average; 1 if there is a mask, because all inputs give the same result."""
    directions: tuple[Direction, ...]


class _Attached(TorchFunctionMode):
    """Ignores `detach`, so that gradients also pass through detached tensors, such as Transformer-XL's
    memory.

    A detached tensor is read too, although no gradient flows through it in training.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def picture(sizes: Sizes, name: str, knobs: Mapping[str, Any]) -> Picture:
    """Compute the picture of a variant with these knobs. Raises ValueError for an invalid knob value."""
    variant = variants.load_mixer(name)
    config = variant.Config.of(knobs)
    directions = tuple(_direction(sizes, variant, config, causal=causal) for causal in (True, False))
    ruled = all(panel.rule is not None for direction in directions for panel in direction.panels)
    return Picture(name, knobs, variant.info.paper, 1 if ruled else sizes.inputs, directions)


def pictures(sizes: Sizes, names: Sequence[str] | None = None) -> Iterator[Picture]:
    """Yield the pictures of the gallery: of every variant, or of the named ones."""
    for name in names or sorted(variants.mixers(), key=variant_rank):
        if name in sizes.knobs:
            yield from (picture(sizes, name, knobs) for knobs in sizes.knobs[name])
            continue
        drawn = picture(sizes, name, scaled(name, sizes.scale))
        yield drawn if any(one.panels for one in drawn.directions) else picture(sizes, name, {})


def scaled(name: str, scale: int) -> dict[str, Any]:
    """The defaults of a variant for a short sequence: integers of `scale` or more are divided by it, so that
    windows, blocks and numbers of features are in proportion; counts below it stay.

    {} if the knobs do not allow such values together.
    """
    config = variants.load_mixer(name).Config
    knobs: dict[str, Any] = {}
    for key, one in knobs_of(config).items():
        small = _divided(one.default, scale)
        if small != one.default:
            knobs[key] = list(small) if isinstance(small, tuple) else small
    try:
        config.of(knobs)
    except ValueError:
        return {}
    return knobs


def _divided(value: Any, scale: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_divided(entry, scale) for entry in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value // scale if whole and value >= scale else value


def _direction(
    sizes: Sizes, variant: type[SequenceMixer], config: VariantConfig, *, causal: bool
) -> Direction:
    dims = Dims(seq_len=sizes.seq_len, d_model=sizes.d_model, heads=sizes.heads)
    reason = variant.unsupported(config, dims, causal=causal) or variant.missing(
        config, dims, device=torch.device("cpu"), dtype=torch.float64
    )
    if reason:
        return Direction(causal, reason=reason)
    panels = []
    for depth in range(1, sizes.layers + 1):
        model = build(variant, config, dims, depth)
        if depth == 1:
            rule = sequence_mask(model.layers[0], model.input_schedule, sizes.seq_len, causal=causal)
        else:
            rule = dependence(model, sizes.seq_len, causal=causal)
        if rule is None and 1 < depth < sizes.layers:
            continue  # intermediate depths are only shown for masks
        inputs = sizes.inputs if rule is None else 1
        samples = [read(model, sizes.seq_len, causal=causal, seed=seed) for seed in range(inputs)]
        panels.append(Panel(depth, torch.stack(samples).double().mean(dim=0), samples[0], rule))
    return Direction(causal, tuple(panels))


def build(variant: type[SequenceMixer], config: VariantConfig, dims: Dims, depth: int) -> LanguageModel:
    """Build a float64 model with weights large enough that read pairs have significant gradients."""
    torch.manual_seed(0)
    model = LanguageModel(
        ModelSpec.of(variant, config, feed_forward=feed_forward(mult=1)),
        dims,
        depth=depth,
        dropout=0.0,
        vocabulary=1,
        activations="keep",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.double().eval()


def read(model: LanguageModel, seq_len: int, *, causal: bool, seed: int) -> Tensor:
    """(T, T) bool: whether the output of a position (row) depends on an input (column), for one random input.

    For a model with one layer, only the attention layer is evaluated; for several, all blocks with their
    residual connections. In both cases the sequence is fed by the variant's input schedule, with state
    carried.
    """
    torch.manual_seed(seed)
    channels, ctx = model.head.in_features, Context(causal=causal)
    # a copy for each query, so that one backward pass gives the gradients of all of them
    x = torch.randn(1, seq_len, channels, dtype=torch.float64).repeat(seq_len, 1, 1).requires_grad_()

    def layer(window: Tensor, state: Any) -> NetworkOut:
        return NetworkOut(*model.layers[0](window, ctx, state)[:2])

    def blocks(window: Tensor, states: Any) -> NetworkOut:
        return model.run_visits(window, states, ctx)

    query = torch.arange(seq_len)
    with _Attached():
        y = model.input_schedule.stream(layer if len(model.blocks) == 1 else blocks, x, causal=causal)
        (y[query, query] @ torch.randn(channels, dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    size = x.grad.abs().amax(dim=-1)
    return size > EPSILON * size.amax(dim=-1, keepdim=True)
