"""The state of `gated_scan`, which decoding keeps (Katharopoulos 2020, arXiv:2006.16236, §3.4).

Shapes: B batch, H heads, n tokens of a step, D channels of queries and keys, m features, V channels of
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState
from variants.ops.recurrences.gated_scan import read_segments
from variants.ops.recurrences.scan_chunks import Plan, Segment
from variants.ops.recurrences.scan_features import FeatureMap


class ScanState(DecodingState):
    """S and, with a normaliser, z of one layer, in float32 or wider."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        *,
        normalise: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, H, m, V); `dtype` is that of keys and values."""
        super().__init__(clock, max_len)
        wide = torch.promote_types(dtype, torch.float32)
        self.sums = torch.zeros(shape, dtype=wide, device=device)
        self.norms = self.sums.new_zeros(*shape[:3], 1) if normalise else None

    def _held(self) -> tuple[Tensor, ...]:
        """Views of the tensors with B and H in one dimension, as the scan has them."""
        held = (self.sums,) if self.norms is None else (self.sums, self.norms)
        return tuple(tensor.flatten(0, 1) for tensor in held)

    @staticmethod
    def bytes(shape: tuple[int, int, int, int], *, normalise: bool, element_bytes: int) -> int:
        """Bytes of a state for keys and values of `element_bytes`."""
        batch, heads, features, channels = shape
        return max(4, element_bytes) * batch * heads * features * (channels + normalise)

    def read_next(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        features: FeatureMap,
        table: Tensor | None = None,
        least: Tensor | None = None,
        chunk: int,
        device_type: str,
    ) -> Tensor:
        """Add the next n tokens, and return their outputs (B, H, n, V). Arguments: see `gated_scan`."""
        if q.shape[2] == 1:
            return self._read_token(Segment(q, k, v, log_decay, weight, least), features, table)
        before = self._held()
        plan = Plan.make(features, q, v, table, self.norms is not None, chunk, device_type)
        y, _, states = read_segments(plan, Segment(q, k, v, log_decay, weight, least), table, before)
        for held, after in zip(before, states[-1], strict=True):
            held.copy_(after)
        return y

    def _read_token(self, token: Segment, features: FeatureMap, table: Tensor | None) -> Tensor:
        """One token by the recurrence itself: a chunk would compute and mask pairs for it."""
        wide = (None if x is None else x.flatten(0, 1).to(self.sums.dtype) for x in token)
        q, k, v, log_decay, weight, least = Segment.of(*wide)
        query, key = (features.features(x, table) for x in (q, k))
        decay = None if log_decay is None else log_decay.exp()
        written = key if weight is None else key * weight
        sums, *norms = self._held()
        for held in (sums, *norms):
            if decay is not None:
                held.mul_(decay)
        sums.addcmul_(written.mT, v)
        y = query @ sums
        for held in norms:
            held.add_(written.mT)
            norm = query @ held
            y.div_(norm if least is None else torch.maximum(norm, least))
        result: Tensor = y.unflatten(0, token.q.shape[:2]).to(token.v.dtype)
        return result
