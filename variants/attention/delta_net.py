"""DeltaNet: linear attention whose writes replace values (Schlag 2021, arXiv:2102.11174; Yang 2024,
arXiv:2406.06484).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from variants.base import Caps, Complexity, Info
from variants.ops.recurrences.delta_mixer import DeltaConfig, DeltaMixer, implementations


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaConfig):
    """Knobs of the convolution and of the chunks."""

    kernel: ClassVar[str] = "delta_rule"


class DeltaNet(DeltaMixer):
    """S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ; the output is S_tᵀ q_t, normalised and projected.

    A write removes the share β_t of what the state holds for the key k_t, and adds the same share of v_t;
    linear attention adds only. With k_t of length 1, the factor of S_{t−1} is a contraction.

    Queries, keys and values are swish of a causal convolution (knob `conv`), queries and keys have length 1,
    β = sigmoid(w·x), and each head has an RMS norm, all as in the paper of 2024. Order is encoded by the
    recurrence and the convolution; rotary positions would make a key differ from the same key elsewhere, so
    that no write would replace it.

    Deviations: values are as wide as keys. The paper of 2021 has other features of keys, which are divided by
    their sum, and no convolution.
    """

    Config = DeltaNetConfig
    config: DeltaNetConfig
    IMPLS = implementations(DeltaNetConfig.kernel)
    info = Info(
        paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·c·D + T·D²", source="Yang 2024, chunkwise form"),
        caps=Caps(causal=True, bidirectional=False),
    )
