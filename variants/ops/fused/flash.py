"""Flash attention: windows, sequences of several lengths in one launch, and merging by logsumexp.

Dao 2023, FlashAttention-2, arXiv:2307.08691. *Untried*: no device has run the CUDA kernels from here yet.

Shapes: B batch, T queries, S keys, H heads, D channels of a head; packed: N tokens of several sequences, one
after the other.

Contract, on every device:

- q is (B, T, H, D), k and v are (B, S, H, D), or all are packed, (N, H, D), with the lengths of the sequences
  in `Packing` or `DevicePacking`. The logsumexp of the scores of a query (natural logarithm, float32) is
  (B, H, T) or, packed, (H, N).
- The last query stands beside the last key (*aligned bottom right*, as in flash attention since 2.1): query i
  has the position i + S − T among the keys. With `causal` it reads no key after its position. `window` is
  (left, right): the number of keys before and after its position that it reads; None: no limit. A window
  that is not causal needs at least as many keys as queries in each sequence: the kernels cut a side off at
  the number of keys.
- A query without an allowed key gives 0 and a logsumexp of +∞, which makes its weights exp(score − ∞) = 0.
- Strides are arbitrary but for the channels, which are contiguous. Results have the layout of q, k and v. The
  backward pass copies an output, or a gradient of the output, that is not contiguous.

The operators are in `flash_operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.ops.fused import flash_operators
from variants.ops.fused.flash_operators import UNLIMITED, Knobs, allowed_pairs

LARGEST_HEAD = 256
"""Maximum number of channels of a head."""
HEAD_MULTIPLE = 8
"""The number of channels of a head is a multiple of this."""
MOST_SEQUENCES = 65_535
"""Maximum number of sequences of a launch: CUDA's limit for the second dimension of a grid."""
Window = tuple[int | None, int | None]


def missing_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The requirement of the kernel that this machine does not meet, or None.

    On a CPU the operator is an oracle for tests, so a cell must use another implementation there. A machine
    without a CUDA device may plan for one; nothing is known about its compute capability then.
    """
    if device.type != "cuda":
        return f"impl=flash needs a CUDA device; on {device.type}, use another impl"
    if torch.version.hip is not None:
        return "impl=flash needs CUDA: its kernels are not those of ROCm builds of torch"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"impl=flash needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % HEAD_MULTIPLE or head_dim > LARGEST_HEAD:
        allowed = f"multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
        return f"impl=flash does not support heads of {head_dim} channels; allowed are {allowed}"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        major, minor = capability
        return f"impl=flash needs compute capability 8.0 or higher, not {major}.{minor}"
    return None


@dataclass(frozen=True)
class Packing:
    """Sequences that are packed one after the other, with the number of queries and of keys of each."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.queries or len(self.queries) != len(self.keys):
            raise ValueError(f"{len(self.queries)} lengths of queries, {len(self.keys)} of keys")

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """As many keys as queries in each sequence."""
        return cls(tuple(lengths), tuple(lengths))


@dataclass(frozen=True, kw_only=True)
class DevicePacking:
    """Packed sequences whose lengths depend on data, so that only the device knows them.

    The results of rows after the last sequence are undefined.
    """

    queries: Tensor
    """int32: the first query of each sequence, and the end of the last."""
    keys: Tensor
    """int32: the first key of each sequence, and the end of the last."""
    most_queries: int
    """No sequence has more queries. The kernel starts threads for so many queries of each sequence, so a high
    bound costs time."""
    most_keys: int
    """No sequence has more keys."""
    pairs: int
    """Allowed pairs of all sequences, of one head, or an upper bound: for counting only."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Window = (None, None),
    packing: Packing | DevicePacking | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention, differentiable: outputs in the layout of q. `scale` of the scores: None is 1/√D."""
    return flash_forward(q, k, v, causal=causal, window=window, packing=packing, scale=scale)[0]


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Window = (None, None),
    packing: Packing | DevicePacking | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and logsumexp. The outputs are differentiable, the logsumexp is not."""
    _require(q, k, v, packing, causal, window)
    y, lse = flash_operators.forward(q, k, v, *arguments(q, k, causal, window, packing, scale))
    return y, lse


def flash_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    window: Window = (None, None),
    packing: Packing | DevicePacking | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from these keys.

    y and lse may belong to a softmax over more keys than k: the weights are exp(score − lse), and the
    gradient of a score is its weight times (dy · v − dy · y). So if a softmax is merged from parts, the
    gradients of its parts add up to that of the whole, as in ring attention (Liu 2023, arXiv:2310.01889).
    """
    _require(q, k, v, packing, causal, window)
    return flash_operators.backward(dy, q, k, v, y, lse, *arguments(q, k, causal, window, packing, scale))


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs and logsumexp of one softmax over the keys of all parts, from those of each part; not packed.

    Not differentiable: use `flash_backward` for each part with the merged y and lse.
    """
    lse = torch.stack([lse for _, lse in parts])  # (parts, B, H, T)
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # of a query without a key in a part
    total = lse.logsumexp(0)
    total = total.masked_fill(total == -torch.inf, torch.inf)
    shares = (lse - total).exp().transpose(-1, -2)[..., None]  # (parts, B, T, H, 1)
    y = torch.stack([y for y, _ in parts])
    return (y * shares).sum(0).to(y.dtype), total


def _require(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | DevicePacking | None,
    causal: bool,
    window: Window,
) -> None:
    if any(side is not None and side < 0 for side in window):
        raise ValueError(f"window={window}: allowed are None and 0 or more")
    dims, q_tokens = (4, q.shape[:1]) if packing is None else (3, torch.Size())
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != dims or k.shape != v.shape or k.dim() != dims or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"{shapes}: allowed are (B, T, H, D) and (B, S, H, D), packed (N, H, D) and (M, H, D)"
        )
    if k.shape[: len(q_tokens)] != q_tokens:
        raise ValueError(f"{shapes}: the batch sizes of queries and keys differ")
    lengths = [(q.shape[-3], k.shape[-3])]
    if isinstance(packing, Packing):
        lengths = list(zip(packing.queries, packing.keys, strict=True))
    sequences = len(q) if packing is None else len(lengths)
    if isinstance(packing, DevicePacking):
        lengths, sequences = [], len(packing.queries) - 1
    if sequences > MOST_SEQUENCES:
        raise ValueError(f"{sequences:,} sequences; allowed are {MOST_SEQUENCES:,}")
    if not causal and window != (None, None) and any(queries > keys for queries, keys in lengths):
        raise ValueError(f"{shapes}, window={window}: allowed are no more queries than keys")
    if isinstance(packing, Packing) and (sum(packing.queries), sum(packing.keys)) != (len(q), len(k)):
        raise ValueError(f"{shapes}: packed are {sum(packing.queries)} queries and {sum(packing.keys)} keys")


def arguments(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: Window,
    packing: Packing | DevicePacking | None,
    scale: float | None,
) -> Knobs:
    """The arguments of the operators after the tensors."""
    left, right = (UNLIMITED if side is None else side for side in window)
    if causal:
        right = 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(packing, DevicePacking):
        most = [packing.most_queries], [packing.most_keys]
        return Knobs(left, right, *most, packing.queries, packing.keys, packing.pairs, scale)
    if packing is None:
        pairs = q.shape[0] * allowed_pairs(q.shape[1], k.shape[1], left, right)
        return Knobs(left, right, [], [], None, None, pairs, scale)
    lengths = list(packing.queries), list(packing.keys)
    pairs = sum(allowed_pairs(*each, left, right) for each in zip(*lengths, strict=True))
    return Knobs(left, right, *lengths, None, None, pairs, scale)
