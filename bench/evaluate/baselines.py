"""Baselines of text: what n-gram tables and general compressors reach on the targets of a cell.

The tables learn the bytes of the cell's own training batches, each byte once however often it was drawn, and
predict the cell's scored targets from the bytes before them in the cell's windows. The compressors read the
scored bytes only, document after document, as one file. All figures are bits per scored byte.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.evaluate import compressors, ngram
from bench.measure.cached import load_or_measure
from bench.tasks.text import Text

BASELINES_DIR = "baselines"
"""Folder of an experiment that caches the figures."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Bits per byte, by record key."""

    ngram_bits_per_byte: list[float]
    """Element k is of the table of order k + 1."""
    ngram_train_bytes: int
    """Distinct bytes from which the tables were learnt."""
    gzip_bits_per_byte: float
    xz_bits_per_byte: float
    zstd_bits_per_byte: float | None
    """None if the package zstandard is not installed."""


def measure(task: Text, *, steps: int, stride: int) -> Baselines:
    """Measure the baselines of a model that was trained for `steps` steps and is scored with `stride`.
    The bytes of its tokens must be known."""
    learnt = task.train_text(steps)
    scored = [ngram.Piece(*window) for window in task.scored_text(stride)]
    tables = ngram.learn([ngram.Piece(text) for text in learnt])
    text = np.concatenate([piece.text[piece.start :] for piece in scored]).tobytes()
    bytes_per_target = task.bytes_per_target()
    assert bytes_per_target is not None
    context = math.ceil(task.setting.seq_len * bytes_per_target)
    zstd = compressors.zstd_bytes(text, context)
    return Baselines(
        ngram_bits_per_byte=ngram.bits_per_byte(tables, scored),
        ngram_train_bytes=sum(map(len, learnt)),
        gzip_bits_per_byte=8 * compressors.gzip_bytes(text, context) / len(text),
        xz_bits_per_byte=8 * compressors.xz_bytes(text, context) / len(text),
        zstd_bits_per_byte=None if zstd is None else 8 * zstd / len(text),
    )


def of_cell(task: Text, folder: Path, *, steps: int, stride: int) -> Baselines:
    """Return the baselines of a cell; they are measured once for all cells of an experiment, in `folder`,
    with the same text, windows and number of steps."""
    setting = task.setting
    code = "".join(inspect.getsource(module) for module in (ngram, compressors, sys.modules[__name__]))
    decides = [
        hashlib.sha256(code.encode()).hexdigest(),
        compressors.has_zstd(),
        task.sha256(task.config, setting.data),
        asdict(setting) | {"data": None},  # the text is known by its hash, whatever its name
        steps,
        stride,
    ]
    keys = set(Baselines.__annotations__)
    found = load_or_measure(
        folder / BASELINES_DIR, decides, lambda: asdict(measure(task, steps=steps, stride=stride)), keys
    )
    return Baselines(**found)
