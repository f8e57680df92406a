"""Every mistake is refused in one line with the value, what is allowed, and the nearest match."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from hydra_plugins.longctx_bench import CellSweeper, Composer, Preset, product
from omegaconf import DictConfig, OmegaConf

import variants
from bench.cli import errors, guard
from bench.cli.overrides import groups
from bench.config.parse import parse
from bench.config.spec import ACTIVATIONS, Cell, CellSpec, DataSpec, MeasureSpec, ModelSizes, Root
from bench.inputs.errors import ConfigError, choose
from bench.measure import predict
from bench.run import prepare, sweep

CONFIGS = Path(__file__).parents[1] / "configs"


def cell_of(*overrides: str) -> Cell:
    overrides = tuple(guard.checked(overrides))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=["device=cpu", *overrides])
    return parse(composed)


def refusal(*overrides: str) -> str:
    """What the user is told."""
    with pytest.raises(errors.KINDS) as caught:
        cell_of(*overrides)
    message = errors.explain(caught.value, list(overrides), CONFIGS)
    assert message
    assert "\n" not in message
    return message


REFUSED: dict[str, tuple[str, ...]] = {
    # unknown names
    "variant=longfromer": ("variant=longfromer", "dense", "did you mean longformer?"),
    "+variant.impll=sdpa": ("impll", "impl", "did you mean impl?"),
    "activations=chekpoint": ("activations=chekpoint", "keep", "did you mean checkpoint?"),
    "model=tinny": ("model=tinny", "small", "did you mean tiny?"),
    "measure=quik": ("measure=quik", "standard", "did you mean quick?"),
    "feed_forward=gluu": ("feed_forward=gluu", "mlp", "did you mean glu?"),
    "stack=univresal": ("stack=univresal", "stack", "did you mean universal?"),
    "feed_forward.n_experts=4": ("unknown knob", "switch, top_k have it", "such as feed_forward=switch"),
    "stack.threshold=1": ("stack.threshold", "early_exit has it: choose one, such as stack=early_exit"),
    "data=play": ("data=play", "stdlib", "did you mean plays?"),
    "objective=clmm": ("objective=clmm", "auto", "mlm", "did you mean clm?"),
    "dtype=float16": ("dtype='float16'", "float32 or bfloat16"),
    "device=gpu": ("device='gpu'", "auto, cpu or cuda"),
    "variant.impl=spda": (
        "variant.impl='spda'",
        "sdpa, naive, flash, cudnn, efficient, math, flex or xformers",
        "did you mean sdpa?",
    ),
    "rerun=contaminatd": ("rerun='contaminatd'", "none, contaminated or oom", "did you mean contaminated?"),
    # misspelt knobs
    "seqlen=5": ("seqlen", "unknown knob", "did you mean seq_len?"),
    "model.head=2": ("model.head", "did you mean model.heads?"),
    "+depht=3": ("depht", "depth", "did you mean depth?"),
    # wrong types
    "seq_len=abc": ("seq_len='abc'", "an integer"),
    "seq_len=1.5": ("seq_len=1.5", "an integer"),
    "depth=null": ("depth=null", "an integer, 1 to 65,536 blocks"),
    "depth={a: 1}": ("depth",),
    "variant=": ("variant=", "allowed is one of"),
    "variant={name: dense}": ("variant={name: dense}", "allowed is one of"),
    "variant=true": ("variant=true: unknown", "dense"),
    "force=perhaps": ("force='perhaps'", "true or false"),
    "force=1": ("force=1", "true or false"),
    "tracker.place=x": ("tracker.place='x'", "choose a tracker"),
    "cluster.cells_per_job=0": ("cluster.cells_per_job=0", "1 or more cells"),
    "cluster.gpus=1": ("cluster.gpus: unknown knob", "cluster.cells_per_job"),
    "model.dropout=much": ("model.dropout='much'", "a number"),
    "measure.time_seconds=long": ("measure.time_seconds='long'", "a number"),
    # out of bounds
    "seq_len=0": ("seq_len=0", "1 or more"),
    "seq_len=-5": ("seq_len=-5", "1 or more"),
    "depth=0": ("depth=0", "1 to 65,536 blocks"),
    "audit_oom=1.5": ("audit_oom=1.5", "0 to 1"),
    "audit_oom=-0.1": ("audit_oom=-0.1", "0 to 1"),
    "audit_oom=nan": ("audit_oom=nan", "0 to 1"),
    "audit_oom=some": ("audit_oom='some'", "a number"),
    "skip_after_oom=perhaps": ("skip_after_oom='perhaps'", "true or false"),
    "batch_size=0": ("batch_size=0", "1 or more"),
    "replicate=-1": ("replicate=-1", "0 or more"),
    "twin=-1": ("twin=-1", "0 or more"),
    "twin=second": ("twin='second'", "an integer"),
    "model.heads=0": ("model.heads=0", "1 or more"),
    "model.heads=3": ("model.heads=3", "must divide d_model=64", "nearest divisor is 2"),
    "model.heads=64": ("model.heads=64", "even"),
    "feed_forward.mult=0": ("feed_forward.mult=0", "1 or more"),
    "feed_forward.mult=wide": ("feed_forward.mult='wide'", "an integer"),
    "model.ff_mult=8": ("model.ff_mult=8", "unknown knob", "it is now feed_forward.mult"),
    "+model.ff_mult=8": ("model.ff_mult=8", "unknown knob", "it is now feed_forward.mult"),
    "model.dropout=1": ("model.dropout=1.0", "0 up to below 1"),
    "model.dropout=-0.1": ("model.dropout=-0.1", "0 up to below 1"),
    "measure.min_samples=0": ("measure.min_samples=0", "1 or more"),
    "measure.time_seconds=-1": ("measure.time_seconds=-1", "0 or more"),
    "measure.precision=-0.1": ("measure.precision=-0.1", "0 or more"),
    "measure.precision=nan": ("measure.precision=nan", "0 or more"),
    "measure.precision=fine": ("measure.precision='fine'", "a number"),
    "measure.train_tokens=-1": ("measure.train_tokens=-1", "0 or more"),
    "measure.train_flops=-1": ("measure.train_flops=-1", "0 or more"),
    "measure.train_seconds=nan": ("measure.train_seconds=nan", "0 or more"),
    "measure.train_seconds=inf": ("measure.train_seconds=inf", "a finite number"),
    "measure.train_flops=many": ("measure.train_flops='many'", "a number"),
    "measure.train_budget=token": ("measure.train_budget='token'", "seconds", "did you mean tokens?"),
    "measure.train_budget=flops": ("measure.train_flops=0", "nothing to spend", "train_budget=tokens"),
    "measure.eval_split=validate": ("measure.eval_split='validate'", "did you mean validation?"),
    "measure.eval_split=train": ("measure.eval_split='train'", "test or validation"),
    "measure.checkpoint_seconds=-1": ("measure.checkpoint_seconds=-1", "0 or more"),
    "measure.eval_tokens=0": ("measure.eval_tokens=0", "1 or more"),
    "measure.eval_stride=0": ("measure.eval_stride=0", "null or 1 or more tokens"),
    "measure.eval_stride=1025": ("measure.eval_stride=1025", "1 to seq_len=1024", "null"),
    "measure.eval_stride=half": ("measure.eval_stride='half'", "an integer"),
    "measure.place_period=-1": ("measure.place_period=-1", "0 or more"),
    "measure.attention_windows=-1": ("measure.attention_windows=-1", "0 or more"),
    "measure.reach=far": ("measure.reach='far'", "true or false"),
    "measure.longer=6": ("measure.longer=6", "0 for none, or a power of two from 2 to 64"),
    "measure.longer=1": ("measure.longer=1", "0 for none, or a power of two from 2 to 64"),
    "measure.history_targets=-1": ("measure.history_targets=-1", "0 or more"),
    "measure.history_targets=1": ("measure.history_targets=1", "0 for none, or 2 or more"),
    "measure.learning_rate=0": ("measure.learning_rate=0", "more than 0"),
    "measure.limit_bytes=lots": ("measure.limit_bytes=lots", "80GiB"),
    "measure.limit_bytes=0": ("measure.limit_bytes=0", "80GiB"),
    "measure.limit_seconds=0": ("measure.limit_seconds=0", "more than 0"),
    "model.dropout=nan": ("model.dropout=nan",),
    "measure.learning_rate=nan": ("measure.learning_rate=nan",),
    "measure.limit_seconds=nan": ("measure.limit_seconds=nan",),
    "measure.time_seconds=nan": ("measure.time_seconds=nan",),
    "name=../elsewhere": ("name='../elsewhere'", "a folder name under results_dir"),
    "name=/tmp/elsewhere": ("name='/tmp/elsewhere'", "a folder name under results_dir"),
    "name=''": ("name=''", "a folder name under results_dir"),
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_mistake_is_refused_in_one_line(override: str) -> None:
    message = refusal(override)
    for part in REFUSED[override]:
        assert part in message


NO_VALUES = ("[dense,plan]", "???", "null", "~")
"""What neither a group nor a knob of the root can be; the last takes it away."""


NULLABLE = {field.name for field in fields(Root) if field.default is None}
"""Knobs of the root that may have no value; `Root` declares them with the default null."""


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        (knob, value)
        for knob in sorted({*(field.name for field in fields(Root)), *groups()})
        for value in NO_VALUES
        if not (value == "null" and knob in NULLABLE)
    ],
)
def test_nothing_and_several_are_no_value(knob: str, value: str) -> None:
    message = refusal(f"~{knob}" if value == "~" else f"{knob}={value}")
    assert knob in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("name=~/x", ("name='~/x'", "a folder name under results_dir")),
        ("name=~", ("name='~'", "a folder name under results_dir")),
        ("name=a/" + "x" * 300, ("name=xxx", "255 bytes")),
        ("results_dir=" + "x" * 300, ("results_dir=xxx", "255 bytes")),
        ("results_dir=~nosuchuser/x", ("results_dir=~nosuchuser/x", "~nosuchuser is not known")),
        ("tracker=tensorboard tracker.place=~nosuchuser", ("tracker.place=~nosuchuser", "is not known")),
    ],
)
def test_a_path_that_is_none_is_refused(override: str, parts: tuple[str, ...]) -> None:
    message = refusal(*override.split(" "))
    for part in parts:
        assert part in message


def test_a_tilde_at_the_start_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cell_of("results_dir=~/x").folder == tmp_path / "x/adhoc"
    cell = cell_of("tracker=tensorboard", "tracker.place=~/runs")
    assert cell.tracker.place == str(tmp_path / "runs")
    assert cell_of("tracker=mlflow", "tracker.place=http://h:5/~x").tracker.place == "http://h:5/~x"


TEXTS = ("2024_11_26", "1e3", "1.10", "true", "False", "0x10", "007", "1_000", "nan", "+5", ".5", "5.", "12")


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_was_typed(text: str) -> None:
    cell = cell_of(f"name={text}", f"results_dir={text}", "data=files", f"data.path={text}")
    assert (cell.name, cell.folder) == (text, Path(text, text))
    assert cell.spec.data.params["path"] == text


def test_null_is_no_path_where_there_may_be_none() -> None:
    assert cell_of("data=files", "data.path=null").spec.data.params["path"] is None


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("variant=chunked", "variant.chunk=0"), ("variant.chunk=0", "1 or more")),
        (("variant=chunked", "variant.chunk=many"), ("variant.chunk='many'", "an integer")),
        (("variant=overlapping", "variant.chunk=6"), ("variant.chunk=6", "multiple of 4")),
        (("variant=longformer", "variant.window=[0]"), ("variant.window=[0]", "each 1 or more tokens")),
        (("variant=longformer", "variant.window=[]"), ("variant.window=[]", "a list of 1 or more integers")),
        (("variant=longformer", "variant.chunk=5"), ("variant.chunk", "variant.window")),
        (("variant=longformer", "+variant.windows=5"), ("windows", "did you mean window?")),
        (("feed_forward=glu", "feed_forward.activation=silo"), ("'silo'", "gelu", "did you mean silu?")),
        (("feed_forward=glu", "feed_forward.mult=0"), ("feed_forward.mult=0", "1 or more")),
        (("feed_forward=glu", "feed_forward.mul=2"), ("feed_forward.mul", "did you mean feed_forward.mult?")),
        (("feed_forward=glu", "+feed_forward.mul=2"), ("feed_forward.mul", "did you mean mult?")),
        (
            ("stack=shared", "stack.groups=3", "depth=8"),
            ("stack.groups=3: must divide depth=8; the nearest smaller divisor is 2",),
        ),
        (("stack=shared", "stack.order=revers"), ("'revers'", "did you mean reverse?")),
        (("stack=universal", "stack.blocks=2"), ("stack.blocks: unknown knob", "stack.name")),
        (("variant=hybrid", "variant.layers=[longformer,dens]"), ("variant=dens", "did you mean dense?")),
        (("variant=hybrid", "variant.layers=[dense,hybrid]"), ("hybrid is itself a mixture",)),
        (("variant=hybrid", "variant.layers=[chunked,transformer_xl]"), ("allowed is one for all",)),
        (
            ("variant=hybrid", "depth=1"),
            ("depth=1: the variant has 2 layers", "allowed are 2 blocks or more"),
        ),
        (
            ("variant=hybrid", "stack=universal"),
            ("depth=2", "stack=universal makes 1 block", "2 blocks or more"),
        ),
    ],
)
def test_a_variants_own_knobs_are_checked(overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    message = refusal(*overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", variants.names())
def test_the_entry_of_a_variant_holds_its_defaults(name: str) -> None:
    """So that `python -m bench --help variant=x` shows what a Python user gets."""
    cell = cell_of(f"variant={name}")
    variant, config, dims = cell.spec.attention()
    assert config == variant.Config()
    assert cell.spec.variant_params == variant.Config().as_dict()
    assert (dims.seq_len, dims.d_model) == (cell.spec.seq_len, cell.spec.model.d_model)


def test_a_single_number_is_a_list_of_one() -> None:
    spec = cell_of("variant=longformer", "variant.window=64").spec
    assert spec.variant_params["window"] == [64]
    assert spec.attention()[1].as_dict()["window"] == [64]


def test_auto_is_decided_before_the_cell_is_hashed() -> None:
    auto, said = cell_of().spec, cell_of("objective=clm").spec
    assert auto.objective == "clm"
    assert auto.cell_id("data", "code") == said.cell_id("data", "code")


@pytest.mark.parametrize("release", ["2.13.0+cpu", "2.13.0", "2.13.0+cu128"])
def test_torch_says_which_device_auto_is_unless_it_was_built_for_cpus(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.config.parse._version", {"torch": release}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cell_of("device=auto").spec.device == ("cpu" if release.endswith("+cpu") else "cuda")


def test_every_figures_knob_changes_the_cells_id_and_no_other_does() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", return_hydra_config=True)
        make = Composer(GlobalHydra.instance().config_loader(), composed)

    def cell_id(*overrides: str) -> str:
        return parse(make(["device=cpu", *overrides])).spec.cell_id("data", "code")

    same = [
        "results_dir=elsewhere",
        "name=other",
        "force=true",
        "measure.limit_seconds=5",
        "measure.limit_bytes=5GiB",
    ]
    same += ["measure.checkpoint_seconds=5", "measure.train_seconds=5"]  # the budget is of tokens
    same += ["twin=0", "rerun=contaminated", "measure.precision=0.03", "measure.limit_bytes=5GiB"]
    same += ["rerun=oom", "audit_oom=1", "skip_after_oom=false"]
    same += ["measure.place_period=0", "measure.attention_windows=0", "measure.reach=false"]
    same += ["measure.prune_windows=0"]
    assert {cell_id(override) for override in same} == {cell_id()}
    different = [
        *("variant=chunked", "seq_len=5", "depth=3", "batch_size=2", "replicate=1", "objective=mlm"),
        *("dtype=bfloat16", "activations=checkpoint", "model=small", "model.dropout=0.1", "data=stdlib"),
        *("measure=quick", "measure.train_tokens=1", "variant.impl=naive", "measure.learning_rate=0.1"),
        *("measure.eval_split=validation", "measure.precision=0", "twin=1", "twin=2"),
        *("measure.place_period=32", "measure.attention_windows=1", "measure.reach=true"),
        "measure.prune_windows=1",
    ]
    assert len({cell_id(override) for override in different} | {cell_id()}) == len(different) + 1
    assert cell_of().spec.cell_id("data", "other") != cell_id() != cell_of().spec.cell_id("other", "code")


def test_knobs_that_came_later_leave_the_ids_of_older_cells_alone() -> None:
    """A record is found again by this hash, which was taken before there were twins and a precision."""
    spec = CellSpec(
        variant="dense",
        variant_params={"impl": "sdpa"},
        seq_len=512,
        depth=2,
        batch_size=1,
        replicate=0,
        objective="clm",
        device="cpu",
        dtype="float32",
        activations="keep",
        model=ModelSizes(),
        data=DataSpec(),
        measure=MeasureSpec(),
    )
    assert spec.cell_id("data", "code") == "3af9a10e3280d86b"


def test_a_twin_is_its_sibling_in_weights_and_data() -> None:
    one, twin = (cell_of(f"twin={n}", "data=stdlib", "model=tiny", "replicate=3").spec for n in (0, 1))
    assert one.label != twin.label
    assert one.task()[1:] == twin.task()[1:]
    weights = [predict.build_model(spec).state_dict() for spec in (one, twin)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_budget_is_of_one_kind_and_the_others_are_not_looked_at() -> None:
    spent = {
        "tokens": cell_of("measure.train_tokens=7").spec,
        "flops": cell_of("measure.train_budget=flops", "measure.train_flops=1e13").spec,
        "seconds": cell_of("measure.train_budget=seconds", "measure.train_seconds=2.5").spec,
    }
    assert {name: spec.measure.train_amount for name, spec in spent.items()} == {
        "tokens": 7,
        "flops": 1e13,
        "seconds": 2.5,
    }
    assert len({spec.cell_id("data", "code") for spec in spent.values()}) == 3
    other = cell_of("measure.train_budget=seconds", "measure.train_seconds=2.5", "measure.train_tokens=7")
    assert other.spec.cell_id("data", "code") == spent["seconds"].cell_id("data", "code")


def test_what_is_known_before_a_cell_runs_names_its_budgets() -> None:
    """So that a cell that is stopped says them too."""
    fits = prepare.identity(cell_of("measure=fits", "measure.budget=2GiB", "data=stdlib"))
    assert (fits["budget_bytes"], fits.get("learning_rate")) == (2 * 2**30, None)
    trained = prepare.identity(cell_of("measure=standard", "measure.eval_split=validation", "data=stdlib"))
    assert trained["budget_bytes"] is None
    keys = ("train_budget", "train_amount", "learning_rate", "eval_split")
    assert [trained[key] for key in keys] == ["tokens", 400_000, 0.003, "validation"]


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_a_preset_sweeps_into_a_folder_of_its_own(preset: str) -> None:
    """A preset that is named after another one and more words adds its cells to those of that one."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
    assert composed.name == preset or preset.startswith(f"{composed.name}_")
    assert composed.hydra.mode.name == "MULTIRUN"
    assert composed.hydra.sweeper.get("params") or composed.hydra.sweeper.get("grids")


def jobs_of(preset: str) -> list[dict[str, str]]:
    """The overrides of each cell of a preset, in the sweep's order."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
        grids = Preset.of(composed, []).grids
        loader = GlobalHydra.instance().config_loader()
        jobs = [job for grid in grids for job in product(loader, grid, [])]
    return [dict(override.split("=", 1) for override in job) for job in jobs]


def swept(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Cell]:
    """The cells that a sweep would run, in their order."""
    ran: list[Cell] = []
    monkeypatch.setattr(sweep, "run", ran.extend)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composed = loader.load_configuration("config", ["hydra.mode=MULTIRUN", *arguments], RunMode.MULTIRUN)
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        sweeper = composed.hydra.sweeper
        cells = CellSweeper(sweeper.params, sweeper.grids)
        cells.setup(hydra_context=context, task_function=parse, config=composed)
        cells.sweep(list(composed.hydra.overrides.task))
    return ran


@pytest.mark.slow
def test_a_sweep_over_presets_runs_the_whole_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = ("device=cpu", "depth=1,3")
    alone = [swept(monkeypatch, f"experiment={preset}", *beside) for preset in ("smoke", "fits")]
    assert len(alone[0]) == 2 * 26
    assert {cell.name for cell in alone[1]} == {"fits"}
    for line in ("smoke,fits", "choice(smoke, fits)"):
        assert swept(monkeypatch, f"experiment={line}", *beside) == [*alone[0], *alone[1]]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("{cluster: ray}", "not allowed in a grid"),
        ("{experiment: smoke}", "not allowed in a grid"),
        ("{hydra.run.dir: x}", "not allowed in a grid"),
        ("{hydra.callbacks.x: y}", "not allowed; Hydra.s settings"),
        ("{variant: '../x'}", "allowed is one of"),
        ("{variant: '[dense,chunked]'}", "allowed is one of"),
        ("{experiment@_global_: smoke}", "package of a group is fixed"),
        ("{name: '${depth}'}", "plain"),
        ("{name: '???'}", "not a value"),
        ("{'~seq_len': 1}", "cannot be removed"),
    ],
)
def test_a_grid_holds_what_a_command_line_may(grid: str, says: str) -> None:
    params = OmegaConf.create(grid)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        with pytest.raises(ConfigError, match=says):
            product(loader, params, [])


@pytest.mark.parametrize("preset", ["smoke", "listops"])
def test_a_sweep_s_cells_are_those_that_hydra_composes_one_by_one(preset: str) -> None:
    jobs = [[f"{key}={value}" for key, value in job.items()] for job in jobs_of(preset)[::9]]
    jobs += [["variant=dense", "model=small", value] for value in ("variant.impl=naive", "model.dropout=0.5")]
    jobs.append(["variant=chunked", "results_dir=x${seq_len}"])
    jobs.append(["variant=reformer", "activations=reversible", "model=base", "measure=quick", "tracker=none"])
    jobs.append(["variant=longformer", "variant=dense", "variant.impl=naive", "++name=a", "depth=3"])
    jobs += [[f"experiment={name}", *jobs[-2]] for name in ("modifications", "decode")]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = [f"experiment={preset}", "device=cpu"]
        composed = compose("config", overrides=chosen, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        make = Composer(loader, composed)
        for job in jobs:
            assert parse(make(job)) == parse(loader.load_sweep_config(composed, job))
        for mistake in ("sqe_len=5", "variant.impll=x", "variant=densee", "seq_len@x=5"):
            with pytest.raises(errors.KINDS) as one:
                make([mistake])
            with pytest.raises(errors.KINDS) as other:
                loader.load_sweep_config(composed, [mistake])
            assert str(one.value) == str(other.value)


def test_hydra_composes_once_for_each_group_and_not_for_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    names = variants.names()[:4]
    axes = [f"variant={','.join(names)}", "activations=keep,checkpoint,sqrt", "seq_len=range(1,6)"]
    composed: list[list[str]] = []
    load = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, master: DictConfig, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return load(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    cells = swept(monkeypatch, "measure=plan", "device=cpu", *axes)
    assert len({cell.spec.cell_id("data", "code") for cell in cells}) == 4 * 3 * 5
    assert sorted(composed) == [[], *([f"~{group}"] for group in ("activations", "measure", "variant"))]


@pytest.mark.parametrize("preset", ["smoke", "cpu", "gpu", "depth", "batch_payoff"])
def test_a_preset_that_compares_times_measures_a_few_cells_twice(preset: str) -> None:
    """Each such cell is there once more, in the same round, and others are measured in between. Cells that a
    grid interleaves are those of test_interleave.py."""
    base = cell_of("data=stdlib")
    cells = [
        replace(
            base,
            spec=replace(
                base.spec,
                variant=job["variant"],
                replicate=int(job.get("replicate", 0)),
                twin=int(job.get("twin", 0)),
                data=DataSpec(params={k: v for k, v in job.items() if k not in ("variant", "twin")}),
            ),
        )
        for job in jobs_of(preset)
    ]
    order = [cell.spec for cell in prepare.order_in_rounds(cells)]
    assert [spec.replicate for spec in order] == sorted(spec.replicate for spec in order)
    twins = [spec for spec in order if spec.twin]
    assert len({spec.variant for spec in twins}) > 1
    assert len(twins) < len(order) / 8
    for twin in twins:
        apart = order.index(twin) - order.index(replace(twin, twin=0))
        assert 1 < apart < len(order)


def test_a_cell_goes_to_the_experiments_folder() -> None:
    cell = cell_of("results_dir=there", "name=a/b", "force=true", "rerun=contaminated")
    assert (cell.folder, cell.name, cell.force) == (Path("there/a/b"), "a/b", True)
    assert cell.rerun == "contaminated"
    assert cell.spec.causal
    assert not cell_of("objective=mlm").spec.causal


def test_choose_gives_back_what_is_allowed() -> None:
    assert [choose("activations", value, ACTIVATIONS) for value in ACTIVATIONS] == list(ACTIVATIONS)
    with pytest.raises(ConfigError, match=r"^knob=zzz: unknown; allowed are aaa, bbb$"):
        choose("knob", "zzz", ["aaa", "bbb"])
