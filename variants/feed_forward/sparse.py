"""The sparse feed-forward layer of Scaling Transformers (Jaszczur 2021, arXiv:2111.12763, §3.1).

The hidden channels are in blocks of N, and a small controller chooses one channel in each block for each
token. A parallel pass computes all channels and masks them, as the paper does in training. A pass of few
tokens in evaluation, such as a step of decoding, reads only the weights of the chosen channels: 1/N of them.

Training follows the released code (Trax, `SparseFF`). Gumbel noise moves choices. The chosen channels are
used alone in 30 % of the passes, with the gradient of the softmax (straight-through); in the others all
channels are multiplied by their softmax, without noise. One random number decides for all tokens of a pass.
The mask is applied before the ReLU, so a channel that is 0 has no gradient: where chosen channels are used
alone, only they train the softmax.

Deviations: no biases, as in the other layers here. The controller is computed in float32, so that a
recomputation from rounded inputs makes the same choices. The paper varies N; the default here is that of the
released code.

Shapes: B batch, T tokens, C channels, D hidden channels in G blocks of N, R channels of the controller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.knobs import knob

GATHER_PASSES = 3
"""How often a gathered weight is passed over: it is read, written next to the others, and read again. A
weight of a matrix product is read once."""


@dataclass(frozen=True, kw_only=True)
class SparseConfig(FeedForwardConfig):
    """Knobs of the sparse feed-forward layer."""

    block: int = knob(32, least=1, unit="channels")
    """Hidden channels of a block, of which one is active. It divides the hidden width; 1 is an MLP with
    ReLU."""
    mult: int = knob(4, least=1)
    """Width of the hidden layer as a multiple of the model's channels."""
    rank: int | None = knob(None, least=1, unit="channels")
    """Width of the controller's bottleneck; null is the model's channels divided by block."""
    temperature: float = knob(0.1, least=0)
    """Factor of the Gumbel noise on the controller's log-probabilities in training."""
    hard: float = knob(0.3, least=0, most=1)
    """Probability that a training pass uses the chosen channels alone, and not all by their softmax."""

    def hidden(self, d_model: int) -> int:
        """Channels of the hidden layer."""
        return self.mult * d_model

    def bottleneck(self, d_model: int) -> int:
        """Channels between the two maps of the controller."""
        return self.rank or max(1, d_model // self.block)


class _Rows(nn.Module):
    """A linear map of D channels whose weight has a row for each of them, so that a row is read at once."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) → (B, T, C)."""
        return hidden @ self.weight


class Sparse(FeedForward):
    """W₂ max(0, m(x) ⊙ W₁ x): C → D → C, where m(x) is 1 for one channel of each block, 0 for the others.

    The channel is that of the largest entry of C₂ C₁ x within its block.
    """

    Config = SparseConfig
    config: SparseConfig
    paper = "Jaszczur et al. 2021, Sparse is Enough in Scaling Transformers, arXiv:2111.12763"

    def __init__(self, config: SparseConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        hidden, rank = config.hidden(d_model), config.bottleneck(d_model)
        self.blocks = hidden // config.block
        self.controller_down = nn.Linear(d_model, rank, bias=False)
        self.controller_up = nn.Linear(rank, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.out = _Rows(hidden, d_model)

    @classmethod
    def unsupported(cls, config: SparseConfig, d_model: int) -> str | None:
        """A block must divide the width of the hidden layer."""
        hidden = config.hidden(d_model)
        if hidden % config.block:
            return f"blocks of {config.block} channels do not divide a hidden layer of {hidden}"
        return None

    def active_parameters(self) -> int:
        """Those of the controller, and of one hidden channel in each block."""
        of_channels = self.up.weight.numel() + self.out.weight.numel()
        of_controller = self.controller_down.weight.numel() + self.controller_up.weight.numel()
        return of_controller + of_channels // self.config.block

    def choices(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """(B, T, C) → (B, T, G) each: the channel of each block, from 0, and whether it is above 0.

        In training the choice has noise, from torch's random state. See `MakesChoices`; nothing depends on
        `ctx`.
        """
        chosen = self._choose(self._logits(x))
        inner = self.up(x).unflatten(-1, (self.blocks, self.config.block))
        return chosen, inner.gather(-1, chosen[..., None])[..., 0] > 0

    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""
        if not self.training and self.reads_chosen(x.shape[0] * x.shape[1]):
            return FFOut(self._gathered(x))
        is_hard = self._is_hard(x.device) if self.training else None
        logits = self._logits(x)
        probabilities = logits.softmax(-1)
        channels = torch.arange(self.config.block, device=x.device)
        mask = (self._choose(logits)[..., None] == channels).to(logits.dtype)
        mask = mask + (probabilities - probabilities.detach())  # 0, with the gradient of the softmax
        if is_hard is not None:
            mask = torch.where(is_hard, mask, probabilities)
        inner = self.up(x)
        return FFOut(self.out(F.relu(inner * mask.flatten(-2).to(inner.dtype))))

    def reads_chosen(self, tokens: int) -> bool:
        """Whether a pass of so many tokens in evaluation reads the chosen channels of each, and not the
        weights of all channels once: where it moves fewer bytes."""
        return GATHER_PASSES * tokens <= self.config.block

    def _gathered(self, x: Tensor) -> Tensor:
        """The same map from the weights of the chosen channels alone, with the same gradients."""
        logits = self._logits(x).flatten(0, 1)  # (B·T, G, N)
        chosen = logits.argmax(-1)
        first = torch.arange(0, self.up.out_features, self.config.block, device=x.device)
        channels = (chosen + first).flatten()
        shape = (*chosen.shape, self.d_model)
        tokens = x.reshape(-1, self.d_model, 1)
        inner = self.up.weight.index_select(0, channels).view(shape) @ tokens.to(self.up.weight.dtype)
        if torch.is_grad_enabled():
            probabilities = logits.softmax(-1).gather(-1, chosen[..., None])
            inner = inner * (1 + (probabilities - probabilities.detach())).to(inner.dtype)
        hidden = F.relu(inner).transpose(1, 2)  # (B·T, 1, G)
        y = hidden @ self.out.weight.index_select(0, channels).view(shape)
        return y.view(x.shape)

    def reference(self, x: Tensor) -> Tensor:
        """Every channel, and a mask that is written block by block."""
        is_hard = self._is_hard(x.device) if self.training else torch.ones((), dtype=torch.bool)
        chosen, is_positive = self.choices(x, Context(causal=True))
        low = torch.einsum("btc,rc->btr", x, self.controller_down.weight)
        scores = torch.einsum("btr,dr->btd", low, self.controller_up.weight)
        parts = []
        for block, of_block in enumerate(scores.split(self.config.block, dim=-1)):
            weights = (of_block - of_block.amax(-1, keepdim=True).detach()).exp()
            soft = weights / weights.sum(-1, keepdim=True)
            one = F.one_hot(chosen[..., block], self.config.block).to(soft)
            parts.append(one + soft - soft.detach() if is_hard else soft)
        hidden = torch.cat(parts, dim=-1) * torch.einsum("btc,dc->btd", x, self.up.weight)
        is_active = hidden.detach() > 0
        if is_hard:
            is_active = (F.one_hot(chosen, self.config.block) * is_positive[..., None]).flatten(-2)
        return torch.einsum("btd,dc->btc", hidden * is_active, self.out.weight)

    def cost(self, work: Workload) -> Cost:
        """Two products of C·D multiply-accumulates a token, as of an MLP, and the controller's R·(C + D).

        It is the cost of a parallel pass, which computes all channels; a gathered pass computes the
        products of D/N channels.
        """
        hidden, rank = self.config.hidden(work.d_model), self.config.bottleneck(work.d_model)
        products = 2 * work.d_model * hidden + rank * (work.d_model + hidden)
        return Cost({"feed_forward": 2 * work.batch_size * work.seq_len * products})

    def _logits(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, G, N), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(x.to(dtype), self.controller_down.weight.to(dtype))
            scores = F.linear(low, self.controller_up.weight.to(dtype))
        by_block: Tensor = scores.unflatten(-1, (self.blocks, self.config.block))
        return by_block

    def _choose(self, logits: Tensor) -> Tensor:
        if self.training and self.config.temperature:
            # in float32, so that every dtype has the same noise
            noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
            logits = logits + self.config.temperature * noise
        return logits.argmax(-1)

    def _is_hard(self, device: torch.device) -> Tensor:
        """() bool: whether a training pass uses the chosen channels alone."""
        is_hard: Tensor = torch.rand((), device=device) < self.config.hard
        return is_hard
