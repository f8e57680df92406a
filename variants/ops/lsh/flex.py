"""Rounds of hashed attention by FlexAttention (torch): a kernel for CUDA. Untried: no device has run it yet.

Shapes: n sequences, R rounds, P positions of a sequence in a sorted order, D head_dim. For FlexAttention the
sequences are the batch and the rounds are the heads.

The tiles that are computed follow from the sizes alone: queries read the positions near their own. Which
pairs of a tile are allowed follows from the codes of the rows (see `variants.ops.lsh.layout`), in the mask. A
score is multiplied by the factor of its key, in the score modification, so that queries and keys are one
tensor.

FlexAttention returns the logsumexp of each row and can be differentiated through both results. The backward
pass therefore computes the forward pass again and asks for the gradient of outputs and logsumexp: nothing
that is sorted has to be stored, and only torch's public interface is used.

With the `band` neighbourhood, causal, no bit of an output should depend on a later token: each bucket begins
a tile of `KEYS` keys. The keys of a row then have the same positions in their tiles, and tiles of other
buckets change nothing.

torch's `varlen_attn` and flash-attn are not used: they have no mask for the pairs of earlier rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from variants.ops.fused.backends import BLOCK, GRAPHS, missing_flex, note_work
from variants.ops.lsh.flex_tiles import Tiles, key_tiles, tiles
from variants.ops.lsh.streams import Stream
from variants.ops.lsh.windows import Window

KEYS = 32
"""Keys that the kernel's forward pass reads at a time. A bucket begins at a multiple of it."""
NUMBERS = (2**29, 2**28)
"""Numbers of the sorted queries that are computed at a time, forward and backward. The backward pass has
about eight tensors of the size."""
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 9
"""Products of all pairs and D channels. Backward: the forward pass again, and seven for its gradients."""
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 2, 6
"""The kernel and the scale of the logsumexp; these two, the row sums of output · gradient, their gradient,
the row sums that the kernel's backward pass begins with, and the kernel."""
BACKWARD_TENSORS = 21
"""Tensors of n·R·P·D numbers that the launches of the backward pass read and write."""


class FlexRounds:
    """The kernel; see `variants.ops.lsh.streams.Kernel`."""

    multiple = BLOCK

    def sequences(self, rounds: int, positions: int, window: Window, head_dim: int, *, backward: bool) -> int:
        """As many as `NUMBERS` allows."""
        return NUMBERS[backward] // (rounds * positions * head_dim)

    def new_decisions(
        self, sequences: int, rounds: int, positions: int, window: Window, like: Tensor
    ) -> Tensor:
        """None: the mask decides."""
        return like.new_empty(sequences, 0)

    def forward(self, stream: Stream, decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        given = _arguments(stream)
        out, lse = torch.ops.longctx_bench.flex_rounds(*given, stream.window.numbers)
        extra = _bytes(given[0]) + 2 * _bytes(lse)  # query-keys are read as keys too
        note_work(0, FORWARD_LAUNCHES - 1, extra)
        return out.flatten(0, 2), lse.flatten(), lse.flatten()

    def backward(
        self, stream: Stream, decisions: Tensor, lse: Tensor, grad: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        given = _arguments(stream)
        lse, grad, mean = (stream.inner(x) for x in (lse, grad, mean))
        # The operator allocates the outputs and their gradient. This shows it to a plan, which sees only what
        # operators return; on a device the allocator gives the same memory to the operator.
        scratch = grad.new_empty(2, *grad.shape)
        del scratch
        grads = torch.ops.longctx_bench.flex_rounds_backward(
            *given,
            stream.window.numbers,
            lse.view(stream.shape),
            grad.view(stream.shape + grad.shape[1:]),
            mean.view(stream.shape),
        )
        extra = (BACKWARD_TENSORS - 6) * _bytes(grad)  # the operator's arguments and results are six of them
        note_work(0, BACKWARD_LAUNCHES - 1, extra)
        grad_query, grad_key, grad_value = (x.flatten(0, 2) for x in grads)
        return grad_query, grad_key, grad_value


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _arguments(stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query-keys and values (n, R, P, D), factors (n, R, P), codes (R, n, R, P)."""
    query_key, value = (stream.inner(stream.rows[:, i]).unflatten(0, stream.shape) for i in range(2))
    margin = stream.margin
    code = stream.code[:, margin : stream.code.shape[1] - margin]
    return query_key, value, stream.inner(stream.factor).view(stream.shape), code.unflatten(1, stream.shape)


# --- the kernel -----------------------------------------------------------------------------------


def _attend(
    query: Tensor, key: Tensor, value: Tensor, factor: Tensor, code: Tensor, places: Tiles, window: Window
) -> tuple[Tensor, Tensor]:
    """Outputs (n, R, P, D) and logsumexp (n, R, P)."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    low, high = window.read
    rounds, positions = query.shape[1:3]

    def factored(score: Tensor, sequence: Tensor, turn: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * factor[sequence, turn, k]

    def allowed(sequence: Tensor, turn: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = q > k if window.causal else q != k
        for one in range(rounds):
            difference = code[one, sequence, turn, q] - code[one, sequence, turn, k]
            reads = (difference >= low) & (difference <= high)
            # the round itself reads the pair, and no earlier one does
            found = found & ((turn < one) | (reads == (turn == one)))
        return found

    block_mask = BlockMask(
        seq_lengths=(positions, positions),
        kv_num_blocks=places.keys,
        kv_indices=places.key_index,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=places.queries,
        q_indices=places.query_index,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=allowed,
    )
    options: Any = {"fwd_BLOCK_N": KEYS}
    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod=factored,
        block_mask=block_mask,
        scale=1.0,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


def _products_with(lse: Tensor, grad: Tensor, mean: Tensor, *given: Any) -> Tensor:
    """A number for each row whose gradients are those of the outputs and of the logsumexp of the round, if
    the round's share in the output of all rounds is exp(its logsumexp − lse)."""
    out, of_round = _attend(*given)
    share = (of_round.detach() - lse).exp()
    product = (out * grad).sum(-1, dtype=mean.dtype) * share
    return product + (product.detach() - mean * share) * of_round


@cache
def _compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    # see `variants.ops.fused.backends._compiled_flex`
    backend = "inductor" if device_type == "cuda" else "eager"
    compiled: Any = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _run(function: Callable[..., Any], device: torch.device, *given: Any) -> Any:
    import torch._dynamo as dynamo

    with dynamo.config.patch(recompile_limit=GRAPHS):
        return _compiled(function, device.type)(*given)


def _forward(
    query_key: Tensor, value: Tensor, factor: Tensor, code: Tensor, window: list[int]
) -> tuple[Tensor, Tensor]:
    """Outputs (n, R, P, D) and logsumexp (n, R, P) of each round. On a CPU, P × P scores are computed."""
    chosen = Window(*window)  # type: ignore[arg-type]
    places = tiles(chosen, query_key.shape[2], query_key.device)
    out, lse = _run(_attend, query_key.device, query_key, query_key, value, factor, code, places, chosen)
    return out.contiguous(), lse.to(factor.dtype)


def _backward(
    query_key: Tensor,
    value: Tensor,
    factor: Tensor,
    code: Tensor,
    window: list[int],
    lse: Tensor,
    grad: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (n, R, P, D) of query-keys as queries, of query-keys as keys, and of values. Raises
    NotImplementedError where FlexAttention has no backward pass."""
    chosen, device = Window(*window), query_key.device  # type: ignore[arg-type]
    if reason := missing_flex(device, query_key.shape[3]):
        raise NotImplementedError(reason)
    places = tiles(chosen, query_key.shape[2], device)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query_key, query_key, value)]
        products = _run(_products_with, device, lse, grad, mean, *inputs, factor, code, places, chosen)
        grads = torch.autograd.grad(products, inputs, torch.ones_like(products))
    first, second, third = (x.contiguous() for x in grads)
    return first, second, third


# Operators without `custom_op`, within which autograd is switched off.
_LIBRARY = torch.library.Library("longctx_bench", "FRAGMENT")
_GIVEN = "Tensor query_key, Tensor value, Tensor factor, Tensor code, SymInt[] window"
_LIBRARY.define(f"flex_rounds({_GIVEN}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"flex_rounds_backward({_GIVEN}, Tensor lse, Tensor grad, Tensor mean) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("flex_rounds", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_rounds_backward", _backward, "CompositeExplicitAutograd")


def _forward_shapes(
    query_key: Tensor, value: Tensor, factor: Tensor, code: Tensor, window: list[int]
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), torch.empty_like(factor, memory_format=torch.contiguous_format)


def _backward_shapes(query_key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), value.new_empty(value.shape), value.new_empty(value.shape)


torch.library.register_fake("longctx_bench::flex_rounds", _forward_shapes)
torch.library.register_fake("longctx_bench::flex_rounds_backward", _backward_shapes)


def _count_pairs(window: list[int], positions: int) -> int:
    tiles_read = key_tiles(Window(*window), positions)  # type: ignore[arg-type]
    return sum(last - first + 1 for first, last in tiles_read) * BLOCK * BLOCK


def _flops(query_key: Tensor, window: list[int], products: int) -> int:
    sequences, rounds, positions, head_dim = query_key.shape
    return 2 * products * sequences * rounds * head_dim * _count_pairs(window, positions)


@register_flop_formula(torch.ops.longctx_bench.flex_rounds, get_raw=True)
def _(
    query_key: Tensor, value: Tensor, factor: Tensor, code: Tensor, window: list[int], out_val: Any = None
) -> int:
    return _flops(query_key, window, FORWARD_PRODUCTS)


@register_flop_formula(torch.ops.longctx_bench.flex_rounds_backward, get_raw=True)
def _(
    query_key: Tensor,
    value: Tensor,
    factor: Tensor,
    code: Tensor,
    window: list[int],
    *_: Tensor,
    out_val: Any = None,
) -> int:
    return _flops(query_key, window, BACKWARD_PRODUCTS)
