"""The notebooks run, say what they show, and what they make of the records is what the report says."""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import HANG_SECONDS
from jupytext.config import load_jupytext_config
from nbclient import NotebookClient
from nbformat import NotebookNode
from test_report import failed, record, write

import variants
from bench import records
from bench.records import Record
from bench.report import build
from bench.tasks.base import Setting
from bench.tasks.dialogue import Dialogue, DialogueConfig

ROOT = Path(__file__).parents[1]
PAIRING = load_jupytext_config(str(ROOT / "notebooks" / "statistics.ipynb"))
TEXTS = {"peak_phase", "claim_source", "attention_kernels", "search_budget"}
"""Of summary.csv, what is no figure, though a column that is empty reads like one."""


def experiment() -> list[Record]:
    """Three variants at two lengths, with two, five and seven replicates, twins, and a cell that failed."""
    found = []
    for seq_len, replicates in ((512, 2), (1024, 5), (2048, 7)):
        for replicate in range(replicates):
            for variant in ("dense", "chunked", "longformer"):
                where: dict[str, Any] = {"variant": variant, "seq_len": seq_len, "replicate": replicate}
                started = f"2026-03-01T1{replicate}:00:00+00:00"
                noise = random.Random(f"{variant}{seq_len}{replicate}")
                for twin in range(TWINS if variant == "dense" else 1):
                    time = (
                        1e-3 * seq_len * (1 + 0.05 * noise.random()) * (1.3 if variant == "longformer" else 1)
                    )
                    other: dict[str, Any] = {"step_seconds_median": time, "tokens_per_second": seq_len / time}
                    other |= {"ngram_bits_per_byte": [4.0, 3.0, 2.25, 2.0 + replicate / 100, 2.0]}
                    other |= {"ngram_train_bytes": 250_000, "gzip_bits_per_byte": 3.5}
                    if twin:
                        other |= {"twin": twin, "cell_id": f"{seq_len}-{replicate}-{twin}"}
                    found.append(record(**where, **other, started_at=started))
    found.append(failed("oom", "too big", variant="dense", seq_len=4096))
    old = record("dense", seq_len=512, replicate=0, step_seconds_median=9.0, code_sha256="0" * 64)
    old.cell_id, old.started_at = "old", "2025-01-01T00:00:00+00:00"
    return [*found, old]


RANKING = {"rank_low", "rank_high", "comparisons", *(f"nll_to_dense{end}" for end in ("", "_low", "_high"))}
"""Figures that compare all models of a pool. The notebook leaves them to tests/test_report_ranks.py, which
sets them against other computations and simulated pools."""

TWINS = 2 if "twin" in records.KEYS else 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An experiment's report, and the names that the notebook leaves behind."""
    folder = write(tmp_path_factory.mktemp("demo") / "demo", experiment())
    report = build(folder, plots=False)
    notebook = json.loads((ROOT / "notebooks" / "statistics.ipynb").read_text())
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESULTS", str(folder))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"<{cell['id']}>", "exec"), names)
    return report, names


def test_the_notebook_makes_every_figure_of_the_summary(run: tuple[Path, dict[str, Any]]) -> None:
    report, names = run
    theirs, mine = names["theirs"], names["mine"]
    figures = {name for name in theirs if pd.api.types.is_numeric_dtype(theirs[name])} - RANKING
    assert figures - set(mine) - TEXTS == set()
    assert len(theirs) == len(pd.read_csv(report / "summary.csv")) == 10
    for name in figures - TEXTS:
        got, expected = (frame[name].astype(float).to_numpy() for frame in (mine, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=name)
    assert names["difference"].max() < 1e-9


def test_the_notebook_finds_the_same_cells_undertrained(run: tuple[Path, dict[str, Any]]) -> None:
    _, names = run
    theirs, mine = names["theirs"]["undertrained"], names["mine"]["undertrained"]
    assert theirs.eq(True).tolist() == mine.eq(True).tolist()
    assert {True, False} == set(theirs.dropna().astype(bool))


def test_the_notebook_tells_the_same_cells_apart(run: tuple[Path, dict[str, Any]]) -> None:
    _, names = run
    theirs, mine = names["theirs"]["differs"], names["mine"]["differs"]
    assert theirs.isna().tolist() == mine.isna().tolist()
    known = theirs.notna()
    assert theirs[known].astype(bool).tolist() == mine[known].astype(bool).tolist()
    assert {True, False} == set(theirs[known].astype(bool)) or TWINS == 1


def test_the_notebook_finds_the_noise_of_the_report(run: tuple[Path, dict[str, Any]]) -> None:
    report, names = run
    theirs, mine = pd.read_csv(report / "noise.csv").set_index("machine"), names["noise"]
    assert theirs["pairs"].sum() == len(names["aa"])
    for name in ("floor", "upper", "median", "found_suggested"):
        expected = theirs[name].dropna()
        assert mine[name].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)


# --- every notebook ---------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
TORCH_FREE = "import sys; print('torch' in sys.modules)"


def cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@every_notebook
def test_notebooks_are_kept_without_their_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), path.name
        assert cell.get("execution_count") is None, path.name


@every_notebook
def test_a_notebook_and_its_text_are_one(path: Path) -> None:
    """After an edit of one, `jupytext --sync` is due."""
    text = path.with_suffix(".nb.py")
    assert cells(jupytext.read(text)) == cells(nbformat.read(path, as_version=4))
    assert text.read_text() == jupytext.writes(
        nbformat.read(path, as_version=4), config=PAIRING, fmt=".nb.py:percent"
    )


def test_every_text_has_its_notebook() -> None:
    texts = {path.name.removesuffix(".nb.py") for path in (ROOT / "notebooks").glob("*.py")}
    assert (
        texts
        == {path.stem for path in NOTEBOOKS}
        >= {
            "compare",
            "memory",
            "patterns",
            "reformer_dialogue",
            "statistics",
        }
    )


def ran(name: str, *more: str, after: tuple[str, str] | None = None, measures: bool = False) -> NotebookNode:
    """A notebook after it ran in a kernel of its own, as by `make notebooks`, with more cells at its end.

    `after`: how a cell begins, and the code of a cell that is inserted after it. `measures`: it runs cells of
    the benchmark, whose progress goes to stderr.
    """
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if after:
        (place,) = [k for k, cell in enumerate(notebook.cells) if cell.source.startswith(after[0])]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(after[1]))
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    client = NotebookClient(
        notebook,
        timeout=HANG_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute()
    said = [output.text for output in outputs(notebook, "stream") if output.name == "stderr"]
    assert bool(said) == measures, "a notebook warns of nothing"
    return notebook


def outputs(notebook: NotebookNode, *kinds: str) -> list[NotebookNode]:
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in found if output.output_type in kinds]


def pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.data for output in outputs(notebook, "display_data", "execute_result"))


def test_compare_shows_the_reference_run_without_torch() -> None:
    notebook = ran("compare", TORCH_FREE)
    assert pictures(notebook) == 4
    printed = [output.text for output in outputs(notebook, "stream")]
    assert printed[0].startswith("156 records")
    assert printed[-1] == "False\n"
    (style, *_) = [
        o.data["text/html"] for o in outputs(notebook, "execute_result") if "1.00×" in o.data["text/html"]
    ]
    assert {"longformer", "transformer_xl"} <= set(re.findall(r"[a-z_]+", style))


def test_compare_takes_what_a_sweep_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that failed, records of older code, twins, nothing but one depth."""
    monkeypatch.setenv("RESULTS", str(write(tmp_path / "demo", experiment())))
    notebook = ran("compare")
    assert pictures(notebook) >= 2
    assert any("too big" in o.data["text/plain"] for o in outputs(notebook, "execute_result"))


def test_patterns_explains_every_variant_with_its_formula_and_its_paper() -> None:
    """Read, not run: each section names its variant, has mathematics in it and links what it cites."""
    notebook = nbformat.read(ROOT / "notebooks" / "patterns.ipynb", as_version=4)
    sections = {}
    for cell, following in itertools.pairwise(notebook.cells):
        if heading := re.match(r"## `(\w+)`: ", cell.source):
            sections[heading[1]] = cell.source
            assert following.source == f'show("{heading[1]}")'
    assert set(sections) == set(variants.mixers()) - set(variants.plugins())
    for name, text in sections.items():
        assert "$" in text, name
        assert len(text.split()) > 30, name
        paper = variants.load(name).info.paper
        for number in re.findall(r"\d{4}\.\d{5}", paper):
            assert f"(https://arxiv.org/abs/{number})" in text, name
        assert "arXiv" in paper or paper in text, name


CONSTANTS = "FOLDER = "
"""How the cell begins that has the sizes of the training notebook."""


def test_the_dialogues_of_the_training_notebook_fill_its_windows(tmp_path: Path) -> None:
    """At the notebook's own sizes, up to where it would measure; and hashing finds what it should."""
    names: dict[str, Any] = {}
    notebook = nbformat.read(ROOT / "notebooks" / "reformer_dialogue.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if "longctx_bench.sweep" in cell.source:
                break
            exec(compile(cell.source, f"<{cell['id']}>", "exec"), names)
            if cell.source.startswith(CONSTANTS):
                names["FOLDER"] = tmp_path
    config = DialogueConfig(path=str(names["path"]), bpe=400)
    setting = Setting(
        data="dialogue",
        objective="clm",
        replicate=0,
        seq_len=names["SEQ_LEN"],
        test_tokens=65_536,
        batch_size=4,
    )
    assert Dialogue(config, setting).unsupported() is None
    longer = replace(setting, seq_len=10 * names["SEQ_LEN"])
    assert Dialogue(config, longer).unsupported(), "the check itself"
    probability = names["same_bucket"]
    assert probability[-1] == 1, "equal vectors have equal hashes"
    assert probability[np.abs(names["cosines"]).argmin()] == pytest.approx(1 / names["N_BUCKETS"], abs=0.03)
    assert (np.diff(probability) > -0.03).all(), "the nearer, the more likely"


@pytest.mark.slow
def test_reformer_dialogue_trains_in_small(tmp_path: Path) -> None:
    sizes = f"""
FOLDER = Path({str(tmp_path)!r})
N_DIALOGUES, SEQ_LEN, TRAIN_TOKENS, LENGTHS, DEPTH = 100, 128, 4000, [64, 128], 4
"""
    frames = "print(sizes['peak_bytes'].to_json()); print(trained['softmax_error'].to_json())"
    notebook = ran("reformer_dialogue", frames, after=(CONSTANTS, sizes), measures=True)
    assert pictures(notebook) == 3
    *_, peaks, errors = (json.loads(line) for line in outputs(notebook, "stream")[-1].text.splitlines())
    for seq_len in (64, 128):
        for variant in ("dense", "reformer"):
            kept, reversible = (peaks[str((seq_len, variant, name))] for name in ("keep", "reversible"))
            assert reversible < kept
    assert errors["dense"] is None
    assert errors["shared QK"] < 1e-4 < errors["4 rounds"] < errors["1 round"]
    assert (tmp_path / "trained" / "report" / "index.html").exists()


@pytest.mark.slow
def test_patterns_shows_every_picture() -> None:
    notebook = ran("patterns", "len(gallery)")
    *_, count = outputs(notebook, "execute_result")
    assert pictures(notebook) == int(count.data["text/plain"]) + 1, "and the sheet"


@pytest.mark.slow
def test_memory_tells_what_fits() -> None:
    notebook = ran("memory", "print(fits, deep['peak_bytes'].to_dict())")
    assert pictures(notebook) == 2
    fits, peaks = (
        ast.literal_eval(f"{{{part}}}")
        for part in re.findall(r"{(.*?)}", outputs(notebook, "stream")[-1].text)
    )
    assert fits["keep"] < fits["checkpoint"] < fits["reversible"]
    assert peaks["reversible"] < peaks["checkpoint"] < peaks["sqrt"] < peaks["selective"] < peaks["keep"]


@pytest.mark.slow
def test_statistics_runs_on_the_reference_run() -> None:
    assert not outputs(ran("statistics"), "error")
