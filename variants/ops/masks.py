"""Attention patterns as pure rules: (query index, key index) → may the query read the key.

A rule takes two integer tensors that broadcast against each other and returns a bool tensor.
Rules compose with `both` and `either`; `matrix` draws one. They are the oracle of the fast
paths and the picture in the gallery, never the way a variant computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor], Tensor]


def anything(i: Tensor, j: Tensor) -> Tensor:
    """Every key."""
    return (i >= 0) & (j >= 0)


def causal(i: Tensor, j: Tensor) -> Tensor:
    """No later key."""
    return j <= i


def window(size: int, dilation: int | Tensor = 1) -> Rule:
    """Keys less than `size` steps of `dilation` away, on either side: size − 1 neighbours a side.

    A tensor of dilations broadcasts against the indices.
    """

    def rule(i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).abs()
        return (distance < size * dilation) & (distance % dilation == 0)

    return rule


def same(group: Callable[[Tensor], Tensor]) -> Rule:
    """Keys whose group index equals the query's."""
    return lambda i, j: group(i) == group(j)


def span(first: Callable[[Tensor], Tensor], length: int) -> Rule:
    """Keys in [first(i), first(i) + length)."""
    return lambda i, j: (first(i) <= j) & (j < first(i) + length)


def both(*rules: Rule) -> Rule:
    """Keys that every rule allows."""

    def rule(i: Tensor, j: Tensor) -> Tensor:
        allowed = rules[0](i, j)
        for other in rules[1:]:
            allowed = allowed & other(i, j)
        return allowed

    return rule


def either(*rules: Rule) -> Rule:
    """Keys that any rule allows."""

    def rule(i: Tensor, j: Tensor) -> Tensor:
        allowed = rules[0](i, j)
        for other in rules[1:]:
            allowed = allowed | other(i, j)
        return allowed

    return rule


def matrix(rule: Rule, seq_len: int) -> Tensor:
    """(T, T) bool: rows are queries, columns are keys."""
    index = torch.arange(seq_len)
    return rule(index[:, None], index[None, :])


def window_pairs(seq_len: int, size: int, *, is_causal: bool) -> int:
    """How many (query, key) pairs an undilated window allows, in closed form."""
    reach = min(size, seq_len)
    one_sided = reach * (reach + 1) // 2 + (seq_len - reach) * reach
    return one_sided if is_causal else 2 * one_sided - seq_len


def composed(layers: Sequence[Tensor]) -> Tensor:
    """(T, T) bool: which inputs (columns) an output (row) of a stack can depend on.

    `layers` are the patterns of its layers, lowest first. Each token also keeps what it holds, as residual
    connections let it. A window of w tokens a side reaches L·(w − 1) tokens back through L layers.
    """
    found = torch.eye(layers[0].shape[-1])
    for allowed in layers:
        found = (found + allowed.float() @ found).clamp(max=1)
    return found > 0
