"""Rotary positions: their base, and the numbers of heads that are possible. Does not import torch."""

from __future__ import annotations

ROTARY_BASE = 10_000.0
"""Base of the rotary angles (Su 2021, arXiv:2104.09864, §3.2.2), unless a model has another."""


def unusable_heads(
    d_model: int, heads: int, head_size: int | None = None, kv_heads: int | None = None
) -> str | None:
    """The reason why attention with rotary positions cannot have these heads, or None.

    `head_size` is the number of channels of a head; None: d_model / heads. `kv_heads` is the number of heads
    of keys and values; None: `heads`.
    """
    if kv_heads is not None and heads >= 1 and (kv_heads < 1 or heads % kv_heads):
        nearest = _nearest_divisor(heads, kv_heads)
        return f"kv_heads={kv_heads}: must divide heads={heads}; the nearest divisor is {nearest}"
    if head_size is not None:
        if heads < 1:
            return f"heads={heads}: allowed is 1 or more"
        if head_size < 2 or head_size % 2:
            allowed = "rotary positions need an even number, 2 or more"
            return f"head_size={head_size}: {allowed}; the nearest is {max(2, head_size // 2 * 2)}"
        return None
    if heads < 1 or d_model % heads:
        nearest = _nearest_divisor(d_model, heads)
        return f"heads={heads}: must divide d_model={d_model}; the nearest divisor is {nearest}"
    if (d_model // heads) % 2:
        return (
            f"heads={heads}: each head has {d_model // heads} channels of d_model={d_model}; "
            "rotary positions need an even number"
        )
    return None


def _nearest_divisor(number: int, target: int) -> int:
    """The divisor of `number` that is nearest to `target`; the smaller one of two."""
    if target >= number:
        return max(number, 1)
    target = max(target, 1)
    below = next(n for n in range(target, 0, -1) if number % n == 0)
    above = (n for n in range(target + 1, 2 * target - below) if number % n == 0)
    return next(above, below)
