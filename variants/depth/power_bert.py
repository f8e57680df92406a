"""PoWER-BERT: from visit to visit fewer tokens, those that receive most attention (Goyal 2020,
arXiv:2001.08950, §3).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; n(j) tokens at visit j, with n(0) = T
and n(j + 1) = ⌈keep · n(j)⌉.

    x(j)   ← visit j of n(j) tokens
    s(k)   = sum over the heads and queries of the weights of key k in visit j      (its significance score)
    x(j+1) = the n(j + 1) tokens of x(j) with the largest s, in their order

A token that is dropped keeps its hidden state after its last visit, and the output is read from it. The score
of a key depends on all queries, so there is no causal form. The weights are computed a second time for the
scores, from the queries and keys of the visit and in blocks of queries: no n × n matrix is stored. Scores
select and have no gradient. With keep=1 nothing is dropped or scored, and the model is a stack.

Deviations: the numbers of tokens are a geometric series, where the paper learns them and trains three
times; here one training has the same numbers from its start. All tokens have an output, because masked tokens
are predicted anywhere; the paper classifies from the first token alone. Tokens are dropped after the
feed-forward layer of the visit and not before it, so that the last state of a token is that of a whole block.
Rotary positions of a visit are the indices of the tokens that are left, in their order: distances across
dropped tokens shrink, where the paper's embeddings hold the positions in the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from variants.base import (
    Context,
    Cost,
    DepthConfig,
    Dims,
    ExposesScores,
    Path,
    PathOut,
    RunVisits,
    SequenceMixer,
    Workload,
)
from variants.base.lengths import ChangesLength
from variants.knobs import knob
from variants.ops.memoizable import repeatable

BLOCK_WEIGHTS, LEAST_QUERIES = 2**24, 128
"""Weights of a block of queries that are in memory at a time, of all sequences and heads together: 64 MiB in
float32. A block has at least so many queries."""


@dataclass(frozen=True, kw_only=True)
class PowerBertConfig(DepthConfig):
    """How many tokens are left from visit to visit."""

    keep: float = knob(0.8, above=0, most=1)
    """Share of the tokens that the next visit processes; 1 is a stack."""


def kept(tokens: int, keep: float, depth: int) -> list[int]:
    """The number of tokens of each visit."""
    numbers = [tokens]
    while len(numbers) < depth:
        numbers.append(math.ceil(keep * numbers[-1]))
    return numbers


@repeatable
def _add_received(total: Tensor, q: Tensor, k: Tensor) -> None:
    """Add the weights that a block of queries (N, n, D) gives to keys (N, D, T) to `total` (N, T)."""
    total.add_(torch.bmm(q, k).float().softmax(-1).sum(1))


def received(q: Tensor, k: Tensor) -> Tensor:
    """The attention that each key receives, of queries and keys (B, H, T, D): (B, T)."""
    batch, heads, tokens, channels = q.shape
    size = max(LEAST_QUERIES, BLOCK_WEIGHTS // (batch * heads * tokens))
    q, k = q.flatten(0, 1) / math.sqrt(channels), k.flatten(0, 1).transpose(1, 2)
    total = torch.zeros(batch * heads, tokens, device=q.device, dtype=torch.float32)
    for queries in q.split(size, dim=1):
        _add_received(total, queries, k)
    summed: Tensor = total.unflatten(0, (batch, heads)).sum(1)
    return summed


class PowerBertPath(Path):
    """See the top of the file; it has no parameters."""

    def __init__(self, keep: float, depth: int) -> None:
        super().__init__()
        self.keep, self.depth = keep, depth

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """(B, T, C) → PathOut. Places are run one by one where tokens are dropped, or all at once."""
        numbers = kept(x.shape[1], self.keep, self.depth)
        if numbers[-1] == numbers[0]:
            return PathOut(run(places, x))
        levels: list[tuple[Tensor, Tensor]] = []
        for place in places:
            before, x = x, run([place], x)
            following = numbers[min(place + 1, self.depth - 1)]
            if following < x.shape[1]:
                with torch.no_grad():
                    chosen = self.choose(*run.queries_keys(place, before), following)
                levels.append((x, chosen[..., None].expand(-1, -1, x.shape[2])))
                x = x.gather(1, levels[-1][1])
        for outer, chosen in reversed(levels):
            x = outer.scatter(1, chosen, x)
        return PathOut(x)

    def choose(self, q: Tensor, k: Tensor, count: int) -> Tensor:
        """The indices (B, count) of the tokens that are left, ascending."""
        return received(q, k).topk(count, sorted=False).indices.sort().values

    def cost(self, work: Workload) -> Cost:
        """The queries and keys once more, and their scores, of each visit after which tokens are dropped."""
        numbers = kept(work.seq_len, self.keep, self.depth)
        scored = [n for n, after in pairwise(numbers) if after < n]
        if not scored:
            return Cost()
        projected = 2 * work.d_model * (work.inner_dim + work.key_dim) * sum(scored)
        scores = 2 * work.inner_dim * sum(n * n for n in scored)
        return Cost({"token_scores": work.batch_size * (projected + scores)}, {"token_scores": 0})


class PowerBert(ChangesLength):
    """Blocks 0, 1, …, depth − 1, each of which processes a share of the tokens of the one before."""

    Config = PowerBertConfig
    config: PowerBertConfig
    paper = "Goyal et al. 2020, PoWER-BERT: Progressive Word-vector Elimination, arXiv:2001.08950"

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """The selection reads all tokens."""
        if causal and config.keep < 1:
            return "has no causal form: which tokens are dropped depends on the attention of later tokens"
        return None

    @classmethod
    def refuses(cls, config: Any, mixer: type[SequenceMixer]) -> str | None:
        """Weights of softmax over all tokens are needed."""
        if config.keep == 1 or issubclass(mixer, ExposesScores):
            return None
        return "drops tokens by the attention that they receive, and the layer exposes no queries and keys"

    def path(self, dims: Dims) -> Path:
        """No parameters."""
        return PowerBertPath(self.config.keep, self.depth)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """See `kept`."""
        return kept(seq_len, self.config.keep, self.depth)

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """A decoder is causal."""
        return "has no causal form" if config.keep < 1 else None
