"""A Hydra launcher based on Ray's core: each job is a Ray task; one that dies does not affect the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

RAY_SETTINGS = {
    "RAY_worker_niceness": "0",  # default 15: other processes would have priority over the measurement
    "RAY_worker_oom_score_adjustment": "0",  # default: as high as a cell's, which must be killed first
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers at 95 % of memory, which a cell may use
}
"""Settings of a Ray that is started here, so that a cell runs as it does without Ray. Variables of the
environment have priority."""


class RayLauncher(Launcher):
    """Runs jobs on the machines of a Ray cluster, or on a Ray that is started on this machine until the jobs
    end.

    `init` holds the arguments of ray.init, `remote` those of ray.remote: the resources of each job.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init: Any = OmegaConf.to_container(init, resolve=True)
        self.remote: Any = OmegaConf.to_container(remote, resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the arguments for `launch`."""
        self.common = (hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and wait for all of them; returns their results in the order of the jobs."""
        import ray
        from ray.exceptions import RayError

        os.environ.update({name: value for name, value in RAY_SETTINGS.items() if name not in os.environ})
        with ray.init(**self.init):
            common = ray.put((*self.common, Singleton.get_state()))
            task = ray.remote(**self.remote)(_work)
            running = {
                task.remote(common, list(overrides), initial_job_idx + index): index
                for index, overrides in enumerate(job_overrides)
            }
            ended: dict[int, JobReturn] = {}
            waiting = list(running)
            while waiting:
                (done,), waiting = ray.wait(waiting, num_returns=1)
                try:
                    ended[running[done]] = ray.get(done)
                except RayError as error:  # its process or its machine died
                    ended[running[done]] = JobReturn(status=JobStatus.FAILED, _return_value=error)
        return [ended[index] for index in range(len(job_overrides))]


def _work(common: Any, overrides: list[str], number: int) -> JobReturn:
    """Run one job in a Ray worker process."""
    context, task, config, singletons = common
    setup_globals()
    Singleton.set_state(singletons)
    job = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    return run_job(
        hydra_context=context,
        task_function=task,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
