"""Three dozen variants in one report: looks that follow from families, and figures that stay readable."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from many_records import ZOO, zoo
from matplotlib.colors import to_rgb
from test_report import write

import variants
from bench.report.__main__ import main
from bench.report.data.experiment import read
from bench.report.figures import selection, style
from bench.report.figures.drawing import draw_all
from bench.report.figures.selection import MOST, Selection
from bench.report.figures.style import looks_of, styles, variant_rank
from bench.report.page import html
from bench.report.page.symbols import contrast
from bench.report.sections import Results, compute, discover
from variants import facts

NAMES = [name for own in ZOO.values() for name in own]
FAMILY = {name: family for family, own in ZOO.items() for name in own}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_installed", lambda: sorted(NAMES))
    monkeypatch.setattr(style, "family", lambda name: FAMILY.get(name, facts.UNKNOWN))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    records = [*zoo(lengths=2, depths=1, replicates=1)]
    return compute(read(write(tmp_path_factory.mktemp("zoo"), records)), discover())


@pytest.fixture
def frame(results: Results) -> pd.DataFrame:
    return results.records.collected.frame.copy()


# --- looks --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_looks_follow_from_the_installed_variants_alone() -> None:
    every = looks_of(NAMES)
    for name in NAMES:
        assert looks_of([name, "no_such_variant"])[name] == every[name]
    assert len(set(every.values())) == len(NAMES)


@pytest.mark.usefixtures("installed")
def test_a_family_is_a_range_of_hues_and_its_members_differ_in_the_marker() -> None:
    found = looks_of(NAMES)
    for family, own in ZOO.items():
        assert len({found[name][1] for name in own}) == len(own)
        if family != "dense":
            turns = [_hue(found[name][0]) for name in own]
            spread = max(abs((a - b + 180) % 360 - 180) for a in turns for b in turns)
            assert spread <= style.HUE_RANGE + 2
    first = {found[own[0]][1] for own in ({f: sorted(o) for f, o in ZOO.items()}).values()}
    assert len(first) == len(ZOO)


@pytest.mark.usefixtures("installed")
def test_marks_of_one_shape_differ_in_colour_and_stand_out_from_the_page() -> None:
    found = looks_of(NAMES)
    for colour, _ in found.values():
        assert contrast(colour, "#ffffff") >= 3
    for one, other in combinations(NAMES, 2):
        if found[one][1] == found[other][1]:
            rgb = (to_rgb(found[name][0]) for name in (one, other))
            assert sum(abs(a - b) for a, b in zip(*rgb, strict=True)) > 0.2


def _hue(colour: str) -> float:
    """Degrees in OKLab."""
    rgb = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array([[1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]])
    a, b = lab @ np.cbrt(cone @ rgb)
    return float(np.degrees(np.arctan2(b, a)))


def test_every_installed_variant_has_a_look_of_its_own() -> None:
    found = looks_of(variants.names())
    assert len(set(found.values())) == len(variants.names())
    assert found["dense"] == ("#000000", "o")


def test_variants_from_elsewhere_differ_and_have_colours() -> None:
    names = [f"variant_{number}" for number in range(13)]
    found = looks_of(names)
    assert len({colour for colour, _ in found.values()}) == len({m for _, m in found.values()}) == 13


def test_labels_of_a_variant_share_its_marker_and_differ_in_colour() -> None:
    found = styles([("longformer", "longformer (window=64)"), ("longformer", "longformer (window=128)")])
    assert len({s.marker for s in found.values()}) == 1
    assert len({s.colour for s in found.values()}) == 2


def test_a_family_of_its_own_name_follows_those_of_the_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {
        "a": "sparse weights",
        "b": "a new family",
        "c": "memory",
        "d": facts.MIXTURE,
        "e": facts.UNKNOWN,
    }
    monkeypatch.setattr(style, "family", groups.__getitem__)
    assert sorted("edcba", key=variant_rank) == ["c", "b", "a", "d", "e"]


# --- figures ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_dense_and_the_best_of_every_family_are_drawn(frame: pd.DataFrame) -> None:
    chosen = Selection.of(frame)
    drawn = chosen.drawn(NAMES)
    assert len(drawn) == MOST
    assert "dense" in drawn
    best = [min(own, key=lambda name: (chosen.standing.get(name, 1), name)) for own in ZOO.values()]
    assert set(best) <= drawn


def test_the_best_is_so_at_the_longest_length_or_in_loss_and_a_leak_is_no_loss(
    frame: pd.DataFrame, installed: None
) -> None:
    longest = frame["seq_len"] == frame["seq_len"].max()
    fast = frame["variant"] == "axial"
    good, leaky = frame["variant"] == "etc", frame["variant"] == "light_conv"
    frame.loc[frame["variant"].eq("bigbird") & ~longest, "step_seconds_median"] = 1e-9  # not at the longest
    frame.loc[fast & longest, "step_seconds_median"] = 1e-9
    frame.loc[(good | leaky) & frame["nll"].notna(), "nll"] = 0.5
    frame.loc[leaky, "leak_max_abs"] = 1.0
    standing = Selection.of(frame).standing
    rest = [value for name, value in standing.items() if name not in ("axial", "etc")]
    assert max(standing["axial"], standing["etc"]) < min(rest)


def test_few_variants_are_all_drawn(frame: pd.DataFrame) -> None:
    few = frame[frame["variant"].isin(NAMES[:MOST])]
    assert Selection.of(few).part(few)[1] == ""
    assert Selection.of(frame, None).drawn(NAMES) == set(NAMES)


def svg_of(results: Results, folder: Path, stem: str, **options: Any) -> str:
    """The text of one figure of the report."""
    every = [spec for section, data in results for spec in section.figures(data)]
    specs = {"one": [spec for spec in every if spec.stem == stem]}
    draw_all(specs, results.records.collected.frame, results.records.kinds, folder, **options)
    return (folder / "plots" / f"{stem}.svg").read_text()


def texts_in(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def names_in(svg: str) -> set[str]:
    found = {text.split(" ")[0] for text in texts_in(svg)}
    return found & set(NAMES)


@pytest.mark.usefixtures("installed")
def test_a_figure_says_how_many_it_leaves_out(results: Results, tmp_path: Path) -> None:
    svg = svg_of(results, tmp_path, "step_time")
    assert len(names_in(svg)) == MOST
    said = f"{MOST} of {len(NAMES)} variants: dense and the best of each family by loss, accuracy or time; "
    assert f"{said}{selection.OPTION} draws the other {len(NAMES) - MOST}" in " ".join(texts_in(svg))


@pytest.mark.usefixtures("installed")
def test_a_figure_with_a_row_for_each_variant_has_all(
    results: Results, frame: pd.DataFrame, tmp_path: Path
) -> None:
    svg = svg_of(results, tmp_path, "held_out_loss")
    assert names_in(svg) == set(frame.loc[frame["nll"].notna(), "variant"])
    assert selection.OPTION not in svg


@pytest.mark.usefixtures("installed")
def test_the_option_draws_all(results: Results, tmp_path: Path) -> None:
    assert names_in(svg_of(results, tmp_path, "step_time", max_variants=None)) == set(NAMES)


def test_what_is_drawn_in_any_case_is_drawn_too(frame: pd.DataFrame, installed: None) -> None:
    chosen = Selection.of(frame)
    left = sorted(set(NAMES) - chosen.drawn(NAMES))[:2]
    cells, words = chosen.part(frame, left)
    assert set(cells["variant"]) == chosen.drawn(NAMES) | set(left)
    assert f"{MOST + 2} of {len(NAMES)}" in words


def test_the_command_line_has_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert selection.OPTION in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_the_page_has_families_and_what_is_left_out(results: Results) -> None:
    page = html(results)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["left_out"]) == len(NAMES) - MOST
    assert [family["name"] for family in data["families"]] == list(ZOO)
    assert "Show the best" in page
