"""Transformer-XL: the reach of a sequence's last token by depth, and the loss of chunks without memory.

`transformer_xl` without memory is a network on chunks with the same parameters and relative positions. Its
additional loss compared with memory is therefore caused only by the chunk edges.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import difference, finished, has
from bench.claims.parts import above, knob, like, one_setting, points, reaches, reason

STATEMENT = "Transformer-XL's reach grows with every layer; resetting positions in chunks hurts."
SOURCE = "Dai 2019, arXiv:1901.02860, §3.1 and §3.2"


def reach(frame: pd.DataFrame) -> Judgement:
    """Judge the reach from cells at several depths."""
    reached = has(finished(frame, variant="transformer_xl"), "reach")
    return reaches(reached, ["segment", "mem_len"], lambda knobs: knobs["mem_len"], "memory")


def _with_memory(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the trained cells of one setting with a memory as long as a segment."""
    memory = has(finished(frame, variant="transformer_xl"), "nll")
    rows = memory[knob(memory, "mem_len") == knob(memory, "segment")]
    if rows.empty:
        raise Missing("variant=transformer_xl: trained with mem_len = segment")
    rows = one_setting(rows)
    return finished(rows, knobs={"segment": int(knob(rows, "segment").iloc[0])}, **like(rows))


def memory(frame: pd.DataFrame) -> Judgement:
    """Judge the loss without memory against that with it."""
    own = _with_memory(frame)
    length = int(knob(own, "segment").iloc[0])
    without = finished(frame, variant="transformer_xl", knobs={"segment": length, "mem_len": 0}, **like(own))
    hurt, reset = difference(without, own, "nll"), difference(without, own, "nll_reset")
    window, trained = int(own.iloc[0]["seq_len"]), own.iloc[0]["tokens_trained"]
    verdict = above(hurt)
    return Judgement(
        predicted=f"The first token of a chunk has no context; with memory it has {length} positions, "
        "and the information that lower layers store in them.",
        measured=f"Loss of transformer_xl without memory minus that with {length} positions, "
        f"after {trained:,.0f} tokens of training: {hurt.text(points)} nats per token; with the "
        f"memory reset every {window} tokens: {reset.text(points)}.",
        verdict=verdict,
        reason=reason(verdict, "its memory gains nothing", hurt),
    )


def chunks(frame: pd.DataFrame) -> Judgement:
    """Judge the loss of chunks, whose positions restart, against that of dense attention."""
    own = _with_memory(frame)
    length, trained = int(knob(own, "segment").iloc[0]), own.iloc[0]["tokens_trained"]
    rotary = difference(
        finished(frame, variant="chunked", knobs={"chunk": length}, **like(own)),
        finished(frame, variant="dense", **like(own)),
        "nll",
    )
    verdict = above(rotary)
    return Judgement(
        predicted=f"A token has at most {length - 1} tokens of context in a chunk of {length}.",
        measured=f"Loss of chunks of {length} minus that of dense over {own.iloc[0]['seq_len']}, after "
        f"{trained:,.0f} tokens of training: {rotary.text(points)} nats per token.",
        verdict=verdict,
        reason=reason(verdict, f"chunks of {length} are not worse than dense", rotary),
    )


PARTS = {
    "The reach grows with every layer": reach,
    "Without memory, with the same positions and parameters, the loss is higher": memory,
    "The loss of chunks is higher than that of dense attention": chunks,
}
