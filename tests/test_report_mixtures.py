"""The report's section on mixtures: every figure by the share of layers that are dense."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from test_report import record, table, write
from test_report_decoding import cell
from test_report_memory import look, text_of
from test_report_recall import answers

from bench.records import Record
from bench.report.data import collect
from bench.report.data.experiment import read
from bench.report.figures import canvas
from bench.report.figures.style import styles
from bench.report.page.symbols import contrast
from bench.report.sections import compute, discover
from bench.report.sections.mixtures import SECTIONS
from bench.report.sections.mixtures.data import panels
from bench.report.sections.mixtures.plots import draw
from bench.report.sections.mixtures.sources import FIGURES
from bench.report.text.columns import shown
from variants.facts import layers_knob

WINDOW, LINEAR = "longformer(window=64)", "linear_transformer"
MIXED: dict[str, tuple[tuple[str, ...], float]] = {
    "windows, one dense": ((WINDOW, WINDOW, WINDOW, "dense"), 0.25),
    "windows, two dense": ((WINDOW, "dense"), 0.5),
    "linear": ((LINEAR,), 0.0),
    "linear, one dense": ((LINEAR, LINEAR, LINEAR, "dense"), 0.25),
}
"""Layers of one period, and the share of dense ones in four layers."""
NEEDED = ("cost", "decoding", "mixtures", "quality", "rates", "recall")


def model(layers: Sequence[str], name: str, replicate: int) -> dict[str, Any]:
    """What records of a mixture or of dense attention have in common."""
    own = {"variant": "hybrid", "variant_params": {"layers": list(layers)}}
    if tuple(layers) == ("dense",):
        own = {"variant": "dense", "variant_params": {"impl": "sdpa"}}
    return {**own, "depth": 4, "replicate": replicate, "cell_id": f"{name}-{'-'.join(layers)}-{replicate}"}


def share_of(layers: Sequence[str]) -> float:
    return statistics.mean(layers[block % len(layers)] == "dense" for block in range(4))


MODELS = [("dense",), (WINDOW,), *(layers for layers, _ in MIXED.values())]


def texts() -> list[Record]:
    """Windows lose 0.2 nats to dense, half of them less."""
    found = []
    for layers, r in itertools.product(MODELS, range(3)):
        nll = 1.5 + 0.2 * (1 - share_of(layers)) + 0.003 * r
        of = model(layers, "text", r)
        found.append(record(of.pop("variant"), nll=nll, step_seconds_median=2 - share_of(layers), **of))
    return found


def recalls() -> list[Record]:
    """Dense recalls all, linear layers alone nothing."""
    found = []
    for layers, r in itertools.product(MODELS, range(3)):
        made = answers("dense", 8, r, accuracy=0.25 + 0.7 * share_of(layers) + 0.01 * r)
        for key, value in model(layers, "recall", r).items():
            setattr(made, key, value)
        found.append(made)
    return found


def decoded(**figures: Any) -> list[Record]:
    """State and time of a token grow with the share; the second replicate ran on a slower machine."""
    found = []
    for layers, length, r in itertools.product(MODELS, (512, 2048), range(2)):
        share, of = share_of(layers), model(layers, f"decode{length}", r)
        variant, cell_id, _ = (of.pop(key) for key in ("variant", "cell_id", "replicate"))
        of |= {"decode_state_bytes": int(1024 * (length * share + 64 * (1 - share)))}
        of |= {"decode_batch_seconds_median": (1 + r) * (1 + share)}
        found.append(cell(variant, length, r, (1 + r) * (0.001 + 0.001 * share), **of, **figures))
        found[-1].cell_id = cell_id
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixtures") / "x", [*texts(), *recalls(), *decoded()])


@pytest.fixture(scope="module")
def measured(folder: Path) -> pd.DataFrame:
    """The section's data."""
    return points_of(folder)


def points_of(folder: Path) -> pd.DataFrame:
    """The section's data, with those of the sections that it needs alone."""
    sections = [section for section in discover() if section.name in NEEDED]
    points: pd.DataFrame = compute(read(folder), sections).data["mixtures"]
    return points


def columns_of(points: pd.DataFrame, place: int = 0) -> dict[str, list[str]]:
    """A table of the section: title → cells."""
    return {column.title: column.cells for column in shown(SECTIONS[0].tables(points)[place].columns)}


def labels_of(folder: Path, found: list[Record]) -> list[str]:
    """The labels of records, in the order of their replicates."""
    frame = read(write(folder, found)).collected.frame.sort_values("replicate")
    return [str(label) for label in frame["label"]]


def mixtures(*kinds: tuple[tuple[str, ...], str | None]) -> list[Record]:
    """A record of each mixture, with the implementations of its members."""
    found = [model(layers, "text", number) for number, (layers, _) in enumerate(kinds)]
    pairs = zip(found, kinds, strict=True)
    return [record(of.pop("variant"), impl=impl, **of) for of, (_, impl) in pairs]


def test_a_mixture_is_named_by_its_layers(tmp_path: Path) -> None:
    """In their order; of a single kind of layer the name still says that it is a mixture."""
    kinds = ((WINDOW, WINDOW, "dense"), ("dense", WINDOW, WINDOW), (LINEAR,), (WINDOW, WINDOW))
    assert labels_of(tmp_path / "x", mixtures(*((layers, None) for layers in kinds))) == [
        "2×longformer (window=64) + dense",
        "dense + 2×longformer (window=64)",
        "hybrid of linear_transformer",
        "hybrid of 2×longformer (window=64)",
    ]
    assert labels_of(tmp_path / "one", mixtures((kinds[0], None))) == ["hybrid"]


def test_the_implementation_of_members_is_no_part_of_a_name(tmp_path: Path) -> None:
    """It follows from the layers and the code: other code that names more of them measured the same model."""
    fused, plain, layers = "longformer=fused, dense=sdpa", "dense=sdpa", (WINDOW, "dense")
    found = mixtures((layers, fused), (layers, plain), ((LINEAR,), None))
    for one, length in zip(found, (512, 1024, 512), strict=True):
        one.seq_len = length
    name = "longformer (window=64) + dense"
    assert labels_of(tmp_path / "lengths", found) == [name, name, "hybrid of linear_transformer"]
    same = mixtures((layers, fused), (layers, plain), ((LINEAR,), None))
    assert labels_of(tmp_path / "same", same)[:2] == [f"{name} (impl={fused})", f"{name} (impl={plain})"]


def test_two_variants_with_layers_keep_their_names_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "layers_knob", lambda name: None if name == "dense" else "layers")
    found = mixtures(((WINDOW, "dense"), None), ((LINEAR, "dense"), None))
    other = mixtures(((WINDOW, "dense"), None), ((LINEAR, "dense"), None))
    for number, one in enumerate(other):
        one.variant, one.replicate, one.cell_id = "another", 2 + number, f"another{number}"
    names = ["longformer (window=64) + dense", "linear_transformer + dense"]
    expected = [f"{variant} of {name}" for variant in ("hybrid", "another") for name in names]
    assert labels_of(tmp_path / "x", [*found, *other]) == expected


def test_mixtures_have_hues_of_their_own() -> None:
    looks = styles([("dense", "dense"), *(("hybrid", f"{times}×rfa + dense") for times in range(2, 9))])
    colours = {style.colour for style in looks.values()}
    assert len(colours) == len(looks)
    for label, style in looks.items():
        assert contrast(style.colour, "#ffffff") >= 3 - 0.01, "it stands out from the background"
        assert (len({*to_rgb(style.colour)}) == 1) is (label == "dense"), "grey is dense alone"


@pytest.mark.parametrize("name", ["dense", "longformer", "latent_attention", "no_such_variant"])
def test_only_mixtures_have_a_knob_of_layers(name: str) -> None:
    assert layers_knob(name) is None
    assert layers_knob("hybrid") == "layers"


def test_shares_are_counted_in_the_layers_of_the_model(tmp_path: Path) -> None:
    """Four layers with a period of three have the first one twice; the order makes no other kind."""
    kinds = [
        (WINDOW, WINDOW, "dense"),
        ("dense", WINDOW, WINDOW),
        ("dense", "rfa", WINDOW),
        (WINDOW, "dense", "rfa"),
        ("dense", "dense"),
    ]
    found = []
    for layers in (("dense",), *kinds):
        of = model(layers, "text", 0)
        found.append(record(of.pop("variant"), **of))
    points = points_of(write(tmp_path / "x", found))
    bits = points[points["figure"] == "bits"]
    seen = {(row["layers"], row["share"], row["kind"], row["member"]) for _, row in bits.iterrows()}
    both = "longformer (window=64) + rfa"
    assert seen == {
        ("dense", 1.0, "", "dense"),
        ("2×longformer (window=64) + dense", 0.25, "longformer (window=64)", "longformer"),
        ("dense + 2×longformer (window=64)", 0.5, "longformer (window=64)", "longformer"),
        ("dense + rfa + longformer (window=64)", 0.5, both, "longformer"),
        ("longformer (window=64) + dense + rfa", 0.25, both, "longformer"),
    }, "dense in every layer is dense attention, and no mixture"


def test_the_table_has_the_figures_of_the_records(measured: pd.DataFrame) -> None:
    columns = columns_of(measured)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert [(row["other layers"], row["layers"], row["dense layers"]) for row in rows] == [
        ("–", "dense", "100 %"),
        ("linear_transformer", "linear_transformer", "0 %"),
        ("linear_transformer", "3×linear_transformer + dense", "25.0 %"),
        ("longformer (window=64)", "longformer (window=64)", "0 %"),
        ("longformer (window=64)", "3×longformer (window=64) + dense", "25.0 %"),
        ("longformer (window=64)", "longformer (window=64) + dense", "50.0 %"),
    ]
    dense, linear, _, windows, _, half = rows
    bits = [1.503 / np.log(2), statistics.stdev(r.bits_per_byte or 0 for r in texts()[:3])]
    assert dense["bits per byte"] == f"{bits[0]:.3f} ± {bits[1]:.3f}"
    assert dense["bits per byte − dense"] == "–"
    assert windows["bits per byte − dense"].startswith(f"+{0.2 / np.log(2):.3f} (+")
    assert half["accuracy"] == "61.0 ± 1.0 %"
    assert linear["accuracy / dense"] == "0.271×"
    assert (half["state"], half["state / dense"]) == ("1.03 MiB", "0.516×"), "at the longest context"
    assert (half["time a token"], half["time a token / dense"]) == ("2.25 ms", "0.750×")
    assert (windows["tokens a second"], windows["tokens a second / dense"]) == ("7.50 tokens/s", "2.00×")
    assert windows["step time / dense"].startswith("2.00×")
    (shown_table,) = SECTIONS[0].tables(measured)
    words = "Bits per byte: data plays, width 64, batch 4, length 512; accuracy: data mqar"
    assert shown_table.note.startswith(words)
    figures = SECTIONS[0].csv_tables(measured)["mixtures"]
    assert set(figures["figure"]) == set(FIGURES)
    assert set(figures.loc[figures["figure"] == "token", "seq_len"]) == {512, 2048}


def points(axis: Axes) -> list[list[tuple[float, float]]]:
    """The points of each line of several."""
    lines = (np.asarray(line.get_xydata()) for line in axis.get_lines())
    return [[(float(x), float(y)) for x, y in own] for own in lines if len(own) > 1]


def test_every_line_ends_at_dense_and_the_doubt_is_a_band(
    folder: Path, measured: pd.DataFrame, tmp_path: Path
) -> None:
    own = measured
    figure = draw(own, look(read(folder).collected.frame))
    assert figure is not None
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == [
        "bits per byte",
        "accuracy",
        "state",
        "step time",
        "time a token",
        "tokens a second",
    ]
    for axis, pool in zip(figure.axes, panels(own), strict=True):
        full = pool.loc[pool["kind"] == "", "value"].item()
        lines = [line for line in points(axis) if line[0][0] < line[-1][0] < 1.01]
        if pool["figure"].iloc[0] == "accuracy":
            lines = [line for line in lines if line[-1][1] != 1 / 8]  # guessing
        assert len(lines) == 2
        assert [[x for x, _ in line] for line in lines] == [[0, 0.25, 1], [0, 0.25, 0.5, 1]]
        assert all(line[-1] == (1.0, pytest.approx(full)) for line in lines)
    bits = panels(own)[0]
    (band,) = figure.axes[0].patches
    half = (bits["difference_high"] - bits["difference_low"]).max() / 2
    low, high = band.get_extents().transformed(figure.axes[0].transData.inverted()).intervaly
    dense = bits.loc[bits["kind"] == "", "value"].item()
    assert (low, high) == (pytest.approx(dense - half), pytest.approx(dense + half))
    assert bits["differs"].dropna().all(), "0.1 nats are more than the doubt"
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == [
        "dense",
        "longformer (window=64)",
        "linear_transformer",
        "doubt of a difference",
        "guessing",
    ]
    with canvas.look():
        canvas.save(figure, tmp_path, "mixtures")
    assert imread(tmp_path / "mixtures.png").std() > 0.01


@pytest.mark.slow
def test_every_figure_of_a_report_on_mixtures_is_drawn(tmp_path: Path) -> None:
    """Their names are short enough to stand at the ends of lines."""
    shallow = texts()
    for made in shallow:
        made.depth, made.cell_id = 2, f"shallow-{made.cell_id}"
    folder = tmp_path / "x"
    text = text_of(folder, [*texts(), *shallow, *recalls(), *decoded()], plots=True)
    stems = {path.stem for path in (folder / "report" / "plots").glob("mixtures*.png")}
    assert stems == {"mixtures-depth_2", "mixtures-depth_4"}
    assert "](plots/mixtures-depth_4.png)](plots/mixtures-depth_4.svg)" in text
    assert "### Mixtures, depth 2\n" in text
    rows = table(text, "### Mixtures, depth 4")
    assert [row["dense layers"] for row in rows] == ["100 %", "0 %", "25.0 %", "0 %", "25.0 %", "50.0 %"]
    assert len(pd.read_csv(folder / "report" / "mixtures.csv")) > len(rows)
    assert "3×longformer (window=64) + dense" in text


def test_without_two_shares_there_is_no_section(tmp_path: Path) -> None:
    mixture = {"layers": [WINDOW, "dense"]}
    one = [r for r in texts() if not r.replicate and r.variant_params in ({"impl": "sdpa"}, mixture)]
    assert points_of(write(tmp_path / "one", one)).empty
    assert not SECTIONS[0].tables(pd.DataFrame())
    assert SECTIONS[0].csv_tables(pd.DataFrame()) == {}


def test_decoding_alone_and_no_dense_attention(tmp_path: Path) -> None:
    """Without dense there are no ratios, and lines end at their last mixture."""
    found = [r for r in decoded(contaminated="other load") if r.variant != "dense"]
    folder = write(tmp_path / "x", found)
    own = points_of(folder)
    columns = columns_of(own)
    assert columns["layers"] == [
        LINEAR,
        f"3×{LINEAR} + dense",
        "longformer (window=64)",
        "3×longformer (window=64) + dense",
        "longformer (window=64) + dense",
    ]
    assert not any("/ dense" in title or "step time" in title for title in columns)
    assert all(cell.endswith("§") for cell in columns["time a token"])
    figure = draw(own, look(read(folder).collected.frame))
    assert figure is not None
    lines = [[x for x, _ in line] for line in points(figure.axes[0])]
    assert sorted(lines) == [[0, 0.25], [0, 0.25, 0.5]]


def test_a_model_that_leaks_is_marked(tmp_path: Path) -> None:
    leaky = [made for made in texts() if not made.replicate]
    for made in leaky:
        made.leak_max_abs = 0.5 if made.variant_params == {"layers": [LINEAR]} else made.leak_max_abs
    columns = columns_of(points_of(write(tmp_path / "x", leaky)))
    marked = {
        layers
        for layers, cell in zip(columns["layers"], columns["bits per byte"], strict=True)
        if "†" in cell
    }
    assert marked == {LINEAR}
