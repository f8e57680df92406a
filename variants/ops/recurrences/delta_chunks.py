"""The gated delta rule over the chunks of one segment, for `delta_rule`.

Shapes: B batch, H heads, N = B·H sequences, T tokens, D channels of queries and keys, V channels of values;
n chunks of each sequence in a segment, G = N·n chunks, c tokens of a chunk.

Within a chunk, with b_t the sum of log g up to t, and S the state before the chunk (Yang 2024,
arXiv:2406.06484; with decays arXiv:2412.06464):

    K⁻ = exp(b) K, K⁺ = exp(b_c − b) K, Q⁻ = exp(b) Q
    (I + tril(Γ ∘ K Kᵀ, −1) diag β) X = V − K⁻ S
    Y = Q⁻ S + tril(Γ ∘ Q Kᵀ) diag β X
    S' = exp(b_c) S + (diag β K⁺)ᵀ X

X are the differences of the values and what the state returns for their keys. The system is solved for V and
K⁻, in float32 or wider, which gives X = U − W S. So S' = M S + R with M = exp(b_c) I − (diag β K⁺)ᵀ W and R =
(diag β K⁺)ᵀ U: everything except the states is computed for all chunks of a segment at once.

The gradient of log g_t is the sum over all pairs of an earlier column and a row from t on, those by way of
states included. Each sum is over pairs of one chunk, or over one state. A difference of two sums over the
whole sequence would be shorter, but rounding errors of weak decays would be those of strong ones too.

RWKV-7 (arXiv:2503.14456), a generalised delta rule, is not among the variants: it mixes the values of the
first layer into those of all others, and the interface of a layer has nothing that crosses layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.recurrences import affine_scan
from variants.ops.recurrences.chunk_decay import ChunkDecay, Pairs, decay_of, earlier_sums, later_sums
from variants.ops.recurrences.feature_sums import split_segments

LEAST_SQUARE = 1e-6
"""Added to the square of the length of a query or key before it is divided by its length."""


class Plan(NamedTuple):
    """What is computed, apart from the tensors."""

    chunk: int
    tokens: int
    """Tokens of a segment, of all sequences together."""
    unit: bool
    """Queries and keys are divided by their lengths."""
    tree: bool
    """The states of chunks follow in a tree, not in order."""


class Tokens(NamedTuple):
    """The tensors of a segment: (B, H, T, …) in views of the whole sequence, or (G, c, …) in chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    """(…, 1): strength of the write."""
    log_decay: Tensor | None
    """(…, 1 or D): log g_t ≤ 0."""

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Tokens:
        """All of them, in order."""
        q, k, v, beta, log_decay = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert beta is not None
        return cls(q, k, v, beta, log_decay)

    def split(self, plan: Plan, *others: Tensor) -> list[tuple[Tokens, tuple[Tensor, ...]]]:
        """The segments, each with its parts of `others`."""
        given = [x for x in self if x is not None]
        found = []
        for parts in split_segments(plan.tokens, plan.chunk, *given, *others):
            own, rest = parts[: len(given)], parts[len(given) :]
            found.append((Tokens.of(*own, *([None] if self.log_decay is None else [])), rest))
        return found


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, D) → (G, c, D), contiguous, float32 or wider; padded tokens are 0, and change nothing.

    All chunks of a sequence are neighbours, so that blocks of a tree are views.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if missing := -x.shape[2] % chunk:
        wide = torch.nn.functional.pad(wide, (0, 0, 0, missing))
    return wide.reshape(-1, chunk, x.shape[-1]).contiguous()


def _write(target: Tensor, part: Tensor) -> None:
    """Write the chunks `part` (G, c, D) to `target` (B, H, T, D)."""
    target.copy_(part.reshape(*target.shape[:2], -1, part.shape[-1])[:, :, : target.shape[2]])


def _times(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """x·y of each token, (G, c, 1). Not by `torch.linalg.vecdot`, which is a matrix product a token."""
    return (x * y).sum(-1, keepdim=True)


def _inverse_lengths(x: Tensor) -> Tensor:
    """1/|x|, (G, c, 1)."""
    return _dots(x, x).add_(LEAST_SQUARE).rsqrt_()


def _solve(system: Tensor, of: Tensor, *, transposed: bool = False) -> Tensor:
    """(I + system)⁻¹ of, or with the transpose; system (G, c, c) is strictly lower triangular.

    Solved as xᵀ (I + system)ᵀ = ofᵀ: the solver wants columns in memory, which rows of xᵀ are.
    """
    by = system if transposed else system.mT
    solved: Tensor = torch.linalg.solve_triangular(
        by, of.mT, upper=not transposed, left=False, unitriangular=True
    )
    return solved.mT


class Chunks(NamedTuple):
    """A segment in chunks, and all that both passes need."""

    raw: Tokens
    q: Tensor  # (G, c, D)
    k: Tensor
    inverse_q: Tensor | None  # (G, c, 1): 1/|q|
    inverse_k: Tensor | None
    decay: ChunkDecay
    scores: Tensor  # (G, c, c): tril(Γ ∘ Q Kᵀ)
    overlaps: Tensor  # (G, c, c): tril(Γ ∘ K Kᵀ, −1)
    system: Tensor  # (G, c, c): overlaps diag β
    w: Tensor  # (G, c, D)
    written: Tensor  # (G, c, D): diag β K⁺
    transitions: list[Tensor]  # see `affine_scan.levels`
    states: Tensor  # (G, D, V): before each chunk
    x: Tensor  # (G, c, V)
    end: Tensor  # (N, D, V): the state after the last chunk

    @classmethod
    def make(cls, plan: Plan, tokens: Tokens, start: Tensor, *, last: bool) -> Chunks:
        """`start` (N, D, V) is the state before the segment. `last`: whether the state after it is needed."""
        raw = Tokens.of(*(None if x is None else _to_chunks(x, plan.chunk) for x in tokens))
        inverse_q, inverse_k = map(_inverse_lengths, (raw.q, raw.k)) if plan.unit else (None, None)
        q, k = _times(raw.q, inverse_q), _times(raw.k, inverse_k)
        decay = decay_of(raw.log_decay)
        scores, overlaps = decay.pairs(q, k), decay.pairs(k, k).tril_(-1)
        system = overlaps * raw.beta.mT
        channels = [raw.v.shape[-1], k.shape[-1]]
        u, w = _solve(system, torch.cat([raw.v, _times(k, decay.before)], -1)).split(channels, -1)
        written = _times(k, decay.after) * raw.beta
        sequences = len(start)
        transition = torch.bmm(written.mT, w).neg_()
        diagonal = transition.diagonal(dim1=1, dim2=2)
        diagonal.add_(1 if decay.total is None else decay.total.squeeze(-1))
        terms = torch.bmm(written.mT, u).unflatten(0, (sequences, -1))
        transition = transition.unflatten(0, (sequences, -1))
        found = affine_scan.levels(transition, tree=plan.tree)
        states = affine_scan.states(found, terms, start)
        end = torch.baddbmm(terms[:, -1], transition[:, -1], states[:, -1]) if last else start
        states = states.flatten(0, 1)
        x = torch.baddbmm(u, w, states, alpha=-1)
        lengths = inverse_q, inverse_k
        return cls(raw, q, k, *lengths, decay, scores, overlaps, system, w, written, found, states, x, end)


@repeatable
def read(plan: Plan, tokens: Tokens, start: Tensor, y: Tensor) -> Tensor:
    """Write the outputs of a segment to y (B, H, T, V); return the state after it (N, D, V)."""
    chunks = Chunks.make(plan, tokens, start, last=True)
    found = torch.bmm(_times(chunks.q, chunks.decay.before), chunks.states)
    _write(y, torch.baddbmm(found, chunks.scores, chunks.x * chunks.raw.beta))
    return chunks.end


def _of_vectors(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """The gradient of vectors from that of unit vectors."""
    if inverse is None:
        return grad
    return grad.addcmul(unit, _dots(grad, unit), value=-1).mul_(inverse)


@repeatable
def read_backward(
    plan: Plan, tokens: Tokens, start: Tensor, of_end: Tensor, grad: Tensor, of_tokens: Tokens
) -> Tensor:
    """Write the gradients of a segment, from those of its outputs and of the state after it; return that of
    `start`."""
    chunks = Chunks.make(plan, tokens, start, last=False)
    raw, q, k, decay, states = chunks.raw, chunks.q, chunks.k, chunks.decay, chunks.states
    g = _to_chunks(grad, plan.chunk)
    # of diag β X, from the outputs; then the gradients of the states after all chunks
    of_written = torch.bmm(chunks.scores.mT, g)
    q_before, k_after = _times(q, decay.before), _times(k, decay.after)
    terms = torch.baddbmm(torch.bmm(q_before.mT, g), chunks.w.mT, of_written * raw.beta, alpha=-1)
    terms = terms.unflatten(0, (len(start), -1))
    of_states = affine_scan.states(chunks.transitions, terms, of_end, backward=True)
    of_start = torch.baddbmm(terms[:, 0], chunks.transitions[0][:, 0].mT, of_states[:, 0])
    of_states = of_states.flatten(0, 1)

    of_written = torch.baddbmm(of_written, k_after, of_states)
    of_values = _solve(chunks.system, of_written * raw.beta, transposed=True)
    of_system = torch.bmm(of_values, chunks.x.mT).neg_()
    of_beta = _dots(chunks.x, of_written).add_((of_system * chunks.overlaps).sum(1).unsqueeze(-1))
    x_beta = chunks.x * raw.beta
    of_pairs = Pairs(torch.bmm(g, x_beta.mT).tril_(), (of_system * raw.beta.mT).tril_(-1))
    of_q, of_k, *of_log = decay.pairs_backward(of_pairs, Pairs(chunks.scores, chunks.overlaps), q, k)
    # what is read from the state before a chunk, and written to the one after it
    of_reads = _times(torch.bmm(g, states.mT), decay.before)
    of_returns = _times(torch.bmm(of_values, states.mT), decay.before).neg_()
    of_writes = _times(torch.bmm(x_beta, of_states.mT), decay.after)
    if of_tokens.log_decay is not None:
        assert decay.total is not None
        of_rows = (q * of_reads).addcmul_(k, of_returns)
        of_columns = k * of_writes
        of_passed = (states * of_states).sum(-1).unsqueeze(1)  # (G, 1, D)
        if of_tokens.log_decay.shape[-1] == 1:
            of_rows, of_columns, of_passed = (
                x.sum(-1, keepdim=True) for x in (of_rows, of_columns, of_passed)
            )
        across = later_sums(of_rows).add_(earlier_sums(of_columns))
        _write(of_tokens.log_decay, across.add_(of_log[0]).addcmul_(of_passed, decay.total.mT))
    _write(of_tokens.q, _of_vectors(of_q.add_(of_reads), q, chunks.inverse_q))
    _write(of_tokens.k, _of_vectors(of_k.add_(of_returns).add_(of_writes), k, chunks.inverse_k))
    _write(of_tokens.v, of_values)
    _write(of_tokens.beta, of_beta)
    return of_start
