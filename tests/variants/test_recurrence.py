"""What all variants with a memory of earlier segments promise: of their state, of the other objective, and of
several segments at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, difference, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import variants
from bench.evaluate.nll import tally
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import training_step
from variants.base import Context, Workload
from variants.input_schedule import Segments
from variants.ops.segments.compression import COMPRESSIONS
from variants.ops.segments.recurrent import Recurrent

NAMES = [name for name in variants.mixers() if issubclass(variants.load(name), Recurrent)]

sizes = {"segment": st.integers(1, 12), "mem_len": st.integers(0, 15)}
compressed = {
    "comp_len": st.integers(0, 8),
    "rate": st.integers(1, 7),
    "compression": st.sampled_from(sorted(COMPRESSIONS)),
}
configurations = st.one_of(
    st.tuples(st.just("transformer_xl"), st.fixed_dictionaries(sizes)),
    st.tuples(st.just("compressive"), st.fixed_dictionaries({**sizes, **compressed})),
)


class Decoder:
    """Tokens in, one at a time, outputs out; between them, nothing but the tensors in `kept`."""

    def __init__(self, layer: Recurrent, batch: int) -> None:
        self.layer, self.state = layer, None
        self.open_segment = torch.empty(batch, 0, layer.dims.d_model, dtype=torch.float64)

    def next(self, token: Tensor) -> Tensor:
        """(B, 1, C) → (B, 1, C)."""
        config: Any = self.layer.config
        self.open_segment = torch.cat([self.open_segment, token], dim=1)
        out = self.layer(self.open_segment, Context(causal=True), state=self.state)
        if self.open_segment.shape[1] == config.segment:
            self.state, self.open_segment = out.state, token[:, :0].clone()
        return out.y[:, -1:]

    @property
    def kept(self) -> list[Tensor]:
        return [t for t in tree_leaves([self.state, self.open_segment]) if isinstance(t, Tensor)]


def built(name: str, knobs: dict[str, Any], tokens: int, batch: int) -> Recurrent:
    variant = variants.load(name)
    layer = make_layer(variant, variant.Config(**knobs), dims_for(tokens, batch))
    assert isinstance(layer, Recurrent)
    return layer


@settings(deadline=None, max_examples=40)
@given(configuration=configurations, tokens=st.integers(1, 45), batch=st.sampled_from([1, 3]))
@example(configuration=("transformer_xl", {"segment": 12, "mem_len": 0}), tokens=30, batch=1)
@example(
    configuration=(
        "compressive",
        {"segment": 5, "mem_len": 4, "comp_len": 2, "rate": 4, "compression": "most_used"},
    ),
    tokens=40,
    batch=2,
)
def test_state_bytes_are_what_decoding_keeps(
    configuration: tuple[str, dict[str, Any]], tokens: int, batch: int
) -> None:
    """After every token, what is kept gives the next output, and takes the bytes that were announced."""
    name, knobs = configuration
    layer = built(name, knobs, tokens, batch)
    x = numbers(batch, tokens, layer.dims.d_model).detach()
    decoder, outputs = Decoder(layer, batch), []
    with torch.no_grad():
        want = feed(layer, x, causal=True)
        for index in range(tokens):
            outputs.append(decoder.next(x[:, index : index + 1]))
            size = Workload(
                causal=True, batch_size=batch, seq_len=index + 1, d_model=16, heads=2, element_bytes=8
            )
            held = sum(tensor.untyped_storage().nbytes() for tensor in decoder.kept)
            assert layer.state_bytes(size) == held, f"after {index + 1} tokens"
            decoder = copy.deepcopy(decoder)
    assert difference(torch.cat(outputs, dim=1), want) <= EXACT


@settings(deadline=None, max_examples=40)
@given(configuration=configurations, tokens=st.integers(1, 30))
def test_nothing_is_kept_in_vain(configuration: tuple[str, dict[str, Any]], tokens: int) -> None:
    """Each hidden state that is kept has a part in the next output."""
    name, knobs = configuration
    layer = built(name, knobs, tokens + 1, 1)
    x = numbers(1, tokens + 1, layer.dims.d_model).detach()
    decoder = Decoder(layer, 1)
    for index in range(tokens):
        decoder.next(x[:, index : index + 1])
    hidden = [tensor for tensor in decoder.kept if tensor.dim() == 3 and tensor.shape[1]]  # usage: (B, M)
    for tensor in hidden:
        tensor.requires_grad_()
    y = decoder.next(x[:, tokens:])
    if hidden:
        for gradient in torch.autograd.grad(y.sum(), hidden):
            assert gradient.ne(0).any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [("transformer_xl", {}), *(("compressive", {"compression": word}) for word in sorted(COMPRESSIONS))],
)
def test_state_bytes_in_a_model_of_any_dtype(name: str, knobs: dict[str, Any], dtype: torch.dtype) -> None:
    """Hidden states stay float32 in a bfloat16 cell: autocast narrows products alone."""
    variant = variants.load(name)
    size = Workload(causal=True, batch_size=2, seq_len=40, d_model=16, heads=2)
    model = LanguageModel(
        ModelSpec.of(
            variant, variant.Config(segment=8, mem_len=12, **knobs), feed_forward=feed_forward(mult=2)
        ),
        size,
        depth=2,
        dropout=0.0,
        vocabulary=11,
        activations="keep",
        dtype=dtype,
    )
    widths = set()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _layer, given_: widths.add(given_[0].element_size()))
    with torch.no_grad():
        *_, (_, out) = model.stream(torch.zeros(2, 40, dtype=torch.int64), causal=True)
    assert widths == {size.element_bytes}
    held = sum(t.nbytes for t in tree_leaves(out.states) if isinstance(t, Tensor))
    assert held == sum(layer.state_bytes(size) for layer in model.layers)


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_are_refused(name: str) -> None:
    """No causal output is passed off as that of the other objective."""
    layer, x = built(name, {}, 8, 1), numbers(1, 8, 16).detach()
    for work in (layer, layer.reference):
        with pytest.raises(ValueError, match=r"^\w+ with causal=False: has no bidirectional form$"):
            work(x, Context(causal=False))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_segments_are_the_layers(name: str) -> None:
    """The first segment and one with state, of several sequences and heads: outputs, loss and gradients."""
    layer = built(name, {"segment": 12, "mem_len": 9}, 36, 2)
    x = numbers(2, 24, 16)

    def segments(x: Tensor) -> list[Tensor]:
        first = layer(x[:, :12], Context(causal=True))
        second = layer(x[:, 12:], Context(causal=True), state=first.state)
        return [t for t in (first.y, second.y, second.aux_loss) if t is not None]

    torch.compiler.reset()
    found = []
    for work in (segments, torch.compile(segments, backend="aot_eager")):
        outputs = work(x)
        roots = torch.stack([output.square().sum() for output in outputs])
        inputs = [x, *layer.parameters()]
        found.append([*outputs, *torch.autograd.grad(roots.sum(), inputs, materialize_grads=True)])
    for eager, compiled in zip(*found, strict=True):
        assert difference(compiled, eager) <= EXACT


# several segments at once


def outcome(
    name: str, knobs: dict[str, Any], tokens: int, batch: int, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """Outputs, the sum of the auxiliary losses, the last state, and all gradients of a random direction."""
    layer = built(name, knobs, tokens, batch).to(dtype)
    x = numbers(batch, tokens, layer.dims.d_model).detach().to(dtype).requires_grad_()
    state, outputs, losses = None, [], []
    for segment in layer.input_schedule(layer.config).segments(tokens):
        out = layer(x[:, segment], Context(causal=True), state)
        state = out.state
        outputs.append(out.y)
        losses += [out.aux_loss] if out.aux_loss is not None else []
    y = torch.cat(outputs, dim=1)
    loss = sum(losses[1:], losses[0]) if losses else None
    roots, directions = [y], [numbers(*y.shape, seed=3).detach().to(dtype)]
    if loss is not None:
        roots, directions = [*roots, loss], [*directions, torch.full_like(loss, 2.5)]
    gradients = torch.autograd.grad(roots, [x, *layer.parameters()], directions, materialize_grads=True)
    return [y, loss, *tree_leaves(state), *gradients]


def assert_equal_outcomes(got: list[Tensor | None], want: list[Tensor | None], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert difference(one, other) <= tolerance


@settings(deadline=None, max_examples=60)
@given(
    configuration=configurations,
    at_once=st.sampled_from([2, 3, 5, "all"]),
    tokens=st.integers(1, 80),
    batch=st.sampled_from([1, 3]),
)
@example(configuration=("transformer_xl", {"segment": 6, "mem_len": 0}), at_once="all", tokens=45, batch=2)
@example(configuration=("transformer_xl", {"segment": 6, "mem_len": 15}), at_once=2, tokens=45, batch=2)
@example(  # a memory shorter than a segment, and a segment that leaves more compressed memories than are kept
    configuration=(
        "compressive",
        {"segment": 10, "mem_len": 3, "comp_len": 2, "rate": 2, "compression": "dilated_conv"},
    ),
    at_once=3,
    tokens=67,
    batch=2,
)
@example(  # a memory whose size changes from segment to segment
    configuration=(
        "compressive",
        {"segment": 4, "mem_len": 9, "comp_len": 5, "rate": 3, "compression": "conv"},
    ),
    at_once="all",
    tokens=50,
    batch=1,
)
def test_segments_at_once_are_the_segments_in_turn(
    configuration: tuple[str, dict[str, Any]], at_once: int | str, tokens: int, batch: int
) -> None:
    """Outputs, losses, state and gradients."""
    name, knobs = configuration
    got = outcome(name, {**knobs, "segments_at_once": at_once}, tokens, batch)
    assert_equal_outcomes(got, outcome(name, knobs, tokens, batch), EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_segments_at_once_are_the_segments_in_turn_in_float32(name: str) -> None:
    sizes = {"segment": 32, "mem_len": 40}
    got = outcome(name, {**sizes, "segments_at_once": "all"}, 300, 2, torch.float32)
    assert_equal_outcomes(got, outcome(name, sizes, 300, 2, torch.float32), 2e-6)


class Operations(TorchDispatchMode):
    """Counts the operations inside it."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "knobs"), [("transformer_xl", {}), ("compressive", {"comp_len": 4})])
def test_operations_do_not_grow_with_the_segments_at_once(name: str, knobs: dict[str, Any]) -> None:
    """Once the memories are full."""
    found = []
    for tokens in (64, 128):
        with Operations() as counted:
            outcome(name, {"segment": 8, "mem_len": 8, "segments_at_once": "all", **knobs}, tokens, 1)
        found.append(counted.number)
    assert found[0] == found[1]


@pytest.mark.parametrize("activations", ["keep", "checkpoint", "sqrt", "selective", "reversible"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_and_is_evaluated_alike(name: str, activations: str) -> None:
    """Loss and gradients of a training step, and the nll of each position, whatever is done at once. Logits,
    and the gradients that begin with them, are float32."""
    tokens = torch.randint(0, 11, (2, 60), generator=torch.Generator().manual_seed(3))
    batch = Batch(tokens, tokens.roll(-1, 1))
    found = []
    for at_once in (1, 3, "all"):
        torch.manual_seed(0)
        variant = variants.load(name)
        config = variant.Config(segment=8, mem_len=12, segments_at_once=at_once)
        model = LanguageModel(
            ModelSpec.of(variant, config, feed_forward=feed_forward(mult=2)),
            dims_for(60, 2),
            depth=2,
            dropout=0.0,
            vocabulary=11,
            activations=activations,
        ).double()
        scored = tally(model, [batch], causal=True, device=torch.device("cpu"))
        loss = training_step(model, torch.optim.SGD(model.parameters(), lr=0), batch, causal=True).nll
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([loss, torch.from_numpy(scored.nats), *gradients])
    for got in found[1:]:
        for one, other in zip(got, found[0], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_memory_is_said_to_grow_where_all_segments_are_kept() -> None:
    for name in NAMES:
        variant = variants.load(name)
        claimed = [
            variant.info_for(variant.Config(segments_at_once=n)).complexity.memory for n in (1, 8, "all")
        ]
        assert claimed == [0, 0, 1]


def test_known_keys_are_not_computed_again() -> None:
    """Segments at once cost what they cost in turn, without the keys of a memory that the group contains."""
    work = dims_for(64)
    for name in NAMES:
        one, all_ = (
            built(name, {"segment": 8, "mem_len": 8, "segments_at_once": n}, 64, 1).cost(work)
            for n in (1, "all")
        )
        assert all_.parts["attention"] == one.parts["attention"]
        assert all_.parts["memory"] < one.parts["memory"]
        assert all_.parts["projections"] == one.parts["projections"]


def test_groups_are_cut_from_the_sequence() -> None:
    assert Segments(4, 2).segments(19) == [slice(0, 8), slice(8, 16), slice(16, 19)]
    assert Segments(4, None).segments(19) == [slice(0, 19)]
    assert Segments(4, 2).split(7) == Segments(4).segments(7) == [slice(0, 4), slice(4, 7)]
