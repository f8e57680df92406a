"""index.html: the report as one file that opens offline: a chooser, charts, a table to sort and filter.

Everything that it needs is inside, and its content policy forbids all else: only the scripts that were put
there run, known by their hashes, so that no text of a record can become one. Tables, charts and the rows of
cells come from the report's sections.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bench.report import summary
from bench.report.figures.chart_data import Json
from bench.report.figures.selection import Selection
from bench.report.figures.style import styles, variant_rank
from bench.report.page.environment import environments
from bench.report.page.symbols import DARK, symbols
from bench.report.sections import Results
from bench.report.text.listing import PageList
from bench.report.text.markdown import plain
from bench.report.text.marks import NOTES

CHOOSER = ("common.js", "generate.js", "choose.js")
SCRIPTS = (*CHOOSER, "charts.js", "table.js")
"""The page's own script is these, one after the other; without a table of cells, it is the chooser alone."""
VEGA_LITE = "6.4"
"""The release of Vega-Lite, of those that vl_convert carries."""


def html(results: Results) -> str:
    """The whole of index.html."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    frame, problems = results.records.collected.frame, results.records.collected.problems
    charts = _merged(section.page_charts(data) for section, data in results)
    contents = document(results, charts)
    scripts = ["\n".join(_file(name) for name in (SCRIPTS if contents["table"] else CHOOSER))]
    if any(charts.values()):
        scripts.insert(0, charts_library())
    texts = "".join(text for column in contents["table"] for text in column["text"])
    lists = [one for section, data in results for one in section.page_lists(data) if one.table.rows]
    return page.from_string(_file("template.html")).render(
        names=", ".join(sorted(frame["name"].unique())),
        style=Markup(_file("page.css").replace("$DARK", DARK)),
        count=len(results.records.collected.every),
        contents=contents,
        document=Markup(_json(contents)),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        facts=summary.facts(results),
        warnings=summary.warnings(results),
        problems=problems,
        environment=environments(frame),
        lists=[one for one in lists if not one.about_noise],
        links=_links(one for one in lists if not one.about_noise),
        about_noise=[one for one in lists if one.about_noise],
        notes={mark: plain(words) for mark, words in NOTES.items() if mark in texts},
    )


def _links(lists: Iterable[PageList]) -> dict[str, str]:
    """The anchor of the first list of each title."""
    links: dict[str, str] = {}
    for one in lists:
        links.setdefault(one.title, one.anchor)
    return links


def document(results: Results, charts: Json) -> Json:
    """The data of the page's scripts: data and charts of all sections, and the `styles` of the variants.

    `families` are the families of the labels, in order; `left_out` are the labels that the charts draw only
    on request, because there are too many (`figures.selection`).
    `generating` are the cells that measured decoding, None without any.
    The scripts expect the keys that the section of cells gives, of which `table` and `label` are used here.
    """
    frame = results.records.collected.frame
    contents = _merged([*(section.page_data(data) for section, data in results), charts])
    looks = styles(zip(frame["variant"], frame["label"], strict=True))
    variant_of = dict(zip(frame["label"], frame["variant"], strict=True))
    generating = contents.get("generating")
    every = {*contents["label"], *(generating["label"] if generating else ())}
    labels = sorted(every, key=lambda label: (variant_rank(variant_of[label]), label))
    families: dict[str, list[str]] = {}
    for label in labels:
        families.setdefault(variant_rank(variant_of[label])[1], []).append(label)
    charted = set(contents["label"])
    drawn = Selection.of(frame).drawn(variant_of[label] for label in charted)
    return {
        **contents,
        "generating": generating,
        "styles": symbols({label: looks[label] for label in labels}),
        "families": [{"name": name, "labels": own} for name, own in families.items()],
        "left_out": [label for label in labels if label in charted and variant_of[label] not in drawn],
    }


def _merged(parts: Iterable[Mapping[str, Any]]) -> Json:
    """The keys of all parts. Raises ValueError for a key that two of them have."""
    merged: Json = {}
    for part in parts:
        for key, value in part.items():
            if key in merged:
                raise ValueError(f"two sections give the page {key!r}; choose another name for one of them")
            merged[key] = value
    return merged


@cache
def charts_library() -> str:
    """Vega-Lite with all that it needs, as one script."""
    entry = "window.vegaEmbed = vegaEmbed;"
    script = vl_convert.javascript_bundle(entry, vl_version=VEGA_LITE).replace("\r", "\n")
    for end in ("</script", "<!--"):
        assert end not in script, f"a script with {end} in it cannot stand in a page"
    return script


def _json(contents: Json) -> str:
    """JSON that is safe inside a page: no text in it ends the element that holds it."""
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(script: str) -> str:
    """How the page's content policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _file(name: str) -> str:
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
