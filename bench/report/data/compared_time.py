"""The time by which cells are compared: the device's where there is one, else wall-clock time.

A launch-bound step takes the time in which the host submits its operations, which says little about the
variant. The time that the device is busy does not depend on the host. Both are in a report, but only one is
compared: cells are ranked, divided by dense, fitted and drawn by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

SECONDS, RATE, SOURCE = "compared_seconds", "compared_tokens_per_second", "time_source"
"""Columns of records: seconds of a step, tokens per second, and which time it is."""
DEVICE, WALL = "device", "wall"
MACHINE = ("device", "machine")
"""Cells of one machine are compared by one kind of time, so that its noise floor is of that kind too."""


def with_compared_time(frame: pd.DataFrame, among: Sequence[str] = MACHINE) -> pd.DataFrame:
    """Add the columns `SECONDS`, `RATE` and `SOURCE` to a frame of records.

    The source is `DEVICE` where every timed record that shares the keys `among` has a device time, else
    `WALL`: an older record without one would otherwise be compared with another kind of time.
    """
    wall, device = frame["step_seconds_median"], frame["device_seconds_step"]
    rate = frame["tokens_per_second"]
    lacks = (frame["status"] == "ok") & wall.notna() & device.isna()
    if among:
        keys = [frame[key] for key in among]
        lacks, has = (flag.groupby(keys).transform("any") for flag in (lacks, device.notna()))
        by_device = has & ~lacks
    else:
        by_device = pd.Series(bool(device.notna().any() and not lacks.any()), index=frame.index)
    return frame.assign(
        **{
            SECONDS: wall.where(~by_device, device),
            RATE: rate.where(~by_device, rate * wall / device),
            SOURCE: by_device.map({True: DEVICE, False: WALL}),
        }
    )
