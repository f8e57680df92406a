"""The README's table of quality, computed from records."""

from __future__ import annotations

from itertools import groupby

import pandas as pd

BASE = ["ngram_3", "ngram_5", "xz"]


def name_of(variant: str, knobs: dict[str, object]) -> str:
    """As the README calls it: with the knob by which cells of one variant differ."""
    if variant == "longformer":
        (window,) = knobs["window"]  # type: ignore[misc]  # one for all layers
        return f"`longformer`, window {window}"
    if variant == "compressive":
        return f"`compressive`, memory {knobs['mem_len']}"
    if variant == "hybrid":
        runs = [(layer, len([*same])) for layer, same in groupby(map(str, knobs["layers"]))]  # type: ignore[call-overload]
        return "`hybrid`, " + ", ".join(f"{n}×{layer}" if n > 1 else layer for layer, n in runs)
    return f"`{variant}`"


def rows_of(frame: pd.DataFrame) -> list[list[str]]:
    """A row a causal model, best first: its bits per byte after each budget, and the difference to dense."""
    trained = frame[frame["bits_per_byte"].notna()]
    names = [
        name_of(variant, knobs)
        for variant, knobs in zip(trained["variant"], trained["variant_params"], strict=True)
    ]
    budgets = pd.DataFrame(trained["bits_per_byte_by_budget"].tolist(), index=trained.index)
    budgets = budgets.assign(name=names, replicate=trained["replicate"])
    means = budgets.groupby("name")[[0, 1, 2]].mean().sort_values(2)
    last = budgets.pivot_table(index="replicate", columns="name", values=2)
    spread, extra = last.std(), last.sub(last["`dense`"], axis=0).mean()
    return [
        [
            str(name),
            f"{row[0]:.2f}",
            f"{row[1]:.2f}",
            f"{row[2]:.3f} ± {spread[name]:.3f}",
            "–" if name == "`dense`" else f"{extra[name]:+.3f}".replace("-", "−"),
        ]
        for name, row in means.iterrows()
    ]
