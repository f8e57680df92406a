"""The mixture of experts of the Switch Transformer: one expert for a token (Fedus 2021, arXiv:2101.03961).

Deviations from §2: by default no token is dropped. With a capacity, tokens are dropped by their position in
their own sequence, and the paper's capacity counts the tokens of a whole batch: there, later tokens and other
sequences displace a token. Experts have GELU, as `mlp` here, and not ReLU. The router has no jitter, and
experts no dropout of their own (§2.4). Weights are initialised as those of other layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from variants.knobs import knob
from variants.ops.routed_experts import RoutedConfig, RoutedExperts, Routes


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(RoutedConfig):
    """Knobs of the Switch Transformer's layer."""

    capacity_factor: float | None = knob(None, above=0)
    """Tokens of a sequence that an expert takes, as a multiple of tokens / experts; null is all. The paper
    has 1 to 2. Where an expert is full, later tokens get 0 from the layer. With a capacity, the layer needs
    the whole sequence: it is not decoded, and not applied in chunks (model.ff_chunks)."""

    @property
    def routes(self) -> Routes:
        """One expert, whose gate is its probability (equation 2)."""
        return Routes(capacity_factor=self.capacity_factor)


class Switch(RoutedExperts):
    """p_e(x) · expert_e(x), where e has the largest probability p of the router (§2.1)."""

    Config = SwitchConfig
    config: SwitchConfig
    paper = "Fedus et al. 2021, Switch Transformers, arXiv:2101.03961"
