"""Positive random features in the dtype of their inputs, for matrix products on an accelerator.

Shapes: D channels of a head, m features; directions ω (m, D), divided by D^¼.

`positive_features` stores exponents in float32, with a level for each feature that is the running maximum of
the keys. Here features are stored as numbers, so that tensor cores multiply them, and a level is one number
for each token, from its norm alone: with σ = |x| / D^¼, the standard deviation of ω·x over Gaussian ω,

    φ_j(x) = exp(ω_j·x − λ(σ)),    λ(σ) = min(σ²/2, σ·√(2 log m)).

Up to σ = 2·√(2 log m), which is 6.7 for m = 256, these are the features of arXiv:2009.14794, Lemma 1. Above,
σ²/2 leaves the range of floating point, while the largest of the m exponents is near σ·√(2 log m). A key has
the weight exp(λ(σ) − σ²/2) ≤ 1, by which its value is multiplied. The level of a query cancels in the
normaliser.

For bfloat16 the exponents are float16: their rounding, 2^-12 of at most about 4σ, is not larger than the
change of ω·x by the rounding of x to bfloat16, which has a standard deviation of 2^-9 σ/√3.

Limits, where `positive_features` has none: a weight below 2^-126 is 0. A query whose normaliser may therefore
be inexact, below `LEAST_NORM`, or infinite, gives NaN. That needs σ above 12 of all its keys (|k| > 34 for
D = 64), or queries and keys with σ above 10 that point away from each other. A feature overflows if x with σ
above 17 points exactly along its direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from variants.ops.features.positive_features import RELU_FLOOR

LEAST_NORM = 2.0**-100
"""Least normaliser: 2^20 weights that are lost, each below 2^-126, are less than 2 % of it."""
ALIGNED = 8
"""Entries to which rows are padded: tensor cores read 16 bytes at a time."""


def write(target: Tensor, function: Callable[..., Tensor], *args: Any) -> None:
    """Write function(*args) to `target`, rounded to its dtype, without a temporary."""
    if torch.compiler.is_compiling():  # the tracer accepts only contiguous `out`, and removes the temporary
        target.copy_(function(*args))
    else:
        function(*args, out=target)


def exact_or_nan(norms: Tensor) -> Tensor:
    """Replace normalisers that have lost weights or overflown by NaN."""
    return torch.where((norms >= LEAST_NORM) & (norms < math.inf), norms, math.nan)


class ScaledFeatures(NamedTuple):
    """A feature map, whose features are numbers."""

    directions: Tensor
    """(m, D), divided by D^¼, float32 or wider."""
    softmax: bool
    """Softmax features if true, else relu features."""
    narrow: bool
    """Whether features are bfloat16; otherwise they have the dtype of the directions."""

    @classmethod
    def of_dtype(cls, directions: Tensor, softmax: bool, dtype: torch.dtype) -> ScaledFeatures:
        """The features of inputs of a dtype: bfloat16 for bfloat16, float32 or wider for others."""
        return cls(directions, softmax, dtype == torch.bfloat16)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features, and of values that are multiplied by them."""
        return torch.bfloat16 if self.narrow else self.directions.dtype

    @property
    def vector_dtype(self) -> torch.dtype:
        """The dtype of the vectors that `put` takes, and of the exponents. Relu features are not rounded
        before they are compared with 0, because a wrong sign is an error of the whole gradient."""
        return torch.float16 if self.narrow and self.softmax else self.directions.dtype

    def put(self, target: Tensor, x: Tensor, *, weighted: bool) -> Tensor | None:
        """Write the features of vectors x (…, D) to `target` (…, m).

        Keys are `weighted`, and queries are not. Returns the weights (…, 1); None for queries and for relu.
        """
        flat, directions = x.flatten(0, -2), self.directions.mT
        if not self.softmax:
            floor = torch.full((1,), RELU_FLOOR, dtype=x.dtype, device=x.device)
            raised = torch.addmm(floor, flat, directions)
            target.copy_(raised.clamp_(min=RELU_FLOOR).view(target.shape))
            return None
        spread = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=self.directions.dtype)
        spread.mul_(x.shape[-1] ** -0.25)
        half = spread * (0.5 / math.log(2))  # all exponents are to base 2
        steepest = math.sqrt(2 * math.log(len(self.directions) + 1))  # + 1: not 0 for one feature
        level = half.clamp(max=steepest / math.log(2)).mul_(spread).to(x.dtype)
        exponents = torch.addmm(level, flat, (directions / math.log(2)).to(x.dtype), beta=-1)
        # not exp2, because its result would be float16 before it is rounded to bfloat16, and overflow
        two = torch.full((1,), 2.0, dtype=self.directions.dtype, device=x.device)
        write(target, torch.pow, two, exponents.view(target.shape))
        if not weighted:
            return None
        weights = torch.sub(level, half.mul_(spread)).exp2_()
        # numbers with few bits below the normal range must not dominate a normaliser
        weights = torch.nn.functional.threshold(weights, torch.finfo(self.dtype).tiny, 0.0)
        return weights.to(self.dtype).view(*x.shape[:-1], 1)

    def backward(self, grad: Tensor, features: Tensor, *, weighted: bool) -> tuple[Tensor, Tensor | None]:
        """Gradient of the features (…, m), which is overwritten → of the vectors x (…, D), and a number for
        each vector (…, 1) or None.

        For queries the levels are constants, because outputs do not depend on them. Keys are `weighted`, and
        the gradient of their weights is the sum of the gradients of the exponents. This is the number: it is
        to be multiplied by −x/√D and added, because all exponents of a key contain −|x|²/2√D.
        """
        directions = self.directions.to(self.dtype)
        if not self.softmax:
            # the floor itself is rounded, by up to half of this
            above = features > RELU_FLOOR * (1 + torch.finfo(self.dtype).eps)
            return grad.mul_(above) @ directions, None
        of_exponents = grad.mul_(features)
        if not weighted:
            return of_exponents @ directions, None
        head_dim = directions.shape[1]
        with_ones = torch.nn.functional.pad(directions, (0, ALIGNED))
        with_ones[:, head_dim].fill_(1)
        along, sums = (of_exponents @ with_ones).split([head_dim, ALIGNED], dim=-1)
        return along, sums[..., :1]
