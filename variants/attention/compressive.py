"""Compressive Transformer: memories too old for Transformer-XL, compressed (Rae 2019, arXiv:1911.05507).

Shapes: B batch, T tokens, S tokens of a segment, M positions of memory, M_c compressed memories, F positions
that fall out of the memory after a segment, c compression rate, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Complexity, Context, Cost, Dims, Info, MixerOut, VariantConfig, Workload
from variants.input_schedule import Segments
from variants.knobs import knob
from variants.ops.relative_attention import Attended, Recurrent, slide


class Compressor(nn.Module):
    """(B, F, C) → (B, F / c, C), F a multiple of c: the mean of each group of c."""

    reach = 0
    """Positions outside its own group, on either side, that a compressed memory depends on."""

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__()
        self.d_model, self.rate = d_model, rate

    def groups(self, x: Tensor) -> Tensor:
        """(B, F / c, c, C)."""
        grouped: Tensor = x.unflatten(1, (-1, self.rate))
        return grouped

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """`usage` (B, F) is the mean attention that each position received, where the memory counts it."""
        return self.groups(fallen).mean(dim=2)

    def flops(self, fallen: int) -> int:
        """Forward FLOPs of one sequence's F positions."""
        return 0


class MaxPool(Compressor):
    """The largest of each group, channel by channel."""

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        return self.groups(fallen).amax(dim=2)


class MostUsed(Compressor):
    """The F / c positions that received most attention, in their order."""

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        assert usage is not None
        kept = usage.topk(fallen.shape[1] // self.rate, dim=1).indices.sort(dim=1).values
        return fallen.gather(1, kept[..., None].expand(-1, -1, fallen.shape[2]))


class Conv(Compressor):
    """A convolution with kernel and stride c, written as one linear map of each group."""

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__(d_model, rate)
        self.pool = nn.Linear(rate * d_model, d_model, bias=False)

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        pooled: Tensor = self.pool(self.groups(fallen).flatten(2))
        return pooled

    def flops(self, fallen: int) -> int:
        """Each position is multiplied by one C × C matrix."""
        return 2 * fallen * self.d_model**2


class DilatedConv(Conv):
    """A convolution with kernel 3 and dilation 2 over what falls out together, a GELU, then `Conv`.

    The paper names dilated convolutions and gives no sizes: these are ours. Ends are padded with zeros.
    """

    reach = 2

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__(d_model, rate)
        self.spread = nn.Linear(3 * d_model, d_model, bias=False)

    def forward(self, fallen: Tensor, usage: Tensor | None) -> Tensor:
        """See `Compressor`."""
        tokens, padded = fallen.shape[1], F.pad(fallen, (0, 0, self.reach, self.reach))
        taps = [padded[:, i : i + tokens] for i in (0, self.reach, 2 * self.reach)]
        return super().forward(F.gelu(self.spread(torch.cat(taps, dim=-1))), usage)

    def flops(self, fallen: int) -> int:
        """Three matrices a position more than `Conv`."""
        return 4 * super().flops(fallen)


COMPRESSIONS: dict[str, type[Compressor]] = {
    "mean": Compressor,
    "max": MaxPool,
    "conv": Conv,
    "dilated_conv": DilatedConv,
    "most_used": MostUsed,
}


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig(VariantConfig):
    """Knobs of compressed memory."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens that are processed, and trained on, at a time."""
    mem_len: int = knob(256, least=0, unit="tokens")
    """Positions before the segment whose hidden states each layer keeps as they are; 0 for none."""
    comp_len: int = knob(64, least=0, unit="memories")
    """Compressed memories that each layer keeps beyond those; 0 for none, which is Transformer-XL."""
    rate: int = knob(4, least=1, unit="memories")
    """Memories that are compressed into one."""
    compression: Literal["mean", "max", "conv", "dilated_conv", "most_used"] = "conv"
    """How memories are compressed. mean or max pooling, conv or dilated_conv (learnt), most_used (those that
    got most attention)."""

    def falls(self, memory: int, tokens: int) -> int:
        """Positions that leave a memory of this size when a segment enters it."""
        over = max(0, memory + tokens - self.mem_len)
        return over - over % self.rate if self.comp_len else over


class State(NamedTuple):
    """What is carried from segment to segment, detached."""

    memory: Tensor
    """Hidden states (B, M, C)."""
    compressed: Tensor
    """Compressed memories (B, ≤ M_c, C)."""
    usage: Tensor | None
    """(B, M) sum over the queries so far of the attention to each memory, mean over heads; for most_used."""


class Stretch(NamedTuple):
    """The sizes at one segment of a sequence, which its length alone decides."""

    segment: slice
    memory: int
    compressed: int
    first: int
    """The earliest token that the segment can read, compressed or not."""
    fallen: int
    """Positions compressed after the segment."""


@lru_cache(maxsize=16)
def _stretches(config: CompressiveConfig, reach: int, seq_len: int) -> tuple[Stretch, ...]:
    """Kept, because every layer of a model asks for it several times: 0.1 s at a million tokens."""
    found, memory = [], 0
    queue: list[int] = []  # the earliest token that each compressed memory depends on
    for segment in Segments(config.segment).segments(seq_len):
        oldest = segment.start - memory
        fallen = config.falls(memory, segment.stop - segment.start)
        found.append(Stretch(segment, memory, len(queue), min(queue, default=oldest), fallen))
        if config.comp_len:
            groups = range(oldest, oldest + fallen, config.rate)
            queue += [max(oldest, group - reach) for group in groups]
            queue = queue[-config.comp_len :]
        memory += segment.stop - segment.start - fallen
    return tuple(found)


class Compressive(Recurrent):
    """Transformer-XL with a second, compressed memory beyond the first (§3).

    Every query reads the compressed memories, the memory, and its segment up to itself, in this order;
    relative positions count along it, so that a compressed memory is one position.

    After a segment, what no longer fits in the memory is compressed in groups of `rate`, the oldest
    first. Where it is no whole number of groups, the rest stays in the memory, readable, until its group
    is full; the memory then holds up to rate − 1 positions more than mem_len.

    The attention-reconstruction loss (§3.1, algorithm 2) is the mean squared difference between content
    attention (q·k, no positions) to what fell out and to its compression. Queries, keys' and values'
    projections and memories are detached in it, so it trains the compressor alone; compressed memories
    are carried detached, so the task trains everything else. It is `MixerOut.aux_loss`, computed where
    gradients are: evaluation does without, and `cost` does not count it (`flop_overhead_reason` says so, and
    `reconstruction_flops` how much it is). Pooling and most_used learn nothing and have none.

    The default, conv, is the paper's best (§4.1), and has its rate · C² parameters: at rate 4, as many as
    all of a dense layer's projections. Pooling has none.

    Cost beside `transformer_xl`, segment = mem_len = 512 and comp_len = 128 at T = 16,384: a third more
    FLOPs, for the eighth more keys, the convolution and the loss, most of which is the attention to
    what fell out; without positions, it cannot be taken from the layer's own. Measured on two cores,
    median of three rounds: 0.39 of the time of dense attention (`transformer_xl` 0.28).

    Deviations from the paper: those of `transformer_xl`; the loss is a mean, not a sum, over tokens and
    channels, so that it does not grow with the batch; most_used ranks by the mean attention over all
    queries that could read a position, those of its own segment included. The package
    compressive-transformer-pytorch reconstructs the attention to the whole memory, not only, as Algorithm 2
    does, to what falls out.
    """

    Config = CompressiveConfig
    config: CompressiveConfig
    info = Info(
        paper="Rae et al. 2019, Compressive Transformers, arXiv:1911.05507",
        family="recurrence",
        complexity=Complexity(time=1, memory=0, formula="T·(S+M+M_c)", source="Rae 2019, §3", survey=2),
        caps=Caps(causal=True, bidirectional=False, stateful=True),
    )

    def __init__(self, config: CompressiveConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        # drawn last, and only where used, so that everything else is as in transformer_xl
        make = COMPRESSIONS[config.compression] if config.comp_len else Compressor
        self.compressor = make(dims.d_model, config.rate)
        self.counts = isinstance(self.compressor, MostUsed)
        self.learns = any(True for _ in self.compressor.parameters())
        if self.learns:
            self.flop_overhead_reason = (
                f"{type(self).flop_overhead_reason}; training also attends twice for the reconstruction loss"
            )

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """The compressor's: the task never reaches them."""
        return self.compressor.parameters()

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> Segments:
        """Segments in order, the last as long as what is left."""
        assert isinstance(config, CompressiveConfig)
        return Segments(config.segment)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> MixerOut:
        """(B, S, C) → MixerOut. Raises ValueError where not causal."""
        if state is None:
            state = self._blank(x)
        found = self.attend(x, torch.cat([state.compressed, state.memory], dim=1), count=self.counts)
        after, fallen, compressed = self._advance(x, state, found.usage)
        loss = None
        if compressed is not None and self.learns and torch.is_grad_enabled():
            keys = slice(state.compressed.shape[1], state.compressed.shape[1] + fallen)
            loss = self._reconstruction(found, keys, compressed)
        return MixerOut(found.y, after, loss)

    def _blank(self, x: Tensor) -> State:
        nothing = x.new_empty(x.shape[0], 0, x.shape[2])  # not a view, which would keep x
        return State(nothing, nothing, nothing.new_zeros(x.shape[0], 0) if self.counts else None)

    def _advance(self, x: Tensor, state: State, received: Tensor | None) -> tuple[State, int, Tensor | None]:
        """The state after segment x, how many positions fell out, and their compression if there is one.

        The compression carries the compressor's gradient; in the state, it is detached. The state is made of
        copies, so that what fell out is freed.
        """
        tokens = x.shape[1]
        held = slide(state.memory, x, 0)
        fallen = self.config.falls(state.memory.shape[1], tokens)
        usage = mean_usage = None
        if received is not None and state.usage is not None:
            held_tokens = held.shape[1]
            usage = F.pad(state.usage, (0, tokens)) + received[:, -held_tokens:]
            # each position was read by itself and by all after it
            readers = torch.arange(held_tokens, 0, -1, device=x.device, dtype=usage.dtype)
            mean_usage = (usage / readers)[:, :fallen]
            usage = usage[:, fallen:].clone()
        compressed = None
        queue = state.compressed
        if fallen and self.config.comp_len:
            compressed = self.compressor(held[:, :fallen], mean_usage)
            queue = torch.cat([queue, compressed.detach()], dim=1)[:, -self.config.comp_len :].clone()
        return State(held[:, fallen:].clone(), queue, usage), fallen, compressed

    def _reconstruction(self, found: Attended, keys: slice, compressed: Tensor) -> Tensor:
        """Algorithm 2; the keys and values of what fell out are those that the segment attended to."""
        q = found.q.detach().transpose(0, 1)
        k, v = found.kv.detach()[..., keys, :].transpose(1, 2)  # (B, H, F, D)
        shorter = F.linear(compressed, self.kv.weight.detach()).unflatten(-1, (2, self.heads, -1))
        k_short, v_short = shorter.permute(2, 0, 3, 1, 4)
        want = F.scaled_dot_product_attention(q, k, v)
        error = F.scaled_dot_product_attention(q, k_short, v_short) - want
        # `mse_loss` computes the same, but its result keeps a buffer as large as `error` alive on the CPU
        return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean()

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment, every score written out. Raises ValueError where not causal."""
        self.require_objective(causal=ctx.causal)
        return torch.cat([y for y, _ in self.reference_segments(x)], dim=1)

    def reference_segments(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Outputs and reconstruction loss of each segment, for reading."""
        c = self.config
        compressed = old = memory = x[:, :0].detach()
        usage = readers = x.new_zeros(x.shape[0], 0)
        for segment in self.input_schedule(c).segments(x.shape[1]):
            h = x[:, segment]
            found = self.plainly_attend(h, torch.cat([compressed, memory], dim=1))
            assert found.usage is not None
            tokens, seen = h.shape[1], memory.shape[1] + h.shape[1]
            usage = torch.cat([usage, h.new_zeros(len(h), tokens)], dim=1) + found.usage.detach()[:, -seen:]
            own = torch.arange(tokens, 0, -1).to(h).expand(len(h), -1)
            readers = torch.cat([readers + tokens, own], dim=1)
            memory = torch.cat([memory, h.detach()], dim=1)
            over = max(0, seen - c.mem_len)
            over = over // c.rate * c.rate if c.comp_len else over
            old, memory = memory[:, :over], memory[:, over:]
            loss = None
            if c.comp_len and over:
                new = self.compressor(old, (usage / readers)[:, :over])
                if self.learns:
                    q = self.q.weight.detach(), self.kv.weight.detach()
                    loss = (
                        (self._content(h.detach(), old, *q) - self._content(h.detach(), new, *q))
                        .square()
                        .mean()
                    )
                compressed = torch.cat([compressed, new.detach()], dim=1)[:, -c.comp_len :]
            usage, readers = usage[:, over:], readers[:, over:]
            yield found.y, loss

    def _content(self, h: Tensor, memory: Tensor, w_q: Tensor, w_kv: Tensor) -> Tensor:
        """Content attention of h (B, S, C) to a memory, with the weights given: (B, H, S, D)."""
        q, (k, v) = h @ w_q.T, (memory @ w_kv.T).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended: Tensor = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        return attended

    def stretches(self, seq_len: int) -> tuple[Stretch, ...]:
        """The sizes at each segment of a sequence."""
        return _stretches(self.config, self.compressor.reach, seq_len)

    def cost(self, work: Workload) -> Cost:
        """The segments of a sequence, each with the memories that exist by then, and the compression."""
        total = Cost()
        for part in self.stretches(work.seq_len):
            tokens = part.segment.stop - part.segment.start
            total += self.segment_cost(work, tokens, part.memory + part.compressed)
            total += Cost({"compression": work.batch_size * self.compressor.flops(part.fallen)})
        return total

    def reconstruction_flops(self, work: Workload) -> int:
        """Forward FLOPs of the auxiliary loss, where it is computed: two attentions without positions,
        to what fell out and to its compression, and the keys and values of the latter."""
        if not self.learns:
            return 0
        total = 0
        for part in self.stretches(work.seq_len):
            tokens, compressed = part.segment.stop - part.segment.start, part.fallen // self.config.rate
            total += 4 * work.d_model * (tokens * (part.fallen + compressed) + compressed * work.d_model)
        return work.batch_size * total

    def state_bytes(self, work: Workload) -> int:
        """Hidden states, not keys and values: one a memory, a compressed memory and a token of the open
        segment; where usage counts, one number a memory too.

        A segment of which some tokens are still to come is open: those tokens read the memories from before
        it, and its tokens so far. What its queries add to the usage is not kept: at its end, when usage is
        first asked for, its hidden states give it again.
        """
        part = self.stretches(work.seq_len)[-1]
        memory, compressed, tokens = part.memory, part.compressed, part.segment.stop - part.segment.start
        open_tokens = tokens % self.config.segment
        if not open_tokens:
            memory += tokens - part.fallen
            if self.config.comp_len:
                compressed = min(self.config.comp_len, compressed + part.fallen // self.config.rate)
        hidden: int = (memory + compressed + open_tokens) * work.d_model * work.element_bytes
        usage: int = memory * max(4, work.element_bytes) if self.counts else 0  # summed in float32 at least
        return work.batch_size * (hidden + usage)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """What can be read in one layer, as it is or compressed; most_used keeps what content decides."""
        if self.counts:
            return None
        index = torch.arange(seq_len)
        first = torch.zeros(seq_len, dtype=torch.int64)
        for part in self.stretches(seq_len):
            first[part.segment] = part.first
        return (index <= index[:, None]) & (index >= first[:, None])
