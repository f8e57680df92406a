"""The bytes that a token of a byte-level tokenizer stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bench.corpora.base import CorpusError, Document, Ids
from bench.inputs.printable import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _alphabet() -> list[str]:
    """(256,) the character of each byte."""
    printable_bytes = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable_bytes else next(others)) for byte in range(256)]


ALPHABET = _alphabet()
"""GPT-2's character of each byte."""
_BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of V entries. Special tokens, such as the end of a text, stand for none."""

    name: str
    """Of the tokenizer, for messages."""
    begins: npt.NDArray[np.int64]
    """(V,) the place of each entry in `content`."""
    lengths: npt.NDArray[np.int64]
    """(V,) its number of bytes; −1 if there is no such entry."""
    content: Document

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, name: str) -> TokenBytes:
        """Return those of a tokenizer whose ids are below `size`. Raises CorpusError for an entry that is not
        bytes."""
        added = tokenizer.get_added_tokens_decoder()
        entries: list[bytes | None] = [None] * size
        for text, index in tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                entries[index] = b"" if added[index].special else added[index].content.encode()
            elif set(text) <= _BYTE_OF.keys():
                entries[index] = bytes(_BYTE_OF[character] for character in text)
            else:
                entry = printable(text, 40)
                raise CorpusError(f"{name}: its entry {entry!r} is not bytes; it is no byte-level tokenizer")
        lengths = np.array([-1 if entry is None else len(entry) for entry in entries])
        begins = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))[:-1]])
        return cls(name, begins, lengths, np.frombuffer(b"".join(filter(None, entries)), dtype=np.uint8))

    def count(self, ids: Ids) -> npt.NDArray[np.int64]:
        """(N,) the number of bytes of each of N tokens. Raises CorpusError for an id that is no entry."""
        found: npt.NDArray[np.int64] = self.lengths[ids]
        if len(ids) and found.min() < 0:
            raise CorpusError(f"{self.name}: has no entry {int(ids[found.argmin()])}, which the data holds")
        return found

    def decode(self, ids: Ids, newline: int | None = None) -> Document:
        """Return the bytes of tokens; those of the token `newline` are a newline."""
        lengths = self.count(ids)
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(self.begins[ids] - (ends - lengths), lengths)
        text: Document = self.content[places]
        if newline is None:
            return text
        assert not lengths[ids == newline].any()
        return np.asarray(np.insert(text, ends[ids == newline], ord("\n")), dtype=np.uint8)
