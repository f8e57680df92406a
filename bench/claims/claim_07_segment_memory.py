"""Transformer-XL: the reach of a sequence's last token by depth, and the loss of chunks without memory.

`transformer_xl` without memory is a network on chunks with the same parameters and relative positions. Its
additional loss compared with memory is therefore caused only by the chunk edges.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding, Missing
from bench.claims.cells import Spread, difference, finished, has
from bench.claims.parts import Part, beyond, knob, like, one_setting, points, reaches, together, unsure

STATEMENT = "Transformer-XL's reach grows with every layer; resetting positions in chunks hurts."
SOURCE = "Dai 2019, arXiv:1901.02860, §3.1 and §3.2"


def judge(frame: pd.DataFrame) -> Finding:
    """Judge the reach from cells at several depths, and the quality from trained cells."""
    reached = has(finished(frame, variant="transformer_xl"), "reach")
    grows = reaches(reached, ["segment", "mem_len"], lambda knobs: knobs["mem_len"], "memory")
    return together([grows, *_quality(frame)])


def _quality(frame: pd.DataFrame) -> list[Part]:
    memory = has(finished(frame, variant="transformer_xl"), "nll")
    with_memory = memory[knob(memory, "mem_len") == knob(memory, "segment")]
    if with_memory.empty:
        raise Missing("variant=transformer_xl: none trained with mem_len = segment")
    with_memory = one_setting(with_memory)
    length, setting = int(knob(with_memory, "segment").iloc[0]), like(with_memory)
    with_memory = finished(with_memory, knobs={"segment": length}, **setting)
    without = finished(frame, variant="transformer_xl", knobs={"segment": length, "mem_len": 0}, **setting)
    chunks = finished(frame, variant="chunked", knobs={"chunk": length}, **setting)
    dense = finished(frame, variant="dense", **setting)

    hurt = difference(without, with_memory, "nll")
    reset = difference(without, with_memory, "nll_reset")
    rotary = difference(chunks, dense, "nll")
    window, trained = int(with_memory.iloc[0]["seq_len"]), with_memory.iloc[0]["tokens_trained"]
    return [
        Part(
            predicted=f"The first token of a chunk has no context; with memory it has {length} positions, "
            "and the information that lower layers store in them.",
            measured=f"Loss of transformer_xl without memory minus that with {length} positions, "
            f"after {trained:,.0f} tokens of training: {hurt.text(points)} nats per token; with the "
            f"memory reset every {window} tokens: {reset.text(points)}.",
            verdict=beyond(hurt),
            but=_instead(hurt, "transformer_xl gains from its memory", "its memory gains nothing"),
        ),
        Part(
            predicted="",
            measured=f"Loss of chunks of {length} minus that of dense over {window}: {rotary.text(points)} "
            "nats per token.",
            verdict=beyond(rotary),
            but=_instead(
                rotary,
                f"chunks of {length} are worse than dense",
                f"after {trained:,.0f} tokens of training, chunks of {length} are not worse than dense",
            ),
        ),
    ]


def _instead(gain: Spread, gained: str, otherwise: str) -> str:
    return f"{gained}, but {unsure(gain)}" if gain.middle > 0 else otherwise
