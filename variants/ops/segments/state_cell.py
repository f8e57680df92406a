"""The recurrent cell of state vectors that read blocks of tokens (Hutchins 2022, arXiv:2203.07852).

Shapes: B batch, S state vectors, C channels, H heads of queries, K heads of keys, G = H / K, D channels of a
head, W tokens of a block, n blocks. A state is (B, S, C), in float32 or wider.

One step, from the state c and the keys and values of a block:

    h = c / rms(c) ∘ scale + identity                          the identity tells the vectors apart
    q, q′, k, v = h Wᵀ                                         tied: q′ = q
    y = [softmax(q kᵀ/√D) v, softmax(q′ k_blockᵀ/√D) v_block]  tied: their sum
    z = y Uᵀ + u
    fixed gate:  c ← g ∘ c + (1 − g) ∘ z,  g = σ(b)
    LSTM gate:   c ← f ∘ c + i ∘ z,  f = σ(y F_fᵀ + b_f + 1),  i = σ(y F_iᵀ + b_i − 1)

The backward pass computes a step again, from the state before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.segments.state_weights import Weights

EPS = 1e-5
"""Added to the mean square of a state vector."""
FORGET, INPUT = 1.0, -1.0
"""Added to the logits of the LSTM gates: states are kept at first."""


class _Attended(NamedTuple):
    """Attention of one kind, with what its gradient needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> _Attended:
        """Queries (B, K, G·S, D)."""
        return cls(q, k, v, ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1))

    def gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_weights = dy @ self.v.mT
        d_scores = self.weights * (d_weights - (d_weights * self.weights).sum(-1, keepdim=True))
        d_scores = d_scores * self.q.shape[-1] ** -0.5
        return d_scores @ self.k, d_scores.mT @ self.q, self.weights.mT @ dy


def _rows(x: Tensor, key_heads: int, head_dim: int) -> Tensor:
    """(B, S, H·D) → (B, K, G·S, D): the queries that share keys, one after the other."""
    rows: Tensor = x.unflatten(-1, (key_heads, -1, head_dim)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return rows


def _channels(rows: Tensor, states: int) -> Tensor:
    """(B, K, G·S, D) → (B, S, H·D)."""
    channels: Tensor = rows.unflatten(2, (-1, states)).permute(0, 3, 1, 2, 4).flatten(2)
    return channels


def _both(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """(B, S, Q) → (B, S, H·D) of each kind of attention."""
    one, *other = x.split(weights.inner, dim=-1)
    return one, (other or [one])[0]


def _joined(parts: list[Tensor], weights: Weights) -> Tensor:
    """(B, S, H·D) of each kind of attention → (B, S, Q)."""
    return parts[0] + parts[1] if weights.tied else torch.cat(parts, dim=-1)


def _normal(c: Tensor) -> tuple[Tensor, Tensor]:
    """c / rms(c), and 1 / rms(c)."""
    factor = c.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
    return c * factor, factor


def _hidden(normal: Tensor, weights: Weights) -> Tensor:
    """h, in the dtype of the weights."""
    return (normal * weights.scale + weights.identity).to(weights.project.dtype)


def keys_and_values(c: Tensor, weights: Weights, key_heads: int) -> tuple[Tensor, Tensor]:
    """The keys and values (B, K, S, D) of a state, which its tokens read."""
    found = F.linear(_hidden(_normal(c)[0], weights), weights.project[weights.queries :])
    k, v = found.unflatten(-1, (2, key_heads, -1)).permute(2, 0, 3, 1, 4)
    return k, v


class _Step(NamedTuple):
    """What one step computes."""

    normal: Tensor
    factor: Tensor
    hidden: Tensor
    own: _Attended
    block: _Attended
    y: Tensor
    z: Tensor
    keep: Tensor
    """What the state is multiplied by, and `take`, what z is multiplied by; float32 or wider."""
    take: Tensor

    @classmethod
    def of(cls, c: Tensor, k: Tensor, v: Tensor, weights: Weights) -> _Step:
        """Keys and values of the block (B, K, W, D)."""
        (key_heads, _, head_dim), states = k.shape[1:], c.shape[1]
        normal, factor = _normal(c)
        hidden = _hidden(normal, weights)
        queries, kv = F.linear(hidden, weights.project).tensor_split([weights.queries], dim=-1)
        q, q_block = (_rows(t, key_heads, head_dim) for t in _both(queries, weights))
        own_k, own_v = kv.unflatten(-1, (2, key_heads, -1)).permute(2, 0, 3, 1, 4)
        own = _Attended.of(q, own_k, own_v)
        block = _Attended.of(q_block, k, v)
        y = _joined([_channels(part.weights @ part.v, states) for part in (own, block)], weights)
        z = F.linear(y, weights.update, weights.bias)
        if weights.gates is None:
            keep = weights.gate.to(c.dtype).sigmoid()
            take = 1 - keep
        else:
            logits = F.linear(y, weights.gates, weights.gate).to(c.dtype)
            forget, new = logits.chunk(2, dim=-1)
            keep, take = (forget + FORGET).sigmoid(), (new + INPUT).sigmoid()
        return cls(normal, factor, hidden, own, block, y, z, keep, take)

    def next(self, c: Tensor) -> Tensor:
        """The state after the block."""
        return torch.addcmul(self.keep * c, self.take, self.z.to(c.dtype))


@repeatable
def next_state(
    c: Tensor, k: Tensor, v: Tensor, weights: Weights, read: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The state after a block with the keys and values (B, K, W, D).

    The keys and values of the state before it are written to `read`, if given.
    """
    step = _Step.of(c, k, v, weights)
    if read is not None:
        read[0].copy_(step.own.k)
        read[1].copy_(step.own.v)
    return step.next(c)


@repeatable
def step_backward(
    c: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    d_next: Tensor,
    d_read: tuple[Tensor, Tensor],
    d_block: tuple[Tensor, Tensor],
    totals: Weights,
) -> Tensor:
    """The gradient of the state, from those of the next state and of the keys and values of the state.

    The gradients of the keys and values of the block are written to `d_block`; those of the weights are added
    to `totals`.
    """
    step, states, dtype = _Step.of(c, k, v, weights), c.shape[1], weights.project.dtype
    key_heads, head_dim = k.shape[1], k.shape[3]
    d_z = (step.take * d_next).to(dtype)
    d_y = d_z @ weights.update
    totals.update.add_(_over_vectors(d_z, step.y))
    totals.bias.add_(d_z.sum((0, 1)))
    if weights.gates is None:
        slope = step.keep * step.take
        totals.gate.add_(slope * (d_next * (c - step.z)).sum((0, 1)))
    else:
        d_keep = d_next * c * step.keep * (1 - step.keep)
        d_take = d_next * step.z * step.take * (1 - step.take)
        d_logits = torch.cat([d_keep, d_take], dim=-1).to(dtype)
        d_y = d_y + d_logits @ weights.gates
        assert totals.gates is not None
        totals.gates.add_(_over_vectors(d_logits, step.y))
        totals.gate.add_(d_logits.sum((0, 1)))
    d_own, d_of_block = (_rows(part, key_heads, head_dim) for part in _both(d_y, weights))
    d_q, d_k, d_v = step.own.gradients(d_own)
    d_q_block, *d_tokens = step.block.gradients(d_of_block)
    for given, found in zip(d_block, d_tokens, strict=True):
        given.copy_(found)
    d_kv = torch.stack([d_k + d_read[0], d_v + d_read[1]]).permute(1, 3, 0, 2, 4).flatten(2)
    d_queries = _joined([_channels(d_q, states), _channels(d_q_block, states)], weights)
    d_found = torch.cat([d_queries, d_kv], dim=-1)
    totals.project.add_(_over_vectors(d_found, step.hidden))
    d_hidden = (d_found @ weights.project).to(c.dtype)
    return step.keep * d_next + _normal_backward(d_hidden, step.normal, step.factor, weights, totals)


@repeatable
def read_backward(c: Tensor, weights: Weights, d_read: tuple[Tensor, Tensor], totals: Weights) -> Tensor:
    """The gradient of a state that is only read, from those of its keys and values."""
    normal, factor = _normal(c)
    first = weights.queries
    d_found = torch.stack(d_read).permute(1, 3, 0, 2, 4).flatten(2)
    totals.project[first:].add_(_over_vectors(d_found, _hidden(normal, weights)))
    d_hidden = (d_found @ weights.project[first:]).to(c.dtype)
    return _normal_backward(d_hidden, normal, factor, weights, totals)


def _over_vectors(d_out: Tensor, given: Tensor) -> Tensor:
    """The gradient of a matrix, over all vectors (B, S, …)."""
    return d_out.flatten(0, 1).T @ given.flatten(0, 1)


def _normal_backward(
    d_hidden: Tensor, normal: Tensor, factor: Tensor, weights: Weights, totals: Weights
) -> Tensor:
    totals.identity.add_(d_hidden.sum(0))
    totals.scale.add_((d_hidden * normal).sum((0, 1)))
    d_normal = d_hidden * weights.scale
    along = (d_normal * normal).mean(-1, keepdim=True)
    return factor * torch.addcmul(d_normal, normal, along, value=-1)
