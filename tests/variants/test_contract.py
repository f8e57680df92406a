"""What every variant promises. Nothing here names one: a new file in `variants/` is covered as it stands.

A variant's own test file may hold `SMALL: list[dict[str, Any]] = [...]`, a literal list of knobs: small
configurations that show at a few dozen tokens what the defaults show at hundreds. They go through the same
tests: the first that runs in a direction by default, the others among the slow tests. There are also the
defaults of a variant with such a configuration, except of one variant of each family.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    EXACT,
    assert_same,
    bytes_of,
    cost_of,
    difference,
    dims_for,
    feed,
    language_model,
    make_layer,
    mask_of,
    numbers,
    refer,
)
from tiers import REPRESENTATIVES, slow, tiered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import variants
from bench.config.groups import completed
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tools import check
from variants.base import (
    Complexity,
    Context,
    Cost,
    Dims,
    EstimatesSoftmax,
    ExposesScores,
    MixerOut,
    SequenceMixer,
    UpdatesAfterStep,
    VariantConfig,
    Workload,
    known_leak,
)

NAMES = variants.mixers()
DEFAULT_LENGTH = 600
"""Past every default window, and no multiple of a block."""
SMALL_LENGTH = 70

property_test = settings(deadline=None, max_examples=8)


@cache
def small_knobs(name: str) -> list[dict[str, Any]]:
    """`SMALL` of the variant's own test file; none where there is no such file or list."""
    path = Path(__file__).with_name(f"test_{name}.py")
    if not path.exists():
        return []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SMALL" and node.value:
            return ast.literal_eval(node.value)
    return []


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a variant in one direction."""

    name: str
    small: int | None
    """Index into `SMALL`; None is the default configuration."""
    causal: bool

    @property
    def variant(self) -> type[SequenceMixer]:
        return variants.load(self.name)

    @property
    def config(self) -> VariantConfig:
        return self.variant.Config(**({} if self.small is None else small_knobs(self.name)[self.small]))

    @property
    def length(self) -> int:
        """Long enough for the configuration to differ from dense."""
        return DEFAULT_LENGTH if self.small is None else SMALL_LENGTH

    def refuses(self, dims: Dims) -> str | None:
        """Why it cannot run, or cannot here."""
        if reason := self.variant.unsupported(self.config, dims, causal=self.causal):
            return reason
        return self.variant.missing(self.config, dims, device=torch.device("cpu"), dtype=torch.float32)

    def runs(self, dims: Dims) -> bool:
        return self.refuses(dims) is None

    def layer(self, dims: Dims, **kwargs: int) -> SequenceMixer:
        """A layer, or a skip with the variant's own reason."""
        if reason := self.refuses(dims):
            pytest.skip(reason)
        return make_layer(self.variant, self.config, dims, **kwargs)


def cases(*, small: bool, directions: tuple[bool, ...] = (True, False)) -> Any:
    """Every direction that a variant claims, of its defaults and, if asked, of its small configurations.

    By default, each direction once with a small configuration; and once with the defaults, where there is no
    small one, and of a variant of each family.
    """
    found = []
    for name in NAMES:
        caps = variants.load(name).info.caps
        for causal in (d for d in directions if (caps.causal if d else caps.bidirectional)):
            sizes = [Case(name, index, causal) for index in range(len(small_knobs(name)) if small else 0)]
            running = [case for case in sizes if case.runs(dims_for(case.length))]
            for case in (Case(name, None, causal), *sizes):
                size = "" if case.small is None else f"-small{case.small}"
                if case.small is not None:
                    is_short = case in running[:1]
                else:
                    is_short = name in REPRESENTATIVES or not running
                label = f"{name}{size}-{'clm' if causal else 'mlm'}"
                found.append((case if is_short else None, pytest.param(case, id=label)))
    return pytest.mark.parametrize("case", tiered(found))


every_variant = pytest.mark.parametrize("name", NAMES)


def test_small_configurations_are_found() -> None:
    """Every file that speaks of SMALL gives some; else a slip of the pen would leave them out in silence."""
    for path in Path(__file__).parent.glob("test_*.py"):
        name = path.stem.removeprefix("test_")
        assert not (name in NAMES and "\nSMALL" in path.read_text()) or small_knobs(name), path.name


# --- what a variant says about itself -------------------------------------------------------------


@every_variant
def test_config_is_frozen_and_keyword_only(name: str) -> None:
    config_class = variants.load(name).Config
    assert issubclass(config_class, VariantConfig)
    fields = dataclasses.fields(config_class)
    assert all(field.kw_only for field in fields)
    assert all(field.default is not dataclasses.MISSING for field in fields), "every knob has a default"
    config = config_class()
    assert hash(config) == hash(config_class())
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, field.default)
        with pytest.raises(TypeError):
            config_class(field.default)


def documented(config_class: type) -> set[str]:
    """Fields of a class body that are followed by a string."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(body, ast.ClassDef)
    found = set()
    for field, after in zip(body.body, body.body[1:], strict=False):
        said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
        if isinstance(field, ast.AnnAssign) and isinstance(said, str) and said.strip():
            found.add(ast.unparse(field.target))
    return found


@every_variant
def test_every_knob_has_a_docstring(name: str) -> None:
    config_class = variants.load(name).Config
    own = [c for c in config_class.__mro__ if issubclass(c, VariantConfig) and c is not VariantConfig]
    said = {knob for c in own for knob in documented(c)}
    assert {field.name for field in dataclasses.fields(config_class)} <= said


@every_variant
def test_what_a_variant_is_has_been_filled_in(name: str) -> None:
    variant = variants.load(name)
    assert variant.info.caps.causal or variant.info.caps.bidirectional
    assert variant.info.paper.strip()
    claim = variant.info.complexity
    assert isinstance(claim, Complexity)
    assert 0 < claim.time <= 2
    assert 0 <= claim.memory <= 2  # 0: what is held at a time does not depend on T
    assert claim.formula.strip()
    assert claim.source.strip()
    for documented_thing in (variant, variant.Config, inspect.getmodule(variant)):
        assert (documented_thing.__doc__ or "").strip(), f"{documented_thing} has no docstring"


@every_variant
def test_the_configuration_offers_exactly_its_knobs_with_their_defaults(name: str) -> None:
    assert completed("variant", name, {}) == {"name": name, **variants.load(name).Config().as_dict()}


@every_variant
def test_unsupported_agrees_with_caps(name: str) -> None:
    variant = variants.load(name)
    for causal, can in ((True, variant.info.caps.causal), (False, variant.info.caps.bidirectional)):
        reason = variant.unsupported(variant.Config(), dims_for(1024), causal=causal)
        assert (reason is None) == can
        assert reason is None or reason.strip()


@every_variant
@pytest.mark.parametrize(
    ("d_model", "heads", "said"),
    [
        (16, 3, "heads=3: must divide d_model=16; the nearest divisor is 2"),
        (16, 32, "heads=32: must divide d_model=16; the nearest divisor is 16"),
        (16, 0, "heads=0: must divide d_model=16; the nearest divisor is 1"),
        (64, 7, "heads=7: must divide d_model=64; the nearest divisor is 8"),
        (12, 4, "heads=4: each head has 3 channels of d_model=12; rotary positions need an even number"),
        (16, 16, "heads=16: each head has 1 channels of d_model=16; rotary positions need an even number"),
    ],
)
def test_sizes_that_no_layer_has_are_refused(name: str, d_model: int, heads: int, said: str) -> None:
    """By `unsupported` and by the constructor, in the same line."""
    variant = variants.load(name)
    dims = Workload(causal=True, batch_size=1, seq_len=600, d_model=d_model, heads=heads)
    for causal in (
        d for d in (True, False) if (variant.info.caps.causal if d else variant.info.caps.bidirectional)
    ):
        reason = variant.unsupported(variant.Config(), dims, causal=causal)
        assert reason is not None
        assert "\n" not in reason
        if "half are local" not in reason:  # one of the variant's own may come first
            assert reason == said
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        variant(variant.Config(), dims)


@every_variant
def test_an_objective_without_a_form_is_refused(name: str) -> None:
    variant, dims = variants.load(name), dims_for(300)
    layer, x = make_layer(variant, variant.Config(), dims), numbers(1, 300, dims.d_model)
    for causal in (True, False):
        if reason := variant.unsupported(variant.Config(), dims, causal=causal):
            said = f"^{re.escape(f'{variant.__name__} with causal={causal}: {reason}')}$"
            with pytest.raises(ValueError, match=said):
                layer(x, Context(causal=causal))
        else:
            layer(x, Context(causal=causal))


@every_variant
@pytest.mark.parametrize(("batch", "tokens"), [(0, 8), (2, 0), (0, 0)])
def test_an_input_without_a_token_is_refused(name: str, batch: int, tokens: int) -> None:
    """By a layer, by its plan and by a model, in the same line."""
    variant, dims = variants.load(name), dims_for(300)
    causal = variant.info.caps.causal
    layer = make_layer(variant, variant.Config(), dims)
    model = language_model(variant, variant.Config(), 300)
    x, ids = torch.zeros(batch, tokens, dims.d_model), torch.zeros(batch, tokens, dtype=torch.int64)
    for shape, run in (
        ((batch, tokens, dims.d_model), lambda: layer(x.double(), Context(causal=causal))),
        ((batch, tokens, dims.d_model), lambda: feed(layer, x.double(), causal=causal)),
        ((batch, tokens), lambda: model(ids, causal=causal)),
        ((batch, tokens), lambda: list(model.stream(ids, causal=causal))),
    ):
        said = f"input of shape {shape}: allowed is 1 or more sequences of 1 or more tokens"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            run()


def shapes(layer: SequenceMixer) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.parameters()]


@every_variant
def test_caps_are_what_is_so(name: str) -> None:
    """Fixed length: parameters grow with the longest sequence. Stochastic: another seed, other outputs.
    Stateful: there is a state. Exact: dense attention, given its weights."""
    variant, caps = variants.load(name), variants.load(name).info.caps
    dims = dims_for(DEFAULT_LENGTH)
    layer, shorter = (make_layer(variant, variant.Config(), d) for d in (dims, dims_for(DEFAULT_LENGTH - 1)))
    assert caps.fixed_length == (shapes(layer) != shapes(shorter))
    x = numbers(1, DEFAULT_LENGTH, dims.d_model).detach()
    one, other = (feed(layer, x, causal=caps.causal, seed=seed) for seed in (2, 3))
    assert caps.stochastic == (difference(one, other) > EXACT)
    first = layer(x[:, :8], Context(causal=caps.causal))
    assert caps.stateful == (first.state is not None)
    if caps.exact:
        dense = variants.load("dense")
        same = make_layer(dense, dense.Config(impl="naive"), dims)
        same.load_state_dict(layer.state_dict())
        assert difference(one, feed(same, x, causal=caps.causal)) <= EXACT


# --- what a variant says of softmax attention -----------------------------------------------------


@cases(small=True)
def test_queries_and_keys_are_those_of_the_weights(case: Case) -> None:
    """Where a variant gives them, its outputs are the values mixed by their softmax."""
    tokens = 9
    layer = case.layer(dims_for(tokens))
    x = numbers(2, tokens, layer.dims.d_model).detach()
    if not isinstance(layer, ExposesScores):
        pytest.skip("its weights are no softmax over all keys")
    q, k = layer.queries_keys(x, Context(causal=case.causal))
    assert q.shape == k.shape == (2, layer.dims.heads, tokens, layer.dims.head_dim)
    scores = q @ k.mT / layer.dims.head_dim**0.5
    if case.causal:
        scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), float("-inf"))
    _, _, w_v = layer.get_parameter("projections.qkv.weight").chunk(3)
    values = (x @ w_v.T).unflatten(-1, (layer.dims.heads, -1)).transpose(1, 2)
    mixed = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
    want = mixed @ layer.get_parameter("projections.out.weight").T
    assert difference(layer(x, Context(causal=case.causal)).y, want) <= EXACT


@cases(small=True)
def test_what_is_estimated_obeys_the_objective(case: Case) -> None:
    """Full attention of the layer's own weights: every token counts that may, and no later one."""
    tokens, cut = 9, 5
    layer = case.layer(dims_for(tokens))
    x = numbers(2, tokens, layer.dims.d_model).detach()
    want = (
        layer.softmax_target(x, Context(causal=case.causal)) if isinstance(layer, EstimatesSoftmax) else None
    )
    if want is None:
        pytest.skip("estimates no softmax attention")
    assert (want.shape, want.dtype) == (x.shape, x.dtype)
    later, first = x.clone(), x.clone()
    later[:, cut:] += 1
    first[:, 0] += 1
    moved = [
        (layer.softmax_target(other, Context(causal=case.causal)) - want).abs().amax(dim=(0, 2))
        for other in (later, first)
    ]
    assert (moved[0][:cut].max() > 1e-6) == (not case.causal)
    assert (moved[1][1:] > 1e-6).all()


# --- what a forward pass returns ------------------------------------------------------------------


@cases(small=True)
@pytest.mark.parametrize("tokens", [1, 97, *slow(2, 5, 256, 601)])
def test_forward_keeps_shape_and_dtype(case: Case, tokens: int) -> None:
    for batch, dtype in ((1, torch.float32), (3, torch.float64)):
        dims = dims_for(tokens, batch)
        layer = case.layer(dims).to(dtype)
        x = numbers(batch, tokens, dims.d_model).detach().to(dtype)
        out = layer(x, Context(causal=case.causal))
        assert isinstance(out, MixerOut)
        for y in (out.y, feed(layer, x, causal=case.causal)):
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert y.isfinite().all()
        if not case.variant.info.caps.stateful:
            assert out.state is None
        assert not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(out.state))
        assert out.aux_loss is None or out.aux_loss.dim() == 0


@cases(small=True)
def test_layer_keeps_nothing_between_sequences(case: Case) -> None:
    """What another sequence went through before does not show, in training and in evaluation."""
    dims = dims_for(case.length, 2)
    first, second = (numbers(2, case.length, dims.d_model, seed=seed).detach() for seed in (1, 2))
    layer = case.layer(dims)
    for mode in (layer.train(), layer.eval()):
        before = feed(mode, first, causal=case.causal)
        other = feed(mode, second, causal=case.causal)
        assert difference(feed(mode, first, causal=case.causal), before) <= EXACT
        assert difference(other, before) > EXACT, "the output does not depend on the input"


@cases(small=True, directions=(True,))
def test_state_that_is_given_is_left_as_it_was(case: Case) -> None:
    """A segment may be read again from the same state: a search, or a backward pass that recomputes."""
    if not case.variant.info.caps.stateful:
        pytest.skip("carries no state")
    dims = dims_for(case.length, 2)
    layer = case.layer(dims)
    first, second = (numbers(2, 40, dims.d_model, seed=seed).detach() for seed in (1, 2))
    state = layer(first, Context(causal=True)).state
    before = copy.deepcopy(state)
    outs = [layer(second, Context(causal=True), state=state) for _ in range(2)]
    for given_state, kept in ((state, before), (outs[0].state, outs[1].state)):
        for a, b in zip(tree_leaves(given_state), tree_leaves(kept), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(outs[0].y, outs[1].y)


@cases(small=True)
def test_sequences_of_a_batch_are_independent(case: Case) -> None:
    dims = dims_for(case.length, 3)
    layer = case.layer(dims).eval()
    x = numbers(3, case.length, dims.d_model).detach()
    alone = torch.cat([feed(layer, row[None], causal=case.causal) for row in x])
    assert difference(feed(layer, x, causal=case.causal), alone) <= EXACT


@cases(small=True)
def test_a_strided_input_is_read_as_its_values(case: Case) -> None:
    dims = dims_for(case.length, 2)
    layer = case.layer(dims)
    x = numbers(case.length, dims.d_model, 2).detach().permute(2, 0, 1)
    assert not x.is_contiguous()
    packed = feed(layer, x.contiguous(), causal=case.causal)
    assert difference(feed(layer, x, causal=case.causal), packed) <= EXACT


# --- the mathematics ------------------------------------------------------------------------------


@cases(small=False)
def test_order_of_the_tokens_matters(case: Case) -> None:
    """Two of the tokens that the last one reads change places: attention without positions would not tell."""
    layer = case.layer(dims_for(DEFAULT_LENGTH)).eval()
    first, second, length = two_read_by_the_last(layer, causal=case.causal)
    x = numbers(1, length, layer.dims.d_model).detach()
    swapped = x.clone()
    swapped[:, [first, second]] = x[:, [second, first]]
    y, y_swapped = (feed(layer, given_x, causal=case.causal)[:, -1] for given_x in (x, swapped))
    assert difference(y_swapped, y) > 1e-4


def two_read_by_the_last(layer: SequenceMixer, *, causal: bool) -> tuple[int, int, int]:
    """Two tokens before the last that it reads, and a length at which it does."""
    for length in (8, 64):
        pattern = mask_of(layer, length, causal=causal)
        read = range(length - 1) if pattern is None else torch.nonzero(pattern[-1, :-1]).flatten().tolist()
        if len(read) > 1:
            return read[-2], read[-1], length
    raise AssertionError("the last of 64 tokens reads fewer than two others")


@cases(small=True)
@property_test
@given(tokens=st.integers(1, 300), batch=st.sampled_from([1, 3]), index=st.integers(0, 2))
@example(tokens=1, batch=3, index=0)
@example(tokens=2, batch=1, index=1)
@example(tokens=256, batch=1, index=0)
@example(tokens=257, batch=1, index=1)
@example(tokens=600, batch=2, index=0)
def test_fast_path_equals_reference(case: Case, tokens: int, batch: int, index: int) -> None:
    dims = dims_for(tokens, batch)
    if not case.runs(dims):
        return
    layer = case.layer(dims, index=index)
    x = numbers(batch, tokens, dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=case.causal),
        lambda: refer(layer, x, causal=case.causal),
        [x, *layer.parameters()],
    )


@cases(small=True)
def test_fast_path_equals_reference_after_a_step(case: Case) -> None:
    """What is learnt outside the optimiser is learnt for both."""
    dims = dims_for(case.length, 2)
    layer = case.layer(dims).train()
    x = numbers(2, case.length, dims.d_model)
    feed(layer, x, causal=case.causal).square().sum().backward()
    if isinstance(layer, UpdatesAfterStep):
        layer.after_step()
    assert_same(
        lambda: feed(layer, x, causal=case.causal),
        lambda: refer(layer, x, causal=case.causal),
        [x, *layer.parameters()],
    )


@cases(small=True, directions=(True,))
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_no_output_sees_a_later_token(case: Case, dtype: torch.dtype) -> None:
    """The gate passes; where the variant states a leak, it is really there."""
    dims = dims_for(DEFAULT_LENGTH if case.small is None else 2 * SMALL_LENGTH, 2)
    if reason := case.refuses(dims):
        pytest.skip(reason)
    with torch.random.fork_rng():
        worst = gates.leak(case.variant, case.config, dims, gates.LEAK_LAYERS, torch.device("cpu"), dtype)
    assert (worst > gates.LEAK_TOLERANCE) == bool(known_leak(case.variant, case.config))


def sampled_positions(case: Case) -> list[int]:
    """All of a small case; of a default one, both ends, the powers of two and what is beside them."""
    tokens = case.length
    if case.small is not None:
        return list(range(tokens))
    near = {p + d for p in [0, 64, 128, 192, 256, 320, 384, 448, 512, 576, tokens] for d in (-2, -1, 0, 1)}
    return sorted(p for p in near if 0 <= p < tokens)


@cases(small=True)
def test_pattern_is_what_is_read(case: Case) -> None:
    """A key moves the queries that may read it and no others; gradients never leave the pattern."""
    tokens, some = case.length, sampled_positions(case)
    layer = case.layer(dims_for(tokens, len(some) + 1)).eval()
    pattern = mask_of(layer, tokens, causal=case.causal)
    if pattern is None:
        pytest.skip("content decides")
    assert (pattern.shape, pattern.dtype) == ((tokens, tokens), torch.bool)
    assert not (case.causal and pattern.triu(1).any())
    rows = torch.arange(len(some))

    x = numbers(1, tokens, layer.dims.d_model).detach().repeat(len(some) + 1, 1, 1)
    x[rows + 1, some] += 1.0
    with torch.no_grad():
        y = feed(layer, x, causal=case.causal)
    moved = (y[1:] - y[:1]).abs().amax(-1) > EXACT  # (keys, T)
    assert torch.equal(moved.T, pattern[:, some])

    x = x[1:].clone().requires_grad_()
    y = feed(layer, x, causal=case.causal)
    (gradient,) = torch.autograd.grad(y[rows, some].sum(), x)
    reached = gradient.abs().amax(-1) > EXACT  # (queries, T)
    assert not (reached & ~pattern[some]).any()
    if not case.variant.info.caps.stateful:  # state is detached: a later segment reads what gets no gradient
        assert torch.equal(reached, pattern[some])


# --- what it costs --------------------------------------------------------------------------------


def counted(layer: SequenceMixer, dims: Workload, causal: bool) -> tuple[int, Cost]:
    """(FLOPs dispatched in a forward pass, those of the formula)."""
    parameters = list(layer.parameters())  # of some layers there are none
    dtype = parameters[0].dtype if parameters else torch.float32
    x = torch.zeros(dims.batch_size, dims.seq_len, dims.d_model, dtype=dtype)
    with CountFlops() as counter, torch.no_grad():
        feed(layer, x, causal=causal)
    formula = cost_of(layer, dims, causal=causal)
    assert (formula.tokenwise > 0) == bool(parameters)
    return counter.total, formula


def assert_cost_is_honest(dispatched: int, formula: Cost, reason: str | None) -> None:
    ratio = (dispatched - formula.tokenwise) / formula.mixing
    assert 0.99 <= ratio <= (1.01 if reason is None else 2.2), reason


@cases(small=True)
@pytest.mark.parametrize("tokens", [300, *slow(100, 1111)])
def test_dispatched_flops_are_those_of_the_formula(case: Case, tokens: int) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=64, heads=2)
    layer = case.layer(dims).eval().float()  # as it is trained: float64 may cost a projection more
    assert_cost_is_honest(*counted(layer, dims, case.causal), layer.flop_overhead_reason)


@cases(small=False)
def test_flops_scale_with_the_batch(case: Case) -> None:
    """Affine in it: what a layer computes from positions alone is shared by the sequences of a batch."""
    sizes = [dims_for(500, batch) for batch in (1, 2, 5)]
    one, two, five = (counted(case.layer(dims), dims, case.causal)[1].total for dims in sizes)
    assert one < two <= 2 * one
    assert five - one == 4 * (two - one)


@cases(small=False)
@pytest.mark.parametrize("tokens", [8192, *slow(32_768)])
def test_runs_under_fake_tensors_at_any_length(case: Case, tokens: int) -> None:
    """How a cell is planned without its hardware: nothing is computed; costs stay honest."""
    dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=64, heads=2)
    if not case.runs(dims):
        pytest.skip("unsupported")
    with FakeTensorMode():
        layer = case.variant(case.config, dims)
        x = torch.randn(1, dims.seq_len, dims.d_model, requires_grad=True)
        y = feed(layer, x, causal=case.causal)
        y.sum().backward()
        assert y.shape == x.shape
        assert x.grad is not None
        assert_cost_is_honest(*counted(layer, dims, case.causal), layer.flop_overhead_reason)


@cases(small=True)
def test_state_grows_with_the_sequence(case: Case) -> None:
    """The largest that a stretch of lengths needs: between them, a block that ends may be let go."""
    layer = case.variant(case.config, dims_for(512))
    largest = check.check_state(lambda tokens: bytes_of(layer, dims_for(tokens)))
    assert largest >= (case.small is None)  # a window of the token itself carries nothing


# --- how it lives in a model ----------------------------------------------------------------------


@cases(small=True)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_and_a_restored_layer_are_the_layer(case: Case, training: bool) -> None:
    """Whatever decides the outputs is in the state dict."""
    dims = dims_for(case.length, 2)
    layer = case.layer(dims).train(training)
    x = numbers(2, case.length, dims.d_model)
    if training:
        feed(layer, x, causal=case.causal).sum().backward()
        if isinstance(layer, UpdatesAfterStep):
            layer.after_step()
    x = x.detach()
    want = feed(layer, x, causal=case.causal)
    other = make_layer(case.variant, case.config, dims, seed=9).train(training)
    if layer.state_dict():
        assert difference(feed(other, x, causal=case.causal), want) > EXACT
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), other):
        assert difference(feed(same, x, causal=case.causal), want) <= EXACT


@every_variant
def test_a_model_tells_each_layer_its_place(name: str) -> None:
    """What differs from layer to layer differs in a model: each is what it is when built by itself there."""
    variant, dims = variants.load(name), dims_for(300)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=2)),
        dims,
        depth=3,
        dropout=0.0,
        vocabulary=11,
        activations="keep",
    )
    assert [layer.layer for layer in model.layers] == [0, 1, 2]


@cases(small=True)
def test_every_parameter_is_used(case: Case) -> None:
    """Every parameter gets a gradient from the outputs or from the auxiliary loss."""
    dims = dims_for(case.length)
    layer = case.layer(dims)
    if not list(layer.parameters()):
        pytest.skip("has no parameters")
    outs = []
    hook = layer.register_forward_hook(lambda _module, _args, out: outs.append(out))
    feed(layer, numbers(1, case.length, dims.d_model), causal=case.causal)
    hook.remove()
    losses = [out.y.square().sum() for out in outs]
    losses += [out.aux_loss for out in outs if out.aux_loss is not None]
    found = torch.autograd.grad(losses, list(layer.parameters()), materialize_grads=True)
    unused = [name for (name, _), grad in zip(layer.named_parameters(), found, strict=True) if not grad.any()]
    assert not unused


@cases(small=False)
def test_runs_in_bfloat16_by_autocast(case: Case) -> None:
    dims = dims_for(case.length, 2)
    layer = case.layer(dims).float()
    x = numbers(2, case.length, dims.d_model).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = feed(layer, x, causal=case.causal)
    assert y.isfinite().all()
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *layer.parameters()))
