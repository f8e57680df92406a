"""What happens to activations between forward and backward.

A strategy runs the blocks of a network in order; `STRATEGIES` maps the name of `activations=` to it.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    get_device_states,
    set_device_states,
)
from torch.utils.checkpoint import checkpoint as recompute

from variants.base import Out


class BlockOut(NamedTuple):
    """What a block returns: hidden states (B, T, C), the attention layer's new state and auxiliary loss."""

    x: Tensor
    state: Any
    aux_loss: Tensor | None


class Told(NamedTuple):
    """What is left of a block when the next one has run: holding on to every `x` would make the forward
    pass grow with depth, whatever is stored for the backward pass."""

    state: Any
    aux_loss: Tensor | None


class Block(Protocol):
    """A residual block: x + attend(x), then x + feed(x). Both branches norm their input themselves."""

    ff_chunks: int
    """Pieces of the sequence that `feed` may be given one at a time."""

    def __call__(self, x: Tensor, state: Any, *, causal: bool) -> BlockOut:
        """The whole block."""
        ...

    def attend(self, x: Tensor, state: Any, *, causal: bool) -> Out:
        """The attention branch, without x added."""
        ...

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward branch, without x added; every token by itself."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of both branches."""
        ...


Run = Callable[..., tuple[Tensor, list[Told]]]
"""(blocks, x, states, causal=…) → hidden states and what each block told."""


def _in_order(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    outs = []
    for block, state in zip(blocks, states, strict=True):
        x, *told = block(x, state, causal=causal)
        outs.append(Told(*told))
    return x, outs


def keep(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """Every activation is stored, as autograd does by itself."""
    return _in_order(blocks, x, states, causal=causal)


def _recomputed(
    size: int,
    blocks: Sequence[Block],
    x: Tensor,
    states: Sequence[Any],
    *,
    causal: bool,
    **options: Any,
) -> tuple[Tensor, list[Told]]:
    """Groups of `size` blocks, each computed again from its input in the backward pass."""
    outs: list[Told] = []
    for begin in range(0, len(blocks), size):
        group, entering = blocks[begin : begin + size], states[begin : begin + size]
        x, found = recompute(_from_cold, group, x, entering, causal=causal, use_reentrant=False, **options)
        outs += found
    return x, outs


def _from_cold(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """`_in_order` with an empty autocast cache, as a recomputation starts with.

    Autocast casts a weight once and reuses the copy. Without this, a weight that an earlier window or layer
    used would not be cast again in the forward pass, but would be in the recomputation, which must dispatch
    the same operations. The copies of one group are also freed when the next one begins.
    """
    torch.clear_autocast_cache()
    return _in_order(blocks, x, states, causal=causal)


def checkpoint(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """Only each block's input is stored; the rest is computed again in the backward pass.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, with one
    block a segment. The random state is put back for the second computation.
    """
    return _recomputed(1, blocks, x, states, causal=causal)


def sqrt(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """Only the input of every ⌈√L⌉-th of L blocks is stored (Chen et al. 2016, §4.1).

    Backward stores the activations of one such group at a time, so both grow as √L.
    """
    return _recomputed(max(1, math.isqrt(len(blocks) - 1) + 1), blocks, x, states, causal=causal)


_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def _keeps_products(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Inside an autograd.Function, where gradients are off, results are overwritten in place and what is
    # worth storing is the function's own choice.
    kept = op in _PRODUCTS and torch.is_grad_enabled()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """Of each block, the results of matrix products and attention kernels are stored; norms, activation
    functions and what else is cheap are computed again (torch's selective checkpointing).

    Variants with an autograd.Function of their own run it twice, because torch sees no kernel in it.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    return _recomputed(1, blocks, x, states, causal=causal, context_fn=contexts)


def offload(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """Every activation is stored, in the host's pinned memory instead of the device's."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _in_order(blocks, x, states, causal=causal)


# --- reversible: Gomez 2017, The Reversible Residual Network, arXiv:1707.04585 ---------------------


class Streams(NamedTuple):
    """The two residual streams of a reversible network, (B, T, C) each."""

    first: Tensor
    second: Tensor


class _Replay:
    """Randomness and autocast as they are now, for later."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device.type
        self.host = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        enabled, dtype = self.autocast
        accelerator = {} if self.device == "cpu" else {"device_type": self.device}
        with torch.random.fork_rng(self.devices, **accelerator), torch.autocast(self.device, dtype, enabled):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states)
            yield


class _Border:
    """How far down the backward pass of a network has come, and the streams there."""

    def __init__(self, drift: dict[int, float] | None) -> None:
        self.level = 0
        self.streams: Streams | None = None
        self.drift = drift
        self.stored: list[Streams] = []
        """What the streams were below each block, kept only where drift is asked for."""

    def up(self, entered: Streams, left: Streams) -> int:
        """A block was run; returns its level, from 1."""
        self.level += 1
        self.streams = Streams(*(s.detach() for s in left))
        if self.drift is not None:
            self.stored.append(Streams(*(s.detach() for s in entered)))
        return self.level

    def at(self, level: int) -> Streams:
        """The streams above the block of this level, which the block is to overwrite."""
        if self.level != level or self.streams is None:
            raise RuntimeError("a reversible network runs backward once, from its top, all blocks in order")
        return self.streams

    def down(self) -> None:
        """The block's inputs have been rebuilt."""
        assert self.streams is not None
        if self.drift is not None:
            pairs = zip(self.streams, self.stored.pop(), strict=True)
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            self.drift[self.level] = max(self.drift.get(self.level, 0.0), error)
        self.level -= 1
        if not self.level:
            self.streams = None


class _ReversibleBlock(torch.autograd.Function):
    """One block that stores neither stream: backward rebuilds its inputs from its outputs, in place.

    y₁ = x₁ + attend(x₂), y₂ = x₂ + feed(y₁); backward: x₂ = y₂ − feed(y₁), x₁ = y₁ − attend(x₂).
    """

    @staticmethod
    def forward(
        ctx: Any,
        border: _Border,
        block: Block,
        state: Any,
        causal: bool,
        keep_state: Callable[[Any], None],
        first: Tensor,
        second: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        attend_replay = _Replay(first)
        out = block.attend(second, state, causal=causal)
        y_first = first + out.y
        feed_replay = _Replay(first)
        pieces = zip(_pieces(block, second), _pieces(block, y_first), strict=True)
        y_second = torch.cat([x + block.feed(y) for x, y in pieces], dim=1)
        keep_state(out.state)
        ctx.border, ctx.level = border, border.up(Streams(first, second), Streams(y_first, y_second))
        ctx.block, ctx.state, ctx.causal, ctx.replays = block, state, causal, (attend_replay, feed_replay)
        return y_first, y_second, out.aux_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor, d_aux: Tensor) -> tuple[Tensor | None, ...]:
        block, border = ctx.block, ctx.border
        attend_replay, feed_replay = ctx.replays
        first, second = border.at(ctx.level)
        parameters = _trained(block)
        totals: list[Tensor | None] = [None] * len(parameters)

        def through(outputs: list[Tensor], x: Tensor, grads: list[Tensor]) -> Tensor:
            """The gradient of x; those of the parameters are added to `totals`."""
            with torch.autocast(x.device.type, enabled=False):
                d_x, *found = torch.autograd.grad(outputs, [x, *parameters], grads, allow_unused=True)
            for i, grad in enumerate(found):
                if grad is not None:
                    before = totals[i]
                    totals[i] = grad if before is None else before + grad
            return d_x

        d_pieces = []
        with feed_replay(), torch.enable_grad():
            for y, x, d_x in zip(*(_pieces(block, s) for s in (first, second, d_second)), strict=True):
                y = y.detach().requires_grad_()
                fed = block.feed(y)
                with torch.no_grad():
                    x.sub_(fed)
                d_pieces.append(through([fed], y, [d_x.to(fed.dtype)]))
        d_first = d_first + torch.cat(d_pieces, dim=1)
        del d_pieces
        with attend_replay(), torch.enable_grad():
            x = second.detach().requires_grad_()
            out = block.attend(x, ctx.state, causal=ctx.causal)
            with torch.no_grad():
                first.sub_(out.y)
            outputs, grads = [out.y], [d_first.to(out.y.dtype)]
            if out.aux_loss is not None and out.aux_loss.requires_grad:
                outputs, grads = [*outputs, out.aux_loss], [*grads, d_aux]
            d_second = d_second + through(outputs, x, grads)
        border.down()
        return None, None, None, None, None, d_first, d_second, *totals


def _trained(block: Block) -> list[torch.nn.Parameter]:
    """Its parameters that have gradients."""
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def _pieces(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(block.ff_chunks, dim=1)


def two_streams(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[Told]]:
    """The network that `reversible` computes, with every activation stored, to compare it with."""
    first = second = x
    outs = []
    for block, state in zip(blocks, states, strict=True):
        out = block.attend(second, state, causal=causal)
        first = first + out.y
        fed = [block.feed(piece) for piece in _pieces(block, first)]
        second = second + torch.cat(fed, dim=1)
        outs.append(Told(out.state, out.aux_loss))
    return (first + second) / 2, outs


def reversible(
    blocks: Sequence[Block],
    x: Tensor,
    states: Sequence[Any],
    *,
    causal: bool,
    drift: dict[int, float] | None = None,
) -> tuple[Tensor, list[Told]]:
    """No block stores its activations: each one's input is computed from its output (Gomez 2017, §3).

    The pairing is the Reformer's (Kitaev 2020, arXiv:2001.04451, §3): attention and feed-forward are
    the two residual functions, both streams start as x, and x comes out as their mean, which the paper
    leaves open. This is another network than `keep` computes, of the same size.

    `drift` is filled in by the backward pass: level of a block from the bottom → largest error of its
    rebuilt input, relative to the input's largest entry; floats do not subtract exactly.
    """
    border = _Border(drift)
    first = second = x
    outs = []
    for block, state in zip(blocks, states, strict=True):
        new_state: list[Any] = []
        first, second, aux_loss = _ReversibleBlock.apply(  # type: ignore[no-untyped-call]
            border, block, state, causal, new_state.append, first, second, *_trained(block)
        )
        outs.append(Told(new_state[0], aux_loss))
    return (first + second) / 2, outs


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way of saving activation memory."""

    run: Run
    stored: Run = keep
    """The same network with every activation stored."""
    needs_device: bool = False
    """It moves activations away from the device, so there has to be one."""
    depth_exponent: float | None = None
    """The exponent of depth with which what is saved for the backward pass is said to grow on the device:
    n of n layers, be it all or their inputs; √n where every √n-th is stored (Chen 2016, arXiv:1604.06174,
    abstract); nothing that depends on n where inputs are rebuilt (Gomez 2017, arXiv:1707.04585, abstract).
    None where nobody says."""

    def unsupported(self, device: str) -> str | None:
        """Why it cannot be used on this type of device, or None."""
        if self.needs_device and device == "cpu":
            return "moves activations from the device to the host, and on cpu they are there already"
        return None


STRATEGIES: dict[str, Strategy] = {
    "keep": Strategy(run=keep, depth_exponent=1),
    "checkpoint": Strategy(run=checkpoint, depth_exponent=1),
    "sqrt": Strategy(run=sqrt, depth_exponent=0.5),
    "selective": Strategy(run=selective, depth_exponent=1),
    "reversible": Strategy(run=reversible, stored=two_streams, depth_exponent=0),
    "offload": Strategy(run=offload, needs_device=True),
}
