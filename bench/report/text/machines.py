"""The machines and the days of an experiment in words."""

from __future__ import annotations

import pandas as pd

from bench.records.configurations import UNKNOWN
from bench.report.text.phrases import describe


def dates(frame: pd.DataFrame) -> str:
    """The day or days on which the cells started, from the first to the last."""
    days = sorted(frame["started_at"].dropna().astype(str).str[:10].unique())
    if not days:
        return UNKNOWN
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


SETTINGS = {
    "cudnn_version": "cuDNN {:.0f}",
    "tf32": "TF32: {}",
    "device_allocator": "allocator {}",
    "deterministic": "deterministic algorithms: {}",
    "gpu_power_limit_watts": "power limit {:.0f} W",
}
"""Key of a record about an accelerator → its words."""


def settings(frame: pd.DataFrame) -> str:
    """The settings of the accelerators in words, each different set once; empty where none is known."""
    known = frame[list(SETTINGS)].drop_duplicates().to_dict("records")
    phrases = [
        ", ".join(words.format(row[key]) for key, words in SETTINGS.items() if not pd.isna(row[key]))
        for row in known
    ]
    return "; ".join(dict.fromkeys(filter(None, phrases)))


def machines(frame: pd.DataFrame) -> str:
    """Each machine in a phrase: the device's name, the CPU and the threads."""
    labelled = frame.assign(cpu_model=frame["cpu_model"].fillna(UNKNOWN))
    phrases = []
    each = zip(labelled["machine"], labelled["cpu_model"], labelled["threads"], strict=True)
    for machine, cpu, threads in sorted(set(each)):
        same = labelled[labelled["machine"] == machine]
        if cpu == UNKNOWN and (same["cpu_model"] != UNKNOWN).any():
            continue  # a cell that failed early on a machine that others name
        words = [
            machine,
            *([f"CPU {cpu}"] if cpu not in (UNKNOWN, machine) else []),
            describe({"threads": threads}, ["threads"]),
        ]
        phrases.append(", ".join(words))
    return "; ".join(phrases)
