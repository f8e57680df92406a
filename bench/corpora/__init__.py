"""Corpora: documents as bytes, split into train, validation and test, with one hash over all of them.

Each corpus is one file of this package, found by its name (`SOURCES`). A corpus is a sequence of bytes, so no
tokenizer is needed and invalid text cannot cause an error. Reading a corpus never uses the network. A corpus
that must be downloaded is fetched once with `python -m bench.corpora fetch NAME`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from dataclasses import fields
from functools import lru_cache

from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Document, Source, cache_dir

__all__ = [
    "SOURCES",
    "Corpus",
    "CorpusError",
    "CorpusOptions",
    "Document",
    "best",
    "cache_dir",
    "load",
    "source",
]

_SHARED = {
    "__main__",
    "base",
    "dialogues",
    "disk",
    "flat",
    "hub",
    "hub_rows",
    "plain",
    "splits",
    "table_files",
    "token_bytes",
    "token_ids",
    "tokens",
}

SOURCES: tuple[str, ...] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
)
"""The names of the corpora."""


def source(name: str, options: CorpusOptions) -> Source:
    """Return the source of the corpus with this name, after checking that it reads the given knobs.

    Raises CorpusError, with a one-line message, for an unknown name or a knob that this corpus does not read.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CorpusError(f"data={name}: unknown; there are {', '.join(SOURCES)}{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    (source_class,) = (
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Source) and thing.__module__ == module.__name__
    )
    made: Source = source_class(name)
    for knob in fields(options):
        value = getattr(options, knob.name)
        if value is not None and knob.name not in made.knobs:
            raise CorpusError(f"data.{knob.name}={value}: data={name} does not read it; leave it out")
    if options.max_bytes is not None and options.max_bytes < 1:
        raise CorpusError(f"data.max_bytes={options.max_bytes}: allowed is 1 or more")
    return made


NO_OPTIONS = CorpusOptions()
"""Every knob as the source chooses it."""


@lru_cache(maxsize=4)
def load(name: str, options: CorpusOptions = NO_OPTIONS) -> Corpus:
    """Load the corpus with this name from local files.

    Raises CorpusError, with a one-line message, for an unknown name, a knob that this corpus does not read,
    or a corpus that is missing, empty or altered.
    """
    return source(name, options).read(options)


BEST = ("enwik8", "plays", "stdlib")
"""Corpora for a long training without a wish of the user, from the largest on; the last needs no download."""


def best() -> str:
    """Return the first corpus of `BEST` that is on this machine. Raises CorpusError if none is."""
    reasons = []
    for name in BEST:
        try:
            load(name)
        except CorpusError as error:
            reasons.append(str(error))
        else:
            return name
    raise CorpusError("; ".join(reasons))
