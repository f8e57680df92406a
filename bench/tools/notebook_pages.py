"""`python -m bench.tools.notebook_pages`: run notebooks and write each as a page of Markdown with pictures.

GitHub shows the pages (`make notebooks-docs` writes docs/notebooks). Its Markdown differs from a notebook's:
it takes backslashes of formulas as escapes, and shows the style sheets of tables as text.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import write_atomically
from variants.safe_output import run

NOTEBOOKS, PAGES = "notebooks", "docs/notebooks"
COLOURS = 256
"""Colours of a picture's palette: plots have few, and their smoothed edges some more."""


def main() -> int:
    """Write the pages; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tools.notebook_pages", description=__doc__)
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help=f"files to run (default: those of {NOTEBOOKS}/)"
    )
    parser.add_argument("--out", type=Path, default=Path(PAGES), help=f"their folder (default {PAGES})")
    given = parser.parse_args()
    paths: Sequence[Path] = given.notebooks or sorted(Path(NOTEBOOKS).glob("*.ipynb"))
    if absent := [path for path in paths if not path.is_file()] or ([] if paths else [Path(NOTEBOOKS)]):
        print(f"error: {absent[0]}: no such notebook", file=sys.stderr)
        return 2
    for path in paths:
        write(executed(path), path.stem, given.out)
        print(given.out / f"{path.stem}.md", flush=True)
    return 0


def executed(path: Path) -> Any:
    """Return the notebook with its outputs, run in its own folder. Raises CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    return notebook


def write(notebook: Any, name: str, folder: Path) -> None:
    """Write a notebook with outputs as `name`.md, and its pictures into `name`_files, of which others go."""
    import nbformat
    from nbconvert import MarkdownExporter

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = for_github(cell.source)
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = without_style(output.data["text/html"])
        if "outputs" in cell:  # progress and warnings are for who runs the notebook
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    exporter = MarkdownExporter()
    files = f"{name}_files"
    text, resources = exporter.from_notebook_node(
        nbformat.from_dict(notebook), {"output_files_dir": files, "unique_key": name}
    )
    (folder / files).mkdir(parents=True, exist_ok=True)
    for old in (folder / files).iterdir():
        old.unlink()
    for place, content in resources["outputs"].items():
        (folder / place).write_bytes(small(content))
    if not resources["outputs"]:
        (folder / files).rmdir()
    head = f"<!-- Written by `make notebooks-docs` from notebooks/{name}.ipynb. -->\n\n"
    text = text.replace("![png](", "![Picture of the cell above](")
    lines = (line.rstrip() for line in text.strip().splitlines())
    write_atomically(folder / f"{name}.md", head + "\n".join(lines) + "\n")


def for_github(text: str) -> str:
    """Write formulas in the form in which GitHub reads no escapes, and links from the pages' folder."""
    text = re.sub(r"\$\$\s*(.+?)\s*\$\$", r"```math\n\1\n```", text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w`$])\$([^\s$`](?:[^$\n`]*[^\s$`])?)\$(?![\w`$])", r"$`\1`$", text)
    text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
    return text.replace("](../", "](../../")


def without_style(html: str) -> str:
    """Remove the style sheets of tables, what refers to them, and empty lines, which would end the table.

    The identifiers of a styled table are random: with them, no two pages would be equal.
    """
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r' (?:id|class|style|border)="[^"]*"', "", html)
    return "\n".join(line.strip() for line in html.splitlines() if line.strip())


def small(picture: bytes) -> bytes:
    """Return a PNG with a palette."""
    from PIL import Image

    buffer = io.BytesIO()
    opened = Image.open(io.BytesIO(picture)).convert("RGB")
    opened.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
