"""States of S_{i+1} = M_i S_i + B_i over the chunks of a segment, for `delta_rule`.

Shapes: N sequences, n chunks of each, D × D transitions M, D × V states and terms B.

In order, a chunk is one launch. As a tree, all states follow in 2·⌈log₂ n⌉ steps, for one more product of
transitions for each chunk; the number of launches matters on an accelerator only. Transitions of the delta
rule are contractions for unit keys, so their products do not grow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def levels(transitions: Tensor, *, tree: bool) -> list[Tensor]:
    """The transitions (N, n, D, D), followed, for a tree, by those of 2, 4, … chunks together.

    A tree has a power of two of chunks; identities are added.
    """
    if not tree:
        return [transitions]
    sequences, chunks, size = transitions.shape[:3]
    missing = (1 << (chunks - 1).bit_length()) - chunks
    if missing:
        identities = torch.eye(size, dtype=transitions.dtype, device=transitions.device)
        transitions = torch.cat([transitions, identities.expand(sequences, missing, size, size)], 1)
    found = [transitions]
    while found[-1].shape[1] > 2:
        left, right = _siblings(found[-1])
        found.append(torch.bmm(right, left).unflatten(0, (sequences, -1)))
    return found


def states(found: list[Tensor], terms: Tensor, edge: Tensor, *, backward: bool = False) -> Tensor:
    """The states (N, n, D, V) before all chunks, from `levels`, terms (N, n, D, V) and the first state.

    Backward, the gradients of the states after all chunks: S_i = M_iᵀ S_{i+1} + B_i, from the last one.
    """
    if len(found) == 1 and found[0].shape[1] == terms.shape[1]:
        return _in_order(found[0], terms, edge, backward)
    return _as_tree(found, terms, edge, backward)


def _in_order(transitions: Tensor, terms: Tensor, edge: Tensor, backward: bool) -> Tensor:
    chunks = terms.shape[1]
    each = [edge]
    for i in range(chunks - 1, 0, -1) if backward else range(chunks - 1):
        by = transitions[:, i].mT if backward else transitions[:, i]
        each.append(torch.baddbmm(terms[:, i], by, each[-1]))
    return torch.stack(each[::-1] if backward else each, 1)


def _siblings(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right blocks of all pairs: (N, n, …) → two views (N·n/2, …)."""
    return x[:, 0::2].flatten(0, 1), x[:, 1::2].flatten(0, 1)


def _as_tree(found: list[Tensor], terms: Tensor, edge: Tensor, backward: bool) -> Tensor:
    """Terms of larger and larger blocks; then states of smaller and smaller ones.

    A block has the state of its parent, or, forward for a right block and backward for a left one, that of
    its sibling's end.
    """
    sequences, chunks = terms.shape[:2]
    padded = found[0].shape[1]
    if padded > chunks:
        terms = torch.nn.functional.pad(terms, (0, 0, 0, 0, 0, padded - chunks))
    near, far = (1, 0) if backward else (0, 1)  # which sibling is read first

    def transition(level: Tensor, sibling: int) -> Tensor:
        by = _siblings(level)[sibling]
        return by.mT if backward else by

    sums = [terms]
    for level in found[:-1]:
        both = _siblings(sums[-1])
        sums.append(
            torch.baddbmm(both[far], transition(level, far), both[near]).unflatten(0, (sequences, -1))
        )
    result = terms.new_empty(terms.shape)
    result[:, -1 if backward else 0] = edge
    for exponent in reversed(range(len(found))):
        half, step = 1 << exponent, 2 << exponent
        if step > padded:
            continue
        # where the state of a block is kept: at its first chunk or, backward, at its last one
        known, wanted = (step - 1, half - 1) if backward else (0, half)
        parents = result[:, known::step].flatten(0, 1)
        own = _siblings(sums[exponent])[near]
        target = result[:, wanted::step].view(parents.shape)
        torch.baddbmm(own, transition(found[exponent], near), parents, out=target)
    return result[:, :chunks]
