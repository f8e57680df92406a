"""Causal products of features by the kernels of fla-core (flash-linear-attention, Yang 2024).

github.com/fla-org/flash-linear-attention. Shapes: B batch, H heads, T tokens, m features, V channels of
values; n = ⌈T / c⌉ chunks of c tokens.

Untried: no device has run this module. Its arithmetic is tested on a CPU with stand-ins of the same contract.

Each operator is one kernel of `chunk_simple_gla` without gates: the states before all chunks, the outputs,
and their gradients. Separate operators show a planner the states, which are as large as the features. The
kernels are called without gates, because fla-core 0.6 refuses the gradients of gated ones on Hopper with
Triton 3.4 to 3.7.0 (their results are wrong there). Features need no gates: see `scaled_features`. States
between chunks are rounded to the dtype of the features, their sums are float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.features.linear_products import Store
from variants.ops.features.scaled_linear_attention import scaled_favor

CHUNKS = (16, 32, 64)
"""Tokens of a chunk that the kernels can have: tensor cores need 16, and more than 64 are untested there."""
VERSION = "0.6"
"""Release of fla-core whose functions are called. They are not its public interface."""


def missing_fla(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"impl=fla needs a CUDA device: it is not used on {device.type}"
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        return (
            "impl=fla needs the packages fla-core and Triton, which are not installed (pip install fla-core)"
        )
    found = importlib.metadata.version("fla-core")
    if not found.startswith(f"{VERSION}."):
        return f"impl=fla needs fla-core {VERSION}, not {found}"
    return None


# --- operators: one kernel each -------------------------------------------------------------------


@torch.library.custom_op("longctx_bench::gla_states", mutates_args=())
def _states(k: Tensor, v: Tensor, start: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Features (B, T, H, m) and values (B, T, H, V) → states before each chunk (B, n, H, m, V), and after the
    last one (B, H, m, V) in float32. `start` (B, H, m, V) is the first."""
    from fla.ops.common.chunk_h import chunk_fwd_h

    with torch.accelerator.device_index(k.device.index):
        states, end = chunk_fwd_h(k=k, v=v, h0=start, output_final_state=True, chunk_size=chunk)
    return states, end


@torch.library.custom_op("longctx_bench::gla_outputs", mutates_args=())
def _outputs(q: Tensor, k: Tensor, v: Tensor, states: Tensor, chunk: int) -> Tensor:
    """Outputs (B, T, H, V)."""
    from fla.ops.common.chunk_o import chunk_fwd_o

    with torch.accelerator.device_index(q.device.index):
        y: Tensor = chunk_fwd_o(q=q, k=k, v=v, h=states, scale=1.0, chunk_size=chunk)
    return y


@torch.library.custom_op("longctx_bench::gla_states_backward", mutates_args=())
def _states_backward(g: Tensor, of_end: Tensor, q: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk (B, n, H, m, V), and of the first state in float32, from the
    gradients g of the outputs and `of_end` of the last state."""
    from fla.ops.common.chunk_h import chunk_bwd_dh

    with torch.accelerator.device_index(q.device.index):
        # of keys, values and the first state only the shapes and dtypes count
        of_states, of_start = chunk_bwd_dh(
            q=q, k=q, v=g, do=g, h0=of_end, dht=of_end, scale=1.0, chunk_size=chunk
        )
    return of_states, of_start


@torch.library.custom_op("longctx_bench::gla_features_backward", mutates_args=())
def _features_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor, of_states: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the features of queries and keys."""
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg

    with torch.accelerator.device_index(q.device.index):
        g_q, g_k, _, _ = chunk_bwd_dqkwg(
            q=q, k=k, v=v, do=g, h=states, dh=of_states, scale=1.0, chunk_size=chunk
        )
    return g_q, g_k


@torch.library.custom_op("longctx_bench::gla_values_backward", mutates_args=())
def _values_backward(g: Tensor, q: Tensor, k: Tensor, of_states: Tensor, chunk: int) -> Tensor:
    """Gradient of the values."""
    from fla.ops.common.chunk_o import chunk_bwd_dv

    with torch.accelerator.device_index(q.device.index):
        g_v: Tensor = chunk_bwd_dv(q=q, k=k, do=g, dh=of_states, scale=1.0, chunk_size=chunk)
    return g_v


@_states.register_fake
def _(k: Tensor, v: Tensor, start: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    batch, seq_len, heads, features = k.shape
    states = k.new_empty(batch, -(-seq_len // chunk), heads, features, v.shape[-1])
    return states, torch.empty_like(start)


@_outputs.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, states: Tensor, chunk: int) -> Tensor:
    return torch.empty_like(v)


@_states_backward.register_fake
def _(g: Tensor, of_end: Tensor, q: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    batch, seq_len, heads, features = q.shape
    of_states = q.new_empty(batch, -(-seq_len // chunk), heads, features, g.shape[-1])
    return of_states, torch.empty_like(of_end)


@_features_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor, of_states: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@_values_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, of_states: Tensor, chunk: int) -> Tensor:
    return torch.empty_like(g)


# --- FLOPs: whole chunks, and all pairs of a chunk ------------------------------------------------


def _flops(of_features: Tensor, of_values: Tensor, chunk: int, *, states: int, scores: int, sums: int) -> int:
    """FLOPs of products with a state, of products of features in a chunk, and of values in a chunk."""
    batch, seq_len, heads, features = of_features.shape
    channels = of_values.shape[-1]
    a_token = states * features * channels + chunk * (scores * features + sums * channels)
    return 2 * batch * heads * -(-seq_len // chunk) * chunk * a_token


@register_flop_formula(torch.ops.longctx_bench.gla_states, get_raw=True)
def _(k: Tensor, v: Tensor, start: Tensor, chunk: int, out_val: Any = None) -> int:
    return _flops(k, v, chunk, states=1, scores=0, sums=0)


@register_flop_formula(torch.ops.longctx_bench.gla_outputs, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, states: Tensor, chunk: int, out_val: Any = None) -> int:
    return _flops(q, v, chunk, states=1, scores=1, sums=1)


@register_flop_formula(torch.ops.longctx_bench.gla_states_backward, get_raw=True)
def _(g: Tensor, of_end: Tensor, q: Tensor, chunk: int, out_val: Any = None) -> int:
    return _flops(q, g, chunk, states=1, scores=0, sums=0)


@register_flop_formula(torch.ops.longctx_bench.gla_features_backward, get_raw=True)
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    of_states: Tensor,
    chunk: int,
    out_val: Any = None,
) -> int:
    return _flops(q, g, chunk, states=2, scores=2, sums=1)


@register_flop_formula(torch.ops.longctx_bench.gla_values_backward, get_raw=True)
def _(g: Tensor, q: Tensor, k: Tensor, of_states: Tensor, chunk: int, out_val: Any = None) -> int:
    return _flops(q, g, chunk, states=1, scores=1, sums=1)


# --- attention ------------------------------------------------------------------------------------


class FlaProducts:
    """`LinearProducts` by the kernels; rows are (B, T, H)."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, T, D) → (B, T, H, D)."""
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous()

    def empty(self, like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """(B, T, H, channels)."""
        batch, heads, seq_len = like.shape[:3]
        return torch.empty(batch, seq_len, heads, channels, dtype=dtype, device=like.device)

    def heads(self, x: Tensor, like: Tensor) -> Tensor:
        """(B, T, H, D) → (B, H, T, D)."""
        return x.transpose(1, 2)

    def store(self, x: Tensor, features: int, channels: int, dtype: torch.dtype) -> Store:
        """(B, T, H, m)."""
        found = torch.empty(*x.shape[:-1], features, dtype=dtype, device=x.device)
        return Store(found, found)

    def empty_state(self, keys: Store, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros (B, H, m, V), float32."""
        batch, _, heads, features = keys.features.shape
        shape = batch, heads, features, values.shape[-1]
        return torch.zeros(shape, dtype=torch.float32, device=values.device)

    def forward(self, queries: Store, keys: Store, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearProducts`."""
        states, end = _states(keys.features, values, state, self.chunk)
        y: Tensor = _outputs(queries.features, keys.features, values, states, self.chunk)
        return y, end

    def backward(
        self, grad: Tensor, of_end: Tensor, queries: Store, keys: Store, values: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `LinearProducts`."""
        q, k, chunk = queries.features, keys.features, self.chunk
        of_states, of_state = _states_backward(grad, of_end, q, chunk)
        g_v = _values_backward(grad, q, k, of_states, chunk)
        states, _ = _states(k, values, state, chunk)
        g_q, g_k = _features_backward(grad, q, k, values, states, of_states, chunk)
        return g_q, g_k, g_v, of_state


def fla_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    softmax: bool,
    chunk: int,
    device_type: str | None = None,
) -> Tensor:
    """`scaled_favor` by fla-core's kernels: queries, keys and values (B, H, T, D) → (B, H, T, D)."""
    return scaled_favor(q, k, v, directions, softmax, FlaProducts(chunk), chunk, device_type or q.device.type)
