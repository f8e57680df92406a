"""What `recurrences.fla_kernels` expects of fla-core's functions, by definition: token by token in float32.

Shapes: B batch, H heads, T tokens, K channels of queries and keys, V channels of values. Tensors are
(B, T, H, …). tests/peers/test_fla_scans.py compares the recurrence with the kernels, which Triton's
interpreter runs.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

RCP_LN2 = 1 / math.log(2)
NO_STATE = {"scale": 1.0, "initial_state": None}


class Inputs(NamedTuple):
    """(B, T, H, …), in the dtypes of the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    logs: Tensor | None

    def at(self, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v; β (B, H, 1), and the decays (B, H, 1 or K) of a token."""
        q, k, v = (x[:, t].float() for x in (self.q, self.k, self.v))
        beta = None if self.beta is None else self.beta[:, t, :, None].float()
        decay = None
        if self.logs is not None:
            logs = self.logs if self.logs.dim() == 4 else self.logs.unsqueeze(-1)
            decay = logs[:, t].float().exp()
        return q, k, v, beta, decay


def _read(state: Tensor, key: Tensor) -> Tensor:
    """Sᵀ k."""
    return torch.einsum("bhkv,bhk->bhv", state, key)


def _states(x: Inputs) -> list[Tensor]:
    """Before the first token, and after each: (B, H, K, V)."""
    batch, seq_len, heads, keys = x.k.shape
    states = [torch.zeros(batch, heads, keys, x.v.shape[-1])]
    for t in range(seq_len):
        _, k, v, beta, decay = x.at(t)
        state = states[-1] if decay is None else decay[..., None] * states[-1]
        written = v if beta is None else beta * (v - _read(state, k))
        states.append(state + k[..., None] * written[..., None, :])
    return states


def outputs(x: Inputs) -> Tensor:
    """y_t = S_tᵀ q_t."""
    found = [_read(state, x.q[:, t].float()) for t, state in enumerate(_states(x)[1:])]
    return torch.stack(found, 1).to(x.v.dtype)


def gradients(x: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    """Of q, k, v, β (B, T, H) and the logarithms (B, T, H, 1 or K), in float32; by the chain rule."""
    states = _states(x)
    batch, seq_len, heads, _ = x.k.shape
    found: list[list[Tensor]] = []
    of_state = torch.zeros_like(states[0])
    for t in reversed(range(seq_len)):
        q, k, v, beta, decay = x.at(t)
        g = grad[:, t].float()
        of_state = of_state + q[..., None] * g[..., None, :]
        of_q = torch.einsum("bhkv,bhv->bhk", states[t + 1], g)
        kept = states[t] if decay is None else decay[..., None] * states[t]
        of_written = _read(of_state, k)
        if beta is None:
            of_k, of_v, of_beta = torch.einsum("bhkv,bhv->bhk", of_state, v), of_written, None
            of_kept = of_state
        else:
            missing = v - _read(kept, k)
            of_v, of_beta = beta * of_written, (missing * of_written).sum(-1)
            of_k = torch.einsum("bhkv,bhv->bhk", of_state, beta * missing)
            of_k = of_k - torch.einsum("bhkv,bhv->bhk", kept, of_v)
            of_kept = of_state - k[..., None] * of_v[..., None, :]
        of_logs = (of_kept * kept).sum(-1)
        if x.logs is not None and x.logs.dim() == 3:
            of_logs = of_logs.sum(-1, keepdim=True)
        empty = of_v.new_zeros(batch, heads)
        found.append([of_q, of_k, of_v, empty if of_beta is None else of_beta, of_logs])
        of_state = of_kept if decay is None else decay[..., None] * of_kept
    return tuple(torch.stack(each, 1) for each in zip(*reversed(found), strict=True))


# --- fla-core's functions -------------------------------------------------------------------------


def chunk_local_cumsum(g: Tensor, *, chunk_size: int, scale: float) -> Tensor:
    return torch.cat([part.cumsum(1) for part in g.float().split(chunk_size, 1)], 1) * scale


def _logs(sums: Tensor, chunk_size: int) -> Tensor:
    """The inverse of `chunk_local_cumsum`."""
    parts = (sums / RCP_LN2).split(chunk_size, 1)
    return torch.cat([torch.diff(part, dim=1, prepend=torch.zeros_like(part[:, :1])) for part in parts], 1)


def _prepared(chunk_size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices of all chunks, which the stand-ins of backward passes only check."""
    return torch.empty(*like.shape[:3], chunk_size, dtype=dtype)


def _check(prepared: Tensor, chunk_size: int, like: Tensor, dtype: torch.dtype) -> None:
    assert (prepared.shape, prepared.dtype) == ((*like.shape[:3], chunk_size), dtype)


def _checked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, logs: Tensor | None) -> Inputs:
    """As the kernels read them: contiguous, one dtype, others in float32."""
    inputs = Inputs(q, k, v, beta, logs)
    assert all(x.is_contiguous() for x in inputs if x is not None)
    assert q.dtype == k.dtype == v.dtype
    assert all(x.dtype == torch.float32 for x in (beta, logs) if x is not None)
    return inputs


def chunk_gla_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, g_cumsum: None, chunk_size: int, **rest: Any
) -> tuple[Any, ...]:
    assert rest == {**NO_STATE, "output_final_state": False}
    return None, None, None, None, outputs(_checked(q, k, v, None, g))


def chunk_gla_fwd_intra_gk(*, q: Tensor, k: Tensor, g: Tensor, scale: float, chunk_size: int) -> Tensor:
    return _prepared(chunk_size, q, torch.float32)


def chunk_gla_bwd(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: None,
    g_cumsum: Tensor,
    h: None,
    A: Tensor,
    do: Tensor,
    dht: None,
    chunk_size: int,
    **rest: Any,
) -> tuple[Any, ...]:
    assert rest == NO_STATE
    _check(A, chunk_size, q, torch.float32)
    of_q, of_k, of_v, _, of_logs = gradients(_checked(q, k, v, None, _logs(g_cumsum, chunk_size)), do)
    return of_q, of_k, of_v, of_logs, None


def chunk_delta_rule_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int, **rest: Any
) -> tuple[Any, ...]:
    assert rest == {**NO_STATE, "output_final_state": False}
    return outputs(_checked(q, k, v, beta, None)), None, None


def prepare_wy_repr_fwd(
    *, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: None, chunk_size: int
) -> tuple[Any, ...]:
    return None, None, _prepared(chunk_size, k, k.dtype)


def chunk_delta_rule_bwd(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    do: Tensor,
    dht: None,
    chunk_size: int,
    **rest: Any,
) -> tuple[Any, ...]:
    assert rest == NO_STATE
    _check(A, chunk_size, k, k.dtype)
    return *gradients(_checked(q, k, v, beta, None), do)[:4], None


def chunk_gated_delta_rule_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk_size: int, **rest: Any
) -> tuple[Any, ...]:
    assert rest == {**NO_STATE, "output_final_state": False}
    assert g.shape == beta.shape
    return None, outputs(_checked(q, k, v, beta, g)), None, None, None, None


def chunk_gated_delta_rule_fwd_intra(
    *, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk_size: int
) -> tuple[Any, ...]:
    return None, None, _prepared(chunk_size, k, k.dtype)


def chunk_gated_delta_rule_bwd(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A: Tensor,
    do: Tensor,
    dht: None,
    chunk_size: int,
    **rest: Any,
) -> tuple[Any, ...]:
    assert rest == NO_STATE
    _check(A, chunk_size, k, k.dtype)
    *found, of_logs = gradients(_checked(q, k, v, beta, _logs(g, chunk_size)), do)
    return *found, of_logs.squeeze(-1), None, None, None


def chunk_kda_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk_size: int, **rest: Any
) -> tuple[Any, ...]:
    assert rest == {**NO_STATE, "output_final_state": False}
    assert g.shape == k.shape
    return outputs(_checked(q, k, v, beta, g)), *[None] * 11


def chunk_kda_fwd_intra(
    *, q: Tensor, k: Tensor, v: Tensor, gk: Tensor, beta: Tensor, scale: float, chunk_size: int
) -> tuple[Any, ...]:
    return *[None] * 4, *(_prepared(chunk_size, k, k.dtype) for _ in range(2))


def chunk_kda_bwd(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    Aqk: Tensor,
    Akk: Tensor,
    do: Tensor,
    dht: None,
    chunk_size: int,
    **rest: Any,
) -> tuple[Any, ...]:
    assert rest == NO_STATE
    for prepared in (Aqk, Akk):
        _check(prepared, chunk_size, k, k.dtype)
    return *gradients(_checked(q, k, v, beta, _logs(g, chunk_size)), do), None, None, None


def l2norm_fwd(x: Tensor, *, eps: float, output_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous()
    inverse = (x.float().square().sum(-1) + eps).rsqrt()
    return (x * inverse[..., None]).to(output_dtype), inverse


def l2norm_bwd(y: Tensor, rstd: Tensor, dy: Tensor, *, eps: float) -> Tensor:
    assert y.is_contiguous()
    assert dy.is_contiguous()
    along = (dy.float() * y.float()).sum(-1, keepdim=True)
    return (rstd[..., None] * (dy.float() - along * y.float())).to(y.dtype)


MODULES = {
    "fla.modules.norm.l2norm": (l2norm_fwd, l2norm_bwd),
    "fla.ops.utils": (chunk_local_cumsum,),
    "fla.ops.gla.chunk": (chunk_gla_fwd, chunk_gla_fwd_intra_gk, chunk_gla_bwd),
    "fla.ops.delta_rule.chunk": (chunk_delta_rule_fwd, chunk_delta_rule_bwd),
    "fla.ops.delta_rule.wy_fast": (prepare_wy_repr_fwd,),
    "fla.ops.gated_delta_rule.chunk": (chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd),
    "fla.ops.gated_delta_rule.chunk_fwd": (chunk_gated_delta_rule_fwd_intra,),
    "fla.ops.kda.chunk_fwd": (chunk_kda_fwd,),
    "fla.ops.kda.chunk_intra": (chunk_kda_fwd_intra,),
    "fla.ops.kda.chunk_bwd": (chunk_kda_bwd,),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have imports of fla-core's modules find these functions."""
    constants = ModuleType("fla.ops.utils.constant")
    vars(constants)["RCP_LN2"] = RCP_LN2
    made = {constants.__name__: constants}
    for name, functions in MODULES.items():
        made[name] = ModuleType(name)
        vars(made[name]).update({function.__name__: function for function in functions})
    for name in list(made):
        while "." in name:
            name = name.rpartition(".")[0]
            made.setdefault(name, ModuleType(name))
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
