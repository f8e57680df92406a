"""Positive random features of queries and keys, for `variants.attention.performer` (arXiv:2009.14794, §2).

Shapes: D channels of a head, m features.

Softmax features are powers, φ_j(q_t) = 2^{a_tj} and φ_j(k_s) = 2^{b_sj}, whose exponents may exceed float32's
range. Let R_j be the largest b_sj of the keys in a sum, and Λ_t the logarithm of the normaliser of query t.
The weight 2^{a_tj + b_sj − Λ_t} is computed as the product 2^{a_tj + R_j − Λ_t} · 2^{b_sj − R_j}. Neither
exponent is positive, and in the largest term of each query both are near 0. So no normaliser underflows,
whatever the norms; a factor underflows only if the term is below 2^-126 of the largest term of its query.
R_j is called a *level*: it is stored beside each sum, and the sum is stored divided by 2^R_j.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RELU_FLOOR = 1e-3
"""Added to relu features, so that no normaliser is 0 (the paper's ε)."""


class FeatureMap(NamedTuple):
    """A feature map: positive features of softmax, or relu features.

    Softmax features are stored as their exponents to base 2 (exp2 is several times faster than exp on CPUs),
    relu features as they are.
    """

    directions: Tensor
    """(m, D), divided by D^¼: the products of queries and keys then contain softmax's factor 1/√D."""
    softmax: bool
    """Softmax features if true, else relu features."""

    def queries(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Queries (…, D) → exponents, without the term |x|² that the normaliser cancels, or features (…, m).

        With `level` (…, 1), all weights of the queries are divided by 2^level.
        """
        if not self.softmax:
            return self._relu(x) if level is None else self.lower(self._relu(x), level)
        flat, directions = x.flatten(0, -2), self._base_2()
        h = (
            flat @ directions
            if level is None
            else torch.addmm(level.flatten(0, -2), flat, directions, beta=-1)
        )
        return h.view(*x.shape[:-1], -1)

    def keys(self, x: Tensor) -> Tensor:
        """Keys (…, D) → exponents or features (…, m)."""
        if not self.softmax:
            return self._relu(x)
        flat = x.flatten(0, -2)
        half_square = flat.square().sum(-1, keepdim=True) * (-0.5 / math.log(2) / math.sqrt(x.shape[-1]))
        return torch.addmm(half_square, flat, self._base_2()).view(*x.shape[:-1], -1)

    def _base_2(self) -> Tensor:
        return self.directions.mT / math.log(2)

    def _relu(self, x: Tensor) -> Tensor:
        # flattened to one matrix product, because matmul would run a batch of small products
        return (x.flatten(0, -2) @ self.directions.mT).view(*x.shape[:-1], -1).relu_().add_(RELU_FLOOR)

    def highest(self, queries: Tensor, levels: Tensor) -> Tensor:
        """Logarithm of the largest term of each query (…, 1), from the keys' levels (…, m); 0 for relu."""
        if not self.softmax:
            return queries.new_zeros(*queries.shape[:-1], 1)
        return (queries + levels).amax(-1, keepdim=True)

    def lower(self, queries: Tensor, level: Tensor) -> Tensor:
        """Divide all weights of the queries by 2^level (…, 1), in place."""
        return queries.sub_(level) if self.softmax else queries.mul_((-level).exp2())

    def queries_at(self, queries: Tensor, level: Tensor) -> Tensor:
        """Features of queries, multiplied by 2^level (…, m)."""
        return (queries + level).exp2_() if self.softmax else queries

    def keys_at(self, keys: Tensor, level: Tensor) -> Tensor:
        """Features of keys, divided by 2^level (…, m)."""
        return (keys - level).exp2_() if self.softmax else keys

    def add(self, total: Tensor, grad: Tensor, features: Tensor) -> None:
        """Add the gradient of the features to `total`, the gradient of the stored exponents or features."""
        if self.softmax:
            total.addcmul_(grad, features)
        else:
            total.add_(grad)

    def queries_backward(self, grad: Tensor, queries: Tensor, level: Tensor) -> Tensor:
        """Gradient of stored queries (…, m), divided by `lower` → gradient of the query vectors (…, D)."""
        if not self.softmax:
            scale = (-level).exp2()
            grad = grad.mul_(queries > RELU_FLOOR * scale).mul_(scale)
        return self._through(grad)

    def keys_backward(self, grad: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        """Gradient of stored keys (…, m) → gradient of the key vectors x (…, D)."""
        if not self.softmax:
            return self._through(grad.mul_(keys > RELU_FLOOR))
        return self._through(grad).addcmul_(grad.sum(-1, keepdim=True), x, value=-(x.shape[-1] ** -0.5))

    def _through(self, grad: Tensor) -> Tensor:
        through: Tensor = (grad.flatten(0, -2) @ self.directions).view(*grad.shape[:-1], -1)
        return through
