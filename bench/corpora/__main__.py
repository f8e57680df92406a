"""`python -m bench.corpora fetch NAME | show NAME [PATH]`."""

from __future__ import annotations

import argparse
import sys

from bench.corpora import SOURCES, CorpusError, cache_dir, load, source
from bench.corpora.base import SPLITS, Wanted


def main() -> int:
    """Exit status 0, or 2 for a corpus that cannot be had, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m bench.corpora", description="Fetch or describe a corpus")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a corpus into the cache")
    show = commands.add_parser("show", help="sizes and hash of a corpus")
    for command in (fetch, show):
        command.add_argument("name", help=", ".join(SOURCES))
        command.add_argument("--max-bytes", type=int, metavar="N", help="as data.max_bytes")
    show.add_argument("path", nargs="?", help="as data.path")
    arguments = parser.parse_args()
    try:
        if arguments.command == "fetch":
            wanted = Wanted(max_bytes=arguments.max_bytes)
            print(f"{arguments.name}: {source(arguments.name, wanted).fetch(wanted)}")
        else:
            _show(arguments.name, arguments.path, arguments.max_bytes)
    except CorpusError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write to the cache, {cache_dir()}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _show(name: str, path: str | None, max_bytes: int | None) -> None:
    corpus = load(name, path, max_bytes)
    for split in SPLITS:
        documents = corpus.split(split)
        print(f"{split:10} {len(documents):6,} documents {sum(map(len, documents)):14,} bytes")
    print(f"test words {corpus.words_per_byte() * sum(map(len, corpus.test)):,.0f}")
    print(f"sha256     {corpus.sha256}")


if __name__ == "__main__":
    sys.exit(main())
