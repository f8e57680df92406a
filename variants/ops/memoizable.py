"""Functions whose cost depends only on shapes; the planner runs each once and reuses the result.

A model of many layers, planned on fake tensors, goes through the same thousands of operations in each of
them. A function marked `repeatable` is handed to the follower while there is one, which may answer for it.

The follower is the one thing here that is reached through a global. Operators with a fake implementation
would do without: but a fake tells the shapes of results, and not how much is live within the operator at its
peak nor what it dispatches, which is what a plan asks for. As an argument it would pass through every layer,
autograd Function and checkpoint between the planner and the function. Without it, the time of a plan grows
with the depth (tests/test_repeats.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar

Follower = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""(work, its arguments) → what work(*arguments) returns, or the like of it."""
Work = TypeVar("Work", bound=Callable[..., Any])

_followers: list[Follower] = []


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """While inside, `follower` is given all repeatable work instead of its being done."""
    _followers.append(follower)
    try:
        yield
    finally:
        _followers.remove(follower)


def repeatable(work: Work) -> Work:
    """Decorates a function of tensors, or both passes of a torch.autograd.Function.

    What it takes must follow from the shapes of the tensors it is given and from its other arguments. It may
    write to those tensors, and must keep none elsewhere. A Function may use of its context what `Context`
    has: anything else is an AttributeError.
    """
    found: Work = _both_passes(work) if isinstance(work, type) else _one(work)
    return found


def _one(work: Any) -> Any:
    @wraps(work)
    def alone(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return work(*args, **options)

    @wraps(work)
    def followed(*args: Any, **options: Any) -> Any:
        return _followers[-1](alone, (args, options)) if _followers else work(*args, **options)

    return followed


class Context(SimpleNamespace):
    """What a Function is given in place of torch's own context."""

    saved_tensors: tuple[Any, ...] = ()
    non_differentiable: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep them here."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: Any) -> None:
        """Keep them here."""
        self.non_differentiable = outputs


def _both_passes(function: Any) -> Any:
    forward, backward = function.forward, function.backward

    @wraps(forward)
    def forward_alone(*args: Any) -> tuple[Any, tuple[Any, ...], list[int], dict[str, Any]]:
        """Outputs, saved tensors, places of the outputs without a gradient, and the context's attributes."""
        context = Context()
        outputs = forward(context, *args)
        kept = vars(context)
        saved, without = kept.pop("saved_tensors", ()), kept.pop("non_differentiable", ())
        places = [i for i, output in enumerate(_several(outputs)) if any(output is each for each in without)]
        return outputs, saved, places, kept

    @wraps(backward)
    def backward_alone(kept: dict[str, Any], *grads: Any) -> Any:
        return backward(Context(**kept), *grads)

    @wraps(forward)
    def followed_forward(ctx: Any, *args: Any) -> Any:
        if not _followers:
            return forward(ctx, *args)
        outputs, saved, places, ctx.kept = _followers[-1](forward_alone, args)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*(_several(outputs)[i] for i in places))
        return outputs

    @wraps(backward)
    def followed_backward(ctx: Any, *grads: Any) -> Any:
        if not _followers:
            return backward(ctx, *grads)
        kept = {"saved_tensors": ctx.saved_tensors, **ctx.kept}
        return _followers[-1](backward_alone, (kept, *grads))

    function.forward, function.backward = staticmethod(followed_forward), staticmethod(followed_backward)
    return function


def _several(outputs: Any) -> tuple[Any, ...]:
    """The outputs of a Function, which returns one by itself."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
