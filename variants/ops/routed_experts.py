"""Feed-forward layers of experts: a router chooses a few of them for each token, and only these are computed.

Shapes: B batch, T tokens, C channels, D hidden channels of an expert; E experts, k of them for a token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Context, Cost, ExpertLoad, FeedForward, FeedForwardConfig, FFOut, Workload
from variants.knobs import knob
from variants.ops import experts

MULTIPLE = 8
"""Hidden widths that follow from `mult` are multiples of this: kernels for bfloat16 are slow at others."""


class Routes(NamedTuple):
    """How tokens go to experts."""

    k: int = 1
    """Experts that the router chooses for a token."""
    shared: int = 0
    """Further experts, through which every token goes."""
    normalised: bool = False
    """Whether the gates of a token's experts are divided by their sum."""
    capacity_factor: float | None = None
    """Tokens of a sequence that an expert takes, as a multiple of T / E; None is all."""


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(FeedForwardConfig, ABC):
    """Knobs of every layer of experts."""

    n_experts: int = knob(8, least=1, unit="experts")
    """Experts from which the router chooses."""
    expert: Literal["mlp", "glu"] = "mlp"
    """Form of an expert: that of feed_forward=mlp, with GELU, or that of feed_forward=glu, with SiLU."""
    mult: int = knob(4, least=1)
    """Hidden width of all experts of a token together, as a multiple of the model's channels. A token costs
    about as much as in feed_forward=mlp with equal mult: gated experts have two thirds of this width. The
    width of an expert is rounded to a multiple of 8."""
    width: int | None = knob(None, least=1, unit="channels")
    """Width of the hidden layer of an expert, in place of mult."""
    balance: float = knob(0.01, least=0)
    """Weight of the loss that balances the load of the experts; 0 is no such loss."""

    @property
    @abstractmethod
    def routes(self) -> Routes:
        """How tokens go to experts."""

    @property
    def products(self) -> int:
        """Products of an expert."""
        return 3 if self.expert == "glu" else 2

    def hidden(self, d_model: int) -> int:
        """Channels of the hidden layer of an expert."""
        active = self.routes.k + self.routes.shared
        rounded = max(1, round(2 * self.mult * d_model / (self.products * active * MULTIPLE)))
        return self.width or MULTIPLE * rounded


class RoutedExperts(FeedForward):
    """Σ over the k experts that the router chooses of gate · expert(x), plus the shared experts.

    The probabilities of the router are softmax(W x), in float32 at least. The auxiliary loss is
    balance · E · Σ_e f_e P_e (Fedus 2021, arXiv:2101.03961, §2.2, equations 4 to 6): f_e is the share of
    assignments to expert e, before any is dropped, and P_e the mean probability of e, over all tokens of a
    call. It is `balance` if tokens are spread evenly. Each segment of the input schedule has its own.

    The weights of all experts are rows of one matrix, expert after expert, so that they are initialised and
    decayed as those of other layers. Shared experts are one layer of their common width.
    """

    config: RoutedConfig

    def __init__(self, config: RoutedConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.hidden, self.routes = config.hidden(d_model), config.routes
        inner = (config.products - 1) * self.hidden  # of gated experts: rows of the gates, then of the values
        self.router = nn.Linear(d_model, config.n_experts, bias=False)
        self.up = nn.Linear(d_model, config.n_experts * inner, bias=False)
        self.out = nn.Linear(self.hidden, config.n_experts * d_model, bias=False)
        if shared := self.routes.shared:
            self.shared_up = nn.Linear(d_model, shared * inner, bias=False)
            self.shared_out = nn.Linear(shared * self.hidden, d_model, bias=False)

    @classmethod
    def widened(cls, config: RoutedConfig, d_model: int, parameters: int) -> RoutedConfig:
        """Each hidden channel has d_model parameters in each matrix of each expert."""
        count = config.n_experts + config.routes.shared
        more = round(parameters / (config.products * count * d_model))
        return replace(config, width=config.hidden(d_model) + more)

    @classmethod
    def reads_others(cls, config: RoutedConfig) -> str | None:
        """With a capacity, tokens of a sequence compete for experts."""
        if config.routes.capacity_factor is None:
            return None
        return "drops tokens over an expert's capacity, which depends on the length of the sequence"

    def active_parameters(self) -> int:
        """Those of the router, of the shared experts and of k experts."""
        of_experts = self.up.weight.numel() + self.out.weight.numel()
        idle = self.config.n_experts - self.routes.k
        return super().active_parameters() - of_experts // self.config.n_experts * idle

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) → (B, T, k): the experts of each token. See `MakesChoices`."""
        return self._choose(self._logits(x))

    def load(self, x: Tensor) -> ExpertLoad:
        """See `HasExperts`."""
        chosen, count = self.choices(x, Context(causal=True)), self.config.n_experts
        assigned = (chosen[..., None] == torch.arange(count, device=x.device)).sum((0, 1, 2))
        if (capacity := self.capacity(x.shape[1])) is None:
            return ExpertLoad(assigned, None)
        return ExpertLoad(assigned, (~experts.within_capacity(chosen, count, capacity)).sum())

    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""
        count, routes = self.config.n_experts, self.routes
        logits = self._logits(x)
        chosen, probabilities = self._choose(logits), logits.softmax(-1)
        gates = probabilities.gather(-1, chosen)
        if routes.normalised:
            gates = gates / gates.sum(-1, keepdim=True)
        kept, rows = None, chosen.numel()
        if (capacity := self.capacity(x.shape[1])) is not None:
            kept = experts.within_capacity(chosen, count, capacity).flatten(0, 1)
            rows = self._most_rows(len(x), x.shape[1])
        order = experts.sorted_by_expert(chosen.flatten(0, 1), count, kept, rows)

        tokens = x.flatten(0, 1).to(_dtype_of_products(x))
        up, out = (layer.weight.to(tokens.dtype) for layer in (self.up, self.out))
        inputs = experts.to_rows(tokens, order)
        hidden = self._activated(experts.multiply(inputs, up.unflatten(0, (count, -1)), order.ends))
        y = experts.multiply(hidden, out.unflatten(0, (count, -1)), order.ends)
        y = experts.from_rows(y, gates.flatten(0, 1), order).view_as(x)
        if routes.shared:
            y = y + self._shared(x)
        return FFOut(y, self._balance_loss(chosen, probabilities))

    def reference(self, x: Tensor) -> Tensor:
        """All experts compute all tokens, and each token takes its own of them."""
        chosen = self.choices(x, Context(causal=True))
        scores = torch.einsum("btc,ec->bte", x, self.router.weight).exp()
        is_chosen = (chosen[..., None] == torch.arange(self.config.n_experts, device=x.device)).any(2)
        over = scores * is_chosen if self.routes.normalised else scores
        gates = scores * is_chosen / over.sum(-1, keepdim=True)
        gates = gates * self._taken(chosen, gates)
        up = self.up.weight.unflatten(0, (self.config.n_experts, -1))
        out = self.out.weight.unflatten(0, (self.config.n_experts, -1))
        y = torch.zeros_like(x)
        for expert in range(self.config.n_experts):
            y = y + gates[..., expert, None] * self._expert(x, up[expert], out[expert])
        for first in range(0, self.routes.shared * self.hidden, self.hidden):
            channels = slice(first, first + self.hidden)
            parts = [part[channels] for part in self.shared_up.weight.chunk(self.config.products - 1)]
            y = y + self._expert(x, torch.cat(parts), self.shared_out.weight[:, channels])
        return y

    def cost(self, work: Workload) -> Cost:
        """The router; and 2 or 3 products of C·D multiply-accumulates in each expert of a token. Tokens over
        the capacity of their expert are counted up to the number of places of all experts."""
        config, routes, tokens = self.config, self.routes, work.batch_size * work.seq_len
        passes = self._most_rows(work.batch_size, work.seq_len) + tokens * routes.shared
        of_experts = config.products * passes * config.hidden(work.d_model)
        return Cost({"feed_forward": 2 * work.d_model * (tokens * config.n_experts + of_experts)})

    def capacity(self, tokens: int) -> int | None:
        """Tokens that an expert takes of a sequence of T tokens; None if it takes all."""
        factor = self.routes.capacity_factor
        return None if factor is None else max(1, math.ceil(factor * tokens / self.config.n_experts))

    def _most_rows(self, batch: int, tokens: int) -> int:
        """Most assignments that are not dropped."""
        capacity = self.capacity(tokens)
        of_tokens = tokens * self.routes.k
        return batch * (of_tokens if capacity is None else min(of_tokens, capacity * self.config.n_experts))

    def _logits(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.router.weight.to(dtype))

    def _choose(self, logits: Tensor) -> Tensor:
        return logits.topk(self.routes.k, dim=-1).indices

    def _activated(self, hidden: Tensor) -> Tensor:
        if self.config.expert == "mlp":
            return F.gelu(hidden)
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value

    def _shared(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared_out(self._activated(self.shared_up(x)))
        return y

    def _balance_loss(self, chosen: Tensor, probabilities: Tensor) -> Tensor | None:
        if not self.config.balance:
            return None
        count, flat = self.config.n_experts, chosen.flatten()
        shares = torch.zeros(count, dtype=probabilities.dtype, device=flat.device)
        ones = torch.ones((), dtype=shares.dtype, device=flat.device).expand(len(flat))
        shares = shares.scatter_add(0, flat, ones) / len(flat)
        return self.config.balance * count * (shares * probabilities.flatten(0, 1).mean(0)).sum()

    def _expert(self, x: Tensor, up: Tensor, out: Tensor) -> Tensor:
        """One expert, for `reference`."""
        hidden = torch.einsum("btc,dc->btd", x, up)
        if self.config.expert == "mlp":
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        else:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = gate / (1 + torch.exp(-gate)) * value
        return torch.einsum("btd,cd->btc", hidden, out)

    def _taken(self, chosen: Tensor, gates: Tensor) -> Tensor:
        """(B, T, E) 1 where an expert has room for a token, token by token, for `reference`."""
        taken = torch.ones_like(gates)
        capacity = self.capacity(chosen.shape[1])
        if capacity is None:
            return taken
        for b, sequence in enumerate(chosen.tolist()):
            load = [0] * self.config.n_experts
            for t, of_token in enumerate(sequence):
                for expert in of_token:
                    taken[b, t, expert] = float(load[expert] < capacity)
                    load[expert] += 1
        return taken


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype in which autocast computes products of x; it knows no operators of this project."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype
