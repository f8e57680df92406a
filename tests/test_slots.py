"""The slots of a model: its layers, the way through its blocks, and the feed-forward layer's own loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import Cell, CellSpec
from bench.inputs.errors import ConfigError
from bench.measure import gates
from bench.model.activations import STRATEGIES
from bench.model.language_model import LanguageModel
from bench.model.slots import LayerSpec, ModelSpec, feed_forward
from bench.run.cell import CellRun
from bench.run.code_hash import code_sha256
from bench.scenarios.support import Unsupported, check_supported
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import Context, DepthConfig, DepthSchedule, Dims, FFOut, SequenceMixer, SlotSpec, Workload
from variants.declarations import Declared
from variants.depth.universal import Universal, UniversalConfig
from variants.feed_forward.glu import GLU, GLUConfig
from variants.feed_forward.mlp import MLP, MLPConfig
from variants.slots import FEED_FORWARD, Slot

T, VOCABULARY = 24, 11
SIZES = Dims(seq_len=T, d_model=16, heads=2)


@dataclass(frozen=True, kw_only=True)
class TwiceConfig(DepthConfig):
    """No knobs."""


class Twice(DepthSchedule):
    """Every block two times, as a plug-in may have it; it says that it cannot be reversed."""

    Config = TwiceConfig
    paper = "a test"

    @classmethod
    def unsupported(cls, config: Any, *, depth: int, activations: str) -> str | None:
        return "blocks that are visited twice; allowed is keep" if activations == "reversible" else None

    def visits(self) -> Sequence[int]:
        return [index for index in range(self.depth) for _ in range(2)]


class Priced(MLP):
    """An auxiliary loss: the mean square of what it puts out."""

    def forward(self, x: torch.Tensor) -> FFOut:
        y = super().forward(x).y
        return FFOut(y, y.square().mean())


def spec_of(name: str = "dense", mult: int = 2) -> ModelSpec:
    variant = variants.load(name)
    return ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=mult))


def twice() -> ModelSpec:
    return replace(spec_of(), depth=SlotSpec[DepthSchedule]("twice", Twice, TwiceConfig()))


def priced() -> ModelSpec:
    (layer,) = spec_of().layers
    return replace(spec_of(), layers=(LayerSpec(layer.mixer, SlotSpec("priced", Priced, MLPConfig(mult=2))),))


def model_of(spec: ModelSpec, **changed: Any) -> LanguageModel:
    torch.manual_seed(0)
    given = {"depth": 2, "dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep", **changed}
    return LanguageModel(spec, SIZES, **given)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    torch.manual_seed(1)
    training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), ids(1)), causal=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_blocks_are_visited_as_the_schedule_says() -> None:
    model = model_of(twice())
    x = model.embedding(ids())
    want = x
    for block in (model.blocks[0], model.blocks[0], model.blocks[1], model.blocks[1]):
        want = block(want, None, Context(causal=True)).x
    assert torch.equal(model.run_visits(x, None, Context(causal=True)).y, want)


def test_costs_and_states_count_every_visit() -> None:
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=True)
    once, both = model_of(spec_of()), model_of(twice())
    head = once.cost(work).parts["output"]
    assert both.cost(work).total - head == 2 * (once.cost(work).total - head)
    assert both.state_bytes(work) == 2 * once.state_bytes(work)
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in once.parameters())


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if not strategy.needs_device])
@pytest.mark.parametrize("spec", [twice(), priced()], ids=["twice", "priced"])
@pytest.mark.parametrize("ff_chunks", [1, 3])
def test_strategies_hold_for_every_visit_and_auxiliary_loss(
    name: str, spec: ModelSpec, ff_chunks: int
) -> None:
    strategy = STRATEGIES[name]
    model = model_of(spec, activations=name, ff_chunks=ff_chunks)
    got = gradients(model)
    with model.running(strategy.stored):
        want = gradients(model)
    largest = max(grad.abs().max() for grad in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest


def test_a_feed_forward_layers_loss_is_trained_on() -> None:
    torch.manual_seed(1)
    out = model_of(priced())(ids(), causal=True)
    assert [loss.dim() for loss in out.aux_losses] == [0, 0]
    differ = [
        not torch.equal(a, b)
        for a, b in zip(gradients(model_of(priced())), gradients(model_of(spec_of())), strict=True)
    ]
    assert any(differ)


def test_kinds_of_layers_are_counted() -> None:
    hybrid = variants.load("hybrid")
    spec = ModelSpec.of(hybrid, hybrid.Config(layers=("longformer", "longformer", "dense")))
    assert [(layer.mixer.name, count) for layer, count in spec.kinds(5).items()] == [
        ("longformer", 4),
        ("dense", 1),
    ]


def cell(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["device=cpu", *overrides])).spec


def test_a_strategy_that_the_schedule_cannot_carry_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CellSpec, "model_spec", lambda self: twice())
    assert cell("stack=universal", "activations=checkpoint").activations == "checkpoint"
    with pytest.raises(
        ConfigError, match=r"^activations=reversible with stack=\w+: .* visited twice; allowed is keep$"
    ):
        cell("stack=universal", "activations=reversible")


def test_a_schedule_that_leaves_out_visits_is_not_compiled_as_a_whole() -> None:
    """Each choice of visits would be another graph."""
    check_supported(cell("stack=layer_drop", "compile=block"))
    check_supported(cell("stack=layer_drop", "stack.rate=0", "compile=model"))
    with pytest.raises(Unsupported, match=r"^compile=model: stack=layer_drop .* compile=off and block$"):
        check_supported(cell("stack=layer_drop", "compile=model"))


def test_more_layers_than_the_depth_are_refused_in_one_line() -> None:
    layers = "variant.layers=[dense,dense,longformer]"
    assert cell("variant=hybrid", layers, "depth=3").depth == 3
    few = r"^depth=2: the variant has 3 layers and stack=stack makes 2 blocks; allowed are 3 blocks or more$"
    with pytest.raises(ConfigError, match=few):
        cell("variant=hybrid", layers, "depth=2")
    one = (
        r"^depth=3: the variant has 3 layers and stack=universal makes 1 block; allowed are 3 blocks or more$"
    )
    with pytest.raises(ConfigError, match=one):
        cell("variant=hybrid", layers, "depth=3", "stack=universal")


def test_the_command_line_fills_the_slots() -> None:
    spec = cell("feed_forward=glu", "feed_forward.activation=relu", "stack=universal", "depth=3")
    assert spec.feed_forward.params == {"activation": "relu", "mult": 4, "width": None}
    model = spec.model_spec()
    (layer,) = model.layers
    assert (layer.feed_forward.layer, layer.feed_forward.config) == (GLU, GLUConfig(activation="relu"))
    assert (model.depth.layer, model.depth.config) == (Universal, UniversalConfig())
    assert cell().model_spec() == spec_of(mult=4), "an MLP of four times the width in a stack"
    assert "feed_forward=glu stack=universal" in spec.label
    assert "=mlp" not in cell().label


def test_a_layer_that_no_cell_could_have_is_refused_where_two_knobs_are_related(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the class itself: what is read from its source knows no such relation."""

    @dataclass(frozen=True, kw_only=True)
    class Related(MLPConfig):
        def __post_init__(self) -> None:
            self.require("mult", self.mult != 5, "any number but 5")

    monkeypatch.setattr(MLP, "Config", Related)
    own, incomplete = Slot.declared, Declared(MLPConfig, {}, complete=False)
    monkeypatch.setattr(Slot, "declared", lambda self, name: incomplete if name == "mlp" else own(self, name))
    assert cell("feed_forward.mult=6").feed_forward.params == {"mult": 6, "width": None, "activation": "gelu"}
    with pytest.raises(ConfigError, match=r"^feed_forward.mult=5: allowed is any number but 5$"):
        cell("feed_forward.mult=5")


def test_a_broken_layer_is_for_its_cell_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other cells of the sweep can run."""

    def broken(self: Slot[Any], name: str) -> Any:
        raise variants.BrokenVariant(f"{name} cannot be imported: SyntaxError: x")

    monkeypatch.setattr(Slot, "load", broken)
    assert cell("feed_forward=glu", "stack=universal").stack.name == "universal"
    spec = cell("feed_forward=glu")
    assert spec.feed_forward.name == "glu"
    with pytest.raises(variants.BrokenVariant, match="glu cannot be imported"):
        spec.model_spec()


TWO = """
from variants.feed_forward.mlp import MLP, MLPConfig

class One(MLP):
    Config = MLPConfig

class Other(MLP):
    Config = MLPConfig
"""


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (
            TWO,
            TypeError,
            r"^variants\.feed_forward\.mine defines 2 classes with a Config; it must define one$",
        ),
        ("x = 1", TypeError, "defines 0 classes"),
        ("raise SystemExit(3)", variants.BrokenVariant, r"cannot be imported: SystemExit: 3$"),
        ("def (", variants.BrokenVariant, r"cannot be imported: SyntaxError"),
    ],
)
def test_a_file_that_is_no_layer_is_named(
    source: str, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(source)
    package, before = FEED_FORWARD.package, FEED_FORWARD.names()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert FEED_FORWARD.names() == sorted(["mine", *before])
    try:
        with pytest.raises(error, match=said):
            FEED_FORWARD.load("mine")
    finally:
        sys.modules.pop(f"{package.__name__}.mine", None)


def test_what_fills_the_slots_decides_a_cells_id() -> None:
    lines = (
        [],
        ["feed_forward.mult=8"],
        ["feed_forward=glu"],
        ["feed_forward=glu", "feed_forward.activation=gelu"],
        ["feed_forward=glu", "feed_forward.mult=8"],
        ["stack=universal"],
    )
    assert len({cell(*line).cell_id("data", "code") for line in lines}) == len(lines)
    said = ["feed_forward=mlp", "feed_forward.mult=4", "stack=stack"]
    assert cell(*said).cell_id("data", "code") == cell().cell_id("data", "code")


def test_the_code_that_fills_the_slots_decides_a_cells_id() -> None:
    assert cell("feed_forward=glu", "stack=universal").slot_modules() == [
        GLU.__module__,
        Universal.__module__,
    ]
    found = [
        code_sha256("dense", modules=modules)
        for modules in ((), (MLP.__module__,), (GLU.__module__,), (MLP.__module__, Universal.__module__))
    ]
    assert len({*found}) == 4


def test_the_objective_of_a_mixture_is_one_that_all_members_have() -> None:
    assert cell("variant=hybrid", "variant.layers=[dense,longformer]", "depth=2").objective == "clm"
    assert cell("variant=hybrid", "variant.layers=[dense,linformer]", "depth=2").objective == "mlm"


def test_a_mixture_depends_on_the_code_of_its_members() -> None:
    spec = cell("variant=hybrid", "variant.layers=[longformer,dense]", "depth=2")
    assert spec.variants() == ["hybrid", "longformer", "dense"]
    assert cell("variant=dense").variants() == ["dense"]


def test_gates_run_once_for_each_kind_of_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mixture's input schedule; what another mixture has too is not taken again."""
    taken: list[str] = []
    leak = gates.leak

    def counted(mixer: type[SequenceMixer], *args: Any, **given: Any) -> float:
        taken.append(mixer.__name__)
        return leak(mixer, *args, **given)

    monkeypatch.setattr(gates, "leak", counted)
    sizes = ["variant=hybrid", "seq_len=48", "depth=4", "model.d_model=16", "objective=clm"]
    mixed = cell(*sizes, "variant.layers=[dense,sparse_strided,dense]")
    figures = gates.check(mixed, tmp_path, "code")
    assert taken == ["Dense", "SparseStrided"]
    assert figures.leak_max_abs is not None
    assert figures.leak_max_abs < gates.LEAK_TOLERANCE
    assert gates.check(mixed, tmp_path, "code") == figures
    gates.check(
        cell(*sizes, "variant.layers=[dense,sparse_strided]", "activations=checkpoint"), tmp_path, "code"
    )
    assert taken == ["Dense", "SparseStrided", "Dense", "SparseStrided"], "as many layers decide, too"
    gates.check(cell(*sizes, "variant.layers=[transformer_xl,dense]"), tmp_path, "code")
    assert taken[4:] == ["TransformerXL", "Dense"], "another schedule"


def test_a_member_that_leaks_makes_the_mixture_leak(tmp_path: Path) -> None:
    """It says so itself: the figure is recorded, and the gate passes."""
    leaky = "'reformer(neighbourhood=chunk,chunk=8)'"
    sizes = ["variant=hybrid", "seq_len=64", "depth=2", "model.d_model=16", "objective=clm"]
    figures = gates.check(cell(*sizes, f"variant.layers=[dense,{leaky}]"), tmp_path, "code")
    assert figures.leak_max_abs is not None
    assert figures.leak_max_abs > gates.LEAK_TOLERANCE


def test_the_code_of_every_member_decides_a_cells_id() -> None:
    found = [
        code_sha256(*names) for names in (["hybrid"], ["hybrid", "dense"], ["hybrid", "dense", "routing"])
    ]
    assert len({*found}) == 3


def test_a_feed_forward_layer_may_refuse_a_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes the record's reason, before anything is built."""
    monkeypatch.setattr(
        MLP, "unsupported", classmethod(lambda cls, config, d_model: f"d_model={d_model}: odd")
    )
    run = CellRun(
        Cell(spec=cell("seq_len=16"), folder=tmp_path, name="x", force=False), "0", "code", {}.update
    )
    with pytest.raises(Unsupported, match=r"^mlp: d_model=64: odd$"):
        run.run()
