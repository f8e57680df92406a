"""Functions whose cost depends only on shapes: a planner runs each once and reuses the result.

A model with many layers dispatches the same thousands of operations in each layer. The time of a plan on
fake tensors would therefore grow with the depth (tests/test_repeats.py). A function marked `repeatable` asks
torch's active dispatch modes for a `Memoizer`. If there is one, it runs the function or repeats its effects.

A custom operator with a fake implementation cannot replace this. A fake implementation states only the shapes
of the results, whereas a plan also needs the peak memory and the FLOPs of the operations inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Memoizer(ABC):
    """Base class of dispatch modes (`TorchDispatchMode`) that take over the calls of repeatable functions."""

    @abstractmethod
    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return the result of function(*args), or a result with the same shapes, strides and aliases."""


def _active_memoizer() -> Memoizer | None:
    """Return the innermost active dispatch mode that is a Memoizer, or None.

    torch keeps the modes for each thread, and restores them in the backward pass.
    """
    if torch.compiler.is_compiling():  # the compiler cannot trace the stack of modes
        return None
    modes = reversed(_get_current_dispatch_mode_stack())
    return next((mode for mode in modes if isinstance(mode, Memoizer)), None)


def repeatable(decorated: Decorated) -> Decorated:
    """Decorator of a function of tensors, or of both passes of a torch.autograd.Function.

    The cost must depend only on the shapes of the tensors and on the other arguments. The function may write
    to its tensor arguments, but must not store tensors elsewhere. An autograd Function may use only those
    attributes of its context that `FunctionContext` has; any other raises AttributeError.
    """
    wrapped: Decorated = _wrap_passes(decorated) if isinstance(decorated, type) else _wrap(decorated)
    return wrapped


def _wrap(function: Any) -> Any:
    @wraps(function)
    def call_with(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return function(*args, **options)

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        memoizer = _active_memoizer()
        if memoizer is None:
            return function(*args, **options)
        return memoizer.call(call_with, (args, options))

    return wrapper


class FunctionContext(SimpleNamespace):
    """Replacement of the context (`ctx`) of a torch.autograd.Function, usable without autograd."""

    saved_tensors: tuple[Any, ...] = ()
    non_differentiable: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Store the tensors in `saved_tensors`."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: Any) -> None:
        """Store the outputs in `non_differentiable`."""
        self.non_differentiable = outputs


def _wrap_passes(function: Any) -> Any:
    forward, backward = function.forward, function.backward

    @wraps(forward)
    def pure_forward(*args: Any) -> tuple[Any, tuple[Any, ...], list[int], dict[str, Any]]:
        """Return outputs, saved tensors, indices of non-differentiable outputs, and other attributes."""
        context = FunctionContext()
        outputs = forward(context, *args)
        attributes = vars(context)
        saved = attributes.pop("saved_tensors", ())
        without_gradient = attributes.pop("non_differentiable", ())
        indices = [
            index
            for index, output in enumerate(_as_tuple(outputs))
            if any(output is other for other in without_gradient)
        ]
        return outputs, saved, indices, attributes

    @wraps(backward)
    def pure_backward(attributes: dict[str, Any], *grads: Any) -> Any:
        return backward(FunctionContext(**attributes), *grads)

    @wraps(forward)
    def wrapped_forward(ctx: Any, *args: Any) -> Any:
        memoizer = _active_memoizer()
        if memoizer is None:
            return forward(ctx, *args)
        outputs, saved, indices, ctx.attributes = memoizer.call(pure_forward, args)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*(_as_tuple(outputs)[index] for index in indices))
        return outputs

    @wraps(backward)
    def wrapped_backward(ctx: Any, *grads: Any) -> Any:
        memoizer = _active_memoizer()
        if memoizer is None:
            return backward(ctx, *grads)
        attributes = {"saved_tensors": ctx.saved_tensors, **ctx.attributes}
        return memoizer.call(pure_backward, (attributes, *grads))

    function.forward, function.backward = staticmethod(wrapped_forward), staticmethod(wrapped_backward)
    return function


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    """The outputs of a Function as a tuple; a Function with one output may return it alone."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
