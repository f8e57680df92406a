"""Which variants are known to be faster than which: no rank by time says more than this."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED
from bench.report.data.groups import COMMON

_ALIKE = [*COMMON, "depth", "seq_len"]


def faster_than(cells: pd.DataFrame) -> list[list[int]]:
    """For each row of `statistics.cost_cells` the places of the rows that are known to be slower.

    Of a variant and the dense cell of its group `differs` decides. Of two other variants, one is slower if
    its time is longer by more than the noise floor, and longer than dense's too where the faster one is not
    known to differ from dense: so a variant between two that are not told apart is not told from the first
    either. Without a floor only dense between two variants tells them apart. Disturbed times tell nothing.
    """
    sound = cells[f"{SECONDS}_median"].notna() & ~cells[DISTURBED].eq(True)
    places = pd.Series(np.arange(len(cells)), cells.index)[sound]
    found: list[list[int]] = [[] for _ in range(len(cells))]
    own = cells[sound]
    for where in own.groupby(_ALIKE, sort=False, dropna=False).indices.values():
        numbers = places.to_numpy()[where]
        for number, row in zip(numbers, _faster(own.iloc[where]), strict=True):
            found[number] = [int(other) for other in numbers[row]]
    return found


def _faster(own: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """(n, n) whether the variant of a row is known to be faster than that of a column."""
    seconds = own[f"{SECONDS}_median"].to_numpy(dtype=float)
    is_full = (own["label"] == own["baseline"]).to_numpy(dtype=bool)
    differs = own["differs"].fillna(False).to_numpy(dtype=bool) & ~own[RATIO_DISTURBED].eq(True).to_numpy()
    full = own["activations"].map(own[is_full].set_index("activations")[f"{SECONDS}_median"])
    reach = seconds * own["noise_floor"].fillna(np.inf).to_numpy(dtype=float)
    at_dense = ~differs & ~is_full
    reach[at_dense] = np.fmax(reach, full.to_numpy(dtype=float))[at_dense]
    found = seconds > reach[:, None]
    kept = own["activations"].to_numpy()
    same = kept == kept[:, None]
    found = np.where(is_full[:, None] & same, differs, found)
    found = np.where(is_full & same, differs[:, None], found) & (seconds > seconds[:, None])
    for third in range(len(own)):
        found |= np.outer(found[:, third], found[third])
    return np.asarray(found, dtype=bool)
