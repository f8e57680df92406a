"""Sparse Transformer, strided pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; l the stride.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from variants.ops.fused.flash_union import Union, Views
from variants.ops.patterns import masks
from variants.ops.patterns.factorised import Role, SparseAttention, SparseConfig
from variants.ops.patterns.masks import Rule, SameResidue, Window
from variants.ops.patterns.regions import Region, residues
from variants.ops.patterns.strided_parts import StridedTokens


@dataclass(frozen=True, kw_only=True)
class SparseStridedConfig(SparseConfig):
    """Knobs of the strided pattern: only those that both patterns have."""


class SparseStrided(SparseAttention):
    """A token reads itself and the previous l tokens (local factor), and every l-th earlier token (long-range
    factor).

    The local factor is a window. The long-range factor is dense attention among the tokens of a residue,
    which are contiguous in the order of its region. In bidirectional models, which are not in the paper, both
    factors extend to later tokens: l tokens on each side, and the complete column.
    """

    Config = SparseStridedConfig
    config: SparseStridedConfig

    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """local: |i − j| ≤ l; long_range: i ≡ j (mod l); merged: either of them."""
        local, long_range = Window(self.stride + 1), SameResidue(self.stride)
        return {"local": local, "long_range": long_range, "merged": local | long_range}[role.factor]

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The window and the columns of each role.

        The pairs at distances 0 and ±l are in both factors, but must be in one region only. Causal: in the
        window. Bidirectional: in the column.
        """
        local, long_range = Window(self.stride + 1), SameResidue(self.stride)
        regions = []
        for role in self.roles:
            merged, heads = role.factor == "merged", (role.first, role.last)
            if role.factor != "long_range":
                rule = local & masks.causal if causal else local - long_range if merged else local
                regions.append(Region(rule=rule, heads=heads))
            if role.factor != "local":
                rule = long_range & masks.causal if causal else long_range
                rule = rule - local if causal and merged else rule
                regions.append(Region(rule=rule, step=self.stride, heads=heads))
        return tuple(regions)

    def role_union(self, q: Tensor, role: Role, *, causal: bool) -> Union:
        """A window and columns; the pairs at distances 0 and ±l are in one of them, as in `regions`."""
        seq_len, reach = q.shape[2], self.stride
        everything = StridedTokens(start=0, run=seq_len)
        if role.factor == "local" or (role.factor == "merged" and causal):
            window = (reach, 0 if causal else reach)
            calls = [Views(queries=everything, keys=everything, causal=causal, window=window, whole=True)]
            return Union((*calls, *(self._columns(seq_len, 2, causal) if role.factor == "merged" else ())))
        columns = self._columns(seq_len, 0, causal)
        if role.factor == "long_range" or min(reach, seq_len) < 2:
            return Union(columns)
        # distances 1 … l − 1 in each direction: as far as l − 2 from the neighbour
        tokens, neighbours = (StridedTokens(start=start, run=seq_len - 1) for start in (0, 1))
        return Union(
            (
                *columns,
                Views(queries=neighbours, keys=tokens, causal=False, window=(reach - 2, 0)),
                Views(queries=tokens, keys=neighbours, causal=False, window=(0, reach - 2)),
            )
        )

    def _columns(self, seq_len: int, least: int, causal: bool) -> tuple[Views, ...]:
        """The tokens of a residue read each other; causal: those at least `least` rows above. The residues
        that have a token in the last row, if it is shorter, are longer columns and a call of their own."""
        region = Region(rule=SameResidue(self.stride), heads=(0, 1), step=self.stride)
        return tuple(
            Views(
                queries=residue.cut(least, residue.length - least),
                keys=residue.cut(0, residue.length - least),
                causal=causal,
            )
            for residue in residues(region, seq_len)
            if residue.length > least
        )
