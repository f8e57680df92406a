"""Which numbers of heads attention with rotary positions can have. Imports no torch."""

from __future__ import annotations


def unusable_heads(d_model: int, heads: int) -> str | None:
    """Why attention with rotary positions cannot have this width and number of heads, or None."""
    if heads < 1 or d_model % heads:
        near = _divisor(d_model, heads)
        return f"heads={heads}: must divide d_model={d_model}; the nearest that does is {near}"
    if (d_model // heads) % 2:
        return (
            f"heads={heads}: gives heads of {d_model // heads} channels of d_model={d_model}; "
            "rotary positions need an even number"
        )
    return None


def _divisor(number: int, near: int) -> int:
    """The divisor of a number that is nearest to another one; the smaller of two."""
    if near >= number:
        return max(number, 1)
    near = max(near, 1)
    below = next(n for n in range(near, 0, -1) if number % n == 0)
    above = (n for n in range(near + 1, 2 * near - below) if number % n == 0)
    return next(above, below)
