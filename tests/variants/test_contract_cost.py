"""What every variant promises of its cost and of its kernels, in every mode that its knobs name.

Nothing here names a variant. A knob that takes a word lists the words when it refuses one; each of them
is a mode and goes through these tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from oracles import dims_for, feed
from tiers import REPRESENTATIVES, tiered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import variants
from bench.measure import gates, step
from bench.measure.memory import LiveStorage
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.tools import check
from variants.base import Dims, SequenceMixer, VariantConfig, Workload, known_leak

CPU = torch.device("cpu")
NAMES = variants.mixers()
LONG = 4096
NO_WORD = "no such thing"


def words(name: str) -> dict[str, list[str]]:
    """Knob → the words it takes, as its refusal of another word lists them."""
    config_class = variants.load(name).Config
    found = {}
    for field in dataclasses.fields(config_class):
        if isinstance(field.default, str):
            with pytest.raises(ValueError, match=rf"^{field.name}='{NO_WORD}': allowed is .") as refusal:
                config_class(**{field.name: NO_WORD})
            found[field.name] = re.split(r",? or |, ", str(refusal.value).split(": allowed is ")[1])
    return found


def refusal(variant: type[SequenceMixer], config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
    """Why a configuration cannot run, or cannot on a CPU."""
    return variant.unsupported(config, dims, causal=causal) or variant.missing(
        config, dims, device=CPU, dtype=torch.float32
    )


@dataclasses.dataclass(frozen=True)
class Mode:
    """A variant with one knob set to one word, in one direction; `knob` is "" for the defaults."""

    name: str
    knob: str
    word: str
    causal: bool

    @property
    def variant(self) -> type[SequenceMixer]:
        return variants.load(self.name)

    @property
    def config(self) -> VariantConfig:
        return self.variant.Config(**({self.knob: self.word} if self.knob else {}))

    def refuses(self, dims: Dims) -> str | None:
        """Why it cannot run, or cannot here."""
        return refusal(self.variant, self.config, dims, causal=self.causal)

    def need(self, dims: Dims) -> None:
        """Skip, with the variant's own reason, what it cannot do."""
        if reason := self.refuses(dims):
            pytest.skip(reason)


def modes(*directions: bool, defaults: bool = True) -> Any:
    """Each mode in the first direction that the variant has; its defaults, if asked for, in all of them.

    Of a variant of each family, the defaults are the short tier; without them, its first mode that runs here
    is.
    """
    found = []
    for name in NAMES:
        caps = variants.load(name).info.caps
        settings = [("", "")] if defaults else []
        settings += [(knob, word) for knob, some in words(name).items() for word in some]
        default = variants.load(name).Config().as_dict()
        able = [d for d in directions if (caps.causal if d else caps.bidirectional)]
        some = [
            Mode(name, knob, word, causal)
            for knob, word in settings
            if not knob or default[knob] != word
            for causal in (able[:1] if knob else able)
        ]
        short = some if defaults else [mode for mode in some if not mode.refuses(dims_for(600))] or some
        for mode in some:
            label = f"{name}{f'-{mode.word}' if mode.word else ''}-{'clm' if mode.causal else 'mlm'}"
            is_short = name in REPRESENTATIVES and (mode == short[0] or (defaults and not mode.knob))
            found.append(((name, mode.causal) if is_short else None, pytest.param(mode, id=label)))
    return pytest.mark.parametrize("mode", tiered(found))


class Largest(LiveStorage):
    """Beside the peak of all: the most numbers that one storage holds among those that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def _follow(self, tensor: Tensor) -> None:
        super()._follow(tensor)
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.numbers = max(self.numbers, held)


class Operations(TorchDispatchMode):
    """What was dispatched, in order, and the names of attention kernels among it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.all: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name:
            self.names.add(name)
        self.all.append((name, [arg.shape for arg in args if isinstance(arg, Tensor)]))
        return func(*args, **(kwargs or {}))


def storage(variant: type[SequenceMixer], config: VariantConfig, tokens: int, *, causal: bool) -> Largest:
    """What a layer's forward and backward pass hold, its parameters and inputs apart."""
    dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=32, heads=2)
    with FakeTensorMode():
        layer = variant(config, dims)
        x = torch.empty(1, tokens, dims.d_model, requires_grad=True)
        with Largest() as found:
            y = feed(layer, x, causal=causal)
            y.backward(torch.empty_like(y))
    return found


@modes(True, False)
def test_what_is_cheaper_than_dense_holds_nothing_of_its_size(mode: Mode) -> None:
    """Neither scores nor a mask: no tensor of a sub-quadratic layer of two heads is near T × T numbers.
    By default, its peak grows no faster than its paper claims."""
    mode.need(Workload(causal=True, batch_size=1, seq_len=LONG, d_model=32, heads=2))
    if mode.variant.info.complexity.time >= 2:
        pytest.skip("claims no less than T²")
    impl = mode.variant.IMPLS.get(mode.word)
    if impl is not None and not impl.overhead_is_bounded:
        pytest.skip(f"impl={mode.word}: {impl.flop_overhead_reason}")
    found = storage(mode.variant, mode.config, LONG, causal=mode.causal)
    assert found.numbers < LONG**2 // 2
    if not mode.knob:
        claim = max(1, mode.variant.info.complexity.memory)  # inputs and outputs are T numbers in any case
        before = storage(mode.variant, mode.config, LONG // 4, causal=mode.causal)
        assert found.peak <= 1.1 * 4**claim * before.peak


@pytest.mark.parametrize("causal", [True, False])
def test_the_largest_tensor_is_seen(causal: bool) -> None:
    """The measure itself: dense attention by its kernel holds no scores, written out it holds all."""
    dense = variants.load("dense")
    fused, written_out = (
        storage(dense, dense.Config(impl=i), LONG, causal=causal) for i in ("sdpa", "naive")
    )
    assert fused.numbers < LONG**2 // 2
    assert written_out.numbers >= 2 * LONG**2


@modes(True, False)
def test_the_kernel_does_not_depend_on_the_length(mode: Mode) -> None:
    """Nothing switches below a length: whichever attention kernel runs, runs for one token and for 600."""
    kernels = {}
    for tokens in (1, 9, 100, 600):
        dims = dims_for(tokens)
        if mode.refuses(dims):
            continue
        layer = mode.variant(mode.config, dims)
        with torch.no_grad(), Operations() as found:  # without: an auxiliary loss may have kernels of its own
            feed(layer, torch.zeros(1, tokens, dims.d_model), causal=mode.causal)
        kernels[tokens] = found.names
    assert all(names == kernels[600] for names in kernels.values()), kernels


@pytest.mark.parametrize("name", [name for name in NAMES if "impl" in words(name)])
def test_each_implementation_is_one_and_says_which(name: str) -> None:
    """What `impl` says has run is what ran: two implementations do not dispatch the same operations, unless
    one declares that it selects the other."""
    variant, dims = variants.load(name), dims_for(64)
    ran: dict[str | None, list[list[tuple[str, list[torch.Size]]]]] = {}
    for word in words(name)["impl"]:
        config = variant.Config(impl=word)
        if refusal(variant, config, dims, causal=True):
            continue
        layer = variant(config, dims)
        with Operations() as found:
            feed(layer, torch.zeros(1, 64, dims.d_model), causal=True)
        ran.setdefault(layer.impl, []).append(found.all)
    assert all(each == same[0] for same in ran.values() for each in same), [*ran]
    for (one, first), (other, second) in itertools.combinations(ran.items(), 2):
        selected = any(b in variant.IMPLS[str(a)].selects for a, b in ((one, other), (other, one)))
        assert selected or first[0] != second[0], (one, other)


@modes(True, False)
def test_a_plan_equals_the_step_in_every_figure(mode: Mode) -> None:
    """Real kernels hold what fake ones do. Some of torch's do not: the result of `mse_loss` on a CPU keeps a
    buffer as large as its operands alive, which fake tensors do not have."""
    dims = Workload(causal=True, batch_size=2, seq_len=300, d_model=32, heads=2)
    mode.need(dims)

    def build() -> LanguageModel:
        sizes: dict[str, Any] = {"depth": 1, "dropout": 0.1, "vocabulary": 11}
        return LanguageModel(
            ModelSpec.of(mode.variant, mode.config, feed_forward=feed_forward(mult=2)),
            dims,
            activations="keep",
            **sizes,
        )

    def blank() -> Batch:
        tokens = torch.zeros(2, dims.seq_len, dtype=torch.int64)
        return Batch(tokens, tokens.clone())

    def make() -> step.Subject:
        return step.Subject.make(build, blank, causal=mode.causal, device=CPU)

    _, figures = step.on_host(make)
    assert dataclasses.replace(figures, rss_peak_bytes=None) == step.predicted(make)


@modes(True, False)
def test_a_step_executes_at_least_its_formula(mode: Mode) -> None:
    """Forward and backward: a formula that counts a gradient which nobody computes is too high.

    In a wide layer, so that projections outweigh the overhead of tiles: some have only one gradient.
    """
    dims = Workload(causal=mode.causal, batch_size=1, seq_len=1024, d_model=512, heads=2)
    mode.need(dims)

    def build() -> LanguageModel:
        spec = ModelSpec.of(mode.variant, mode.config, feed_forward=feed_forward(mult=1))
        return LanguageModel(spec, dims, depth=1, dropout=0.0, vocabulary=11, activations="keep")

    def blank() -> Batch:
        tokens = torch.zeros(1, dims.seq_len, dtype=torch.int64)
        return Batch(tokens, tokens.clone())

    figures = step.predicted(lambda: step.Subject.make(build, blank, causal=mode.causal, device=CPU))
    with torch.device("meta"):
        cost = build().cost(dims)
    assert figures.flops_forward >= cost.total
    assert figures.flops_step >= cost.step


@modes(True, defaults=False)
def test_no_mode_leaks_unless_it_says_so(mode: Mode) -> None:
    """The causality gate through two layers; a leak that is stated is there. The defaults: test_contract.

    Long enough that some bucket of hashed attention is longer than a chunk: only then do boundaries matter.
    """
    dims = dims_for(600, 1)
    mode.need(dims)
    with torch.random.fork_rng():
        worst = gates.leak(mode.variant, mode.config, dims, 2, CPU)
    assert (worst > gates.LEAK_TOLERANCE) == bool(known_leak(mode.variant, mode.config))


@pytest.mark.parametrize("name", NAMES)
def test_a_knob_that_makes_no_sense_is_refused_by_name(name: str) -> None:
    """Numbers outside of the bounds, and a word that is none."""
    config_class = variants.load(name).Config
    assert {*words(name)} <= {field.name for field in dataclasses.fields(config_class)}
    check.check_refusals(config_class)


def trained_by_the_task(variant: type[SequenceMixer], dims: Dims) -> int:
    """Parameters of a small model that its outputs depend on."""
    torch.manual_seed(0)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=4)),
        dims,
        depth=1,
        dropout=0.0,
        vocabulary=256,
        activations="keep",
    )
    tokens = torch.randint(256, (1, dims.seq_len))
    causal = variant.info.caps.causal
    logits = [out.logits.square().sum() for _, out in model.stream(tokens, causal=causal)]
    found = torch.autograd.grad(logits, list(model.parameters()), allow_unused=True)
    return sum(grad.numel() for grad in found if grad is not None and grad.any())


@pytest.mark.parametrize("name", NAMES)
def test_the_task_trains_as_many_parameters_as_in_dense(name: str) -> None:
    """Within a tenth. What an auxiliary loss trains comes on top, and what grows with the longest sequence
    is for `Caps.fixed_length` to say, what a method saves for `Caps.few_parameters`, and some layers have no
    parameters; the report marks each."""
    variant, dims = variants.load(name), Workload(causal=True, batch_size=1, seq_len=600, d_model=64, heads=2)
    if variant.info.caps.fixed_length:
        pytest.skip("parameters grow with the longest sequence")
    if not list(variant(variant.Config(), dims).parameters()):
        pytest.skip("has no parameters")
    dense, own = (trained_by_the_task(variants.load(each), dims) for each in ("dense", name))
    assert own < 0.9 * dense if variant.info.caps.few_parameters else abs(own - dense) <= 0.1 * dense
