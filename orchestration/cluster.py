"""Connecting to the Ray cluster that an experiment names."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from orchestration.clusters.access import make_token
from orchestration.config import Experiment

# A training polls its workers every 2 s by default, which short ones spend most of their time waiting for.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Tune's own tables and banners; the ledger of a sweep says what there is to say.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Nor does Ctrl-C end it as if it had come to its end.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Paths of an experiment are relative to where the command was typed, on every process.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# That a cluster of its own is guarded by a token is Ray's default, and nobody has to act on it.
TOKENS = logging.getLogger("ray._private.authentication.authentication_token_setup")
TOKENS.setLevel(logging.ERROR)


@contextmanager
def connect(experiment: Experiment | None) -> Iterator[None]:
    """Use the cluster at `cluster.address`; `local` starts one on this machine and ends it afterwards.

    So does no experiment.
    """
    if ray.is_initialized():
        yield
        return
    address = experiment.cluster.address if experiment else "local"
    settings: dict[str, Any] = {"address": address}
    if address == "local":
        make_token()
        # Tune learns from the dashboard that a stopped trial's training is gone; without it, it hangs.
        settings["include_dashboard"] = True
        # Nobody takes this machine away at a minute's notice: one process less a training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # A sweep has more processes than a laptop has cores, which Ray would warn of.
        # As in jobs/Dockerfile.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        startups = max(8, os.cpu_count() or 1)
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(startups))
    ray.init(
        **settings, log_to_driver=False, configure_logging=False, logging_level=logging.WARNING
    )
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    except RayTaskError as error:  # whose text begins with places in Ray
        cause = first_cause(error)
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from error
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def first_cause(error: BaseException) -> BaseException:
    """What an error of a task comes down to, on whichever process it was raised."""
    cause = error.cause if isinstance(error, RayTaskError) else error.__cause__
    return error if cause is None else first_cause(cause)
