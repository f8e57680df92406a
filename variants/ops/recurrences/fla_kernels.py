"""The kernels of fla-core for gated linear recurrences (flash-linear-attention, Yang 2024), as a table.

github.com/fla-org/flash-linear-attention. Shapes: B batch, H heads, T tokens, K channels of queries and keys,
V channels of values; c tokens of a chunk.

Untried: no device has run this module. The calls are those of fla-core's own autograd. The backward passes
compute again what it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from variants.ops.recurrences.fla_products import CHUNKS

BLOCK = 16
"""Tokens of a block: kernels compute whole blocks of the pairs of a chunk."""


class Rows(NamedTuple):
    """Contiguous inputs of a scan, in the layout of the kernels."""

    q: Tensor
    """(B, T, H, K)."""
    k: Tensor
    """(B, T, H, K)."""
    v: Tensor
    """(B, T, H, V)."""
    beta: Tensor | None
    """(B, T, H): strengths of the writes."""
    logs: Tensor | None
    """(B, T, H) or (B, T, H, K): logarithms of the decays."""

    @property
    def given(self) -> list[Tensor]:
        """Without those that a kernel does not have."""
        return [x for x in self if x is not None]

    def arguments(self, chunk: int) -> dict[str, Any]:
        """What all passes of all kernels are called with. No state is read or kept."""
        kept = {"q": self.q, "k": self.k, "v": self.v}
        return {**kept, "scale": 1.0, "initial_state": None, "chunk_size": chunk}


Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Of the five inputs."""


class Products(NamedTuple):
    """How many matrix products of each kind a pass has."""

    states: int
    """With a state, K·V multiplications for each token of a head."""
    keys: int
    """Sums over the pairs of a chunk, c·K."""
    values: int
    """The same, c·V."""
    blocks: int
    """Sums over the blocks up to the token's own, K·(c + 16)/2 on average."""
    squares: int = 0
    """Products of matrices over the pairs of a chunk, c²."""
    inverse: bool = False
    """Whether triangular systems are inverted: blocks on the diagonal elementwise, others by products."""

    def multiplications(self, keys: int, values: int, chunk: int) -> int:
        """For each token of a head."""
        pairs = chunk * (self.keys * keys + self.values * values + self.squares * chunk)
        blocks = self.blocks * keys * (chunk + BLOCK) // 2
        # the six blocks below the diagonal of 64 tokens take 16 products, the one of 32 tokens takes 2
        inverse = chunk**2 // 4 if self.inverse and chunk > BLOCK else 0
        return self.states * keys * values + pairs + blocks + inverse


class Kernel(NamedTuple):
    """The kernels of one recurrence."""

    forward: Callable[[Rows, int], Tensor]
    """Outputs, for chunks of so many tokens."""
    backward: Callable[[Rows, Tensor, int], Gradients]
    """Gradients of the inputs, from those of the outputs."""
    work: Products
    backward_work: Products
    """With what is computed again."""
    launches: int
    """Of Triton's kernels, and of torch's that clear, add and convert tensors between them."""
    backward_launches: int
    chunks: tuple[int, ...] = CHUNKS
    """Tokens that a chunk can have."""
    most_keys: int | None = 256
    """Channels that a key can have; None: any number."""
    decays_heads: bool = False
    """Whether a decay is one number for a head, and not one for each channel of the keys."""
    fails_on_hopper: bool = False
    """Whether its gradients are wrong on Hopper with Triton 3.4 to 3.7.0. fla-core 0.6 refuses them."""


def _sums(logs: Tensor | None, chunk: int) -> Tensor:
    """Sums of the decays within each chunk, as logarithms to base 2 in float32."""
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    sums: Tensor = chunk_local_cumsum(logs, chunk_size=chunk, scale=RCP_LN2)
    return sums


def _gla(x: Rows, chunk: int) -> Tensor:
    from fla.ops.gla.chunk import chunk_gla_fwd

    y: Tensor
    *_, y = chunk_gla_fwd(g=x.logs, g_cumsum=None, output_final_state=False, **x.arguments(chunk))
    return y


def _gla_backward(x: Rows, grad: Tensor, chunk: int) -> Gradients:
    from fla.ops.gla.chunk import chunk_gla_bwd, chunk_gla_fwd_intra_gk

    sums = _sums(x.logs, chunk)
    weights = chunk_gla_fwd_intra_gk(q=x.q, k=x.k, g=sums, scale=1.0, chunk_size=chunk)
    g_q, g_k, g_v, g_logs, _ = chunk_gla_bwd(
        g=None, g_cumsum=sums, h=None, A=weights, do=grad, dht=None, **x.arguments(chunk)
    )
    return g_q, g_k, g_v, None, g_logs


def _delta(x: Rows, chunk: int) -> Tensor:
    from fla.ops.delta_rule.chunk import chunk_delta_rule_fwd

    y: Tensor
    y, _, _ = chunk_delta_rule_fwd(beta=x.beta, output_final_state=False, **x.arguments(chunk))
    return y


def _delta_backward(x: Rows, grad: Tensor, chunk: int) -> Gradients:
    from fla.ops.delta_rule.chunk import chunk_delta_rule_bwd
    from fla.ops.delta_rule.wy_fast import prepare_wy_repr_fwd

    _, _, inverse = prepare_wy_repr_fwd(k=x.k, v=x.v, beta=x.beta, cu_seqlens=None, chunk_size=chunk)
    g_q, g_k, g_v, g_beta, _ = chunk_delta_rule_bwd(
        beta=x.beta, A=inverse, do=grad, dht=None, **x.arguments(chunk)
    )
    return g_q, g_k, g_v, g_beta, None


def _gated_delta(x: Rows, chunk: int) -> Tensor:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    y: Tensor
    _, y, *_ = chunk_gated_delta_rule_fwd(
        g=x.logs, beta=x.beta, output_final_state=False, **x.arguments(chunk)
    )
    return y


def _gated_delta_backward(x: Rows, grad: Tensor, chunk: int) -> Gradients:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra

    sums = _sums(x.logs, chunk)
    _, _, inverse = chunk_gated_delta_rule_fwd_intra(k=x.k, v=x.v, g=sums, beta=x.beta, chunk_size=chunk)
    g_q, g_k, g_v, g_beta, g_logs, *_ = chunk_gated_delta_rule_bwd(
        g=sums, beta=x.beta, A=inverse, do=grad, dht=None, **x.arguments(chunk)
    )
    return g_q, g_k, g_v, g_beta, g_logs


def _kda(x: Rows, chunk: int) -> Tensor:
    from fla.ops.kda.chunk_fwd import chunk_kda_fwd

    y: Tensor
    y, *_ = chunk_kda_fwd(g=x.logs, beta=x.beta, output_final_state=False, **x.arguments(chunk))
    return y


def _kda_backward(x: Rows, grad: Tensor, chunk: int) -> Gradients:
    from fla.ops.kda.chunk_bwd import chunk_kda_bwd
    from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra

    sums = _sums(x.logs, chunk)
    *_, weights, inverse = chunk_kda_fwd_intra(
        q=x.q, k=x.k, v=x.v, gk=sums, beta=x.beta, scale=1.0, chunk_size=chunk
    )
    g_q, g_k, g_v, g_beta, g_logs, *_ = chunk_kda_bwd(
        g=sums, beta=x.beta, Aqk=weights, Akk=inverse, do=grad, dht=None, **x.arguments(chunk)
    )
    return g_q, g_k, g_v, g_beta, g_logs


KERNELS = {
    "gla": Kernel(
        forward=_gla,
        backward=_gla_backward,
        work=Products(states=2, keys=0, values=1, blocks=1),
        backward_work=Products(states=5, keys=0, values=2, blocks=3),
        launches=5,
        backward_launches=11,
        most_keys=None,
    ),
    "delta_rule": Kernel(
        forward=_delta,
        backward=_delta_backward,
        work=Products(states=3, keys=3, values=2, blocks=0, inverse=True),
        backward_work=Products(states=8, keys=10, values=6, blocks=0, squares=2, inverse=True),
        launches=6,
        backward_launches=11,
    ),
    "gated_delta_rule": Kernel(
        forward=_gated_delta,
        backward=_gated_delta_backward,
        work=Products(states=3, keys=2, values=2, blocks=1, inverse=True),
        backward_work=Products(states=8, keys=10, values=6, blocks=1, squares=2, inverse=True),
        launches=6,
        backward_launches=15,
        chunks=(64,),
        decays_heads=True,
        fails_on_hopper=True,
    ),
    "kda": Kernel(
        forward=_kda,
        backward=_kda_backward,
        work=Products(states=3, keys=1, values=2, blocks=2, inverse=True),
        backward_work=Products(states=8, keys=4, values=6, blocks=6, squares=2, inverse=True),
        launches=7,
        backward_launches=16,
        chunks=(32, 64),
    ),
}
"""Name → kernels of S_t = (I − β_t k_t k_tᵀ) g_t S_{t−1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t. gla has no β: S_t =
g_t S_{t−1} + k_t v_tᵀ. g_t is a diagonal matrix for gla and kda, a number for gated_delta_rule, and 1 for
delta_rule. The kernels of gated_delta_rule for shorter chunks are others, which multiply more."""
