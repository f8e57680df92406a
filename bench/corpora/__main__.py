"""`python -m bench.corpora fetch NAME | show NAME [PATH] | best`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from bench.corpora import BEST, SOURCES, CorpusError, best, cache_dir, load, source
from bench.corpora.base import SPLITS, CorpusOptions, in_words
from bench.corpora.disk import file_type
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from variants.safe_output import run


def main() -> int:
    """Return exit status 0, or 2 with a one-line message if the corpus is not available."""
    parser = argparse.ArgumentParser(prog="python -m bench.corpora", description="Fetch or describe a corpus")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a corpus into the cache")
    show = commands.add_parser("show", help="sizes and hash of a corpus")
    commands.add_parser("best", help=f"print the first of {', '.join(BEST)} that is on this machine")
    for command in (fetch, show):
        command.add_argument("name", help=", ".join(SOURCES))
        command.add_argument("--max-bytes", type=int, metavar="N", help="as data.max_bytes")
    show.add_argument("path", nargs="?", help="as data.path")
    for knob in ("field", "split"):
        show.add_argument(f"--{knob}", help=f"as data.{knob}")
    show.add_argument("--max-undecodable", type=float, metavar="SHARE", help="as data.max_undecodable")
    arguments = parser.parse_args()
    try:
        if arguments.command == "best":
            print(best())
        elif arguments.command == "fetch":
            _fetch(arguments.name, CorpusOptions(max_bytes=arguments.max_bytes))
        else:
            options = {knob.name: getattr(arguments, knob.name) for knob in fields(CorpusOptions)}
            _show(arguments.name, CorpusOptions(**options))
    except (CorpusError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _fetch(name: str, options: CorpusOptions) -> None:
    corpus_source = source(name, options)
    folder = cache_dir()
    file_type(folder, "LONGCTX_BENCH_CACHE")  # reports a broken link clearly, which mkdir does not
    try:
        print(f"{name}: {corpus_source.fetch(options)}")
    except OSError as error:
        raise CorpusError(f"cannot write to the cache, {folder}: {error.strerror or error}") from None


def _show(name: str, options: CorpusOptions) -> None:
    corpus = load(name, options)
    for split in SPLITS:
        print(f"{split:10} {len(corpus.split(split)):6,} documents {corpus.symbols(split):14,} bytes")
    print(f"test words {corpus.words_per_byte() * corpus.symbols('test'):,.0f}")
    for note in corpus.notes:
        print(f"note       {printable(note)}")
    if corpus.skipped:
        print(f"skipped    {printable(in_words(corpus.skipped))}")
    print(f"sha256     {corpus.sha256}")


if __name__ == "__main__":
    run(main)
