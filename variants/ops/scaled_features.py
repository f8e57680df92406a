"""Positive random features in the dtype of their inputs, for matrix products on an accelerator.

Shapes: D channels of a head, m features; directions ω (m, D), divided by D^¼.

`positive_features` stores exponents in float32, with a level for each feature that is the running maximum of
the keys. Here features are stored as numbers, so that tensor cores multiply them, and a level is one number
for each token, from its norm alone: with σ = |x| / D^¼, the standard deviation of ω·x over Gaussian ω,

    φ_j(x) = exp(ω_j·x − λ(σ)),    λ(σ) = min(σ²/2, 4σ).

Up to σ = 8 these are the features of arXiv:2009.14794, Lemma 1. Above, σ²/2 leaves the range of floating
point, while the largest of m exponents is near σ·√(2 log m) (3.3 σ for m = 256). The level of a query cancels
in the normaliser. A key has the weight exp(λ(σ) − σ²/2) ≤ 1, by which its value is multiplied.

Limits: a weight below 2^-126 is 0. A query whose weights are all 0 gives NaN; that needs keys with σ above 17
(|k| > 48 for D = 64), or queries and keys with σ above 15 that point away from each other. A feature
overflows if x with σ above 22 points exactly along its direction. In bfloat16, features are rounded to 8 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.positive_features import RELU_FLOOR

STEEPEST = 4.0
"""The slope of λ(σ) for large σ."""
ALIGNED = 8
"""Entries to which rows are padded: tensor cores read 16 bytes at a time."""


def feature_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features of inputs of a dtype: float16 has not enough exponents and becomes float32."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


class ScaledFeatures(NamedTuple):
    """A feature map, whose features are numbers of `dtype`."""

    directions: Tensor
    """(m, D), divided by D^¼, float32 or wider."""
    softmax: bool
    """Softmax features if true, else relu features."""
    dtype: torch.dtype

    def of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors (…, D), float32 or wider → features (…, m), and the weights (…, 1) that a key has, of the
        dtype of x. The weights are None for relu."""
        flat, directions = x.flatten(0, -2), self.directions.mT
        if self.softmax:
            spread = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.25)
            half = spread * 0.5
            level = half.clamp(max=STEEPEST).mul_(spread).div_(math.log(2))
            weights = half.mul_(spread).div_(-math.log(2)).add_(level).exp2_().view(*x.shape[:-1], 1)
            exponents = torch.addmm(level, flat, directions / math.log(2), beta=-1)
            # one pass over the exponents, which are the largest tensor of a layer: computed in their dtype,
            # rounded where they are written
            narrow = exponents.dtype != self.dtype
            found = exponents.new_empty(exponents.shape, dtype=self.dtype) if narrow else exponents
            torch.exp2(exponents, out=found)
        else:
            floor = flat.new_full((1,), RELU_FLOOR)
            weights, raised = None, torch.addmm(floor, flat, directions)
            found = raised.clamp_(min=RELU_FLOOR).to(self.dtype)
        return found.view(*x.shape[:-1], -1), weights

    def queries_backward(self, grad: Tensor, features: Tensor) -> Tensor:
        """Gradient of the features of queries (…, m), which is overwritten → of the queries (…, D).

        The levels are constants here: outputs do not depend on them.
        """
        return self._of_exponents(grad, features) @ self.directions.to(self.dtype)

    def keys_backward(self, grad: Tensor, features: Tensor, keys: Tensor) -> Tensor:
        """Gradient of the features of keys (…, m), which is overwritten → of the keys (…, D).

        For softmax the gradient of the weights is included: it is the sum of the gradients of the exponents.
        """
        of_exponents = self._of_exponents(grad, features)
        directions = self.directions.to(self.dtype)
        if not self.softmax:
            return of_exponents @ directions
        head_dim = keys.shape[-1]
        with_sums = torch.nn.functional.pad(directions, (0, ALIGNED))
        with_sums[:, head_dim] = 1
        along, sums = (of_exponents @ with_sums).split([head_dim, ALIGNED], dim=-1)
        return torch.addcmul(along, sums[..., :1], keys.to(self.dtype), value=-(head_dim**-0.5))

    def _of_exponents(self, grad: Tensor, features: Tensor) -> Tensor:
        if self.softmax:
            return grad.mul_(features)
        # the floor itself is rounded, by up to half of this
        return grad.mul_(features > RELU_FLOOR * (1 + torch.finfo(self.dtype).eps))


def with_normaliser(values: Tensor, norms: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Append `norms` (…, 1), ones by default, to values (…, D), and pad with zeros: (…, D + 8)."""
    head_dim = values.shape[-1]
    joined = values.new_zeros(*values.shape[:-1], head_dim + ALIGNED, dtype=dtype)
    joined[..., :head_dim] = values
    joined[..., head_dim : head_dim + 1] = 1 if norms is None else norms
    return joined
