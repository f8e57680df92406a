"""Locality-sensitive hashing: the number of buckets, random rotations, and the bucket of each token.

Shapes: B batch, T tokens, H heads, D head_dim, R rounds of hashing, N = H·B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.tile_size import Sizes

UNIT_EPSILON = 1e-6
"""ε in 1 / √(‖x‖² + ε²), so that the zero vector has a gradient."""
ONE_ROTATION = 64
"""Maximum number of buckets of one rotation; more buckets need the product of two (see `factors`)."""
MOST_PIECES = 16
"""Maximum number of pieces of the tokens. Longer sequences have larger pieces, to bound the operations."""
HASH_TILE = Sizes(cpu=2**21, accelerator=2**28)
"""Projections computed at a time. The CPU's value keeps them in cache."""


def inverse_length(x: Tensor) -> Tensor:
    """1 / √(‖x‖² + ε²) over the last dimension: (…, D) → (…, 1)."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (length.square() + UNIT_EPSILON**2).rsqrt()


def factors(n_buckets: int) -> tuple[int, ...]:
    """Return the number of buckets of each rotation: even factors of n_buckets; () for a single bucket.

    One rotation to n buckets costs T·D·n/2 multiplications. Two rotations to about √n buckets each cost less.
    Raises ValueError if n_buckets is not such a product.
    """
    if n_buckets == 1:
        return ()
    if n_buckets < 1 or n_buckets % 2:
        raise ValueError(f"n_buckets={n_buckets}: a rotation gives an even number of buckets")
    if n_buckets <= ONE_ROTATION:
        return (n_buckets,)
    if n_buckets % 4:
        raise ValueError(
            f"n_buckets={n_buckets}: over {ONE_ROTATION} it is two even factors: a multiple of 4"
        )
    half = n_buckets // 4
    small = next(f for f in range(math.isqrt(half), 0, -1) if half % f == 0)
    return 2 * small, 2 * (half // small)


def least_buckets(minimum: int) -> int:
    """The smallest number of buckets ≥ `minimum` that is cheap to hash to.

    It is 1, an even number up to `ONE_ROTATION`, or a larger product of two even numbers of which the larger
    is at most twice the smaller.
    """
    if minimum <= 1:
        return 1
    if minimum <= ONE_ROTATION:
        return minimum + minimum % 2
    n = minimum + -minimum % 4
    while True:
        small, large = factors(n)
        if large <= 2 * small:
            return n
        n += 4


def rotations(
    heads: int,
    head_dim: int,
    rounds: int,
    sizes: tuple[int, ...],
    device: torch.device,
    seed: int | None = None,
) -> list[Tensor]:
    """Draw a normal float32 tensor (H, D, R·f/2) on `device` for each factor f.

    Without a seed, the device's global generator is used; with a seed, a new generator on the CPU. The
    numbers of a round do not depend on the number of later rounds.
    """
    halves = [size // 2 for size in sizes]
    shape = rounds, heads, head_dim, sum(halves)
    if seed is None:
        drawn = torch.randn(shape, dtype=torch.float32, device=device)
    else:
        drawn = seeded_normal(shape, seed, device)
    return [part.permute(1, 2, 0, 3).flatten(2) for part in drawn.split(halves, dim=-1)] if sizes else []


def _seeded_normal(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Draw normal float32 numbers; the same seed gives the same numbers on every device."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float32, generator=source).to(device)


# An operator, because torch.compile cannot trace a generator.
seeded_normal = operator(
    "seeded_normal", _seeded_normal, schema="(SymInt[] shape, int seed, Device device) -> Tensor"
)


@seeded_normal.register_fake
def _(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


@torch.no_grad()
@repeatable
def hash_rows(x: Tensor, given: list[Tensor], rounds: int, device_type: str | None = None) -> Tensor:
    """Compute the bucket of each token in each round: x (B, T, H, D) → (R, N, T) int64 with N = (H, B).

    h(x) = argmax [xR; −xR] (Andoni 2015, arXiv:1509.02897), computed as the first largest |xR| and its sign,
    where 0 counts as positive. `given` are the matrices R of `rotations`. Products are float32 for any dtype
    of x: in half precision nearby projections are equal, and the bucket depends on the kernel. The tokens are
    hashed in pieces, because the projections are T × R × buckets numbers. `device_type` decides the size of
    the pieces; None: the device of x.
    """
    batch, seq_len, heads, _ = x.shape
    buckets = torch.zeros(rounds, heads, batch * seq_len, dtype=torch.int64, device=x.device)
    if given:
        by_head = x.flatten(0, 1).transpose(0, 1)  # (H, BT, D)
        width = heads * sum(r.shape[-1] for r in given)
        step = max(HASH_TILE.on(device_type or x.device.type) // width, -(-batch * seq_len // MOST_PIECES), 1)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, batch * seq_len, step):
                piece = by_head[:, start : start + step].float()
                bucket = buckets[:, :, start : start + step]
                for index, rotation in enumerate(given):
                    half = rotation.shape[-1] // rounds
                    y = torch.bmm(piece, rotation).unflatten(-1, (rounds, half))  # (H, n, R, f/2)
                    best = y.abs().argmax(dim=-1, keepdim=True)
                    best = torch.add(best, y.gather(-1, best) < 0, alpha=half)  # of the negative side
                    if index:
                        bucket.mul_(2 * half)
                    bucket.add_(best.squeeze(-1).permute(2, 0, 1))
    return buckets.view(rounds, heads * batch, seq_len)
