"""ETC: global-local attention (Ainslie 2020, arXiv:2004.08483).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, n global tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Complexity, Context, Cost, Dims, Impl, Info, MixerOut, VariantConfig, Workload
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import TILES, MaskedAttention
from variants.ops.patterns.masks import Rule, Window
from variants.ops.patterns.segment_rows import all_rows
from variants.ops.patterns.strided_parts import Part
from variants.ops.projections import Projections, masked_attention, rotary
from variants.ops.spaced_positions import middles_of_parts


@dataclass(frozen=True, kw_only=True)
class EtcConfig(VariantConfig):
    """Knobs of global-local attention."""

    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of the attention of tokens. fused: tiles of the window and the global keys, by torch's
    CPU attention kernel. plain: the same by matrix products, on any device. auto: fused on the CPU, plain
    elsewhere."""
    window: int = knob(128, least=1, unit="tokens")
    """Tokens that a token reads on each side, itself included: the paper's radius r, plus 1."""
    global_tokens: int = knob(64, least=1, unit="tokens")
    """Global tokens: learnt vectors that read all tokens and each other, and are then read by all tokens."""
    weights: Literal["shared", "separate"] = "shared"
    """Projections of global tokens as queries, with their keys, values and outputs. shared: those of the
    tokens, so that the layer has as many as dense attention. separate: four of their own."""


class Etc(MaskedAttention):
    """H = norm(G + attention(G, [X, G])), then y = attention(X, [window of X, H]), for n global tokens G.

    The four kinds of pairs: global tokens read each other (g2g) and all tokens (g2l) in one softmax;
    tokens read all global tokens (l2g) and their own window (l2l) in one softmax. With separate weights, the
    projections of the side of the query are used for all keys that it reads.

    Deviations from the paper: its global tokens are a second input, for example one token for each sentence.
    A layer receives them from the layer below, and all four kinds of pairs read the inputs of the layer. Here
    global tokens are not carried between layers: each layer learns its own G, and tokens read G after G has
    read them. G has its residual and its layer normalisation here, and no feed-forward layer. Positions are
    rotary, and G is placed at equal distances along the sequence; the paper has learnt labels of relative
    positions, and masks by the structure of the input. The authors' code also has models that share the
    projections of queries, keys and values, and not those of the outputs.
    """

    Config = EtcConfig
    config: EtcConfig
    info = Info(
        paper="Ainslie et al. 2020, ETC, arXiv:2004.08483",
        family="fixed patterns",
        complexity=Complexity(
            time=1, memory=1, formula="T·(w + n)", source="Ainslie 2020, global-local attention", survey=1
        ),
        caps=Caps(causal=False, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {name: TILES[name] for name in ("fused", "plain")}

    def __init__(self, config: EtcConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        if config.weights == "separate":
            self.global_projections = Projections(dims)
        global_tokens = torch.randn(config.global_tokens, dims.d_model, dtype=torch.float32)
        self.global_tokens = nn.Parameter(global_tokens.to(torch.get_default_dtype()))
        self.norm = nn.LayerNorm(dims.d_model)

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: every global token reads all tokens, later ones too"
        return super().no_form(config, causal=causal)

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The window; global tokens are no tokens of the sequence."""
        return Window(self.config.window)

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The window, and the keys of the global tokens, which follow those of the tokens."""
        window = super().parts(seq_len, causal=causal, device=device)
        return window + all_rows(seq_len, self.config.global_tokens, self.dims.heads, self.device_type)

    def _global_side(self) -> Projections:
        """The projections of the attention of global tokens."""
        return self.global_projections if self.config.weights == "separate" else self.projections

    def _global_positions(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Positions (n,) float64 of the global tokens."""
        return middles_of_parts(self.config.global_tokens, x.shape[1], positions, x.device)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        side, at = self._global_side(), self._global_positions(x, ctx.positions)
        q, *of_tokens = self.projections.split(x, ctx.positions)
        read = of_tokens if side is self.projections else keys_and_values(side, x, ctx.positions)
        # what depends on no token is projected once for all sequences
        asking, *own = (t.expand(len(x), -1, -1, -1) for t in side.split(self.global_tokens[None], at))
        keys, values = joined(read, own)
        found = F.scaled_dot_product_attention(asking, keys, values)
        hidden = self.norm(self.global_tokens + side.merge(found))
        keys, values = joined(of_tokens, keys_and_values(self.projections, hidden, at))
        q = q.clone()  # a view of one product with the keys, which are no longer needed
        del of_tokens, read
        return MixerOut(self.projections.merge(self.run_impl(self, q, keys, values, ctx.causal)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Two masked attentions, each to T + n keys with all four projections."""
        self.require_objective(causal=ctx.causal)
        seq_len, n = x.shape[1], self.config.global_tokens
        positions = torch.arange(seq_len, device=x.device) if ctx.positions is None else ctx.positions
        at = self._global_positions(x, ctx.positions)
        both = torch.cat([positions.double(), at])

        def attention(side: Projections, global_tokens: Tensor, allowed: Tensor) -> Tensor:
            q, k, v = side.split(torch.cat([x, global_tokens], dim=1), both)
            return side.merge(masked_attention(q, k, v, allowed))  # (B, T + n, C)

        everything = torch.ones(seq_len + n, seq_len + n, dtype=torch.bool)
        window_and_globals = everything.clone()
        window_and_globals[:seq_len, :seq_len] = masks.matrix(Window(self.config.window), seq_len)
        tokens = self.global_tokens.expand(len(x), -1, -1)
        hidden = self.norm(tokens + attention(self._global_side(), tokens, everything)[:, seq_len:])
        return attention(self.projections, hidden, window_and_globals)[:, :seq_len]

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys; those outside the window are read through the global tokens."""
        return masks.matrix(masks.all_keys, seq_len)

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """The pairs of the window, of tokens and global tokens in both directions, and of global tokens."""
        n = self.config.global_tokens
        return super().pairs(seq_len, causal=causal) + self.dims.heads * n * (2 * seq_len + n)

    def cost(self, work: Workload) -> Cost:
        """The projections of tokens, and of global tokens: queries, keys and values once for all sequences,
        then outputs, keys and values; all pairs."""
        n, batch = self.config.global_tokens, work.batch_size
        keys_values = 4 * work.d_model * work.key_dim  # of one token
        queries = 2 * work.d_model * work.inner_dim
        again = batch * work.seq_len * keys_values if self.config.weights == "separate" else 0
        memory = n * (queries + keys_values) + batch * n * (queries + keys_values)
        return super().cost(work) + Cost({"projections": again, "memory": memory})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of all tokens, of both sides: with a further token, the positions of
        the global tokens and so all their weights change."""
        sides = 2 if self.config.weights == "separate" else 1
        return 2 * sides * work.batch_size * work.seq_len * work.key_dim * work.element_bytes


def keys_and_values(side: Projections, x: Tensor, positions: Tensor | None) -> list[Tensor]:
    """(B, T, C) → keys with rotary positions and values, (B, H, T, D), as of `Projections.split`."""
    w_k, w_v = side.qkv.weight[side.inner :].split(side.key_dim)
    k, v = (F.linear(x, w).unflatten(-1, (side.key_heads, -1)) for w in (w_k, w_v))
    k = rotary(k, positions, side.rotary_base)
    return [side.spread(t.transpose(1, 2)) for t in (k, v)]


def joined(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Keys and values (B, H, T, D) with further ones behind them, in the layout (B, T, H, D)."""
    pairs = zip(first, second, strict=True)
    return [torch.cat([a.transpose(1, 2), b.transpose(1, 2)], dim=1).transpose(1, 2) for a, b in pairs]
