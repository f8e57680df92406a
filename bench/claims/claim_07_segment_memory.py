"""Transformer-XL: how far the last token of a sequence can look by depth, and what chunks lose without it.

`transformer_xl` without memory is a network run on chunks with the very same parameters and relative
positions: what it loses to one with memory is what a chunk's edge takes away, and nothing else.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding, Missing
from bench.claims.cells import Spread, difference, finished, has
from bench.claims.parts import Part, beyond, knob, like, one_setting, points, reaches, together, unsure

STATEMENT = "Transformer-XL's reach grows with every layer; resetting positions in chunks hurts."
SOURCE = "Dai 2019, arXiv:1901.02860, §3.1 and §3.2"


def judge(frame: pd.DataFrame) -> Finding:
    """Reach from the cells that worked it out, at several depths; quality from trained ones."""
    reached = has(finished(frame, variant="transformer_xl"), "reach")
    grows = reaches(reached, ["segment", "mem_len"], lambda knobs: knobs["mem_len"], "memory")
    return together([grows, *_quality(frame)])


def _quality(frame: pd.DataFrame) -> list[Part]:
    memory = has(finished(frame, variant="transformer_xl"), "nll")
    kept = memory[knob(memory, "mem_len") == knob(memory, "segment")]
    if kept.empty:
        raise Missing("variant=transformer_xl: none trained with mem_len = segment")
    kept = one_setting(kept)
    length, setting = int(knob(kept, "segment").iloc[0]), like(kept)
    kept = finished(kept, knobs={"segment": length}, **setting)
    without = finished(frame, variant="transformer_xl", knobs={"segment": length, "mem_len": 0}, **setting)
    chunks = finished(frame, variant="chunked", knobs={"chunk": length}, **setting)
    dense = finished(frame, variant="dense", **setting)

    hurt = difference(without, kept, "nll")
    reset = difference(without, kept, "nll_reset")
    rotary = difference(chunks, dense, "nll")
    window, trained = int(kept.iloc[0]["seq_len"]), kept.iloc[0]["tokens_trained"]
    return [
        Part(
            predicted=f"A chunk's first token has nothing before it; with memory it has {length} positions, "
            "and what lower layers put into them.",
            measured=f"Loss of transformer_xl without memory, less with {length} positions of it, after "
            f"{trained:,.0f} tokens of training: {hurt.said(points)} nats a token; with all memory "
            f"emptied every {window} tokens: {reset.said(points)}.",
            verdict=beyond(hurt),
            but=_instead(hurt, "transformer_xl gains from its memory", "its memory gains nothing"),
        ),
        Part(
            predicted="",
            measured=f"Loss of chunks of {length}, less dense over {window}: {rotary.said(points)} nats a "
            "token.",
            verdict=beyond(rotary),
            but=_instead(
                rotary,
                f"chunks of {length} lose to dense",
                f"after {trained:,.0f} tokens of training, chunks of {length} lose nothing to dense",
            ),
        ),
    ]


def _instead(found: Spread, gained: str, otherwise: str) -> str:
    return f"{gained}, but {unsure(found)}" if found.middle > 0 else otherwise
