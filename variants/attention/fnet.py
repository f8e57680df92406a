"""FNet: tokens are mixed by the Fourier transform, without parameters (Lee-Thorp 2021, arXiv:2105.03824).

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from variants.base import (
    Caps,
    Complexity,
    Context,
    Cost,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.ops.fourier import real_fourier, real_fourier_flops


@dataclass(frozen=True, kw_only=True)
class FnetConfig(VariantConfig):
    """Knobs of the transform."""

    norm: Literal["ortho", "none"] = "ortho"
    """Scale of the transform. ortho: divided by √(T·C), so that outputs have the size of inputs. none: plain
    sums (eq. 1), which are larger by √(T·C)."""


class Fnet(SequenceMixer):
    """Re(F_T x F_C): the real part of the Fourier transforms along tokens and channels (eq. 3).

    The layer has no parameters: with a feed-forward layer of width 4·C, a block has a third fewer than one of
    dense attention. Every output depends on every token, so there is no causal form. Heads do not matter.

    Deviations from the paper: the transform is orthonormal by default. The blocks of the paper normalise the
    sum of a branch and its input; here they normalise the input of a branch, and without a scale the outputs
    of the transform would be so large that those of the feed-forward layers are lost in the sum. No position
    embeddings are added: the transform itself depends on positions.
    """

    Config = FnetConfig
    config: FnetConfig
    info = Info(
        paper="Lee-Thorp et al. 2021, FNet: Mixing Tokens with Fourier Transforms, arXiv:2105.03824",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·C·log T", source="Lee-Thorp 2021, by FFT"),
        caps=Caps(causal=False, bidirectional=True),
    )

    @property
    def device_type(self) -> str:
        """Nothing depends on it, and there is no parameter that has a device."""
        return self.dims.device_type or "cpu"

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: every frequency is a sum over all tokens, later ones too"
        return super().no_form(config, causal=causal)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        return MixerOut(real_fourier(x, ortho=self.config.norm == "ortho"))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Products with the matrices of cosines and sines: Re((C − iS) x (C − iS)) = C x C − S x S."""
        tokens, channels = x.shape[1:]
        cos_t, sin_t = self._matrices(tokens, x)
        cos_c, sin_c = self._matrices(channels, x)
        y = cos_t @ x @ cos_c - sin_t @ x @ sin_c
        return y / math.sqrt(tokens * channels) if self.config.norm == "ortho" else y

    @staticmethod
    def _matrices(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (size, size) of 2π·a·b/size, with the product taken modulo `size` as integers."""
        index = torch.arange(size, device=like.device)
        angles = (index[:, None] * index % size).double() * (2 * math.pi / size)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def cost(self, work: Workload) -> Cost:
        """Fast transforms, counted as in `variants.ops.fourier`; constant, so there is one gradient."""
        flops = real_fourier_flops(work.batch_size, work.seq_len, work.d_model)
        return Cost({"transforms": flops}, gradients={"transforms": 1})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all inputs: the frequencies change with the length, so no sum can be continued."""
        return work.batch_size * work.seq_len * work.d_model * work.element_bytes
