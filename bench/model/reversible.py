"""Reversible networks, whose blocks store no activations (Gomez 2017, The Reversible Residual Network,
arXiv:1707.04585).

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from bench.model.visits import VisitResult, summed, weighted
from variants.base import Context, Visit


class Streams(NamedTuple):
    """The two residual streams of a reversible network, (B, T, C) each."""

    first: Tensor
    second: Tensor


class _Replay:
    """Context manager that restores the random state and the autocast settings of its construction."""

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


class _BackwardState:
    """The level that the backward pass of a network has reached, and the streams at this level."""

    def __init__(self, drift: dict[int, float] | None) -> None:
        self.level = 0
        self.streams: Streams | None = None
        self.drift = drift
        self.stored: list[Streams] = []
        """The streams below each block; stored only to measure the drift."""

    def push(self, inputs: Streams, outputs: Streams) -> int:
        """Register the forward pass of a block; returns its level, from 1."""
        self.level += 1
        self.streams = Streams(*(s.detach() for s in outputs))
        if self.drift is not None:
            self.stored.append(Streams(*(s.detach() for s in inputs)))
        return self.level

    def outputs_of(self, level: int) -> Streams:
        """Return the output streams of the block at this level, which the block overwrites with its inputs.

        Raises RuntimeError if the blocks do not run backward in order.
        """
        if self.level != level or self.streams is None:
            raise RuntimeError(
                "a reversible network must run backward once, through all blocks, from the last to the first"
            )
        return self.streams

    def pop(self) -> None:
        """Register that the inputs of the current block have been rebuilt."""
        assert self.streams is not None
        if self.drift is not None:
            pairs = zip(self.streams, self.stored.pop(), strict=True)
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            self.drift[self.level] = max(self.drift.get(self.level, 0.0), error)
        self.level -= 1
        if not self.level:
            self.streams = None


class _ReversibleBlock(torch.autograd.Function):
    """One block that stores neither stream: the backward pass rebuilds the inputs from the outputs, in place.

    y₁ = x₁ + attend(x₂), y₂ = x₂ + feed(y₁); backward: x₂ = y₂ − feed(y₁), x₁ = y₁ − attend(x₂).
    """

    @staticmethod
    def forward(
        ctx: Any,
        progress: _BackwardState,
        block: Visit,
        state: Any,
        context: Context,
        keep_state: Callable[[Any], None],
        first: Tensor,
        second: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        attend_replay = _Replay(first)
        out = block.attend(second, state, context)
        y_first = first + out.y
        feed_replay = _Replay(first)
        y_second, aux_loss = _fed(block, second, y_first)
        keep_state(out.state)
        ctx.progress = progress
        ctx.level = progress.push(Streams(first, second), Streams(y_first, y_second))
        ctx.block, ctx.state, ctx.context, ctx.replays = block, state, context, (attend_replay, feed_replay)
        return y_first, y_second, summed(out.aux_loss, aux_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor, d_aux: Tensor) -> tuple[Tensor | None, ...]:
        block, progress = ctx.block, ctx.progress
        attend_replay, feed_replay = ctx.replays
        first, second = progress.outputs_of(ctx.level)
        parameters = _trained(block)
        totals: list[Tensor | None] = [None] * len(parameters)

        def through(outputs: list[Tensor], x: Tensor, grads: list[Tensor]) -> Tensor:
            """Return the gradient of x, and add the gradients of the parameters to `totals`."""
            with torch.autocast(x.device.type, enabled=False):
                d_x, *d_parameters = torch.autograd.grad(outputs, [x, *parameters], grads, allow_unused=True)
            for i, grad in enumerate(d_parameters):
                if grad is not None:
                    before = totals[i]
                    totals[i] = grad if before is None else before + grad
            return d_x

        d_pieces = []
        with feed_replay(), torch.enable_grad():
            for y, x, d_x in zip(*(_pieces(block, s) for s in (first, second, d_second)), strict=True):
                y = y.detach().requires_grad_()
                fed, aux_loss = block.feed(y)
                if aux_loss is not None:
                    aux_loss = aux_loss * (y.shape[1] / first.shape[1])
                with torch.no_grad():
                    x.sub_(fed)
                roots, grads = _with_loss([fed], [d_x.to(fed.dtype)], aux_loss, d_aux)
                d_pieces.append(through(roots, y, grads))
        d_first = d_first + torch.cat(d_pieces, dim=1)
        del d_pieces
        with attend_replay(), torch.enable_grad():
            x = second.detach().requires_grad_()
            out = block.attend(x, ctx.state, ctx.context)
            with torch.no_grad():
                first.sub_(out.y)
            roots, grads = _with_loss([out.y], [d_first.to(out.y.dtype)], out.aux_loss, d_aux)
            d_second = d_second + through(roots, x, grads)
        progress.pop()
        return None, None, None, None, None, d_first, d_second, *totals


def _with_loss(
    roots: list[Tensor], grads: list[Tensor], aux_loss: Tensor | None, d_aux: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the roots of a backward pass and their gradients, with the auxiliary loss if there is one."""
    if aux_loss is None or not aux_loss.requires_grad:
        return roots, grads
    return [*roots, aux_loss], [*grads, d_aux]


def _trained(block: Visit) -> list[torch.nn.Parameter]:
    """Return the parameters of the block that have gradients."""
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def _pieces(block: Visit, x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(block.ff_chunks, dim=1)


def _fed(block: Visit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x + feed(y), computed by pieces of the sequence, and the sum of the auxiliary losses."""
    sums, losses, pieces = [], [], _pieces(block, y)
    for x_piece, y_piece in zip(_pieces(block, x), pieces, strict=True):
        total, aux_loss = _fed_piece(block, x_piece, y_piece)
        sums.append(total)
        losses.append(aux_loss)
    del total  # otherwise it would be alive together with the result
    return torch.cat(sums, dim=1), summed(*weighted(losses, pieces))


def _fed_piece(block: Visit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """A separate function, so that the output of the branch is freed before the next piece."""
    fed = block.feed(y)
    return x + fed.y, fed.aux_loss


def two_streams(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """The same network as `reversible` with all activations stored, as its reference."""
    first = second = x
    results = []
    for block, state in zip(visits, states, strict=True):
        out = block.attend(second, state, ctx)
        first = first + out.y
        pieces = _pieces(block, first)
        fed = [block.feed(piece) for piece in pieces]
        second = second + torch.cat([piece.y for piece in fed], dim=1)
        losses = weighted([piece.aux_loss for piece in fed], pieces)
        results.append(VisitResult(out.state, summed(out.aux_loss, *losses)))
    return (first + second) / 2, results


def reversible(
    visits: Sequence[Visit],
    x: Tensor,
    states: Sequence[Any],
    ctx: Context,
    *,
    drift: dict[int, float] | None = None,
) -> tuple[Tensor, list[VisitResult]]:
    """Store no activations of a block: the backward pass computes its input from its output (Gomez 2017, §3).

    The two residual functions are attention and feed-forward, as in the Reformer (Kitaev 2020,
    arXiv:2001.04451, §3). Both streams start as x; the output is their mean, which the paper does not
    specify. This network differs from the one that `keep` computes, and has the same size.

    The backward pass writes to `drift`: level of a block, from the bottom → maximum error of its rebuilt
    input, relative to the largest entry of the input. The error exists because floating-point subtraction is
    not exact.
    """
    progress = _BackwardState(drift)
    first = second = x
    results = []
    for block, state in zip(visits, states, strict=True):
        new_state: list[Any] = []
        first, second, aux_loss = _ReversibleBlock.apply(  # type: ignore[no-untyped-call]
            progress, block, state, ctx, new_state.append, first, second, *_trained(block)
        )
        results.append(VisitResult(new_state[0], aux_loss))
    return (first + second) / 2, results
