"""What was dispatched: FLOPs, kernels launched and bytes moved, recompute and padding included.

`bench.measure.launches` says what a launch is and which bytes count. FLOPs are 2 per multiply-accumulate:
torch's own counter with the attention kernels put right: it knows no formula for the CPU kernel,
so dense attention would count 0 there, and it counts a causal call as the full T × T although the
kernels skip what `is_causal` forbids. A mask given as a tensor is counted in full, because nothing
is skipped there. Softmax, norms, sorting, gathers and other elementwise work count 0.

Operators of this project are counted by the operations inside them, on fake tensors too. Kernels of other
libraries have their formulas in torch's registry and are one launch. FlexAttention, which may be compiled, is
counted by the operator that notes its work, and not by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import launches
from bench.measure.launches import Counts
from variants.ops import operators
from variants.ops.fused import backends

_KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_NOTE_WORK = backends.note_work._opoverload
_FLEX = ("flex_attention", "flex_attention_backward")
FORWARD_PRODUCTS = 2
"""Products of size queries × keys × head_dim: the scores and the weighted sum."""
BACKWARD_PRODUCTS = 5
"""The fused kernels' backward: the scores again, and the gradients of V, the weights, Q and K."""


def _pairs(queries: int, keys: int, is_causal: bool) -> int:
    """(query, key) pairs computed; a causal kernel aligns the first query with the first key."""
    if not is_causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + max(0, queries - keys) * keys


def _formula(packet: Any, flops: Callable[[Mapping[str, Any]], int]) -> Callable[..., int]:
    """A formula of the arguments by their names, in the form of torch's registry."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops({**dict(zip(names, args, strict=False)), **kwargs})

    count._get_raw = True  # type: ignore[attr-defined]  # we read flags, not only shapes
    return count


def _attention(products: int) -> Callable[[Mapping[str, Any]], int]:
    def flops(given: Mapping[str, Any]) -> int:
        batch, heads, queries, head_dim = given["query"].shape
        pairs = _pairs(queries, given["key"].shape[2], bool(given.get("is_causal", False)))
        return int(2 * products * batch * heads * pairs * head_dim)

    return flops


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """A formula for every fused attention kernel that this torch has, forward and backward."""
    formulas = {}
    for kernel in _KERNELS:
        for name, products in ((kernel, FORWARD_PRODUCTS), (f"{kernel}_backward", BACKWARD_PRODUCTS)):
            packet = getattr(torch.ops.aten, name)
            formulas[packet] = _formula(packet, _attention(products))
    return formulas


def weighted_sum_formulas() -> dict[Any, Callable[..., int]]:
    """A formula for the weighted sum of rows of a table, and for its two gradients: a product of size rows ×
    channels each. Sums without weights count 0."""

    def sums(given: Mapping[str, Any]) -> int:
        if given.get("per_sample_weights") is None:
            return 0
        return products(given)

    def products(given: Mapping[str, Any]) -> int:
        channels = given["weight" if "weight" in given else "grad"].shape[1]
        return int(2 * given["indices"].numel() * channels)

    flops = {"": sums, "_forward_only": sums, "_backward": sums, "_per_sample_weights_backward": products}
    packets = {getattr(torch.ops.aten, f"_embedding_bag{name}"): each for name, each in flops.items()}
    return {packet: _formula(packet, each) for packet, each in packets.items()}


def formulas() -> dict[Any, Callable[..., int]]:
    """Operation → its formula: torch's, and ours. torch 2.13 has none for products that write in place."""
    own = attention_formulas() | weighted_sum_formulas()
    known = FlopCounterMode(display=False, custom_mapping=own).flop_registry
    aten = torch.ops.aten
    return known | {aten.addmm_: known[aten.addmm], aten.baddbmm_: known[aten.baddbmm]}


@cache
def attention_kernel(func: OpOverload[..., Any]) -> str | None:
    """Return the name of the attention kernel that an operation is, None for others and for backward passes.

    Torch's names without their common parts: flash, flash_for_cpu, efficient, cudnn. The backend *math* of
    scaled_dot_product_attention computes all scores by matrix products; it is recognised by its softmax,
    which nothing else in torch uses. Kernels of other libraries have names of their own.
    """
    name = str(func._overloadpacket.__name__)
    if "backward" in name or func.is_view:
        return None
    if func.namespace == "aten":
        if name == "_safe_softmax":
            return "math"
        if "attention" not in name:
            return None
        for part in ("_scaled_dot_product", "_attention", "_forward"):
            name = name.replace(part, "")
        return name.strip("_")
    known = "attention" in name or "attn" in name or func._overloadpacket in formulas()
    return name.strip("_") if known else None


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others; they are dispatched only where it is taken apart."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace != "prim" and bool(func.has_kernel_for_dispatch_key(composite))


class DispatchedWork(TorchDispatchMode):
    """Gives `count` the FLOPs, launches and bytes of each operation dispatched.

    A mode of our own around torch's formulas, because torch's own has compiled code run uncompiled while
    it counts, and ever after.
    """

    supports_higher_order_operators = True

    def __init__(self, count: Callable[[int, int, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.formulas = count, formulas()
        self.attention_kernels: set[str] = set()
        """Names of the attention kernels dispatched: see `attention_kernel`."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled: what it dispatches is counted, what compiling dispatches is not."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        if func is torch.ops.prim.device.default:  # two thirds of what fake tensors dispatch
            return getattr(args[0], "fake_device", None) or func(*args)
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            if func.name() in _FLEX:
                return func(*args, **kwargs)
            raise NotImplementedError(f"cannot count {func.name()}: what it runs is not dispatched")
        if func is _NOTE_WORK:
            self.count(*args)
            return func(*args)
        if work := operators.implementation(func):
            with self:
                return work(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and _is_composite(func):  # it may be made of operations that have one
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if name := attention_kernel(func):
            self.attention_kernels.add(name)
        if launches.is_kernel(func):
            flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
            self.count(flops, 1, launches.bytes_moved(func, args, kwargs, out))
        return out


class CountFlops:
    """Context manager; `.counts` holds what was dispatched inside it, and `.total` its FLOPs."""

    def __init__(self) -> None:
        self._flops = self._launches = self._bytes = 0
        self._mode = DispatchedWork(self._count)

    @property
    def counts(self) -> Counts:
        """FLOPs, launches and bytes so far."""
        return Counts(self._flops, self._launches, self._bytes)

    @property
    def attention_kernels(self) -> tuple[str, ...]:
        """The names of the attention kernels so far, in alphabetical order."""
        return tuple(sorted(self._mode.attention_kernels))

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return self._flops

    def _count(self, flops: int, launches: int, bytes_moved: int) -> None:
        self._flops += flops
        self._launches += launches
        self._bytes += bytes_moved

    def __enter__(self) -> Self:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
