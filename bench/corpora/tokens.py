"""Tokenised text: byte-level byte-pair encoding, with the bytes of every token known exactly.

A token is a string of bytes, and the tokens of a text are its bytes: nothing is normalised, added or lost.
Therefore the negative log-likelihood of tokens divided by the bytes that they stand for is bits per byte,
comparable with that of any other tokens or of bytes, and it is exact.

There are two kinds:

- *Trained* here on the training split, by the library `tokenizers` (Sennrich 2016, arXiv:1508.07909, over
  bytes as in Radford 2019, §2.2). It is cached by the hash of the corpus and the number of entries.
- A *file* of the user, in the format of that library, whose tokens are bytes (GPT-2, Llama 3, …).

The library works on characters. In both kinds a byte is one character of GPT-2's alphabet, in which printable
bytes stand for themselves. Text for a trained tokenizer is translated byte by byte before it is encoded, so
that text that is not UTF-8 has tokens, too. The tokenizer of a file does this by itself, after it has divided
the text into words, and so the text must be UTF-8.

The ids of a split are cached as well, because each cell of a sweep needs them and is a process of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.corpora.base import Corpus, CorpusError, Document, Ids, cache_dir, sha256
from bench.corpora.token_bytes import ALPHABET, TokenBytes
from bench.inputs.paths import user_path
from bench.inputs.printable import printable
from bench.inputs.slow_work import SlowWork
from bench.records import atomic_writer, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOLDER = "tokens"
"""Folder of the cache."""
PIECE_BYTES = 2**20
"""Longest text that is encoded at once; the library takes about a hundred bytes of memory for one of text. A
piece ends at a newline if there is one, and no token crosses its end."""
WORDS = "Ġ?[A-Za-z¡-ÿĢ-Ń]+|Ġ?[0-9]+|Ġ?[^A-Za-z0-9¡-ÿĢ-ŃĊĠ]+|[ĊĠ]+"
"""Words in GPT-2's alphabet, across which no token is merged: letters and bytes above 127 with the space (Ġ)
before them; digits; other characters; spaces and newlines (Ċ)."""


_TRANSLATION = dict(enumerate(ALPHABET))


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text of N tokens."""

    ids: Ids
    """(N,) the tokens."""
    ends: Ids | None = None
    """(N,) the number of bytes of the text up to the end of each token; None if the tokens are bytes, or if
    their bytes are not known."""

    def __len__(self) -> int:
        return len(self.ids)

    def begin(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of bytes before each of the tokens, which are places from 0 to N."""
        if self.ends is None:
            return tokens
        if not len(self):
            return np.zeros_like(tokens)
        return np.asarray(np.where(tokens > 0, self.ends[tokens - 1], 0), dtype=np.int64)

    @property
    def bytes(self) -> int:
        """Number of bytes of the text."""
        return int(self.begin(np.array([len(self)]))[0])


class TextTokenizer(ABC):
    """A tokenizer and the exact bytes of its tokens."""

    def __init__(self, tokenizer: Tokenizer, name: str, digest: str) -> None:
        """`name` is for messages; `digest` is the hash of the file."""
        self.tokenizer, self.name, self.sha256 = tokenizer, name, digest

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def size(self) -> int:
        """Ids are below it."""
        return max(self._vocabulary.values()) + 1

    def identity(self, corpus: Corpus) -> str:
        """Return the hash of a corpus as these tokens."""
        return sha256(f"{corpus.sha256} {self.sha256}".encode())

    @abstractmethod
    def characters(self, text: bytes) -> str:
        """Return the text as the tokenizer reads it. Raises CorpusError."""

    def margins(self, text: bytes) -> tuple[int, int]:
        """Return how many bytes at the beginning and at the end are a token each, because they belong to a
        character that is cut there."""
        return 0, 0

    def _single(self, text: bytes) -> list[int]:
        """Return the token of each byte."""
        for byte in text:
            if ALPHABET[byte] not in self._vocabulary:
                raise CorpusError(f"{self.name}: has no token for byte {byte}; needs one for each of 256")
        return [self._vocabulary[ALPHABET[byte]] for byte in text]

    @cached_property
    def bytes_of_ids(self) -> TokenBytes:
        """The bytes of each entry. Raises CorpusError if its entries are not bytes."""
        return TokenBytes.of(self.tokenizer, self.size, self.name)

    def encode(
        self, text: Document, *, ends: bytes = b"", advance: Callable[[int], None] = lambda done: None
    ) -> TokenText:
        """Return the tokens of a text; `advance` is told the bytes that are done.
        Raises CorpusError if the tokens are not its bytes.

        A token ends after each of the bytes `ends`, so that a text has the same tokens as its parts.
        """
        ids: list[Ids] = [np.zeros(0, dtype=np.int64)]
        lengths: list[Ids] = [np.zeros(0, dtype=np.int64)]
        for piece in _pieces(text.tobytes(), ends):
            first, last = self.margins(piece)
            middle = piece[first : len(piece) - last]
            found = self.tokenizer.encode(self.characters(middle), add_special_tokens=False)
            told = "".join(found.tokens)
            if told != middle.decode("latin-1").translate(_TRANSLATION):
                raise CorpusError(
                    f"{self.name}: its tokens are not the bytes of the text; allowed is a byte-level "
                    "tokenizer without a normalizer and without a prefix"
                )
            head, tail = map(self._single, (piece[:first], piece[len(piece) - last :]))
            ids.append(np.array([*head, *found.ids, *tail], dtype=np.int64))
            sizes = [*[1] * len(head), *map(len, found.tokens), *[1] * len(tail)]
            lengths.append(np.array(sizes, dtype=np.int64))
            advance(len(piece))
        return TokenText(np.concatenate(ids), np.cumsum(np.concatenate(lengths)))


class Trained(TextTokenizer):
    """A tokenizer that was trained here."""

    def characters(self, text: bytes) -> str:
        """Each byte is a character."""
        return text.decode("latin-1").translate(_TRANSLATION)


class FromFile(TextTokenizer):
    """A tokenizer of the user."""

    def margins(self, text: bytes) -> tuple[int, int]:
        """The bytes of a character of UTF-8 that begins before the text or ends after it."""
        first = next((place for place, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), len(text[:4]))
        last = next((n for n in range(1, 4) if len(text) - n >= first and text[-n] >= 0xC0), 0)
        width = (text[-last] >= 0xC0) + (text[-last] >= 0xE0) + (text[-last] >= 0xF0) + 1 if last else 0
        return first, last if width > last else 0

    def characters(self, text: bytes) -> str:
        """The text must be UTF-8."""
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{self.name}: needs text in UTF-8, but byte {error.start} of a document is not; data.bpe "
                "reads any bytes"
            ) from None


def _pieces(text: bytes, ends: bytes = b"") -> Iterator[bytes]:
    if ends:
        for part in re.split(b"(?<=[" + re.escape(ends) + b"])", text):
            yield from _pieces(part)
        return
    start = 0
    while start < len(text):
        stop = min(start + PIECE_BYTES, len(text))
        newline = text.rfind(b"\n", start, stop)
        if stop < len(text) and newline >= 0:
            stop = newline + 1
        yield text[start:stop]
        start = stop


def _library() -> Any:
    """Return the library; importing it takes a moment, so only tokenised text does."""
    import tokenizers

    return tokenizers


def train(texts: Sequence[Document], size: int) -> str:
    """Train a byte-pair encoding of `size` entries, or fewer if the text has no more pairs; returns its file.

    All 256 bytes are entries. The result is determined by the texts, the size and the library's version.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    words = library.pre_tokenizers.Split(library.Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = words
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ALPHABET, special_tokens=[], show_progress=False
    )
    size_bytes = sum(map(len, texts))
    with SlowWork(f"training a byte-pair encoding of {size:,} entries", "bytes", size_bytes) as work:

        def pieces() -> Iterator[str]:
            for text in texts:
                for piece in _pieces(text.tobytes()):
                    yield piece.decode("latin-1").translate(_TRANSLATION)
                    work.advance(len(piece))

        tokenizer.train_from_iterator(pieces(), trainer)
    return str(tokenizer.to_str())


@lru_cache(maxsize=4)
def trained(corpus: Corpus, size: int) -> TextTokenizer:
    """Return the tokenizer of `size` entries of the corpus's training split, from the cache if it is
    there."""
    path = cache_dir() / FOLDER / f"{corpus.sha256[:16]}-bpe{size}.json"
    if not path.is_file():
        write_atomically(path, train(corpus.train, size))
    content = path.read_bytes()
    name = f"data.bpe={size}"
    return Trained(_parsed(content, path), name, sha256(content))


@lru_cache(maxsize=4)
def from_file(place: str) -> TextTokenizer:
    """Return the tokenizer of a file. Raises CorpusError."""
    path = user_path("data.tokenizer", place)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"data.tokenizer={place}: cannot read it: {error.strerror}") from None
    return FromFile(_parsed(content, path), f"data.tokenizer={place}", sha256(content))


def _parsed(content: bytes, path: Path) -> Tokenizer:
    try:
        tokenizer: Tokenizer = _library().Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more specific
        reason = printable(str(error), 200)
        raise CorpusError(f"{path}: not a tokenizer of the library tokenizers: {reason}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encoded(
    tokenizer: TextTokenizer,
    text: Document,
    *,
    ends: bytes = b"",
    advance: Callable[[int], None] = lambda done: None,
) -> TokenText:
    """Return the tokens of a long text, from the cache if they are there; they are read from the disk when
    they are used. Otherwise `advance` is told the bytes that are encoded. `ends` are those of
    `TextTokenizer.encode`."""
    identity = " ".join([tokenizer.sha256, sha256(text.tobytes()), *([ends.hex()] if ends else [])])
    key = sha256(identity.encode())[:32]
    path = cache_dir() / FOLDER / f"{key}.npy"
    if not path.is_file():
        found = tokenizer.encode(text, ends=ends, advance=advance)
        byte_ends = found.begin(np.arange(1, len(found) + 1))
        with atomic_writer(path) as file:
            np.save(file, np.stack([found.ids, byte_ends]), allow_pickle=False)
    ids, byte_ends = np.load(path, mmap_mode="r", allow_pickle=False)
    return TokenText(ids, byte_ends)


def first_apart(text: Document, tokenizer: TextTokenizer | None) -> TokenText:
    """Return the tokens of a passage, the first of which is its first byte."""
    if tokenizer is None:
        return TokenText(text)
    first, rest = tokenizer.encode(text[:1]), tokenizer.encode(text[1:])
    assert first.ends is not None
    assert rest.ends is not None
    return TokenText(np.append(first.ids, rest.ids), np.append(first.ends, 1 + rest.ends))
