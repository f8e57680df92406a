"""Weights & Biases: one run per cell, in a project of the experiment's name.

Runs are written to local files; `wandb sync FOLDER/wandb/offline-run-*` uploads them. With
WANDB_MODE=online in the environment, they are uploaded at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from bench.records import Record
from bench.trackers import figures, settings, steps


class Tracker:
    """Logs to runs in the folder `place`."""

    needs = "wandb"

    def __init__(self, place: str, experiment: str) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports to the makers of wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        self.place, self.experiment = Path(place), experiment

    def log(self, record: Record, curve: Path) -> None:
        """Log the settings as the run's config, the figures as its summary,
        and the training curve by step."""
        import wandb

        self.place.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            dir=self.place,
            project=self.experiment,
            name=f"{record.variant} T={record.seq_len} #{record.replicate}",
            config=settings(record),
            # nothing of this process, which only passes a finished record on, is measured or stored
            settings=wandb.Settings(console="off", x_disable_stats=True, disable_code=True, disable_git=True),
        )
        for row in steps(curve):
            named = {f"training/{key}": value for key, value in row.items() if key != "step"}
            run.log(named, step=int(row["step"]))
        outcome = {"cell_id": record.cell_id, "status": record.status, "reason": record.reason or ""}
        run.summary.update({**figures(record), **outcome})
        run.finish(exit_code=0 if record.status == "ok" else 1)
