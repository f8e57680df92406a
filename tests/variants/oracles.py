"""Attention written a second time, for comparison: einsum and loops, nothing taken from `variants.ops`.

Shapes: B batch, T tokens, C channels, H heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, einsum, nn

import variants
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import VOCABULARY
from variants.base import (
    Context,
    Cost,
    Dims,
    SequenceMixer,
    VariantConfig,
    Workload,
    scheduled_cost,
    scheduled_reference,
    scheduled_state_bytes,
    sequence_mask,
)
from variants.input_schedule import NetworkOut

D_MODEL, HEADS = 16, 2
EXACT = 1e-9
"""Largest difference of two float64 computations of one thing, relative to the largest entry (or 1)."""


def dims_for(seq_len: int, batch_size: int = 1) -> Workload:
    """The sizes that these tests work with."""
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=D_MODEL, heads=HEADS)


def make_layer(
    variant: type[SequenceMixer], config: VariantConfig, dims: Dims, *, index: int = 0, seed: int = 0
) -> SequenceMixer:
    """A float64 layer with weights of order 1/√fan-in, so that scores and outputs are of order 1."""
    torch.manual_seed(seed)
    layer = variant(config, dims, index).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return layer


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 numbers that want a gradient."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=source).requires_grad_()


def feed(layer: SequenceMixer, x: Tensor, *, causal: bool, seed: int = 2) -> Tensor:
    """The layer's outputs on whole sequences (B, T, C), fed as its input schedule says, randomness fixed."""
    torch.manual_seed(seed)

    def network(window: Tensor, state: Any) -> NetworkOut:
        return NetworkOut(*layer(window, Context(causal=causal), state)[:2])

    return layer.input_schedule(layer.config).stream(network, x, causal=causal)


def mask_of(layer: SequenceMixer, tokens: int, *, causal: bool) -> Tensor | None:
    """(T, T) bool: what a query of a whole sequence reads, fed as its input schedule says; None: content
    decides."""
    return sequence_mask(layer, layer.input_schedule(layer.config), tokens, causal=causal)


def cost_of(layer: SequenceMixer, work: Workload, *, causal: bool) -> Cost:
    """The layer's cost on whole sequences, fed as its input schedule says."""
    return scheduled_cost(layer, layer.input_schedule(layer.config), replace(work, causal=causal))


def bytes_of(layer: SequenceMixer, work: Workload) -> int:
    """The layer's state after work.seq_len tokens, fed as its input schedule says."""
    return scheduled_state_bytes(layer, layer.input_schedule(layer.config), work)


def refer(layer: SequenceMixer, x: Tensor, *, causal: bool, seed: int = 2) -> Tensor:
    """The layer's own readable reference, with the same randomness as `feed`."""
    torch.manual_seed(seed)
    return scheduled_reference(layer, layer.input_schedule(layer.config), x, Context(causal=causal))


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest entry wanted (or 1)."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if not want.numel():
        return 0.0
    return (got - want).abs().max().item() / max(1.0, want.abs().max().item())


def assert_same(
    got: Callable[[], Tensor],
    want: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    inputs_wanted: Sequence[Tensor] | None = None,
    tolerance: float = EXACT,
) -> None:
    """Two computations agree in their output and in the gradient of every input.

    `inputs_wanted` are the second computation's inputs in the same order, where they are other tensors.
    """
    y, y_want = got(), want()
    assert y_want.isfinite().all()
    assert difference(y, y_want) <= tolerance, "outputs differ"
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(y, inputs, direction, materialize_grads=True)
    wanted = torch.autograd.grad(y_want, inputs_wanted or inputs, direction, materialize_grads=True)
    for index, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        assert difference(a, b) <= tolerance, f"gradients of input {index} differ"


def assert_same_layer(got: SequenceMixer, want: SequenceMixer, x: Tensor, *, causal: bool) -> None:
    """Two layers are one map: given the same weights, the same outputs and gradients."""
    want.load_state_dict(got.state_dict())
    assert_same(
        lambda: feed(got, x, causal=causal),
        lambda: feed(want, x, causal=causal),
        [x, *got.parameters()],
        [x, *want.parameters()],
    )


def rotated(x: Tensor) -> Tensor:
    """(B, T, H, D): channels i and i + D/2 as one complex number, turned by position · 10000^(−2i/D)."""
    half = x.shape[-1] // 2
    turns = [[p * 10_000.0 ** (-i / half) for i in range(half)] for p in range(x.shape[1])]
    turn = torch.exp(1j * torch.tensor(turns, dtype=torch.float64))[:, None]  # (T, 1, D/2)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """(B, T, H, D) each; allowed (H or 1, T, T) bool. Written without softmax: exp, mask, divide."""
    scores = einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * allowed
    return einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def oracle(layer: SequenceMixer, x: Tensor, allowed: Tensor) -> Tensor:
    """Multi-head softmax attention with rotary positions on the pairs allowed, (B, T, C) → (B, T, C)."""
    weights = layer.get_parameter("projections.qkv.weight").chunk(3)
    shape = (*x.shape[:2], layer.dims.heads, -1)
    q, k, v = (einsum("btc,dc->btd", x, weight).reshape(shape) for weight in weights)
    y = softmax_attention(rotated(q), rotated(k), v, allowed)
    return einsum("btc,dc->btd", y.reshape(x.shape), layer.get_parameter("projections.out.weight"))


def drawn(seq_len: int, may_read: Callable[[int, int], bool]) -> Tensor:
    """(T, T) bool, pair by pair."""
    return torch.tensor([[may_read(i, j) for j in range(seq_len)] for i in range(seq_len)])


def everything(seq_len: int, *, causal: bool) -> Tensor:
    """(T, T) bool: all pairs, or those that do not look ahead."""
    return drawn(seq_len, lambda i, j: j <= i or not causal)


def language_model(variant: type[SequenceMixer], config: VariantConfig, seq_len: int) -> LanguageModel:
    """A float64 model of two blocks; the same seed gives the same weights whatever the variant."""
    torch.manual_seed(4)
    model = LanguageModel(
        ModelSpec.of(variant, config, feed_forward=feed_forward(mult=2)),
        dims_for(seq_len),
        depth=2,
        dropout=0.0,
        vocabulary=11,
        activations="keep",
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def byte_model(name: str, seq_len: int, **knobs: Any) -> LanguageModel:
    """A float32 model of bytes with opinions on what is near and far, and with dropout, which evaluation
    has to switch off."""
    torch.manual_seed(0)
    variant = variants.load(name)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=2)),
        Workload(causal=True, batch_size=1, seq_len=seq_len, d_model=32, heads=2),
        depth=2,
        dropout=0.5,
        vocabulary=VOCABULARY,
        activations="keep",
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("out.weight", "head.weight")):
                parameter.mul_(20)
    return model


def logits_of(model: LanguageModel, tokens: Tensor, *, causal: bool) -> Tensor:
    """Final hidden states through norm and head: the model's logits before they are made float32."""
    kept: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda _module, _args, out: kept.append(out))
    try:
        model(tokens, causal=causal)
    finally:
        hook.remove()
    (logits,) = kept
    return logits
