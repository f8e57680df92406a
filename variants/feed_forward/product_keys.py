"""A memory with product keys in place of a feed-forward layer (Lample 2019, arXiv:1907.05242, §3).

A query reads the values of the k slots with the largest scores, of n² slots. The key of slot (i, j) is the
i-th of n sub-keys followed by the j-th of n others, so its score is a sum of two. The k best slots are among
the pairs of the k best sub-keys of each kind: 2n + k² scores are enough for the exact search.

Deviations: each query is normalised by itself (a layer norm without parameters) in place of the paper's batch
norm, which lets tokens read each other and needs running means. The paper has a memory in one or two layers,
with 512² slots; here every layer has one, and 128² slots are the default. Queries and scores are computed in
float32, so that a recomputation from rounded inputs makes the same choices. The values have the learning rate
of the other parameters.

Shapes: B batch, T tokens, C channels, H heads, Q channels of a query, n sub-keys of each kind, k slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class ProductKeysConfig(FeedForwardConfig):
    """Knobs of a memory with product keys."""

    heads: int = knob(4, least=1, unit="heads")
    """Queries of a token. Each has its sub-keys; all read the same values, and their results are added."""
    n_keys: int = knob(128, least=1, unit="sub-keys")
    """Sub-keys of each kind. The memory has the square of this number of slots."""
    k: int = knob(32, least=1, unit="slots")
    """Slots that a query reads, at most n_keys."""
    query_size: int | None = knob(None, least=2, multiple=2, unit="channels")
    """Channels of a query; null is half of the model's channels, rounded down to an even number."""

    def __post_init__(self) -> None:
        self.require("k", self.k <= self.n_keys, f"up to n_keys={self.n_keys}")

    def channels(self, d_model: int) -> int:
        """Channels of a query."""
        return self.query_size or 2 * max(1, d_model // 4)


class _Found(NamedTuple):
    """The slots of each query, and their scores: (B, T, H, k) each."""

    slots: Tensor
    scores: Tensor


class ProductKeys(FeedForward):
    """Σ over heads and over the k best slots s of softmax(q · key) · value, without biases.

    Key (i, j) is sub-key i of the first kind, then sub-key j of the second; its slot is n·i + j.
    """

    Config = ProductKeysConfig
    config: ProductKeysConfig
    paper = "Lample et al. 2019, Large Memory Layers with Product Keys, arXiv:1907.05242"

    def __init__(self, config: ProductKeysConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        size, half = config.channels(d_model), config.channels(d_model) // 2
        self.query = nn.Linear(d_model, config.heads * size, bias=False)
        bound = half**-0.5  # the released code initialises sub-keys as a linear map's rows
        keys = torch.empty(2, config.heads, config.n_keys, half).uniform_(-bound, bound)
        self.keys = nn.Parameter(keys)
        self.out = nn.Embedding(config.n_keys**2, d_model)
        nn.init.normal_(self.out.weight, std=d_model**-0.5)

    def active_parameters(self) -> int:
        """All but the values that no query of a token reads."""
        rows = min(self.config.heads * self.config.k, self.config.n_keys**2)
        return self.query.weight.numel() + self.keys.numel() + rows * self.d_model

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) → (B, T, H, k): the slots of each query, in ascending order. See `MakesChoices`; nothing
        depends on `ctx`."""
        return self._search(x).slots.sort(dim=-1).values

    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""
        found = self._search(x)
        weights = found.scores.softmax(-1).to(self.out.weight.dtype)
        y = F.embedding_bag(  # adds rows without a copy of them
            found.slots.flatten(2).flatten(0, 1),
            self.out.weight,
            per_sample_weights=weights.flatten(2).flatten(0, 1),
            mode="sum",
        )
        return FFOut(y.view(x.shape).to(x.dtype))

    def reference(self, x: Tensor) -> Tensor:
        """The scores of the whole keys of the chosen slots, by the definition of each step."""
        heads, count = self.config.heads, self.config.n_keys
        slots = self.choices(x, Context(causal=True))
        queries = torch.einsum("btc,dc->btd", x, self.query.weight).unflatten(-1, (heads, -1))
        centred = queries - queries.mean(-1, keepdim=True)
        queries = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        head = torch.arange(heads, device=x.device)[:, None]
        keys = torch.cat([self.keys[0, head, slots // count], self.keys[1, head, slots % count]], dim=-1)
        scores = torch.einsum("bthq,bthkq->bthk", queries, keys)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        of_slots = weights.new_zeros(*x.shape[:2], count**2)  # a slot that two heads choose has both weights
        of_slots = of_slots.scatter_add(-1, slots.flatten(2), weights.flatten(2))
        return torch.einsum("bts,sc->btc", of_slots, self.out.weight)

    def cost(self, work: Workload) -> Cost:
        """The queries, the scores of the sub-keys and the weighted sum of the values: H·(Q·(C + n) + k·C)
        multiply-accumulates a token."""
        config, size = self.config, self.config.channels(work.d_model)
        products = config.heads * (size * (work.d_model + config.n_keys) + config.k * work.d_model)
        return Cost({"feed_forward": 2 * work.batch_size * work.seq_len * products})

    def _search(self, x: Tensor) -> _Found:
        """The exact k best slots of each query, in the order of their scores."""
        heads, count, k = self.config.heads, self.config.n_keys, self.config.k
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            queries = F.linear(x.to(dtype), self.query.weight.to(dtype)).unflatten(-1, (heads, -1))
            queries = F.layer_norm(queries, queries.shape[-1:])
            halves = queries.flatten(0, 1).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)  # (2, H, B·T, Q/2)
            scores = halves @ self.keys.to(dtype).transpose(-1, -2)  # (2, H, B·T, n)
        best, rows = scores.topk(k, dim=-1)
        pairs = (best[0, ..., :, None] + best[1, ..., None, :]).flatten(-2)  # (H, B·T, k²)
        chosen, pair = pairs.topk(k, dim=-1)
        first = rows[0].gather(-1, pair // k)
        second = rows[1].gather(-1, pair % k)
        slots = count * first + second
        shape = (heads, *x.shape[:2], k)
        return _Found(slots.view(shape).permute(1, 2, 0, 3), chosen.view(shape).permute(1, 2, 0, 3))
