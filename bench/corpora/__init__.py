"""Corpora: documents as bytes, split into train, validation and test, with one hash over all.

One file a corpus, found by its name (`SOURCES`). A corpus is bytes: no tokenizer to agree on, and nothing
that is not valid text to trip over. Reading one never touches the network: what has to come over it is
fetched once, `python -m bench.corpora fetch NAME`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from dataclasses import fields
from functools import lru_cache

from bench.corpora.base import Corpus, CorpusError, Document, Source, Wanted, cache_dir

__all__ = ["SOURCES", "Corpus", "CorpusError", "Document", "cache_dir", "load", "source"]

_SHARED = {"__main__", "base", "disk", "hub", "plain"}

SOURCES: tuple[str, ...] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
)
"""The names of the corpora."""


def source(name: str, wanted: Wanted) -> Source:
    """Where the corpus of this name comes from, after a check that it reads the knobs that were given.

    Raises CorpusError, in one line, for an unknown name or a knob that is not for this corpus.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CorpusError(f"data={name}: unknown; there are {', '.join(SOURCES)}{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Source) and thing.__module__ == module.__name__
    )
    made: Source = found(name)
    for knob in fields(wanted):
        value = getattr(wanted, knob.name)
        if value is not None and knob.name not in made.knobs:
            raise CorpusError(f"data.{knob.name}={value}: data={name} does not read it; leave it out")
    if wanted.max_bytes is not None and wanted.max_bytes < 1:
        raise CorpusError(f"data.max_bytes={wanted.max_bytes}: allowed is 1 or more")
    return made


@lru_cache(maxsize=4)
def load(name: str, path: str | None = None, max_bytes: int | None = None) -> Corpus:
    """The corpus of this name, from this machine alone; the knobs are those of `data`.

    Raises CorpusError, in one line, for an unknown name, a knob that is not for this corpus, or a corpus
    that is missing, empty or altered.
    """
    wanted = Wanted(path=path, max_bytes=max_bytes)
    return source(name, wanted).read(wanted)
