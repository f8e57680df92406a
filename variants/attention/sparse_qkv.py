"""The sparse QKV layer of Scaling Transformers (Jaszczur 2021, arXiv:2111.12763, section "Sparse QKV Layer").

Shapes: B batch, T tokens, C channels in S modules of M = C/S, H heads, D channels of a head; a kernel reads F
tokens and L modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    DecodingState,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.convolutions.module_convolution import module_convolution
from variants.ops.key_cache import KeyCache
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention, rotary, rotary_next


@dataclass(frozen=True, kw_only=True)
class SparseQKVConfig(VariantConfig):
    """Knobs of the sparse QKV layer."""

    modules: int = knob(16, least=1, unit="modules")
    """Modules into which the channels are divided; they divide the width. More modules have fewer
    parameters. The released configurations have 16."""
    length_kernel: int = knob(3, least=1, unit="tokens")
    """Tokens that a convolution reads, the last of which is the token itself; 1 reads no other token."""
    module_kernel: int = knob(3, least=1, unit="modules")
    """Modules, an odd number, that the convolutions of queries and keys read; that of values reads one."""

    def __post_init__(self) -> None:
        self.require("module_kernel", self.module_kernel % 2 == 1, "an odd number")


class Multiplicative(nn.Module):
    """y_{s,m} = Σ_i x_i D_{s,i} E_{m,i}, a linear map with C·(S + M) parameters: (B, T, C) → (B, T, S, M).

    With one module it is a dense layer whose inputs have factors. Its FLOPs are those of a dense layer; a
    step of decoding, which is bound by the bytes that it reads, reads S + M rows instead of C.
    """

    def __init__(self, channels: int, modules: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.randn(modules, channels))
        self.shared = nn.Linear(channels, channels // modules, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, S, M)."""
        modules, channels = self.gates.shape
        y: Tensor
        if x.shape[0] * x.shape[1] <= channels // modules:
            y = self.shared(x[:, :, None] * self.gates)  # S·C numbers for each token
        else:
            weight = (self.gates[:, None] * self.shared.weight).flatten(0, 1)  # C² numbers for all tokens
            y = F.linear(x, weight).unflatten(-1, (modules, -1))
        return y


class ModuleConvolution(nn.Module):
    """Convolutions over tokens and modules: P maps of the same inputs."""

    def __init__(self, size: int, tokens: int, modules: int, maps: int) -> None:
        super().__init__()
        self.maps = maps
        self.weight = nn.Parameter(torch.empty(maps * size, tokens, modules, size))
        nn.init.normal_(self.weight, std=(tokens * modules * size) ** -0.5)

    def forward(self, z: Tensor, device_type: str) -> Tensor:
        """(B, F − 1 + T, S, M) → (B, T, P, C)."""
        return module_convolution(z, self.weight, maps=self.maps, device_type=device_type).flatten(3)


class SparseQKV(SequenceMixer):
    """Dense softmax attention whose queries, keys and values are convolutions of one multiplicative layer.

    A convolution reads a token and the F − 1 tokens before it, also in a bidirectional model. Where the paper
    is silent, the layer follows its released code (google/trax, `MultiplicativeConvCausalAttention`): the
    multiplicative layer is shared, the kernel of the values has one module, and no output layer follows
    attention. The layer has C·(S + M) + F·(2·L + 1)·M² parameters, dense attention 4·C². The paper gives what
    is saved to the feed-forward layer: with feed_forward.mult=6 in place of 4, a model is as large as before.

    Deviations: no biases. Positions are rotary, as in every variant of this project. D starts as normal
    numbers of deviation 1, and E as other projections here, so that modules have the variance of projections.
    The convolution of values is initialised as an output layer, because it writes to the residual stream.
    """

    Config = SparseQKVConfig
    config: SparseQKVConfig
    info = Info(
        paper="Jaszczur et al. 2021, Sparse is Enough in Scaling Transformers, arXiv:2111.12763",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention", survey=2),
        caps=Caps(causal=True, bidirectional=True, few_parameters=True),
    )
    position_scheme = "rotary"
    no_shared_keys: ClassVar[str | None] = "queries and keys are convolutions of the same modules"

    def __init__(self, config: SparseQKVConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        if reason := self._unfit(config, dims):
            raise ValueError(reason)
        self.size, tokens = dims.d_model // config.modules, config.length_kernel
        self.multiplicative = Multiplicative(dims.d_model, config.modules)
        self.query_key = ModuleConvolution(self.size, tokens, config.module_kernel, maps=2)
        self.out = ModuleConvolution(self.size, tokens, 1, maps=1)  # the values; see the class

    @staticmethod
    def _unfit(config: SparseQKVConfig, dims: Dims) -> str | None:
        if dims.d_model % config.modules:
            return f"modules={config.modules}: must divide d_model={dims.d_model}"
        if dims.inner_dim != dims.d_model:
            total = f"no output layer maps {dims.inner_dim} channels of heads to d_model={dims.d_model}"
            return f"head_size={dims.head_size}: {total}; allowed is null"
        return None

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Modules divide the channels, and heads have as many channels as the model."""
        assert isinstance(config, SparseQKVConfig)
        return super().unsupported(config, dims, causal=causal) or cls._unfit(config, dims)

    def _padded(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, F − 1 + T, S, M), with zeros before the first token."""
        return F.pad(self.multiplicative(x), (0, 0, 0, 0, self.config.length_kernel - 1, 0))

    def _convolve(self, modules: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F − 1 + T, S, M) → queries and keys without positions (B, T, 2, H, D), values (B, T, H, D)."""
        heads, device = self.dims.heads, self.device_type
        qk, v = (part(modules, device).unflatten(-1, (heads, -1)) for part in (self.query_key, self.out))
        return qk, v[:, :, 0]

    def _split(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries and keys with rotary positions, and values: (B, H, T, D)."""
        qk, v = self._convolve(self._padded(x))
        q, k = rotary(qk, positions, self.dims.rotary_base).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self._split(x, ctx.positions)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=ctx.causal)
        return MixerOut(y.transpose(1, 2).flatten(2))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The sum of the multiplicative layer as in the paper, and the convolutions tap by tap."""
        gates, shared = self.multiplicative.gates, self.multiplicative.shared.weight
        modules = torch.einsum("bti,si,mi->btsm", x, gates, shared)
        seq_len, count = modules.shape[1:3]
        parts = []
        for weight in (*self.query_key.weight.chunk(2), self.out.weight):
            _, tokens, width, _ = weight.shape
            padded = F.pad(modules, (0, 0, width // 2, width // 2, tokens - 1, 0))
            taps = [
                torch.einsum(
                    "btsm,nm->btsn",
                    padded[:, token : token + seq_len, module : module + count],
                    weight[:, token, module],
                )
                for token in range(tokens)
                for module in range(width)
            ]
            parts.append(torch.stack(taps).sum(0).flatten(2).unflatten(-1, (self.dims.heads, -1)))
        q, k = (rotary(part, ctx.positions, self.dims.rotary_base) for part in parts[:2])
        allowed = self.attention_mask(seq_len, causal=ctx.causal)
        y = masked_attention(q.transpose(1, 2), k.transpose(1, 2), parts[2].transpose(1, 2), allowed)
        return y.transpose(1, 2).flatten(2)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys that the objective allows."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)

    def cost(self, work: Workload) -> Cost:
        """The multiplicative layer, C² multiply-accumulates a token; F·L·M of each convolution for each
        channel, with those of zeros at the borders; scores and weighted sum."""
        config, tokens = self.config, work.batch_size * work.seq_len
        pairs = work.seq_len * (work.seq_len + 1) // 2 if work.causal else work.seq_len**2
        taps = config.length_kernel * (2 * config.module_kernel + 1)
        return Cost(
            {
                "projections": 2 * tokens * work.d_model**2,
                "convolution": 2 * tokens * work.d_model * taps * (work.d_model // config.modules),
                "attention": 4 * work.batch_size * work.d_model * pairs,
            }
        )

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> SparseQKVState:
        """Keys and values, and what the convolutions still read."""
        shape, device = (batch_size, self.dims.heads, self.dims.head_dim), self.out.weight.device
        cache = KeyCache(masks.causal, shape, max_len, clock=clock, dtype=dtype, device=device)
        recent = batch_size, self.config.length_kernel - 1, self.config.modules, self.size
        return SparseQKVState(cache, torch.zeros(recent, dtype=dtype, device=device))

    def step(self, x: Tensor, state: SparseQKVState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        clock, cache = state.clock, state.cache
        new = self.multiplicative(x)
        modules = torch.cat([state.recent.to(new.dtype), new], dim=1)
        state.recent.copy_(modules[:, x.shape[1] :])
        qk, v = self._convolve(modules)
        q, k = rotary_next(qk, clock, self.dims.rotary_base).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if clock.position or x.shape[1] == 1:
            y = cache.attend(q, k, v)
        else:
            cache.write(k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)

    def decoding_bytes(self, work: Workload) -> int:
        """Keys and values of all tokens, and the modules of F − 1 tokens."""
        kept = 2 * work.seq_len + self.config.length_kernel - 1
        return work.batch_size * kept * work.d_model * work.element_bytes

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of all tokens, and of the modules of the last F − 1 tokens."""
        kept = 2 * work.seq_len + min(work.seq_len, self.config.length_kernel - 1)
        return work.batch_size * kept * work.d_model * work.element_bytes


class SparseQKVState(DecodingState):
    """Keys and values, and the modules (B, F − 1, S, M) of the last tokens."""

    def __init__(self, cache: KeyCache, recent: Tensor) -> None:
        super().__init__(cache.clock, cache.max_len)
        self.cache, self.recent = cache, recent

    def parts(self) -> Sequence[DecodingState]:
        """The keys and values."""
        return (self.cache,)
