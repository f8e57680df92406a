"""MLflow: one run per cell, in an experiment of the same name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.records import Record
from bench.trackers import figures, settings, steps

BATCH = 1000
"""Maximum number of metrics that MLflow accepts in one call."""


class Tracker:
    """Logs to the store at `place`: a folder or an MLflow address, such as http://host:5000."""

    needs = "mlflow"

    def __init__(self, place: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # disables MLflow's usage reports
        if "://" not in place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # required since MLflow 3
            place = Path(place).resolve().as_uri()
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=place)
        existing = self.client.get_experiment_by_name(experiment)
        self.experiment = existing.experiment_id if existing else self.client.create_experiment(experiment)

    def log(self, record: Record, curve: Path) -> None:
        """Log the settings as parameters, the figures as metrics and
        the training curve as metrics by step."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        tags = {"cell_id": record.cell_id, "status": record.status, "reason": record.reason or ""}
        run = self.client.create_run(
            self.experiment, run_name=f"{record.variant} T={record.seq_len} #{record.replicate}"
        ).info.run_id
        metrics = [Metric(key, value, now, 0) for key, value in figures(record).items()]
        metrics += [
            Metric(f"training.{key}", value, now, int(row["step"]))
            for row in steps(curve)
            for key, value in row.items()
            if key != "step"
        ]
        params = [Param(key, value) for key, value in settings(record).items()]
        self.client.log_batch(run, params=params, tags=[RunTag(k, v) for k, v in tags.items()])
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run, metrics=metrics[start : start + BATCH])
        ended = record.status == "ok"
        self.client.set_terminated(run, status="FINISHED" if ended else "FAILED")
