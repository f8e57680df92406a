"""TensorBoard: one event folder per cell, which the dashboard shows as a run."""

from __future__ import annotations

from pathlib import Path

from bench.records import Record
from bench.trackers import figures, settings, steps


class Tracker:
    """Writes event files with torch's SummaryWriter into `place`/<experiment>/<cell>."""

    needs = "tensorboard"

    def __init__(self, place: str, experiment: str) -> None:
        self.folder = Path(place) / experiment

    def log(self, record: Record, curve: Path) -> None:
        """Log the settings as text, the figures as scalars at step 0
        and the training curve over its steps."""
        from torch.utils.tensorboard import SummaryWriter

        run = f"{record.variant}-T{record.seq_len}-d{record.depth}-{record.replicate}-{record.cell_id[:6]}"
        with SummaryWriter(str(self.folder / run)) as writer:
            table = [f"| {key} | {value} |" for key, value in settings(record).items()]
            writer.add_text("settings", "\n".join(["| knob | value |", "|---|---|", *table]))
            writer.add_text("status", f"{record.status} {record.reason or ''}")
            for key, value in figures(record).items():
                writer.add_scalar(f"record/{key}", value, 0)
            for row in steps(curve):
                for key, value in row.items():
                    if key != "step":
                        writer.add_scalar(f"training/{key}", value, int(row["step"]))
