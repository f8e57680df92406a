"""Sparse Transformer, strided pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride.
"""

from __future__ import annotations

from dataclasses import dataclass

from variants.ops import masks
from variants.ops.factorised import Role, SparseAttention, SparseConfig
from variants.ops.masks import Rule, SameResidue, Window
from variants.ops.regions import Region


@dataclass(frozen=True, kw_only=True)
class SparseStridedConfig(SparseConfig):
    """Knobs of the strided pattern: those that both patterns have."""


class SparseStrided(SparseAttention):
    """The previous l tokens and itself (near), and every l-th token before (far).

    The near factor is a window. The far factor is dense attention among the tokens of a residue, which stand
    side by side in the order of its region. Bidirectionally both extend to later tokens, which the paper does
    not have: l on each side, and the whole column.
    """

    Config = SparseStridedConfig
    config: SparseStridedConfig

    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """|i − j| ≤ l, i ≡ j (mod l), or either."""
        near, far = Window(self.stride + 1), SameResidue(self.stride)
        return {"near": near, "far": far, "merged": near | far}[role.factor]

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The window and the columns of each role; the pairs of both, at distances 0 and ±l, in one of them.

        Causally the window keeps them, and the column is a triangle; bidirectionally the column is whole.
        """
        near, far = Window(self.stride + 1), SameResidue(self.stride)
        regions = []
        for role in self.roles:
            merged, heads = role.factor == "merged", (role.first, role.last)
            if role.factor != "far":
                rule = near & masks.causal if causal else near - far if merged else near
                regions.append(Region(rule=rule, heads=heads))
            if role.factor != "near":
                rule = far & masks.causal if causal else far
                rule = rule - near if causal and merged else rule
                regions.append(Region(rule=rule, step=self.stride, heads=heads))
        return tuple(regions)
