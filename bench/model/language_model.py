"""A small pre-norm transformer language model with one slot for attention.

Shapes: B batch, T tokens, C channels (d_model), V vocabulary.

Everything but the attention layer is the same for every variant: pre-norm blocks (Xiong 2020,
arXiv:2002.04745), GELU feed-forward, GPT-2's initialisation (normal, 0.02; the projections that
write to the residual stream divided by √(2·depth)). A frozen parameter keeps the values that its layer
gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from bench.model.activations import STRATEGIES, BlockOut, Run, Told
from variants.base import Attention, Dims, Flops, Out, VariantConfig, require_tokens


class FeedForward(nn.Module):
    """C → mult·C → C with a GELU between."""

    def __init__(self, d_model: int, mult: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, mult * d_model, bias=False)
        self.out = nn.Linear(mult * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        y: Tensor = self.out(nn.functional.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, attention: Attention, d_model: int, *, ff_mult: int, ff_chunks: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, ff_mult)
        self.dropout = nn.Dropout(dropout)
        self.ff_chunks = ff_chunks

    def attend(self, x: Tensor, state: Any, *, causal: bool) -> Out:
        """The attention branch: (B, T, C) → Out."""
        out = self.attention(self.attention_norm(x), causal=causal, state=state)
        return out._replace(y=self.dropout(out.y))

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward branch: (B, T, C) → (B, T, C), every token by itself."""
        y: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y

    def forward(self, x: Tensor, state: Any, *, causal: bool) -> BlockOut:
        """(B, T, C) → BlockOut."""
        out = self.attend(x, state, causal=causal)
        x = x + out.y
        if self.ff_chunks == 1:
            fed = self.feed(x)
        else:  # computed again in the backward pass, or every chunk's ff_mult·C channels would be stored
            chunks = x.chunk(self.ff_chunks, dim=1)
            fed = torch.cat([recompute(self.feed, chunk, use_reentrant=False) for chunk in chunks], dim=1)
        return BlockOut(x + fed, out.state, out.aux_loss)


class Output(NamedTuple):
    """Logits (B, T, V), each layer's state, and the layers' auxiliary losses where they have any."""

    logits: Tensor
    states: list[Any]
    aux_losses: list[Tensor]


class LanguageModel(nn.Module):
    """Token ids (B, T) → logits (B, T, V), with the variant's plan applied around the blocks."""

    def __init__(
        self,
        variant: type[Attention],
        config: VariantConfig,
        dims: Dims,
        *,
        depth: int,
        ff_mult: int,
        dropout: float,
        vocabulary: int,
        activations: str,
        ff_chunks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Parameters and sums are float32; `dtype` is that of matrix products, by autocast."""
        super().__init__()
        self.plan = variant.plan(config)
        self.run_blocks = STRATEGIES[activations].run
        self.ff_mult, self.vocabulary, self.dtype = ff_mult, vocabulary, dtype
        self.embedding = nn.Embedding(vocabulary, dims.d_model)
        self.blocks = nn.ModuleList(
            Block(
                variant(config, dims, layer),
                dims.d_model,
                ff_mult=ff_mult,
                ff_chunks=ff_chunks,
                dropout=dropout,
            )
            for layer in range(depth)
        )
        variant.tie(self.layers)
        self.norm = nn.LayerNorm(dims.d_model)
        self.head = nn.Linear(dims.d_model, vocabulary, bias=False)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight") and parameter.requires_grad:  # what writes to the residual stream
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad:
            nn.init.normal_(module.weight, std=0.02)

    @property
    def layers(self) -> list[Attention]:
        """The attention layers, lowest first."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    @contextmanager
    def running(self, run_blocks: Run) -> Iterator[None]:
        """Run the blocks in another way while inside."""
        before, self.run_blocks = self.run_blocks, run_blocks
        try:
            yield
        finally:
            self.run_blocks = before

    def forward(self, tokens: Tensor, *, causal: bool, states: list[Any] | None = None) -> Output:
        """One segment of the plan, (B, T) → Output; `states` is what the segment before returned.

        A causal model's logits at t depend on tokens up to t alone. Logits are float32. Raises ValueError for
        an input without a token.
        """
        require_tokens(tokens)
        outs: list[Told] = []

        def network(window: Tensor) -> Tensor:
            nonlocal states
            before = states or [None] * len(self.blocks)
            x, found = self.run_blocks(self.blocks, self.embedding(window), before, causal=causal)
            outs.extend(found)
            states = [out.state for out in found]
            return x

        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.head(self.norm(self.plan.apply(network, tokens, causal=causal)))
        losses = [out.aux_loss for out in outs if out.aux_loss is not None]
        return Output(logits.float(), states or [], losses)

    def stream(self, tokens: Tensor, *, causal: bool) -> Iterator[tuple[slice, Output]]:
        """A whole sequence (B, T), segment by segment: (where in T, Output) of each, state carried along.

        Raises ValueError for an input without a token.
        """
        require_tokens(tokens)
        states: list[Any] | None = None
        for segment in self.plan.segments(tokens.shape[1]):
            out = self(tokens[:, segment], causal=causal, states=states)
            states = out.states
            yield segment, out

    def flops(self, dims: Dims, *, causal: bool) -> Flops:
        """Algorithmic forward FLOPs on (B, T) tokens: each window of the plan through every block."""
        total = Flops(2 * dims.batch_size * dims.seq_len * dims.d_model * self.vocabulary, 0)
        for length, count in self.plan.lengths(dims.seq_len):
            window = Dims(batch_size=dims.batch_size, seq_len=length, d_model=dims.d_model, heads=dims.heads)
            feed_forward = Flops(4 * dims.batch_size * length * self.ff_mult * dims.d_model**2, 0)
            for layer in self.layers:
                total = total + (layer.flops(window, causal=causal) + feed_forward) * count
        return total
