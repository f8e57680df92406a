"""What every variant promises under torch.compile: one graph, and outputs and gradients as without.

Nothing here names a variant: every direction of its defaults and of its small configurations, and one of each
word that a knob takes. By default, the defaults of a few variants in one direction.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import EXACT, difference, dims_for, make_layer, numbers
from test_contract import NAMES, small_knobs
from test_contract_cost import refusal, words
from tiers import REPRESENTATIVES, representative, tiered
from torch import Tensor

import variants
from variants.base import Context, MixerOut, SequenceMixer, VariantConfig

TOKENS = 260
"""More than a default window or block; default knobs of some variants want as many tokens."""
SMALL_TOKENS = 40


def settings(*, worded: bool) -> Any:
    """(variant, config, causal, tokens) of what runs here: `worded` takes the words in place of the rest."""
    found = []
    for name in NAMES:
        variant = variants.load(name)
        defaults = variant.Config().as_dict()
        knobs: list[tuple[dict[str, Any], int]] = [
            ({}, TOKENS),
            *((k, SMALL_TOKENS) for k in small_knobs(name)),
        ]
        if worded:
            some = words(name).items()
            knobs = [({k: word}, TOKENS) for k, listed in some for word in listed if word != defaults[k]]
        for values, tokens in knobs:
            config = variant.Config.of(values)
            label = "-".join([name, *(f"{knob}={value}" for knob, value in values.items())])
            able = [
                causal
                for causal in (True, False)
                if not refusal(variant, config, dims_for(tokens, 2), causal=causal)
            ]
            for causal in able[: 1 if worded else 2]:
                case_id = f"{label}-{'clm' if causal else 'mlm'}"
                case = pytest.param(variant, config, causal, tokens, id=case_id)
                found.append((name if name in REPRESENTATIVES else None, case))
    return pytest.mark.parametrize(("variant", "config", "causal", "tokens"), tiered(found))


def assert_compiles(
    variant: type[SequenceMixer], config: VariantConfig, causal: bool, tokens: int, backend: str
) -> None:
    """A window of the input schedule, and where there is a state a second one with it, in one graph."""
    layer = make_layer(variant, config, dims_for(tokens, 2))
    schedule = layer.input_schedule(config)
    length = min(schedule.windows(tokens, carried=True)[0][0], schedule.segments(tokens)[0].stop)
    windows = [
        numbers(2, length, layer.dims.d_model, seed=seed) for seed in range(1 + variant.info.caps.stateful)
    ]

    def network(x: Tensor, state: Any) -> MixerOut:
        return layer(x, Context(causal=causal), state=state)

    def run(network: Callable[[Tensor, Any], MixerOut]) -> list[Tensor]:
        """Outputs, then gradients of inputs and parameters."""
        torch.manual_seed(2)
        outs: list[MixerOut] = []
        for window in windows:
            outs.append(network(window, outs[-1].state if outs else None))
        losses = [loss for out in outs for loss in (out.y.square().sum(), out.aux_loss) if loss is not None]
        grads = torch.autograd.grad(losses, [*windows, *layer.parameters()], materialize_grads=True)
        return [*(out.y for out in outs), *grads]

    torch.compiler.reset()
    # inductor draws random numbers in its own order unless told to draw those of eager mode
    options = {"fallback_random": True} if backend == "inductor" else None
    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=False, options=options)
    for got, want in zip(run(compiled), run(network), strict=True):
        assert difference(got, want) <= EXACT


# torch's tracer makes an instance of every custom autograd.Function, against torch's own advice
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # inductor, as it is imported
    # inductor calls torch for them, as in a Fourier transform
    pytest.mark.filterwarnings(
        "ignore:Torchinductor does not support code generation for complex:UserWarning"
    ),
]
inductor = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++")


@settings(worded=False)
def test_is_one_graph_forward_and_backward(
    variant: type[SequenceMixer], config: VariantConfig, causal: bool, tokens: int
) -> None:
    assert_compiles(variant, config, causal, tokens, "aot_eager")


@pytest.mark.parametrize("name", representative(NAMES))
def test_evaluation_is_one_graph(name: str) -> None:
    """What a layer does in evaluation only, such as hashing with fixed rotations."""
    variant = variants.load(name)
    config, dims = variant.Config(), dims_for(TOKENS, 2)
    causal = not refusal(variant, config, dims, causal=True)
    layer = make_layer(variant, config, dims).eval()
    schedule = layer.input_schedule(config)
    length = min(schedule.windows(TOKENS, carried=True)[0][0], schedule.segments(TOKENS)[0].stop)
    x = numbers(2, length, layer.dims.d_model).detach()

    def network(x: Tensor) -> Tensor:
        return layer(x, Context(causal=causal)).y

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
        assert difference(compiled(x), network(x)) <= EXACT


@pytest.mark.slow
@settings(worded=True)
def test_is_one_graph_in_every_mode(
    variant: type[SequenceMixer], config: VariantConfig, causal: bool, tokens: int
) -> None:
    assert_compiles(variant, config, causal, tokens, "aot_eager")


# torch's own lowering of a diagonal calls what torch deprecates
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
@pytest.mark.slow
@inductor
@settings(worded=False)
def test_compiled_code_computes_the_same(
    variant: type[SequenceMixer], config: VariantConfig, causal: bool, tokens: int
) -> None:
    assert_compiles(variant, config, causal, tokens, "inductor")
