"""Reformer's hashed attention (Kitaev 2020, arXiv:2001.04451, §2).

Shapes: B batch, T tokens, C channels, H heads, D = C / H, R rounds of hashing, N = H·B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Complexity,
    Context,
    Cost,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops import masks
from variants.ops.lsh.attention import lsh_attention
from variants.ops.lsh.hashing import (
    ONE_ROTATION,
    factors,
    hash_rows,
    inverse_length,
    least_buckets,
    rotations,
)
from variants.ops.lsh.windows import Window
from variants.ops.projections import masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class ReformerConfig(VariantConfig):
    """Knobs of hashed attention."""

    n_hashes: int = knob(4, least=1, unit="rounds")
    """Rounds of hashing: a token reads what any round gives it."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens that a round of hashing compares. band: how many predecessors of its bucket a token reads in a
    round (and as many successors, where not causal). chunk: the length of a chunk of the sorted order."""
    n_buckets: int | None = knob(None, least=1, unit="buckets")
    """Buckets of a round: 1, or even, or over 64 a multiple of 4 (the product of two rotations).
    None: as many as suit the longest sequence that the model was built for. Up to `chunk` tokens that is
    1. Beyond, it is the paper's half a chunk to a bucket, 2·T/chunk, raised to the next even number, or
    over 64 to the next product of two even numbers of which the larger is at most twice the smaller."""
    neighbourhood: Literal["band", "chunk"] = "band"
    """What a token reads of its bucket in a round. band: the nearest tokens of the same bucket, by position.
    chunk: the paper's, the tokens of the same bucket in the token's own chunk of the sorted order and in the
    one before."""

    def __post_init__(self) -> None:
        allowed = f"null, 1, an even number, over {ONE_ROTATION} a multiple of 4"
        n = self.n_buckets
        fits = n is None or n == 1 or n % (2 if n <= ONE_ROTATION else 4) == 0
        self.require("n_buckets", fits, allowed)

    def buckets(self, seq_len: int) -> int:
        """Buckets of a round in a layer that was built for `seq_len` tokens."""
        if self.n_buckets is not None:
            return self.n_buckets
        return 1 if seq_len <= self.chunk else least_buckets(-(-2 * seq_len // self.chunk))


class Reformer(SequenceMixer):
    """Softmax attention among tokens that random rotations hash to the same bucket.

    Queries and keys are one projection; keys have unit length; a token reads itself only where no round
    gives it another token; rounds are combined by logsumexp with each pair counted once (§2).

    What is hashed are the vectors whose products are the scores, so rotary positions included: hashing
    finds the largest scores, which is its point. Hashing is float32 throughout. Sorting is by (bucket,
    position), stable. In training, rotations are drawn for each head and round in every forward pass, from
    the global generator. In evaluation they are fixed, drawn with the layer's index as seed: otherwise a
    document's loss would depend on the passes before it, and so on the batch size.

    With the `band` neighbourhood and causal, no bit of an output depends on a later token, whatever the
    dtype (see `variants.ops.lsh.windows`).

    Deviations: positions are rotary, as for every variant here (the paper adds learned axial ones to the
    embeddings). The `band` neighbourhood is not the paper's: with chunks of the sorted order, later
    tokens move the boundaries and so decide what an earlier token reads. A token's last `chunk`
    predecessors in its bucket depend on the past alone. Reversible layers (§3) and a feed-forward in
    chunks belong to the network around the layer. With one projection less, the layer has three
    quarters of dense attention's parameters.

    Other code, with which `chunk` is compared in tests/peers: reformer-pytorch computes the same, once it
    is told to mask other buckets and to count a pair once; neither is its default. Hugging Face's
    transformers reads all of a chunk and of the one before, whatever their buckets (before the first is
    the last of another round), weighs a pair by the rounds that meet it, and does not divide scores by
    √D. Both give a token's score with itself a large negative number, where this layer leaves it out.
    """

    Config = ReformerConfig
    config: ReformerConfig
    info = Info(
        paper="Kitaev et al. 2020, Reformer, arXiv:2001.04451",
        family="learned patterns",
        complexity=Complexity(time=1, memory=1, formula="T·log T", source="Kitaev 2020, Table 1", survey=1),
        caps=Caps(causal=True, bidirectional=True, stochastic=True),
    )
    flop_overhead_reason = (
        "a block of queries is given every key that any of them may read, and masks the rest"
    )

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Buckets are of tokens."""
        assert isinstance(config, ReformerConfig)
        if (config.n_buckets or 1) > dims.seq_len:
            return f"n_buckets={config.n_buckets}: more than tokens; allowed is 1 to {dims.seq_len}"
        return super().unsupported(config, dims, causal=causal)

    def __init__(self, config: ReformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.n_buckets = config.buckets(dims.seq_len)
        # One bucket leaves nothing to hash, so every round would be the first again.
        self.rounds = config.n_hashes if self.n_buckets > 1 else 1
        self.qk = nn.Linear(dims.d_model, dims.d_model, bias=False)
        self.value = nn.Linear(dims.d_model, dims.d_model, bias=False)
        self.out = nn.Linear(dims.d_model, dims.d_model, bias=False)

    @classmethod
    def leak(cls, config: VariantConfig) -> str | None:
        """The paper's chunks, where causal."""
        assert isinstance(config, ReformerConfig)
        if config.neighbourhood == "chunk":
            return "later tokens move the boundaries of the sorted chunks, and so choose earlier keys"
        return None

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        qk = self._split(self.qk(x), ctx.positions)
        window = self._window(x.shape[1], ctx.causal)
        y = lsh_attention(qk, self._heads(self.value(x)), self._buckets(x, qk, ctx.positions), window)
        return MixerOut(self.out(y.flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, H, D)."""
        return x.view(*x.shape[:-1], self.dims.heads, -1)

    def _split(self, projected: Tensor, positions: Tensor | None = None) -> Tensor:
        return rotary(self._heads(projected), positions)

    def _window(self, seq_len: int, causal: bool) -> Window:
        band = self.config.neighbourhood == "band"
        return Window.choose(
            seq_len,
            self.n_buckets,
            self.config.chunk,
            band=band,
            causal=causal,
            device_type=self.device_type,
        )

    @torch.no_grad()
    def _buckets(self, x: Tensor, qk: Tensor, positions: Tensor | None = None) -> Tensor:
        """(R, N, T) bucket of each token.

        A float64 layer hashes what its float32 twin would: were the projections rounded differently,
        tokens on the border of two buckets would change sides, and the two could not be compared.
        """
        if qk.dtype == torch.float64:
            qk = self._split(F.linear(x.float(), self.qk.weight.float()), positions)
        heads, head_dim = qk.shape[2:]
        sizes = factors(self.n_buckets)
        seed = None if self.training else self.layer
        given = rotations(heads, head_dim, self.rounds, sizes, x.device, seed)
        return hash_rows(qk, given, self.rounds, self.device_type)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The oracle on the union of what the rounds read; a token with nothing to read reads itself."""
        buckets = self._buckets(x, self._split(self.qk(x), ctx.positions), ctx.positions)
        buckets = buckets.unflatten(1, (self.dims.heads, -1)).transpose(1, 2)  # (R, B, H, T)
        return self._over(x, self._readable(buckets, ctx.causal).any(dim=0), ctx.positions)

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor:
        """Shared-QK attention to every other token that the objective allows: nothing is hashed."""
        other = (masks.causal if ctx.causal else masks.anything) & ~masks.Window(1)
        return self._over(x, masks.matrix(other, x.shape[1]).to(x.device), ctx.positions)

    def _over(self, x: Tensor, allowed: Tensor, positions: Tensor | None) -> Tensor:
        """Shared-QK attention over the pairs allowed, (…, T, T) bool; a token without any reads itself."""
        alone = ~allowed.any(dim=-1, keepdim=True)
        allowed = allowed | (alone & torch.eye(x.shape[1], dtype=torch.bool, device=x.device))
        qk, value = self._split(self.qk(x), positions), self._heads(self.value(x))
        q, k, v = (t.transpose(1, 2) for t in (qk, qk * inverse_length(qk), value))
        y: Tensor = self.out(masked_attention(q, k, v, allowed).transpose(1, 2).flatten(2))
        return y

    def _readable(self, buckets: Tensor, causal: bool) -> Tensor:
        """(…, T) buckets → (…, T, T) bool: which keys a query reads, other than itself."""
        seq_len, chunk = buckets.shape[-1], self.config.chunk
        i = torch.arange(seq_len, device=buckets.device)[:, None]
        j = i.T
        query, key = buckets[..., :, None], buckets[..., None, :]
        same = query == key
        earlier_same = (same & (j < i)).sum(-1)  # how many of its bucket come before a token
        if self.config.neighbourhood == "band":
            near = (earlier_same[..., :, None] - earlier_same[..., None, :]).abs() <= chunk
        else:
            place = ((key < query).sum(-1) + earlier_same) // chunk
            back = place[..., :, None] - place[..., None, :]
            near = (back == 0) | (back == 1)
        return same & near & ((j <= i) | (not causal)) & (i != j)

    def cost(self, work: Workload) -> Cost:
        """4·D for each pair that the windows admit, were their tokens all of one bucket, and the hashing.

        Content decides how many of them are, so the count is an upper bound. A pair counts in each round
        that admits it. Hashing is a product with D × f/2 numbers for each factor f of the buckets.
        """
        t, c = work.seq_len, work.d_model
        pairs = self.rounds * self._window(t, work.causal).admitted
        columns = self.rounds * sum(size // 2 for size in factors(self.n_buckets))
        return Cost(
            {
                "projections": 6 * work.batch_size * t * c * c,
                "hashing": 2 * work.batch_size * c * t * columns,
                "attention": 4 * work.batch_size * c * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """The rotations, and for every token that a later one can still read its shared query-key, its value
        and its buckets, in tables that hold whatever content decides.

        Those are the last tokens of each bucket and round: `chunk` of them, or 2·chunk − 1 for
        `neighbourhood=chunk`. Where that is fewer than all tokens, the latter also needs the number of
        tokens in each bucket, to tell where chunks begin. The position is the caller's.
        """
        t, n_buckets, chunk = work.seq_len, self.n_buckets, self.config.chunk
        band = self.config.neighbourhood == "band"
        tokens = min(t, self.rounds * n_buckets * (chunk if band else 2 * chunk - 1))
        numbers = tokens * 2 * work.d_model * work.element_bytes
        if n_buckets == 1:
            return work.batch_size * numbers
        integers = tokens if band or tokens == t else tokens + n_buckets  # int32, as are counts
        indices = 4 * self.rounds * work.heads * integers
        columns = sum(size // 2 for size in factors(n_buckets))  # float32, the same for all sequences
        return work.batch_size * (numbers + indices) + 4 * self.rounds * work.d_model * columns
