"""Connecting to the Ray cluster that an experiment names."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestration.config import Experiment

# A training polls its workers every 2 s by default, which short trainings spend most of their time waiting for.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Paths of an experiment are relative to where the command was typed, on every process.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")


@contextmanager
def connect(experiment: Experiment) -> Iterator[None]:
    """Use the cluster at `cluster.address`; `local` starts one on this machine and ends it afterwards."""
    if ray.is_initialized():
        yield
        return
    local = experiment.cluster.address == "local"
    ray.init(
        address=None if local else experiment.cluster.address,
        # Tune learns from the dashboard that a stopped trial's training is gone; without it the search hangs.
        include_dashboard=True if local else None,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
