"""`longformer.window=64,256` in a sweep over variants: a knob of one of them; so in every slot."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import bench
from hydra_sweeps import swept

from bench.cli import entry_knobs, guard
from bench.inputs.errors import ConfigError


def cells(*arguments: str) -> list[tuple[str, object]]:
    """The variant of each cell and its window."""
    found = swept(*guard.checked(arguments))
    return [(c.spec.variant, {**c.spec.variant_params}.get("window")) for c in found]


def test_a_knob_is_swept_where_the_variant_has_it() -> None:
    assert cells("variant=dense,longformer", "longformer.window=64,256") == [
        ("dense", None),
        ("longformer", [64]),
        ("longformer", [256]),
    ]


def test_one_value_applies_to_its_variant_alone() -> None:
    assert cells("variant=dense,longformer", "longformer.window=16", "seq_len=32") == [
        ("dense", None),
        ("longformer", [16]),
    ]
    found = swept(
        *guard.checked(["variant=glob(*,exclude=hybrid)", "reformer.impl=plain", "chunked.chunk=8"])
    )
    assert {c.spec.variant for c in found if c.spec.variant_params.get("chunk") == 8} == {"chunked"}
    assert len(found) == len({c.spec.variant for c in found})


def test_so_are_knobs_of_the_other_slots() -> None:
    chosen = ("feed_forward=mlp,switch", "switch.n_experts=2,4", "stack=stack,funnel", "funnel.stride=2")
    found = swept(*guard.checked(["variant=dense", "objective=mlm", *chosen]))
    cells = [
        (c.spec.feed_forward.name, {**c.spec.feed_forward.params}.get("n_experts"), c.spec.stack.name)
        for c in found
    ]
    assert cells == [
        (layer, experts, schedule)
        for layer, experts in (("mlp", None), ("switch", 2), ("switch", 4))
        for schedule in ("stack", "funnel")
    ]
    assert {c.spec.stack.params["stride"] for c in found if c.spec.stack.name == "funnel"} == {2}


def test_an_entry_has_one_owner() -> None:
    """The name of a group is the group's: `stack.stride` is a knob of whatever schedule is chosen."""
    assert entry_knobs.of_group("stack.stride") is None
    assert entry_knobs.of_group("switch.n_experts") == "feed_forward.n_experts"
    assert entry_knobs.of_group("longformer.window") == "variant.window"
    assert entry_knobs.of_group("seq_len") is None


def test_it_applies_to_all_grids_of_a_preset() -> None:
    found = [
        value for variant, value in cells("experiment=cpu", "longformer.window=32") if variant == "longformer"
    ]
    assert found
    assert all(value == [32] for value in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variant=dense,chunked", "longformer.window=8"], "no cell of the sweep has variant=longformer"),
        (
            ["variant=longformer", "longformer.window=8", "variant.window=16"],
            "variant.window is given too",
        ),
        (["variant=dense,longformer", "longformer.windw=8"], "longformer.windw: .* mean longformer.window"),
        (
            ["feed_forward=mlp,glu", "glu.n_experts=8"],
            "glu.n_experts: unknown knob; allowed are glu.activation, glu.mult",
        ),
        (["feed_forward=mlp,glu", "switch.n_experts=8"], "no cell of the sweep has feed_forward=switch"),
        (["variant=[dense,longformer]"], r"variant=hybrid variant.layers=\[dense,longformer\]"),
    ],
)
def test_what_is_ambiguous_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(*arguments)


def test_the_message_about_a_knob_of_another_variant_says_how(tmp_path: Path) -> None:
    done = bench("-m", "variant=dense,longformer", "variant.window=64,256", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "longformer" in line
    assert "or in a sweep over several write longformer.window=…" in line, "one of the sweep"


def test_the_message_survives_an_entry_of_one_s_own(tmp_path: Path) -> None:
    """Its name is no variant's."""
    (tmp_path / "ours/variant").mkdir(parents=True)
    (tmp_path / "ours/variant/narrow.yaml").write_text("name: longformer\nwindow: 8\n")
    done = bench("--config-dir", "ours", "variant=dense", "variant.window=8", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "variant.window: unknown knob" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["longformer.window=64"],
            "longformer.window=64: only for a sweep; add -m (or --multirun); for a single cell, "
            "write variant.window=64",
        ),
        (["seq_len=range(8,64)"], "seq_len=range(8,64): only for a sweep; add -m (or --multirun)"),
        (["-m", "seq_len=range(0,10,0)"], "seq_len=range(0,10,0): the step of a range must not be 0"),
    ],
)
def test_what_is_of_a_sweep_says_so(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = bench("measure=plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {message}\n"


def test_options_may_stand_anywhere() -> None:
    """Hydra itself takes them in front of the overrides only."""
    assert guard.checked(["seq_len=32", "-m", "variant=dense,longformer", "seq_len=32"]) == [
        "-m",
        "seq_len=32",
        "variant=dense,longformer",
        "seq_len=32",
    ]
    assert guard.checked(["seq_len=32", "--cfg", "job"]) == ["--cfg", "job", "seq_len=32"]
