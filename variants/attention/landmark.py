"""Landmark attention: a learnt key selects a block, and weighs it (Mohtashami 2023, arXiv:2305.16300).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, b tokens of a block, F
full blocks, n queries, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
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
from variants.ops.chosen.block_layout import Plan
from variants.ops.chosen.block_means import BlockMeans, best_blocks, candidate_pairs, own_pairs
from variants.ops.chosen.landmark_blocks import landmark_attention
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.projections import Projections, rotary

OVERHEAD = (
    "a query computes the scores of all keys of its own block and of some later landmarks, the last tile of "
    "a selected block has empty slots, and the backward pass computes the outputs of selected blocks again"
)


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(VariantConfig):
    """Knobs of the blocks."""

    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of attention. fused: gathered blocks, by torch's CPU attention kernel. plain: the same
    by matrix products, on any device. auto: fused on the CPU, plain elsewhere."""
    block: int = knob(64, least=1, unit="tokens")
    """Tokens of a block. The paper has 50, and 63 with a landmark token."""
    top_k: int = knob(4, least=1, unit="blocks")
    """Past blocks that a query reads, besides its own block. The paper has 2 and 4 in evaluation."""


def fused(layer: Landmark, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor) -> Tensor:
    """Gathered blocks, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.attend(q, k, v, landmarks, "fused")


def plain(layer: Landmark, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor) -> Tensor:
    """Gathered blocks, by matrix products."""
    return layer.attend(q, k, v, landmarks, "plain")


class Landmark(SequenceMixer):
    """Grouped softmax (§3.1): one softmax over the keys of the own block, causally, and the landmarks of past
    blocks; the weight of a landmark times a softmax over the keys of its block.

    A query reads the k past blocks whose landmarks have the largest scores, by head (§3.2). A block has a
    landmark when it is complete, so that no later token is read. The weights of the chosen landmarks have a
    gradient, which trains the selection; the choice itself has none.

    Deviations from the paper: it inserts a landmark token after each block, which makes the sequence longer
    by 1/b. Here the last token of a block gives the landmark, by a projection of its own, with the rotary
    angle of its position. The paper trains with all blocks, and selects in inference; here training selects
    too, so that both compute the same, and top_k ≥ T/b is the paper's training. Its keys keep positions in
    the text or, beyond the trained length, positions of a shorter text; here they have those in the text.

    The scores of all landmarks grow with T²/b. If heads share keys, each of them selects by itself.
    """

    Config = LandmarkConfig
    config: LandmarkConfig
    position_scheme = "rotary"
    no_shared_keys = None
    info = Info(
        paper="Mohtashami and Jaggi 2023, Landmark Attention, arXiv:2305.16300",
        family="learned patterns",
        complexity=Complexity(time=2, memory=1, formula="T·k·b + T²/b", source="Mohtashami 2023, §3.2"),
        caps=Caps(causal=True, bidirectional=False),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=plain, flop_overhead_reason=OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def __init__(self, config: LandmarkConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.landmark = nn.Linear(dims.d_model, dims.key_dim, bias=False)

    def _past(self, seq_len: int) -> int:
        """Past blocks that the last query selects."""
        return min(self.config.top_k, (seq_len - 1) // self.config.block)

    def _landmarks(self, x: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """Landmarks (B, K, blocks, D) of the blocks that end within x (B, T, C), whose first token is
        `start`; in float32 or wider, since few tokens have a landmark and its gradient is a sum of few terms.
        """
        block = self.config.block
        ends = slice((-1 - start) % block, None, block)
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        keys = self.landmark(x[:, ends]).unflatten(-1, (self.dims.key_heads, -1))
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        turned: Tensor = rotary(keys, positions[ends], self.dims.rotary_base)
        return turned.transpose(1, 2)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self.projections.split_shared(x, ctx.positions)
        landmarks = self._landmarks(x, ctx.positions)
        return MixerOut(self.projections.merge(self.run_impl(self, q, k, v, landmarks)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, kernel: str) -> Tensor:
        """Queries (B, H, T, D), keys and values (B, K, T, D), landmarks (B, K, F, D) → (B, H, T, D)."""
        k, v, landmarks = (self.projections.spread(t) for t in (k, v, landmarks))
        picks = self._select(q, landmarks)
        starts = tuple((j + 1) * self.config.block for j in range(picks.shape[-1]))
        plan = Plan(self.config.block, starts, kernel, self.device_type)
        return landmark_attention(q, k, v, landmarks, picks, plan)

    def _select(self, q: Tensor, landmarks: Tensor, start: int = 0) -> Tensor:
        """The past blocks (B, H, n, picks) of the queries (B, H, n, D) from token `start` on, by landmarks
        (B, H, F, D); the number of blocks where there is none."""
        past = self._past(start + q.shape[2])
        return best_blocks(q, landmarks, self.config.block, past, self.device_type, start=start)

    # --- reference ------------------------------------------------------------------------------------

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """The past blocks that each query selects (B, H, T, picks)."""
        q, _, _ = self.projections.split_shared(x, ctx.positions)
        return self._select(q, self.projections.spread(self._landmarks(x, ctx.positions)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Both softmaxes over all keys, with masks."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        landmarks = self.projections.spread(self._landmarks(x, ctx.positions))
        return self.projections.merge(self._written_out(q, k, v, landmarks, self.choices(x, ctx)))

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, picks: Tensor) -> Tensor:
        """The last n tokens read all S: queries (B, H, n, D), keys and values (B, H, S, D), landmarks
        (B, H, F, D) → (B, H, n, D)."""
        block, blocks, scale = self.config.block, landmarks.shape[2], q.shape[-1] ** -0.5
        key = torch.arange(k.shape[2], device=q.device)
        query = key[k.shape[2] - q.shape[2] :, None]
        own = (key // block == query // block) & (key <= query)
        picked = (picks[..., None, :] == torch.arange(blocks, device=q.device)[:, None]).any(-1)
        scores = q @ k.mT * scale
        of_landmarks = (q @ landmarks.to(q.dtype).mT * scale).masked_fill(~picked, float("-inf"))
        joint = torch.cat([scores.masked_fill(~own, float("-inf")), of_landmarks], dim=-1).softmax(-1)
        of_keys, of_blocks = joint.split([k.shape[2], blocks], dim=-1)
        full = blocks * block
        inside = scores[..., :full].unflatten(-1, (blocks, block)).softmax(-1) * of_blocks[..., None]
        y: Tensor = of_keys @ v + inside.flatten(-2) @ v[:, :, :full]
        return y

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Projections, also of the last token of each block. Gate: 2·D for each query and past block; no
        gradient passes through it. Weights: 2·D for each query and selected landmark. Attention: 4·D for
        each query and key of its blocks."""
        seq_len, block = work.seq_len, self.config.block
        past = sum(max(0, seq_len - (j + 1) * block) for j in range(self._past(seq_len)))
        each = work.batch_size * work.inner_dim
        of_landmarks = 2 * work.batch_size * (seq_len // block) * work.d_model * work.key_dim
        parts = {
            "projections": Projections.flops(work) + of_landmarks,
            "gate": 2 * each * candidate_pairs(seq_len, block),
            "weights": 2 * each * past,
            "attention": 4 * each * (own_pairs(seq_len, block) + past * block),
        }
        return Cost(parts, {"gate": 0})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values, and of the landmarks of complete blocks."""
        rows = 2 * work.seq_len + work.seq_len // self.config.block
        return work.batch_size * work.key_dim * rows * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> LandmarkState:
        """All keys and values, and the landmarks of complete blocks."""
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        device = self.landmark.weight.device
        return LandmarkState(shape, max_len, self.config.block, clock=clock, dtype=dtype, device=device)

    def decoding_bytes(self, work: Workload) -> int:
        """The state after the last token."""
        return self.state_bytes(work)

    def step(self, x: Tensor, state: LandmarkState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence; one token gathers its blocks."""
        begin, tokens, block = state.clock.position, x.shape[1], self.config.block
        end = begin + tokens
        q, k, v = self.projections.split_next(x, state.clock)
        state.write(k, v)
        if begin // block < end // block:
            new = self._landmarks(x, state.clock.positions(tokens, x.device), begin)
            state.landmarks[:, :, begin // block : end // block] = new
        if not begin and tokens > 1:
            known = state.landmarks[:, :, : end // block].to(q.dtype)
            return self.projections.merge(self.run_impl(self, q, k, v, known))
        landmarks = self.projections.spread(state.landmarks[:, :, : end // block].to(q.dtype))
        picks = self._select(q, landmarks, begin)
        if tokens > 1:
            keys, values = (
                self.projections.spread(t[:, :, :end].to(q.dtype)) for t in (state.keys, state.values)
            )
            return self.projections.merge(self._written_out(q, keys, values, landmarks, picks))
        return self.projections.merge(self._read_blocks(q, landmarks, picks[:, :, 0], state))

    def _read_blocks(self, q: Tensor, landmarks: Tensor, picks: Tensor, state: LandmarkState) -> Tensor:
        """One query (B, H, 1, D) reads the picked blocks (B, H, picks), and its own: (B, H, 1, D)."""
        keys, values = (t.to(q.dtype) for t in state.of_blocks(picks))
        scale, count = q.shape[-1] ** -0.5, picks.shape[-1]
        scores = q @ keys.mT * scale
        chosen = landmarks.gather(2, picks[..., None].expand(-1, -1, -1, q.shape[-1]))
        selected, own = scores.split(
            [count * self.config.block, scores.shape[-1] - count * self.config.block], -1
        )
        joint = torch.cat([q @ chosen.mT * scale, own], dim=-1).softmax(-1)
        of_blocks, of_keys = joint.split([count, own.shape[-1]], dim=-1)
        inside = selected.unflatten(-1, (count, self.config.block)).softmax(-1) * of_blocks[..., None]
        return torch.cat([inside.flatten(-2), of_keys], dim=-1) @ values


class LandmarkState(BlockMeans):
    """All keys and values (B, K, max_len, D), and the landmarks (B, K, F, D) of complete blocks."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        block: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D)."""
        super().__init__(shape, max_len, 0, block, clock=clock, dtype=dtype, device=device)
        batch, heads, channels = shape
        self.landmarks = torch.zeros(batch, heads, max_len // block, channels, dtype=dtype, device=device)
