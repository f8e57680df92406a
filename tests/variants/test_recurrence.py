"""What all variants with a memory of earlier segments promise: of their state, and of the other objective."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, difference, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.utils._pytree import tree_leaves

import variants
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec
from variants.base import Context, Workload
from variants.ops.compression import COMPRESSIONS
from variants.ops.recurrent import Recurrent

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
        ModelSpec.of(variant, variant.Config(segment=8, mem_len=12, **knobs), ff_mult=2),
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
