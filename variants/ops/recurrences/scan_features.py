"""Feature maps of linear attention that are functions of one vector, with their derivatives.

Shapes: G chunks of c tokens, D channels of a head, m features.

`gated_scan` computes features of one segment of the sequence at a time, in both passes, and
saves none. A map therefore states its derivative. Positive random features, whose exponents need a level, are
in `features.positive_features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureMap(Protocol):
    """φ: vectors (G, c, D) → features (G, c, m). `table` are constant numbers of the map, or None."""

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """m, the number of features of a vector of D channels."""

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """φ(x). The result may be x itself."""

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """The gradient of x, from that of φ(x), which may be overwritten."""


@dataclass(frozen=True)
class Identity:
    """φ(x) = x."""

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """D."""
        return head_dim

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """x."""
        return x

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """The same gradient."""
        return grad


@dataclass(frozen=True)
class EluPlusOne:
    """φ(x) = elu(x) + 1: exp(x) where x < 0, and x + 1 elsewhere (Katharopoulos 2020, arXiv:2006.16236, eq.
    7).

    Computed as exp(min(x, 0)) + max(x, 0), which is positive down to x = -87 in float32. The sum of elu and 1
    would be 0 below -17.
    """

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """D."""
        return head_dim

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """φ(x)."""
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """The derivative is min(φ(x), 1)."""
        return grad.mul_(features.clamp(max=1))


@dataclass(frozen=True)
class Silu:
    """φ(x) = x · sigmoid(x), which may be negative."""

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """D."""
        return head_dim

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """φ(x)."""
        return F.silu(x)

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """The derivative is σ + φ(x) · (1 − σ), with σ = sigmoid(x)."""
        sigmoid = x.sigmoid()
        return grad.mul_(sigmoid.addcmul_(features, 1 - sigmoid))


@dataclass(frozen=True)
class SinesAndCosines:
    """φ(x) = [sin ωx, cos ωx]/√n for n directions ω (Peng 2021, arXiv:2103.02143); m = 2n.

    `table` is (n, D), and all heads share it.
    """

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """2n."""
        assert table is not None
        return 2 * len(table)

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """φ(x)."""
        assert table is not None
        angles = x @ table.mT
        features = torch.cat([angles.sin(), angles.cos_()], -1)
        return features.mul_(len(table) ** -0.5)

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """The derivative of a sine is the cosine of the same direction, which is a feature."""
        assert table is not None
        sines, cosines = features.chunk(2, -1)
        of_sines, of_cosines = grad.chunk(2, -1)
        of_angles = (of_sines * cosines).addcmul_(of_cosines, sines, value=-1)
        return of_angles @ table


@dataclass(frozen=True)
class Taylor:
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√D, the Taylor series of exp(s) (Arora 2024, arXiv:2402.18668).

    With u = x/D^¼, the features are 1, u, u_i²/√2, and u_i u_j once for each pair i < j: the paper has each
    pair twice, with half the weight. D is even; m = 1 + D + D(D + 1)/2.

    Pairs are computed by their distance: u_i u_{i + r}, where indices wrap around, for r = 1 … D/2 − 1, and
    half of those with r = D/2.
    """

    def width(self, head_dim: int, table: Tensor | None) -> int:
        """m."""
        return 1 + head_dim + head_dim * (head_dim + 1) // 2

    def features(self, x: Tensor, table: Tensor | None) -> Tensor:
        """φ(x)."""
        head_dim = x.shape[-1]
        half = head_dim // 2
        u = x * head_dim**-0.25
        pairs = u[..., None, :] * self._shifted(u)  # (…, D/2 − 1, D)
        ones = torch.ones_like(u[..., :1])
        squares = u.square().mul_(0.5**0.5)
        return torch.cat([ones, u, squares, pairs.flatten(-2), u[..., :half] * u[..., half:]], -1)

    @staticmethod
    def _shifted(u: Tensor) -> Tensor:
        """u_{i + r} for the distances r = 1 … D/2 − 1: a view (…, D/2 − 1, D) of u twice."""
        head_dim = u.shape[-1]
        return torch.cat([u, u], -1).unfold(-1, head_dim, 1)[..., 1 : head_dim // 2, :]

    def gradient(self, grad: Tensor, features: Tensor, x: Tensor, table: Tensor | None) -> Tensor:
        """Of a product u_i u_j, u_i has the gradient times u_j, and the other way round."""
        head_dim = x.shape[-1]
        half, rows = head_dim // 2, head_dim // 2 - 1
        u = features[..., 1 : 1 + head_dim]
        _, own, squares, pairs, opposite = grad.split([1, head_dim, head_dim, rows * head_dim, half], -1)
        of_u = torch.addcmul(own, squares, u, value=2**0.5)
        of_u[..., :half].addcmul_(opposite, u[..., half:])
        of_u[..., half:].addcmul_(opposite, u[..., :half])
        if rows:
            pairs = pairs.unflatten(-1, (rows, head_dim))
            of_u.add_((pairs * self._shifted(u)).sum(-2))
            # row r − 1 moves by r − 1 to the right: rows with one more entry are read as rows without it
            padded = F.pad(pairs * u[..., None, :], (0, head_dim + 1)).flatten(-2)
            moved = padded[..., : rows * 2 * head_dim].unflatten(-1, (rows, 2 * head_dim)).sum(-2)
            of_u.add_((moved[..., :head_dim] + moved[..., head_dim:]).roll(1, -1))
        return of_u.mul_(head_dim**-0.25)
