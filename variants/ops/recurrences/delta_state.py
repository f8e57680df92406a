"""What decoding keeps of a layer with the delta rule: the state, and the last tokens of its convolution.

Shapes: B batch, H heads, n tokens of a step, D channels of queries and keys, V channels of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState
from variants.ops.recurrences.delta_chunks import LEAST_SQUARE, Tokens
from variants.ops.recurrences.delta_rule import make_plan, read_segments


class DeltaState(DecodingState):
    """S of each head, and what the convolution still reads; in float32 or wider."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        recent: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, H, D, V), `recent` the tokens and channels of the convolution's inputs; `dtype` is
        that of values."""
        super().__init__(clock, max_len)
        wide = torch.promote_types(dtype, torch.float32)
        self.sums = torch.zeros(shape, dtype=wide, device=device)
        self.recent = torch.zeros(shape[0], *recent, dtype=wide, device=device)

    @staticmethod
    def bytes(shape: tuple[int, int, int, int], recent: tuple[int, int], *, element_bytes: int) -> int:
        """Bytes of a state for values of `element_bytes`."""
        batch, heads, keys, values = shape
        return max(4, element_bytes) * batch * (heads * keys * values + recent[0] * recent[1])

    def with_recent(self, x: Tensor) -> Tensor:
        """Inputs of the convolution (B, w − 1 + n, C) for the next tokens x (B, n, C), which are kept."""
        window = torch.cat([self.recent, x.to(self.recent.dtype)], 1)
        self.recent.copy_(window[:, x.shape[1] :])
        return window

    def read_next(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None = None,
        *,
        unit: bool = False,
        chunk: int,
        device_type: str,
    ) -> Tensor:
        """Read the next n tokens, and return their outputs (B, H, n, V). Arguments: see `delta_rule`."""
        tokens = Tokens(q, k, v, beta, log_decay)
        if q.shape[2] == 1:
            return self._read_token(tokens, unit)
        plan = make_plan(q, v, unit=unit, chunk=chunk, device_type=device_type)
        before = self.sums.flatten(0, 1)  # a view
        y, states = read_segments(plan, tokens, before)
        before.copy_(states[-1])
        return y

    def _read_token(self, tokens: Tokens, unit: bool) -> Tensor:
        """One token by the recurrence itself: a chunk would solve a system and mask pairs for it."""
        wide = (None if x is None else x.to(self.sums.dtype) for x in tokens)
        q, k, v, beta, log_decay = Tokens.of(*wide)
        if unit:
            q, k = (x * x.square().sum(-1, keepdim=True).add_(LEAST_SQUARE).rsqrt_() for x in (q, k))
        if log_decay is not None:
            self.sums.mul_(log_decay.exp().mT)
        self.sums.addcmul_(k.mT, (v - k @ self.sums).mul_(beta))
        return (q @ self.sums).to(tokens.v.dtype)
