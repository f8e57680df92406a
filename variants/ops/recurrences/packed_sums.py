"""The causal sums of Luna: a sequence packed into one state, which each token reads twice (Ma 2021,
arXiv:2106.01540).

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of a head, l packed length; n chunks of each
sequence in a segment, G = n·N chunks, c tokens of a chunk.

With S_t = Σ_{s ≤ t} w_s m_sᵀ (l, D), the weights are a_t = softmax(S_t q_t / t), and the output is
y_t = S_tᵀ a_t / t. As in `gated_scan`, pairs within a chunk are computed and masked, and earlier
chunks are one state. Both reads share it, so it is computed once in each pass.

For the backward pass are saved: inputs, a, and the state before each segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.recurrences.feature_sums import split_segments, to_chunks, write_chunks
from variants.ops.recurrences.scan_chunks import accumulate, chunk_length
from variants.ops.tile_size import Sizes

SEGMENT = Sizes(cpu=2**17, accelerator=2**28)
"""Numbers of one tensor (tokens of all sequences together, times channels) of a segment. The CPU's value
keeps them in cache."""


class Plan(NamedTuple):
    """How the sequence is divided."""

    chunk: int
    tokens: int
    """Tokens of a segment, of all sequences together."""

    @classmethod
    def make(cls, w: Tensor, m: Tensor, chunk: int, device_type: str) -> Plan:
        """Segments that suit the device, in chunks of equal lengths, of at most `chunk` tokens."""
        tokens = max(1, SEGMENT.on(device_type) // max(w.shape[-1], m.shape[-1]))
        return cls(chunk_length(w.shape[2], chunk), tokens)


def packed_flops(seq_len: int, length: int, head_dim: int, *, chunk: int) -> int:
    """Forward FLOPs of one sequence: the state, two reads of it, and two products for each of the pairs
    within chunks of at most `chunk` tokens, of queries and of weights."""
    c = chunk_length(seq_len, chunk)
    full, remainder = divmod(seq_len, c)
    pairs = full * (c * (c + 1) // 2) + remainder * (remainder + 1) // 2
    return 4 * pairs * (length + head_dim) + 6 * seq_len * length * head_dim


def _counts(before: int, tokens: int, like: Tensor) -> Tensor:
    """1/t for the tokens of a segment, as (1, 1, T, 1) to broadcast over sequences."""
    count = torch.arange(before + 1, before + tokens + 1, device=like.device, dtype=like.dtype)
    return count.reciprocal().view(1, 1, -1, 1)


def _states(w: Tensor, m: Tensor, start: Tensor) -> Tensor:
    """The states (n + 1, N, l, D) before each chunk and after the last one, for w (G, c, l), m (G, c, D)."""
    states = start.new_empty(len(w) // len(start) + 1, *start.shape)
    states[0] = start
    torch.bmm(w.mT, m, out=states[1:].view(-1, *start.shape[1:]))
    accumulate(states, None)
    return states


@repeatable
def read(
    plan: Plan, tensors: tuple[Tensor, ...], each: Tensor, start: Tensor, a: Tensor, y: Tensor
) -> Tensor:
    """Write the weights and outputs of a segment of (q, w, m); return the state after it. `each` is 1/t."""
    q, w, m = (to_chunks(x, plan.chunk) for x in tensors)
    share = to_chunks(each.expand(*tensors[0].shape[:3], 1), plan.chunk)
    states = _states(w, m, start)
    before = states[:-1].view(-1, *start.shape[1:])
    scores = torch.baddbmm(torch.bmm(q, before.mT), (q @ m.mT).tril_(), w)
    weights = scores.mul_(share).softmax(-1)
    found = torch.baddbmm(torch.bmm(weights, before), (weights @ w.mT).tril_(), m)
    write_chunks(a, weights)
    write_chunks(y, found.mul_(share))
    # a copy, because a view would keep the states before all chunks
    return states[-1].clone()


@repeatable
def read_backward(
    plan: Plan,
    tensors: tuple[Tensor, ...],
    each: Tensor,
    start: Tensor,
    of_end: Tensor,
    a: Tensor,
    grad: Tensor,
    targets: tuple[Tensor, ...],
) -> Tensor:
    """Write the gradients of q, w and m of a segment; return that of the state before it."""
    q, w, m = (to_chunks(x, plan.chunk) for x in tensors)
    share = to_chunks(each.expand(*tensors[0].shape[:3], 1), plan.chunk)
    weights, g = to_chunks(a, plan.chunk), to_chunks(grad, plan.chunk) * share
    states = _states(w, m, start)
    before = states[:-1].view(-1, *start.shape[1:])

    pairs = (g @ m.mT).tril_()
    of_weights = torch.baddbmm(torch.bmm(g, before.mT), pairs, w)
    of_w = pairs.mT @ weights
    of_m = (weights @ w.mT).tril_().mT @ g
    of_scores = torch.sub(of_weights, (of_weights * weights).sum(-1, keepdim=True)).mul_(weights).mul_(share)
    pairs = (of_scores @ w.mT).tril_()
    of_q = torch.baddbmm(torch.bmm(of_scores, before), pairs, m)
    of_m = torch.baddbmm(of_m, pairs.mT, q)
    of_w = torch.baddbmm(of_w, (q @ m.mT).tril_().mT, of_scores)

    of_states = states  # they are not read again
    own = of_states[:-1].view(-1, *start.shape[1:])
    torch.bmm(weights.mT, g, out=own)
    own.baddbmm_(of_scores.mT, q)
    of_states[-1] = of_end
    accumulate(of_states, None, backward=True)
    later = of_states[1:].view(-1, *start.shape[1:])
    for target, gradient in zip(
        targets, (of_q, torch.baddbmm(of_w, m, later.mT), torch.baddbmm(of_m, w, later)), strict=True
    ):
        write_chunks(target, gradient)
    return of_states[0].clone()


def read_segments(
    plan: Plan, q: Tensor, w: Tensor, m: Tensor, start: Tensor, before: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs (B, H, T, D), weights (B, H, T, l), and the states before all segments and after the last.

    `start` (N, l, D) is the state after the `before` tokens that precede.
    """
    batch, heads, tokens, head_dim = m.shape
    # the layout that an output projection reads
    y = m.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    a, states = torch.empty_like(w), [start]
    each = _counts(before, tokens, w).expand(batch, heads, -1, -1)
    for *tensors, share, of_a, of_y in split_segments(plan.tokens, plan.chunk, q, w, m, each, a, y):
        states.append(read(plan, tuple(tensors), share, states[-1], of_a, of_y))
    return y, a, states


@repeatable
class _PackedSums(torch.autograd.Function):
    """Processes the segments in order with the state; in backward, in reverse with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, w: Tensor, m: Tensor) -> Tensor:
        batch, heads, _, head_dim = m.shape
        start = w.new_zeros(batch * heads, w.shape[-1], head_dim)
        y, a, states = read_segments(plan, q, w, m, start, 0)
        ctx.save_for_backward(q, w, m, a, *states[:-1])
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        q, w, m, a, *starts = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, w, m)]
        each = _counts(0, w.shape[2], w).expand(*w.shape[:2], -1, -1)
        segments = split_segments(plan.tokens, plan.chunk, q, w, m, each, a, grad, *grads)
        of_end = torch.zeros_like(starts[0])
        for parts, start in zip(reversed(segments), reversed(starts), strict=True):
            of_end = read_backward(plan, parts[:3], parts[3], start, of_end, parts[4], parts[5], parts[6:])
        return None, *grads


def packed_sums(q: Tensor, w: Tensor, m: Tensor, *, chunk: int, device_type: str) -> Tensor:
    """Outputs (B, H, T, D) of scaled queries and tokens q, m (B, H, T, D), and weights w (B, H, T, l).

    `w` are float32 or wider. `chunk` is in tokens, `device_type` decides the size of the segments.
    """
    y: Tensor = _PackedSums.apply(  # type: ignore[no-untyped-call]
        Plan.make(w, m, chunk, device_type), q, w, m
    )
    return y
