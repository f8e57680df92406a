"""index.html: the report as one file that opens offline: a chooser, charts, a table to sort and filter.

All that it needs is inside, and its content policy forbids all else: only the scripts that were put there
run, known by their hashes, so that no text of a record can become one.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bench.report import summary
from bench.report.collect import Collected
from bench.report.page import document, lists
from bench.report.page.figures import Json
from bench.report.page.symbols import DARK
from bench.report.summary import Found

SCRIPTS = ("common.js", "choose.js", "charts.js", "table.js")
"""The page's own script is these, one after the other."""
VEGA_LITE = "6.4"
"""The release of Vega-Lite, of those that vl_convert carries."""


def html(collected: Collected, found: Found) -> str:
    """The whole of index.html."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    contents = document.data(collected.frame, found)
    scripts = ["\n".join(_file(name) for name in SCRIPTS)]
    if contents["figures"] or contents["pareto"]:
        scripts.insert(0, charts_library())
    frame = collected.frame
    said = "".join(text for column in contents["table"] for text in column["text"])
    notes = {mark: words.replace("*", "") for mark, words in summary.NOTES.items() if mark in said}
    return page.from_string(_file("template.html")).render(
        names=", ".join(sorted(frame["name"].unique())),
        style=Markup(_file("page.css").replace("$DARK", DARK)),
        count=len(frame),
        contents=contents,
        document=Markup(_json(contents)),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        facts=summary.facts(collected, found),
        warnings=summary.warnings(collected),
        problems=collected.problems,
        lists={
            "environment": lists.environments(frame),
            "lost": lists.failures(frame),
            "contaminated": lists.contaminated(frame),
            "fits": lists.fits(found.fits),
            "payoff": lists.payoff(found.payoff),
        },
        notes=notes,
    )


@cache
def charts_library() -> str:
    """Vega-Lite with all that it needs, as one script."""
    entry = "window.vegaEmbed = vegaEmbed;"
    script = vl_convert.javascript_bundle(entry, vl_version=VEGA_LITE).replace("\r", "\n")
    for end in ("</script", "<!--"):
        assert end not in script, f"a script with {end} in it cannot stand in a page"
    return script


def _json(contents: Json) -> str:
    """JSON that can stand in a page: nothing in it ends the element that holds it."""
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(script: str) -> str:
    """How the page's content policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _file(name: str) -> str:
    return (resources.files(__name__) / name).read_text(encoding="utf-8")
