"""Keys and values that decoding keeps where content decides what is read: buckets of hashing, clusters.

Shapes: B batch, H heads, n tokens of a step, D channels of a head, R rounds of hashing, w members.

A query reads the last w members of its bucket, in any round. Which tokens these are depends on content, and a
later token of any bucket may follow, so all tokens are kept, with their buckets. A query scans the buckets of
all earlier tokens, 4 bytes each, and gathers the keys and values of the members only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from variants.base import Clock, DecodingState


class BucketCache(DecodingState):
    """All keys and values of a layer, and the bucket of each in each round."""

    constants = ("rotations",)

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        max_len: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
        rotations: Sequence[Tensor] = (),
    ) -> None:
        """`shape` is (R, B, H, D); R = 0: all are in one bucket. `rotations` decide the buckets."""
        super().__init__(clock, max_len)
        self.rotations = list(rotations)
        rounds, batch, heads, head_dim = shape
        self.keys, self.values = (
            torch.zeros(batch, heads, max_len, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.buckets = torch.zeros(rounds, batch, heads, max_len, dtype=torch.int32, device=device)

    def write(self, k: Tensor, v: Tensor, buckets: Tensor) -> None:
        """Keep the keys and values (B, H, n, D) and the buckets (R, B, H, n) of the next tokens."""
        new = slice(self.clock.position, self.clock.position + k.shape[2])
        self.keys[:, :, new], self.values[:, :, new] = k, v
        if len(self.buckets):
            self.buckets[..., new] = buckets

    def attend(
        self, q: Tensor, bucket: Tensor, members: int, token: int, own: tuple[Tensor, Tensor], *, itself: bool
    ) -> Tensor:
        """The query q (B, H, D) of token `token` of this step, which is written already, reads the last
        `members` earlier members of its buckets (R, B, H) → (B, H, D).

        `own` are its key and value (B, H, D): read by every query if `itself`, else only by one without any
        other.
        """
        earlier = self.clock.position + token
        at, is_member = self._members(bucket, members, earlier)
        index = at[..., None].expand(*at.shape, q.shape[-1])
        keys, values = (
            torch.cat([held.gather(2, index).to(q.dtype), new[:, :, None]], dim=2)
            for held, new in ((self.keys, own[0]), (self.values, own[1]))
        )
        has_none = ~is_member.any(-1, keepdim=True)
        reads_own = torch.ones_like(has_none) if itself else has_none
        scores = (keys @ q[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~torch.cat([is_member, reads_own], dim=-1), float("-inf"))
        read: Tensor = scores.softmax(dim=-1)[:, :, None] @ values
        return read.squeeze(2)

    def _members(self, bucket: Tensor, members: int, earlier: int) -> tuple[Tensor, Tensor]:
        """Positions (B, H, m), and whether each is a member and not a repetition of another round."""
        batch, heads = self.keys.shape[:2]
        count = min(members, earlier)
        position = torch.arange(earlier, device=bucket.device)
        if not len(self.buckets):
            at = position[earlier - count :].expand(batch, heads, -1)
            return at, torch.ones_like(at, dtype=torch.bool)
        same = self.buckets[..., :earlier] == bucket[..., None]
        found = torch.where(same, position, -1).topk(count, dim=-1).values  # (R, B, H, m)
        found = found.permute(1, 2, 0, 3).flatten(2).sort(dim=-1, descending=True).values
        repeated = torch.zeros_like(found, dtype=torch.bool)
        repeated[..., 1:] = found[..., 1:] == found[..., :-1]
        return found.clamp(min=0), (found >= 0) & ~repeated


def bucket_cache_bytes(shape: tuple[int, int, int, int], max_len: int, element_bytes: int) -> int:
    """Bytes of a `BucketCache` of this shape (R, B, H, D)."""
    rounds, batch, heads, head_dim = shape
    return batch * heads * max_len * (2 * head_dim * element_bytes + 4 * rounds)
