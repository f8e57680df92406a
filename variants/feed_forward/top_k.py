"""Mixtures of the k best experts (Shazeer 2017, arXiv:1701.06538), with shared experts for every token (Dai
2024, DeepSeekMoE, arXiv:2401.06066).

Deviations: no noise in the router, and the balance loss of the Switch Transformer in place of those of
Shazeer 2017, §4; for k experts it is the expert-level loss of Dai 2024, §3.3. There is no loss by devices. No
token is dropped. `normalised=false` gives the gates of Dai 2024, `expert=glu` its experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from variants.knobs import knob
from variants.ops.routed_experts import RoutedConfig, RoutedExperts, Routes


@dataclass(frozen=True, kw_only=True)
class TopKConfig(RoutedConfig):
    """Knobs of a mixture of the k best experts."""

    k: int = knob(2, least=1, unit="experts")
    """Experts that the router chooses for a token."""
    n_shared: int = knob(0, least=0, unit="experts")
    """Further experts, as wide as the others, through which every token goes with a gate of 1."""
    normalised: bool = True
    """Whether the gates of a token are divided by their sum. They are then a softmax over the k largest
    scores, in place of probabilities among all experts."""

    def __post_init__(self) -> None:
        self.require("k", self.k <= self.n_experts, f"up to n_experts={self.n_experts}")
        # the gate of a single expert would always be 1, and only the balance loss would train the router
        self.require("k", self.k > 1 or not self.normalised, "2 or more, or normalised=false")

    @property
    def routes(self) -> Routes:
        """k experts, and the shared ones."""
        return Routes(self.k, self.n_shared, self.normalised)


class TopK(RoutedExperts):
    """Σ of gate · expert over the k experts with the largest probabilities, plus Σ of the shared experts."""

    Config = TopKConfig
    config: TopKConfig
    paper = "Shazeer et al. 2017, The Sparsely-Gated Mixture-of-Experts Layer, arXiv:1701.06538"
