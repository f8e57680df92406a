"""The baseline between the cells of a grid: its places within a round, and what is not allowed."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hydra_sweeps import swept
from hypothesis import given, settings
from hypothesis import strategies as st

import variants
from bench.cli.interleave import Interleave
from bench.config.spec import Cell, CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.inputs.errors import ConfigError
from bench.run.prepare import order_in_rounds


def grid(**knobs: Any) -> str:
    inner = ",".join(f"{key}:{value}" for key, value in knobs.items())
    return "hydra.sweeper.params={" + inner + "}"


def planned(*arguments: str) -> list[Cell]:
    """The cells of a sweep in the order in which they run."""
    return order_in_rounds(swept("device=cpu", "data=stdlib", "measure=plan", *arguments))


def settings_of(cells: list[Cell]) -> list[tuple[tuple[int, int, int], list[CellSpec]]]:
    """Runs of consecutive cells with the same replicate, length and depth."""

    def setting(cell: Cell) -> tuple[int, int, int]:
        return cell.spec.replicate, cell.spec.seq_len, cell.spec.depth

    return [(key, [cell.spec for cell in group]) for key, group in groupby(cells, setting)]


OTHERS = [name for name in variants.names() if name not in ("dense", "hybrid")]


def cell_of(line: list[str]) -> Cell:
    """A cell with these overrides, composed without Hydra."""
    values: dict[str, str] = dict(override.split("=") for override in line)
    spec = CellSpec(
        variant=values["variant"],
        variant_params={},
        seq_len=int(values["seq_len"]),
        depth=2,
        batch_size=1,
        replicate=int(values["replicate"]),
        objective="clm",
        device="cpu",
        dtype="float32",
        activations="keep",
        model=ModelSizes(),
        data=DataSpec(name="stdlib"),
        measure=MeasureSpec(),
        twin=int(values.get("twin", 0)),
    )
    return Cell(spec=spec, folder=Path("x"), name="x", force=False)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 2))
def test_the_baseline_is_measured_before_and_after_so_many_others(
    nesting: list[int], count: int, every: int, listed: bool, twins: int
) -> None:
    """At each length, in whatever order the grid has its axes."""
    names = [*OTHERS[:count], *["dense"] * listed]
    axes = [
        [f"replicate={r}" for r in (0, 1)],
        [f"seq_len={length}" for length in (64, 128)],
        [f"variant={name}" for name in names],
    ]
    axes = [*(axes[n] for n in nesting), [f"twin={twin}" for twin in range(twins + 1)]]
    lines = [list(line) for line in product(*axes)]
    rule = Interleave.of({"every": str(every), "cell": {"variant": "dense"}})
    assert rule
    placed = rule.apply([(cell_of(line), line) for line in lines], cell_of)
    assert all(cell_of(line).spec == cell.spec for cell, line in placed)
    found = settings_of(order_in_rounds([cell for cell, _ in placed]))
    keys = [(r, length, 2) for r in (0, 1) for length in (64, 128)]
    assert sorted(key for key, _ in found) == keys, "each setting's cells are together"
    for _, specs in found:
        assert len({repr(spec) for spec in specs}) == len(specs), "no cell is there twice"
        others = [spec for spec in specs if spec.variant != "dense"]
        assert [spec.variant for spec in others if not spec.twin] == OTHERS[:count]
        assert len(others) == count * (twins + 1)
        places = [place for place, spec in enumerate(specs) if spec.variant == "dense"]
        assert [specs[place].twin for place in places] == list(range(len(places)))
        if not twins:
            gaps = [after - before - 1 for before, after in pairwise(places)]
            assert (places[0], places[-1]) == (0, len(specs) - 1)
            assert all(gap == every for gap in gaps[:-1])
            assert 1 <= gaps[-1] <= every


def test_a_baseline_has_the_knobs_of_the_cells_around_it_and_defaults_of_its_own() -> None:
    cells = planned(
        grid(
            variant="longformer",
            **{"variant.window": "'16,32'"},
            depth=3,
            interleave="{every:2,cell:{variant:dense}}",
        ),
        "model.d_model=32",
    )
    first, *others, last = [cell.spec for cell in cells]
    assert [spec.variant_params["window"] for spec in others] == [[16], [32]]
    assert first == replace(last, twin=0)
    (alone,) = planned("variant=dense", "depth=3", "model.d_model=32")
    assert first == alone.spec


def test_without_others_nothing_is_added() -> None:
    rule = {"interleave": "{every:2,cell:{variant:dense}}"}
    assert len(planned(grid(variant="dense", seq_len="'64,128'", **rule))) == 2
    assert len(planned(grid(variant="'chunked,longformer'", interleave="null"))) == 2


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (2, "interleave=2: allowed are null, or a mapping with every and cell"),
        ({"evry": 2, "cell": {"variant": "dense"}}, "did you mean every"),
        ({"every": 0, "cell": {"variant": "dense"}}, "interleave.every=0: allowed are whole numbers"),
        ({"every": 1.5, "cell": {"variant": "dense"}}, "interleave.every=1.5: allowed"),
        ({"cell": {"variant": "dense"}}, "interleave.every=None: allowed"),
        ({"every": 2}, "interleave.cell=None: allowed are knobs"),
        ({"every": 2, "cell": "dense"}, "interleave.cell=dense: allowed are knobs"),
    ],
)
def test_what_is_not_allowed_is_named(rule: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Interleave.of(rule)


@pytest.mark.parametrize(
    ("cell", "says"),
    [("{variant:'dense,chunked'}", "allowed is one value"), ("{experiment:smoke}", "not allowed in a grid")],
)
def test_a_baseline_is_one_cell_of_the_command(cell: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        planned(grid(variant="chunked", interleave=f"{{every:2,cell:{cell}}}"))


def test_dense_is_measured_around_every_two_variants_of_the_costs_on_a_cpu() -> None:
    cells = order_in_rounds(swept("experiment=cpu", "device=cpu", "data=stdlib", "replicate=1"))
    specs = [repr(cell.spec) for cell in cells]
    assert len(specs) == len({*specs}), "no cell is there twice"
    found = settings_of([cell for cell in cells if cell.spec.model.size == "small"])
    assert {key[1] for key, _ in found} == {512, 1024, 2048, 4096}
    compared = {cell.spec.variant for cell in cells} - {"dense"}
    assert compared < {*OTHERS}
    masked = {name for name in compared if not variants.load_mixer(name).info.caps.causal}
    for _, specs_of_round in found:
        order = [spec for spec in specs_of_round if not spec.twin or spec.variant == "dense"]
        for objective, others in (("clm", compared - masked), ("mlm", masked)):
            names = [spec.variant for spec in order if spec.objective == objective]
            assert {*names} == {"dense", *others}
            places = [place for place, name in enumerate(names) if name == "dense"]
            assert (places[0], places[-1]) == (0, len(names) - 1)
            assert max(after - before for before, after in pairwise(places)) <= 3
        assert len([*groupby(order, lambda spec: spec.objective)]) == 2, "each objective is together"


def test_the_baseline_has_the_objective_of_the_cells_around_it() -> None:
    """Linformer exists only with a masked objective."""
    rule = {"interleave": "{every:2,cell:{variant:dense}}"}
    found = planned(grid(variant="'chunked,linformer,longformer'", seq_len="'64,128'", **rule))
    causal = [("dense", "clm"), ("chunked", "clm"), ("longformer", "clm"), ("dense", "clm")]
    masked = [("dense", "mlm"), ("linformer", "mlm"), ("dense", "mlm")]
    assert [(cell.spec.variant, cell.spec.objective) for cell in found] == [*causal, *masked] * 2
    assert len({repr(cell.spec) for cell in found}) == len(found), "no cell is there twice"


def test_a_setting_that_two_grids_share_has_one_baseline() -> None:
    rule = "interleave:{every:2,cell:{variant:dense}}"
    grids = [f"{{variant:'{names}',{rule}}}" for names in ("chunked,longformer,dense", "performer")]
    cells = planned(f"hydra.sweeper.grids=[{','.join(grids)}]")
    found = [(cell.spec.variant, cell.spec.twin) for cell in cells]
    assert found == [
        *(("dense", 0), ("chunked", 0), ("longformer", 0)),
        *(("dense", 1), ("performer", 0), ("dense", 2)),
    ]
