"""Each notebook has a page in docs/notebooks, linked by the README, with the notebook's code and output."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from conftest import HANG_SECONDS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = ROOT / "docs" / "notebooks"
MOST_BYTES = 2_500_000
"""Size of all pages and pictures: a clone has them."""
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def page_of(notebook: Path) -> str:
    return (PAGES / f"{notebook.stem}.md").read_text()


@every_notebook
def test_the_code_of_a_page_is_that_of_its_notebook(path: Path) -> None:
    """After a change, `make notebooks-docs ARGS=notebooks/x.ipynb` is due."""
    blocks = re.findall(r"^```python\n(.*?)\n```$", page_of(path), re.MULTILINE | re.DOTALL)
    assert blocks == code_of(path)


@every_notebook
def test_a_page_has_the_headings_and_the_output_of_its_notebook(path: Path) -> None:
    markdown = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    headings = re.findall(r"^#+ .*", "\n".join(markdown), re.MULTILINE)
    text = re.sub(r"^```python\n.*?^```$", "", page_of(path), flags=re.MULTILINE | re.DOTALL)
    found = [line.replace("$`", "$").replace("`$", "$") for line in re.findall(r"^#+ .*", text, re.MULTILINE)]
    assert found == headings
    assert re.search(r"^<table|^    \S|^!\[", text, re.MULTILINE), "no output"
    for unwanted in ("<style", "Traceback", "IPKernelApp"):
        assert unwanted not in text


def test_the_readme_links_every_page_in_its_section_learn() -> None:
    section = re.search(r"^## Learn\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section
    linked = re.findall(r"^\d\. \[[^]]+\]\(docs/notebooks/(\w+)\.md\): \S", section[1], re.MULTILINE)
    assert sorted(linked) == [path.stem for path in NOTEBOOKS]
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(linked)


def test_the_pictures_of_pages_are_there_and_small() -> None:
    shown = set()
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
                shown.add(target)
    pictures = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.png")}
    assert pictures == {target for target in shown if target.endswith(".png")}
    assert len(pictures) > len(NOTEBOOKS)
    assert sum(path.stat().st_size for path in PAGES.rglob("*") if path.is_file()) < MOST_BYTES


def test_the_extra_lists_what_the_notebooks_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    providers = packages_distributions()
    own = {"bench", "longctx_bench", "variants"}
    for path in NOTEBOOKS:
        for code in code_of(path):
            for node in ast.walk(ast.parse(re.sub(r"^%.*", "", code, flags=re.MULTILINE))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names:
                    assert {canonicalize_name(p) for p in providers[name]} & declared, f"{path.name}: {name}"


NOTEBOOK = [
    nbformat.v4.new_markdown_cell(
        "# A title\n\nSee [another](other.ipynb) and [results](../results/x.md).\n\n"
        "A set $S_i=\\{1,\\dots,i\\}$, and `a$b$c`.\n\n$$y=\\sum_j\n a_j\\,v_j$$"
    ),
    nbformat.v4.new_code_cell(
        "import sys\n\n\nimport matplotlib.pyplot as plt\nimport pandas as pd\n\n"
        "print('progress', file=sys.stderr)\nprint(6 * 7)\nplt.plot([1, 2])\nplt.show()"
    ),
    nbformat.v4.new_code_cell("pd.DataFrame({'a': [1, 2]}).style.format('{:.1f}')"),
]


def pages(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.tools.notebook_pages", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=NOTEBOOK), tmp_path / "one.ipynb")
    (tmp_path / "pages" / "one_files").mkdir(parents=True)
    (tmp_path / "pages" / "one_files" / "old.png").touch()
    done = pages("one.ipynb", "--out", "pages", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "pages" / "one.md").read_text()
    assert "[another](other.md) and [results](../../results/x.md)" in text
    assert "A set $`S_i=\\{1,\\dots,i\\}`$, and `a$b$c`." in text
    assert "```math\ny=\\sum_j\n a_j\\,v_j\n```" in text
    assert f"```python\n{NOTEBOOK[1].source}\n```" in text
    assert "\n    42\n" in text
    assert "progress" not in text.replace(NOTEBOOK[1].source, "")
    table = text[text.index("<table") : text.index("</table>")]
    assert "1.0" in table
    assert "\n\n" not in table, "an empty line ends HTML in Markdown"
    assert "<style" not in text
    assert pages("one.ipynb", "--out", "again", cwd=tmp_path).returncode == 0
    assert (tmp_path / "again" / "one.md").read_text() == text, "only changes of figures change a page"
    (picture,) = (tmp_path / "pages" / "one_files").iterdir()
    assert f"](one_files/{picture.name})" in text
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        assert opened.width > 300


def test_a_missing_notebook_is_named(tmp_path: Path) -> None:
    done = pages("none.ipynb", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: none.ipynb: no such notebook\n")
    assert pages(cwd=tmp_path).returncode == 2
