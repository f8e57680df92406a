"""Reformer's hashed attention (Kitaev 2020, arXiv:2001.04451, §2).

Over 300 lines: the parallel form, the readable reference and decoding share the hashing.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, R rounds of hashing, N = H·B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    Dims,
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.clustering.bucket_cache import BucketCache, bucket_cache_bytes
from variants.ops.fused import backends
from variants.ops.lsh.attention import lsh_attention
from variants.ops.lsh.flex import KEYS
from variants.ops.lsh.hashing import (
    ONE_ROTATION,
    factors,
    hash_rows,
    inverse_length,
    least_buckets,
    rotations,
)
from variants.ops.lsh.merged import merged_attention
from variants.ops.lsh.windows import Window
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class ReformerConfig(VariantConfig):
    """Knobs of hashed attention."""

    n_hashes: int = knob(4, least=1, unit="rounds")
    """Rounds of hashing. A token reads the union of the keys of all rounds."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens that are compared in a round of hashing. band: a token reads this number of predecessors in its
    bucket (and, if not causal, of successors). chunk: the length of a chunk of the sorted order."""
    n_buckets: int | None = knob(None, least=1, unit="buckets")
    """Buckets of a round: 1, an even number or, over 64, a multiple of 4 (the product of two rotations).
    null: chosen for the maximum sequence length T. It is 1 if T ≤ chunk. Otherwise it is 2·T/chunk as in the
    paper, so that a bucket has half a chunk of tokens. This is rounded up to an even number or, over 64, to
    a product of two even numbers of which the larger is at most twice the smaller."""
    neighbourhood: Literal["band", "chunk"] = "band"
    """Tokens of its bucket that a token reads in a round. band: the nearest tokens of the bucket, by
    position. chunk: as in the paper, the tokens of the bucket in the token's own chunk of the sorted order
    and in the chunk before."""
    impl: Literal["auto", "plain", "merged", "flex"] = knob("auto", younger=True)
    """Implementation of attention. plain: one round after the other, in pieces that fit a cache. merged: all
    rounds in few launches, merged by their logsumexp. flex: as merged, by FlexAttention, compiled, on CUDA.
    auto: plain on the CPU, merged elsewhere."""

    def __post_init__(self) -> None:
        allowed = f"null, 1, an even number, over {ONE_ROTATION} a multiple of 4"
        n = self.n_buckets
        fits = n is None or n == 1 or n % (2 if n <= ONE_ROTATION else 4) == 0
        self.require("n_buckets", fits, allowed)

    def buckets(self, seq_len: int) -> int:
        """Number of buckets of a round in a layer with the maximum sequence length `seq_len`."""
        if self.n_buckets is not None:
            return self.n_buckets
        return 1 if seq_len <= self.chunk else least_buckets(-(-2 * seq_len // self.chunk))


# --- implementations: (layer, qk, values, buckets, causal) → (B, T, H, D) ---------------------------------


def plain(layer: Reformer, qk: Tensor, value: Tensor, buckets: Tensor, causal: bool) -> Tensor:
    """One round after the other."""
    return lsh_attention(qk, value, buckets, layer._window(qk.shape[1], causal))


def merged(layer: Reformer, qk: Tensor, value: Tensor, buckets: Tensor, causal: bool) -> Tensor:
    """All rounds, by matrix products."""
    window = layer._window(qk.shape[1], causal).in_whole_blocks()
    return merged_attention(qk, value, buckets, window, "merged")


def flex(layer: Reformer, qk: Tensor, value: Tensor, buckets: Tensor, causal: bool) -> Tensor:
    """All rounds, by FlexAttention. Untried."""
    window = layer._window(qk.shape[1], causal).in_blocks(KEYS)
    return merged_attention(qk, value, buckets, window, "flex")


BLOCK_OVERHEAD = (
    "a block of queries computes scores with all keys that any of its queries may read, some masked"
)


class Reformer(SequenceMixer):
    """Softmax attention among tokens that random rotations hash to the same bucket.

    Queries and keys share one projection, and keys have unit length. A token reads itself only if it reads no
    other token in any round. Rounds are combined by logsumexp, with each pair counted once (§2).

    The hashed vectors are those whose products are the scores, including rotary positions, because hashing
    should find the largest scores. Hashing is always float32. Sorting is by (bucket, position), stable. In
    training, rotations are drawn for each head and round in every forward pass, with the global generator. In
    evaluation they are fixed, with the index of the layer as the seed. Otherwise the loss of a document would
    depend on earlier passes, and therefore on the batch size.

    With the `band` neighbourhood, causal, no bit of an output depends on a later token, for any dtype (see
    `variants.ops.lsh.windows`).

    Deviations: positions are rotary; the paper adds learned axial embeddings. The `band` neighbourhood is not
    in the paper. With chunks of the sorted order, later tokens move the boundaries, and so change the keys of
    an earlier token. The last `chunk` predecessors of a token in its bucket depend on earlier tokens only.
    Reversible layers (§3) and chunks of the feed-forward layer belong to the model, not to this layer. With
    one projection less, the layer has three quarters of the parameters of dense attention.

    Other code, with which `chunk` is compared in tests/peers: reformer-pytorch computes the same if it is
    configured to mask other buckets and to count each pair once; neither is its default. Hugging Face
    transformers reads the complete chunk and the chunk before, for all buckets (before the first chunk is the
    last chunk of another round), weights a pair by the number of rounds that read it, and does not divide
    scores by √D. Both use a large negative score of a token with itself; this layer excludes the pair.
    """

    Config = ReformerConfig
    config: ReformerConfig
    position_scheme = "rotary"
    info = Info(
        paper="Kitaev et al. 2020, Reformer, arXiv:2001.04451",
        family="learned patterns",
        complexity=Complexity(time=1, memory=1, formula="T·log T", source="Kitaev 2020, Table 1", survey=1),
        caps=Caps(causal=True, bidirectional=True, stochastic=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "plain": Impl(run=plain, flop_overhead_reason=BLOCK_OVERHEAD, auto_on=("cpu",)),
        "merged": Impl(
            run=merged,
            flop_overhead_reason=BLOCK_OVERHEAD,
            has_shape_functions=True,
            auto_on=(Impl.OTHER_DEVICES,),
        ),
        "flex": Impl(
            run=flex,
            missing=lambda device, dtype, head_dim: backends.missing_flex(device, head_dim),
            flop_overhead_reason=backends.FLEX_OVERHEAD,
            overhead_is_bounded=False,
            has_shape_functions=True,
            untried=True,
        ),
    }

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """There cannot be more buckets than tokens."""
        assert isinstance(config, ReformerConfig)
        if (config.n_buckets or 1) > dims.seq_len:
            return f"n_buckets={config.n_buckets}: larger than seq_len; allowed is 1 to {dims.seq_len}"
        return super().unsupported(config, dims, causal=causal)

    def __init__(self, config: ReformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.n_buckets = config.buckets(dims.seq_len)
        # with one bucket nothing is hashed, so all rounds would be equal
        self.rounds = config.n_hashes if self.n_buckets > 1 else 1
        self.qk = nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.value = nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.out = nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    @classmethod
    def leak(cls, config: VariantConfig) -> str | None:
        """The neighbourhood of the paper leaks in causal models."""
        assert isinstance(config, ReformerConfig)
        if config.neighbourhood == "chunk":
            return "later tokens move the boundaries of the sorted chunks, and so choose earlier tokens' keys"
        return None

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        qk = self._split(self.qk(x), ctx.positions)
        buckets = self._buckets(x, qk, ctx.positions)
        y = self.run_impl(self, qk, self._heads(self.value(x)), buckets, ctx.causal)
        return MixerOut(self.out(y.flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, H, D)."""
        return x.view(*x.shape[:-1], self.dims.heads, -1)

    def _split(self, projected: Tensor, positions: Tensor | None = None) -> Tensor:
        return rotary(self._heads(projected), positions, self.dims.rotary_base)

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

    def _rotations(self, device: torch.device) -> list[Tensor]:
        """The matrices of all rounds; in evaluation they are always the same."""
        seed = None if self.training else self.layer
        sizes = factors(self.n_buckets)
        return rotations(self.dims.heads, self.dims.head_dim, self.rounds, sizes, device, seed)

    @torch.no_grad()
    def _buckets(
        self, x: Tensor, qk: Tensor, positions: Tensor | None = None, matrices: list[Tensor] | None = None
    ) -> Tensor:
        """The bucket of each token in each round: (R, N, T), by `matrices` or new rotations.

        A float64 layer hashes float32 projections: otherwise rounding would move tokens between two buckets.
        """
        if qk.dtype == torch.float64:
            qk = self._split(F.linear(x.float(), self.qk.weight.float()), positions)
        if matrices is None:
            matrices = self._rotations(x.device)
        return hash_rows(qk, matrices, self.rounds, self.device_type)

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """The bucket of each token in each round: (R, N, T) with N = (H, B)."""
        return self._buckets(x, self._split(self.qk(x), ctx.positions), ctx.positions)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention to the union of the keys of all rounds; a token without any reads itself."""
        buckets = self.choices(x, ctx).unflatten(1, (self.dims.heads, -1)).transpose(1, 2)  # (R, B, H, T)
        return self._masked(x, self._readable(buckets, ctx.causal).any(dim=0), ctx.positions)

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor:
        """Shared-QK attention without hashing: to all other tokens that the objective allows."""
        other = (masks.causal if ctx.causal else masks.all_keys) & ~masks.Window(1)
        return self._masked(x, masks.matrix(other, x.shape[1]).to(x.device), ctx.positions)

    def _masked(self, x: Tensor, allowed: Tensor, positions: Tensor | None) -> Tensor:
        """Shared-QK attention to the keys in `allowed` (…, T, T) bool; a token without any reads itself."""
        isolated = ~allowed.any(dim=-1, keepdim=True)
        allowed = allowed | (isolated & torch.eye(x.shape[1], dtype=torch.bool, device=x.device))
        qk, value = self._split(self.qk(x), positions), self._heads(self.value(x))
        q, k, v = (t.transpose(1, 2) for t in (qk, qk * inverse_length(qk), value))
        y: Tensor = self.out(masked_attention(q, k, v, allowed).transpose(1, 2).flatten(2))
        return y

    def _readable(self, buckets: Tensor, causal: bool) -> Tensor:
        """Buckets (…, T) → (…, T, T) bool: the keys that each query reads, without itself."""
        seq_len, chunk = buckets.shape[-1], self.config.chunk
        i = torch.arange(seq_len, device=buckets.device)[:, None]
        j = i.T
        query, key = buckets[..., :, None], buckets[..., None, :]
        same = query == key
        earlier_same = (same & (j < i)).sum(-1)  # number of earlier tokens in the bucket of a token
        if self.config.neighbourhood == "band":
            neighbours = (earlier_same[..., :, None] - earlier_same[..., None, :]).abs() <= chunk
        else:
            chunk_of = ((key < query).sum(-1) + earlier_same) // chunk
            chunks_back = chunk_of[..., :, None] - chunk_of[..., None, :]
            neighbours = (chunks_back == 0) | (chunks_back == 1)
        return same & neighbours & ((j <= i) | (not causal)) & (i != j)

    @classmethod
    def no_decoding(cls, config: VariantConfig) -> str | None:
        """Buckets must not change when later tokens come."""
        if reason := super().no_decoding(config):
            return reason
        return f"has no form for decoding: {leak}" if (leak := cls.leak(config)) else None

    def _cache_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        rounds = self.rounds if self.n_buckets > 1 else 0
        return rounds, batch_size, self.dims.heads, self.dims.head_dim

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> BucketCache:
        """Keys, values and buckets of all tokens."""
        shape, device = self._cache_shape(batch_size), self.qk.weight.device
        turns = self._rotations(device)
        return BucketCache(shape, max_len, clock=clock, dtype=dtype, device=device, rotations=turns)

    def step(self, x: Tensor, state: BucketCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence, other tokens one by one."""
        positions = state.clock.positions(x.shape[1], x.device)
        qk, value = self._split(self.qk(x), positions), self._heads(self.value(x))
        buckets = self._buckets(x, qk, positions, state.rotations)
        q, k, v = (t.transpose(1, 2) for t in (qk, qk * inverse_length(qk), value))  # (B, H, n, D)
        of_sequences = buckets.unflatten(1, (self.dims.heads, -1)).transpose(1, 2)  # (R, B, H, n)
        is_prompt = state.clock.position == 0 and x.shape[1] > 1
        state.write(k, v, of_sequences)
        if is_prompt:
            y = self.run_impl(self, qk, value, buckets, True)
        else:
            y = torch.stack(
                [
                    state.attend(
                        q[:, :, token],
                        of_sequences[..., token],
                        self.config.chunk,
                        token,
                        (k[:, :, token], v[:, :, token]),
                        itself=False,
                    )
                    for token in range(x.shape[1])
                ],
                dim=1,
            )
        merged: Tensor = self.out(y.flatten(2))
        return merged

    def decoding_bytes(self, work: Workload) -> int:
        """All tokens, because content decides which of them are read, and the float32 rotations."""
        tokens = bucket_cache_bytes(self._cache_shape(work.batch_size), work.seq_len, work.element_bytes)
        return tokens + 4 * self.rounds * work.inner_dim * sum(size // 2 for size in factors(self.n_buckets))

    def cost(self, work: Workload) -> Cost:
        """Projections, hashing, and 4·D for each pair that the windows allow if each lies in one bucket.

        The number of pairs depends on content, so this is an upper bound. A pair is counted in each round
        that allows it. Hashing is a product with D × f/2 numbers for each factor f of the number of buckets.
        """
        t, c = work.seq_len, work.inner_dim
        pairs = self.rounds * self._window(t, work.causal).admitted
        columns = self.rounds * sum(size // 2 for size in factors(self.n_buckets))
        return Cost(
            {
                "projections": 6 * work.batch_size * t * c * work.d_model,
                "hashing": 2 * work.batch_size * c * t * columns,
                "attention": 4 * work.batch_size * c * pairs,
            },
            gradients={"hashing": 0},
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the rotations and, for each token that a later token may read, of its query-key, its value
        and its buckets. The number of tokens depends on content, so this is an upper bound.

        Later tokens may read the last tokens of each bucket and round: `chunk` of them, or 2·chunk − 1 for
        `neighbourhood=chunk`. The latter also needs the number of tokens in each bucket, unless all tokens
        are kept, to compute where chunks begin. The caller keeps the position.
        """
        t, n_buckets, chunk = work.seq_len, self.n_buckets, self.config.chunk
        band = self.config.neighbourhood == "band"
        tokens = min(t, self.rounds * n_buckets * (chunk if band else 2 * chunk - 1))
        numbers = tokens * 2 * work.inner_dim * work.element_bytes
        if n_buckets == 1:
            return work.batch_size * numbers
        integers = tokens if band or tokens == t else tokens + n_buckets  # int32, as are counts
        indices = 4 * self.rounds * work.heads * integers
        columns = sum(size // 2 for size in factors(n_buckets))  # float32, the same for all sequences
        return work.batch_size * (numbers + indices) + 4 * self.rounds * work.inner_dim * columns
