"""The interface of an attention variant: hidden states in, hidden states out.

Shapes: B batch, T tokens, C channels (d_model), H heads, D = C / H.

A variant is one module in this package (or a plug-in: see `variants.load`) that defines one
subclass of `Attention`. It imports only this file, `patterns`, `layers` and torch, and knows
nothing of the harness that measures it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from variants.head_size import unusable_heads
from variants.knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes of one attention layer's work.

    `seq_len` is what a layer is fed at a time (after the plan cut the sequence), except when a
    variant is built, where it is the longest sequence it will see.
    """

    batch_size: int
    seq_len: int
    d_model: int
    heads: int
    element_bytes: int = 4

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.heads

    def unusable(self) -> str | None:
        """Why no layer can have these sizes, or None: heads that do not divide the channels, or odd ones."""
        return unusable_heads(self.d_model, self.heads)


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a variant can do, stated so that nobody has to try."""

    causal: bool
    """Has a form in which no output reads a later token."""
    bidirectional: bool
    """Has a form in which every token may read both sides."""
    stateful: bool = False
    """Carries state from one segment of a sequence to the next."""
    exact: bool = False
    """Equals dense softmax attention over every pair that the objective allows, up to rounding."""
    stochastic: bool = False
    """Draws random numbers in its forward pass (hashing rotations, random features)."""
    fixed_length: bool = False
    """Has parameters whose shape depends on the longest sequence."""


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The exponents of T in time and memory that the paper claims, and where it does; log T counts 0."""

    time: float
    memory: float
    formula: str
    source: str
    survey: float | None = None
    """The exponent that the survey of Tay et al. gives (arXiv:2009.06732v3, Table 1, "Complexity", which does
    not tell time from memory); None where it does not list the method."""


class Flops(NamedTuple):
    """Forward FLOPs, 2 per multiply-accumulate, split so that attention can be told apart."""

    projections: int
    """Everything linear in the number of tokens that any layer has: projections, feed-forward, output."""
    attention: int
    """Scores, weighted sums and whatever else the variant computes, allowed pairs only."""

    @property
    def total(self) -> int:
        """Both parts."""
        return self.projections + self.attention

    def __add__(self, other: object) -> Flops:
        if not isinstance(other, Flops):
            return NotImplemented
        return Flops(self.projections + other.projections, self.attention + other.attention)

    def __mul__(self, times: object) -> Flops:
        if not isinstance(times, int):
            return NotImplemented
        return Flops(self.projections * times, self.attention * times)


def require_tokens(x: Tensor) -> None:
    """Raise ValueError, in one line, for an input (B, T, …) that holds no sequence or no token."""
    if x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: allowed is 1 or more sequences of 1 or more tokens"
        )


class Out(NamedTuple):
    """What a layer returns, always: outputs (B, T, C), detached state or None, auxiliary loss or None."""

    y: Tensor
    state: Any = None
    aux_loss: Tensor | None = None


class Plan(ABC):
    """How the model feeds a sequence to the network: applied once, outside the layers."""

    @abstractmethod
    def lengths(self, seq_len: int) -> list[tuple[int, int]]:
        """(length, number) of the independent windows that a sequence of `seq_len` tokens is made of.

        Segments are not independent: they make one window, of whose length a layer's `flops` is asked.
        """

    def segments(self, seq_len: int) -> list[slice]:
        """The parts of a sequence that are fed one after the other, state carried from each to the next."""
        return [slice(0, seq_len)]

    @abstractmethod
    def apply(self, network: Callable[[Tensor], Tensor], x: Tensor, *, causal: bool) -> Tensor:
        """Run `network`, a map (N, L, …) → (N, L, …) that keeps N and L, over one segment x (B, T, …)."""

    def stream(
        self, network: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, *, causal: bool
    ) -> Tensor:
        """Run `network`, a map (x, state) → (y, state), over a whole sequence x (B, T, …).

        Raises ValueError for an input without a token.
        """
        require_tokens(x)
        state: Any = None

        def advance(window: Tensor) -> Tensor:
            nonlocal state
            y, state = network(window, state)
            return y

        segments = [x[:, segment] for segment in self.segments(x.shape[1])]
        return torch.cat([self.apply(advance, segment, causal=causal) for segment in segments], dim=1)


@dataclass(frozen=True)
class Whole(Plan):
    """The network sees the whole sequence at once."""

    def lengths(self, seq_len: int) -> list[tuple[int, int]]:
        """One window."""
        return [(seq_len, 1)]

    def apply(self, network: Callable[[Tensor], Tensor], x: Tensor, *, causal: bool) -> Tensor:
        """One call."""
        return network(x)


@dataclass(frozen=True)
class Segments(Whole):
    """The network sees segments of `length` tokens in order; what it remembers is carried between them.

    Each segment is trained on by itself: state is detached, so backward never leaves a segment.
    """

    length: int

    def segments(self, seq_len: int) -> list[slice]:
        """Full segments, then what is left."""
        return [slice(i, min(i + self.length, seq_len)) for i in range(0, seq_len, self.length)]


@dataclass(frozen=True)
class Chunks(Plan):
    """The whole network runs on independent windows of `length` tokens that start every `stride` tokens.

    Each token's output is taken from exactly one window. Where windows overlap, a causal model keeps
    the end of each window, where the most history is, and a bidirectional one the middle; the first
    window also keeps its beginning and the last its end. No window is padded: what is left over at
    the end of a sequence runs as one shorter window.
    """

    length: int
    stride: int

    def _full(self, seq_len: int) -> int:
        return 0 if seq_len < self.length else (seq_len - self.length) // self.stride + 1

    def _rest(self, seq_len: int) -> int:
        """Length of the shorter last window; 0 where full windows reach the end."""
        full = self._full(seq_len)
        covered = (full - 1) * self.stride + self.length if full else 0
        return seq_len - full * self.stride if covered < seq_len else 0

    def lengths(self, seq_len: int) -> list[tuple[int, int]]:
        """The full windows and the shorter last one, where there are any."""
        windows = [(self.length, self._full(seq_len)), (self._rest(seq_len), 1)]
        return [(length, count) for length, count in windows if length and count]

    def kept(self, *, causal: bool) -> tuple[int, int]:
        """The part [lo, hi) of an inner window whose outputs are kept; hi − lo is the stride."""
        hi = self.length if causal else (self.length + self.stride) // 2
        return hi - self.stride, hi

    def apply(self, network: Callable[[Tensor], Tensor], x: Tensor, *, causal: bool) -> Tensor:
        """Full windows as one batch, then the rest, stitched back to (B, T, …)."""
        batch, seq_len = x.shape[:2]
        full, rest = self._full(seq_len), self._rest(seq_len)
        lo, hi = self.kept(causal=causal)
        pieces = []
        if full:
            end = (full - 1) * self.stride + self.length
            windows = x[:, :end].unfold(1, self.length, self.stride).movedim(-1, 2)  # (B, n, L, …)
            y = network(windows.flatten(0, 1)).unflatten(0, (batch, full))
            pieces += [y[:, 0, :lo], y[:, :, lo:hi].flatten(1, 2)]
            if not rest:
                pieces.append(y[:, -1, hi:])
        if rest:
            y = network(x[:, full * self.stride :])
            pieces.append(y[:, lo:] if full else y)
        pieces = [piece for piece in pieces if piece.shape[1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


@dataclass(frozen=True, kw_only=True)
class VariantConfig(Knobs):
    """Base of every variant's `Config`: its knobs and nothing else."""


class Attention(nn.Module, ABC):
    """One attention layer with its projections: (B, T, C) → (B, T, C)."""

    Config: ClassVar[type[VariantConfig]]
    caps: ClassVar[Caps]
    paper: ClassVar[str]
    """Authors, year, title's short form and arXiv number."""
    complexity: ClassVar[Complexity]
    padding: str | None = None
    """Why a forward pass dispatches more FLOPs than `flops()` counts, or None where it does not."""
    bounded: bool = True
    """Whether the harness's limit on that excess holds. Not where `impl` asks for a general kernel: what its
    tiles cost on this pattern is the finding then, not a defect."""

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        """A layer for sequences up to dims.seq_len; `layer` is its index from the bottom.

        Raises ValueError for sizes that no layer can have.
        """
        super().__init__()
        if reason := dims.unusable():
            raise ValueError(reason)
        self.config = config
        self.dims = dims
        self.layer = layer

    def __call__(self, x: Tensor, *, causal: bool, state: Any = None) -> Out:
        """`forward`, for inputs and objectives that the layer has a form for.

        Raises ValueError for an input without a token, and what `require_objective` raises.
        """
        require_tokens(x)
        self.require_objective(causal=causal)
        out: Out = super().__call__(x, causal=causal, state=state)
        return out

    def require_objective(self, *, causal: bool) -> None:
        """Raise ValueError, in one line, for an objective that the layer has no form for."""
        if reason := self.no_form(self.config, causal=causal):
            raise ValueError(f"{type(self).__name__} with causal={causal}: {reason}")

    @classmethod
    def plan(cls, config: VariantConfig) -> Plan:
        """How the model feeds sequences to a network of these layers."""
        return Whole()

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """Why this configuration has no form for an objective, at any size, or None."""
        if causal and not cls.caps.causal:
            return "has no causal form"
        if not causal and not cls.caps.bidirectional:
            return "has no bidirectional form"
        return None

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Why a cell of these dims cannot run, or None. It becomes the row's reason.

        An override returns this one's reason where it has none of its own.
        """
        return dims.unusable() or cls.no_form(config, causal=causal)

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What this configuration needs and a machine lacks, or None. It becomes the row's reason too.

        `unsupported` speaks of what cannot be on any machine; this, of the kernel that `impl` names: whether
        it is installed and runs on this device, with numbers of this type. Whoever plans with fake tensors
        asks for the CPU, where those are.
        """
        return None

    @classmethod
    def leak(cls, config: VariantConfig) -> str | None:
        """How this configuration's causal form is known to see the future, or None where it does not.

        A leak that is stated here is measured, recorded and marked; any other fails the causality gate.
        """
        return None

    @classmethod
    def tie(cls, layers: Sequence[Attention]) -> None:
        """Called once with all layers of a new model, lowest first, to let them share parameters."""

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that no gradient reaches but that of `Out.aux_loss`, if there are any.

        The norm of their gradients is limited by itself, so that how well the auxiliary loss does
        changes nothing in the step that the task takes.
        """
        return iter(())

    def after_step(self) -> None:
        """Called once after each optimiser step, for what is learnt outside it: moving averages, redraws.

        A forward pass may run twice in a step (recomputation), so it must not do this itself.
        """

    @property
    def impl(self) -> str | None:
        """Which implementation of the mathematics runs, for variants that have more than one."""
        return getattr(self.config, "impl", None)

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Queries and keys (B, H, T, D) of one window x (B, T, C) of the plan, for a layer whose weights are
        softmax(QKᵀ/√D) over every key that the objective allows; None for any other."""
        return None

    def estimated(self, x: Tensor, *, causal: bool) -> Tensor | None:
        """The full softmax attention that the layer estimates, with the layer's own projections, for one
        window of the plan: (B, T, C) → (B, T, C), O(T²). None where the layer estimates none: it is exact,
        or its rule is one of its own."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, *, causal: bool, state: Any = None) -> Out:
        """(B, T, C) → Out. `state` is what the layer returned for the previous segment, or None."""

    @abstractmethod
    def reference(self, x: Tensor, *, causal: bool) -> Tensor:
        """The same mathematics for reading, plan included: (B, T, C) → (B, T, C), O(T²) if need be."""

    @abstractmethod
    def flops(self, dims: Dims, *, causal: bool) -> Flops:
        """Algorithmic forward FLOPs on one window of the plan, counting only pairs the pattern allows."""

    @abstractmethod
    def state_bytes(self, dims: Dims) -> int:
        """Bytes to carry after dims.seq_len tokens in order to process the next one."""

    @abstractmethod
    def pattern(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """(T, T) bool: which keys (columns) a query (row) may read, plan included; None: content decides."""
