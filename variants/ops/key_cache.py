"""Keys and values that decoding keeps for a mask: those that a later query may read, and no others.

Shapes: B batch, H heads, K heads of keys, n tokens of a step, D channels of a head, S slots, R slots of a
ring, p period.

Over 300 lines: what is kept, what is read and what is written follow from each other.

A rule with a period p is the same for all keys of a residue j mod p. Residues that queries may read at any
distance are *summaries*: each of their keys has a slot for ever. All other keys are read only up to a
distance R, and share a ring of R slots. Examples: dense attention has period 1, and its only residue is a
summary. A window of w tokens has a ring of w − 1 slots, and no summary. The fixed pattern of Sparse
Transformers has a ring for the block, and summaries. A rule without a period is taken to read all keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.base import Clock, DecodingState
from variants.ops.patterns.masks import AnyOfGroup, Rule, depends_on_head
from variants.ops.projections import spread

MOST_SCORES = 8192
"""Keys of a head whose scores are allocated at a time by a step, which so needs no memory that grows with the
position."""


@dataclass(frozen=True)
class Kept:
    """What the heads [first, last) of keys keep."""

    first: int
    last: int
    period: int
    summaries: tuple[tuple[int, ...], ...]
    """The residues of each head that are kept for ever, equally many for each."""
    reach: int
    """R: the largest distance at which another key is read."""
    by_distance: bool = False
    """Whether the distance alone decides what is read. Otherwise the rule is evaluated in every step."""
    distances: tuple[int, ...] | None = None
    """By distance: the distances above 0 that are read; None: all up to `reach` or, with a summary, all."""
    reads_itself: bool = False
    """Whether every query reads its own key."""

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.last - self.first

    def slots(self, tokens: int) -> int:
        """Slots of summaries after this many tokens: of the head with the most."""
        rows, rest = divmod(tokens, self.period)
        return max(rows * len(own) + sum(residue < rest for residue in own) for own in self.summaries)

    def ring(self, max_len: int) -> int:
        """Slots of the ring."""
        return min(self.reach, max_len)


@lru_cache(maxsize=128)
def kept_keys(rule: Rule, heads: int, max_len: int) -> tuple[Kept, ...]:
    """What each head keeps for sequences of at most `max_len` tokens; equal neighbours are joined."""
    with _disable_current_modes():
        apart = depends_on_head(rule)
        groups: list[Kept] = []
        for head in range(heads if apart else 1):
            own = _of_head(rule, head, max_len)
            if groups and _alike(groups[-1], own):
                last = groups.pop()
                summaries, reach = last.summaries + own.summaries, max(last.reach, own.reach)
                own = replace(own, first=last.first, summaries=summaries, reach=reach)
            groups.append(own)
        if not apart:
            groups = [replace(groups[0], last=heads, summaries=groups[0].summaries * heads)]
        return tuple(groups)


def _alike(one: Kept, two: Kept) -> bool:
    """Whether heads are read in the same way, and have as many slots. Rings of a periodic rule may differ by
    parts of a period: then all have the longest, so that few operations read all heads."""
    reach = one.reach if one.by_distance else two.reach
    same = replace(one, first=two.first, last=two.last, summaries=two.summaries, reach=reach) == two
    return same and len(one.summaries[0]) == len(two.summaries[0])


def _of_head(rule: Rule, head: int, max_len: int) -> Kept:
    rule = rule.for_head(head)
    index = torch.tensor(head, device="cpu")
    period, everything, nothing = rule.period, ((0,),), ((),)
    if period is None or period >= max_len:
        return Kept(head, head + 1, 1, everything, 0)
    residue = torch.arange(period, device="cpu")[:, None]

    def read(low: int, high: int) -> Tensor:  # (p, high − low + 1): is a key read at distances low … high
        distance = torch.arange(low, high + 1, device="cpu")
        return rule(index, residue + distance, residue).expand(period, len(distance))

    itself = bool(read(0, 0).all())
    limited = rule.reach is not None
    if period == 1:
        distances = tuple((torch.nonzero(read(1, max_len)[0]).flatten() + 1).tolist())
        reach = max(distances, default=0)
        named = None if len(distances) == (reach if limited else max_len) else distances
        return Kept(
            head,
            head + 1,
            1,
            nothing if limited else everything,
            reach if limited else 0,
            by_distance=True,
            distances=named,
            reads_itself=itself,
        )
    if rule.reach is not None:
        return Kept(head, head + 1, period, nothing, _farthest(read(1, rule.reach)), reads_itself=itself)
    forever = torch.zeros(period, dtype=torch.bool, device="cpu")
    row = 2
    while row * period <= max(max_len, 2 * period):
        forever |= read(row * period + 1, (row + 1) * period).any(1)
        row *= 2
    reach = _farthest(read(1, 2 * period) & ~forever[:, None])
    summaries = tuple(torch.nonzero(forever).flatten().tolist())
    return Kept(head, head + 1, period, (summaries,), reach, reads_itself=itself)


def _farthest(read: Tensor) -> int:
    """The largest distance at which a key is read: (p, distances from 1)."""
    columns = torch.nonzero(read.any(0)).flatten()
    return int(columns[-1]) + 1 if len(columns) else 0


def cache_bytes(rule: Rule, heads: int, max_len: int, numbers: int) -> int:
    """Bytes of keys and values: `numbers` is the bytes of a key and a value of one head of all sequences.

    `heads` are those of keys and values, and the rule is theirs (`AnyOfGroup` if query heads share them).
    """
    kept = kept_keys(rule, heads, max_len)
    return numbers * sum(group.heads * (group.slots(max_len) + group.ring(max_len)) for group in kept)


class KeyCache(DecodingState):
    """The keys and values of one layer."""

    def __init__(
        self,
        rule: Rule,
        shape: tuple[int, int, int],
        max_len: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`rule` is causal, and that of the heads of keys; `shape` is (B, K, D)."""
        super().__init__(clock, max_len)
        batch, heads, head_dim = shape
        self.groups = [
            _Group(rule, kept, (batch, kept.heads, head_dim), max_len, clock, dtype, device)
            for kept in kept_keys(rule, heads, max_len)
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The next tokens read the keys that are kept, and each other; then their own keys and values are
        kept: queries (B, H, n, D), keys and values (B, K, n, D) → (B, H, n, D)."""
        queries = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, n, D)
        outputs = [group.attend(*group.of_heads(queries, k, v)) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values (B, K, n, D) of a prompt that is read without the cache."""
        for group in self.groups:
            group.write(*group.of_heads(k, v))

    def parts(self) -> Sequence[DecodingState]:
        """The groups of heads."""
        return self.groups


class _Group(DecodingState):
    """Keys and values of the heads that keep equally many.

    The G query heads that share a head of keys are processed like G times as many queries.
    """

    def __init__(
        self,
        rule: Rule,
        kept: Kept,
        shape: tuple[int, int, int],
        max_len: int,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        batch, heads, head_dim = shape
        self.kept = kept
        self.rule, self.queries_per_key, self.is_common = rule, 1, True
        """The rule of the query heads; how many share keys; whether these read the same of them."""
        if isinstance(rule, AnyOfGroup):
            self.rule, self.queries_per_key = rule.rule, rule.size
            self.is_common = all(map(rule.is_common, range(kept.first, kept.last)))
        # tables, the same for all sequences: not part of the state
        self._tables = {
            "distances": torch.tensor(kept.distances or (), dtype=torch.int64, device=device),
            "summaries": torch.tensor(kept.summaries, dtype=torch.int64, device=device),
        }
        self.ring = kept.ring(max_len)
        self.summary_keys, self.summary_values = (
            torch.zeros(batch, heads, kept.slots(max_len), head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        self.ring_keys, self.ring_values = (
            torch.zeros(batch, heads, self.ring, head_dim, dtype=dtype, device=device) for _ in range(2)
        )

    def of_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The heads of this group, of tensors (B, K, …)."""
        kept = self.kept
        if kept.first == 0 and kept.last == tensors[0].shape[1]:
            return tensors
        return tuple(tensor[:, kept.first : kept.last] for tensor in tensors)

    # --- reading ------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over the keys that are kept and the new ones, which are kept afterwards:
        queries (B, K, G, n, D) → (B, K·G, n, D)."""
        tokens = q.shape[3]
        rows = q.flatten(2, 3)  # (B, K, G·n, D)
        if self._keeps_all() and tokens == 1:  # the own key is already in its slot, beside all others
            self.write(k, v)
            end = self.clock.position + 1
            keys, values = (kept[:, :, :end].to(q.dtype) for kept in (self.summary_keys, self.summary_values))
            y = _read_all(rows, keys, values)
        else:
            y = self._attend(rows, k, v, tokens)
            self.write(k, v)  # not before: a ring has no slot beside those that are read
        by_head: Tensor = y.unflatten(2, (-1, tokens)).flatten(1, 2)
        return by_head

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        parts = [part for part in (self._summaries(tokens, q), self._ring(tokens, q)) if part is not None]
        parts.append((k, v, self._own(tokens, q)))
        scale = q.shape[-1] ** -0.5
        scores = []
        for keys, _, allowed in parts:
            score = (q @ keys.to(q.dtype).transpose(-1, -2)) * scale
            scores.append(score if allowed is None else score.masked_fill(~allowed, float("-inf")))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        if not self._reads_itself():  # a query may have no key, and gives 0
            weights = weights.nan_to_num(0.0)
        sizes = [keys.shape[2] for keys, _, _ in parts]
        pieces = weights.split(sizes, dim=-1)
        y: Tensor = pieces[-1] @ v
        for piece, (_, values, _) in zip(pieces[:-1], parts, strict=False):
            y = y + piece @ values.to(q.dtype)
        return y

    def _keeps_all(self) -> bool:
        """Whether every query reads all keys up to itself."""
        kept = self.kept
        reads_all = bool(kept.summaries[0]) and kept.distances is None and kept.reads_itself
        return self._by_distance() and reads_all

    def _reads_itself(self) -> bool:
        return self.is_common and self.kept.reads_itself

    def _by_distance(self) -> bool:
        return self.is_common and self.kept.by_distance

    def _own(self, tokens: int, like: Tensor) -> Tensor | None:
        """Which of the new keys each new query may read; None: a single one, which it reads."""
        if tokens == 1 and self._reads_itself():
            return None
        positions = self.clock.positions(tokens, like.device)
        return self._allowed(positions[None, None], tokens)

    def _summaries(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        kept, position = self.kept, self.clock.position
        visible = kept.slots(position)
        if not visible:
            return None
        if self._by_distance() and tokens == 1:
            if kept.distances is None:
                return self.summary_keys[:, :, :visible], self.summary_values[:, :, :visible], None
            slots = position - self._near()
            return self.summary_keys[:, :, slots], self.summary_values[:, :, slots], None
        where = self._positions_of_summaries(visible, like)
        allowed = self._allowed(where[:, None], tokens) & (where < position)[:, None]
        return self.summary_keys[:, :, :visible], self.summary_values[:, :, :visible], allowed

    def _ring(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        kept, position = self.kept, self.clock.position
        visible = min(position, self.ring)
        if not visible:
            return None
        if self._by_distance() and tokens == 1:
            if kept.distances is None:
                return self.ring_keys[:, :, :visible], self.ring_values[:, :, :visible], None
            slots = (position - self._near()) % self.ring
            return self.ring_keys[:, :, slots], self.ring_values[:, :, slots], None
        slot = torch.arange(visible, device=like.device)
        where = (position - 1 - (position - 1 - slot) % self.ring)[None]
        allowed = self._allowed(where[:, None], tokens)
        if kept.summaries[0]:
            allowed = allowed & ~self._is_summary(where)[:, None]
        return self.ring_keys[:, :, :visible], self.ring_values[:, :, :visible], allowed

    def _near(self) -> Tensor:
        """The distances that are read from this position."""
        distances = self.kept.distances
        assert distances is not None
        far = self.clock.position if self.kept.summaries[0] else min(self.clock.position, self.ring)
        count = bisect_right(distances, far)
        return self._tables["distances"][:count]

    def _positions_of_summaries(self, visible: int, like: Tensor) -> Tensor:
        """The positions (K or 1, S) of the first slots."""
        own = self._tables["summaries"]
        slot = torch.arange(visible, device=like.device)
        count = own.shape[1]
        return slot // count * self.kept.period + own[:, slot % count]

    def _is_summary(self, where: Tensor) -> Tensor:
        """Whether the keys at these positions (1, S) are summaries of each head of keys: (K, S)."""
        own = self._tables["summaries"]
        return (where[..., None] % self.kept.period == own[:, None]).any(-1)

    def _allowed(self, keys: Tensor, tokens: int) -> Tensor:
        """May the new queries read keys at the positions (K or 1, 1, S): (K or 1, G·n, S)."""
        group = self.queries_per_key
        head = torch.arange(self.kept.first * group, self.kept.last * group, device=keys.device)
        queries = self.clock.positions(tokens, keys.device)[None, :, None]
        keys = spread(keys, group, dim=0) if len(keys) > 1 else keys
        allowed = self.rule(head[:, None, None], queries, keys)
        allowed = allowed.expand(*torch.broadcast_shapes(allowed.shape, (1, tokens, keys.shape[-1])))
        if group == 1:
            return allowed
        if len(allowed) == 1:
            return allowed.repeat(1, group, 1)
        rows: Tensor = allowed.unflatten(0, (-1, group)).flatten(1, 2)
        return rows

    # --- writing ------------------------------------------------------------------------------------------

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values (B, K, n, D) of the next tokens."""
        self._write_summaries(k, v)
        count = min(k.shape[2], self.ring)
        if not count:
            return
        end = self.clock.position + k.shape[2]
        first = (end - count) % self.ring
        before_end = min(count, self.ring - first)
        for ring, new in ((self.ring_keys, k), (self.ring_values, v)):
            last = new[:, :, new.shape[2] - count :]
            ring[:, :, first : first + before_end] = last[:, :, :before_end]
            if before_end < count:
                ring[:, :, : count - before_end] = last[:, :, before_end:]

    def _write_summaries(self, k: Tensor, v: Tensor) -> None:
        kept, position, tokens = self.kept, self.clock.position, k.shape[2]
        if not kept.summaries[0]:
            return
        if kept.period == 1:
            self.summary_keys[:, :, position : position + tokens] = k
            self.summary_values[:, :, position : position + tokens] = v
            return
        for heads, own in _equal(kept.summaries):
            rows = range(position // kept.period, (position + tokens - 1) // kept.period + 1)
            found = [
                (row * len(own) + index, row * kept.period + residue - position)
                for row in rows
                for index, residue in enumerate(own)
                if position <= row * kept.period + residue < position + tokens
            ]
            if not found:
                continue
            slots, tokens_of = zip(*found, strict=True)
            chosen = _span(tokens_of)
            for held, new in ((self.summary_keys, k), (self.summary_values, v)):
                held[:, heads, _span(slots)] = new[:, heads, chosen]


def _read_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√D)V of few queries (B, K, n, D) and many keys (B, K, S, D).

    On a CPU by two products, as long as there are few keys: torch's CPU kernel divides only heads and queries
    among the cores, and needs several times as long for one head of keys.
    """
    if q.device.type != "cpu" or k.shape[2] > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (k @ (q * q.shape[-1] ** -0.5).mT).mT.contiguous()
    y: Tensor = scores.softmax(dim=-1) @ v
    return y


def _equal(summaries: tuple[tuple[int, ...], ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Runs of heads with the same summaries."""
    first = 0
    for head in range(1, len(summaries) + 1):
        if head == len(summaries) or summaries[head] != summaries[first]:
            yield slice(first, head), summaries[first]
            first = head


def _span(indices: tuple[int, ...]) -> slice | list[int]:
    """A slice if the indices are contiguous."""
    first = indices[0]
    contiguous = indices == tuple(range(first, first + len(indices)))
    return slice(first, first + len(indices)) if contiguous else list(indices)
