"""Which documents of a user's data are held out.

Splits that the data has are used as they are, under the names of the library `datasets`. What is missing of
validation and test is taken from the training documents: each document whose hash lies in a fixed tenth of
all hashes. So a document keeps its split when others are added, removed or reordered, and equal documents
are never in two splits.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.corpora.base import HELD_OUT_SHARE, SPLITS, CorpusError

Ints = npt.NDArray[np.int64]

SYNONYMS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of splits → the split."""
FEW = 10
"""With fewer training documents, each is divided by position instead."""
SHARES = {"test": (0.0, HELD_OUT_SHARE), "validation": (HELD_OUT_SHARE, 2 * HELD_OUT_SHARE)}
"""The interval of hashes, as numbers from 0 to 1, of the documents that are held out."""


class Division(NamedTuple):
    """The documents of each split, which are documents of the data or parts of them."""

    pieces: Ints
    """(M, 4): the split (index into SPLITS), the document, and the part of it, [start, stop); sorted by split
    and then by document."""
    ignored: dict[str, int]
    """Documents of other splits of the data, by kind."""
    note: str
    """How the documents were divided, in words."""


def divide(
    names: Sequence[str], own: Ints, lengths: Ints, hashes: npt.NDArray[np.float64], setting: str
) -> Division:
    """Divide N documents: own (N,) their split, an index into `names`; lengths (N,); hashes (N,), in [0, 1).

    A single split is divided as if it were the training split, whatever its name. Raises CorpusError for
    several splits of which none is for training.
    """
    known = ["train"] if len(names) == 1 else [SYNONYMS.get(name, "") for name in names]
    if "train" not in known:
        raise CorpusError(
            f"{setting}: has the splits {', '.join(names)}, none for training; data.split={names[0]} "
            "reads one of them and holds out documents of it"
        )
    codes = np.array([SPLITS.index(name) if name else -1 for name in known])[own]
    ignored = {
        f"of split {name}": int((own == index).sum()) for index, name in enumerate(names) if not known[index]
    }
    missing = [split for split in SHARES if split not in known]
    train = np.flatnonzero(codes == 0)
    starts, stops = np.zeros_like(lengths), lengths.copy()
    documents = np.arange(len(lengths))
    if not missing:
        note = "its own splits"
    elif len(train) >= FEW:
        _hold_out(codes, train, hashes, missing)
        note = f"{' and '.join(missing)} held out by the hash of each document"
    else:
        held_out = f"{' and '.join(missing)} held out"
        note = f"{held_out} at the end of each document, because there are fewer than {FEW}"
        held = len(missing)
        order = [split for split in SPLITS if split in missing]
        cuts = [
            np.round(lengths[train] * (1 - k * HELD_OUT_SHARE)).astype(np.int64) for k in range(held, -1, -1)
        ]
        stops[train] = cuts[0]
        for split, start, stop in zip(order, cuts[:-1], cuts[1:], strict=True):
            codes = np.append(codes, np.full(len(train), SPLITS.index(split)))
            documents, starts = np.append(documents, train), np.append(starts, start)
            stops = np.append(stops, stop)
    pieces = np.stack([codes, documents, starts, stops], axis=1)
    pieces = pieces[(codes >= 0) & (stops > starts)]
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    for code, split in enumerate(SPLITS):
        if not (pieces[:, 0] == code).any():
            raise CorpusError(f"{setting}: the {split} split is empty; the corpus is too small")
    return Division(pieces, {kind: count for kind, count in ignored.items() if count}, note)


def _hold_out(codes: Ints, train: Ints, hashes: npt.NDArray[np.float64], missing: Sequence[str]) -> None:
    """Set the codes of held-out documents. If a split gets none, it gets the one with the smallest hash."""
    for split in missing:
        low, high = SHARES[split]
        inside = train[(hashes[train] >= low) & (hashes[train] < high)]
        codes[inside] = SPLITS.index(split)
    for split in missing:
        code = SPLITS.index(split)
        if not (codes == code).any():
            left = train[codes[train] == 0]
            codes[left[np.argmin(hashes[left])]] = code


def chosen(names: Sequence[str], split: str | None, setting: str) -> list[str]:
    """Return the splits of the data that are read: the one that the user names, else all.

    Raises CorpusError for an unknown name."""
    if split is None:
        return list(names)
    if split not in names:
        near = difflib.get_close_matches(split, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CorpusError(f"{setting}: data.split={split}: unknown; there are {', '.join(names)}{hint}")
    return [split]
