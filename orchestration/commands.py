"""The verbs that do work: data, tracking and engines brought together for one experiment.

Each can be interrupted and typed again: what is done is not done again.
"""

import logging
from pathlib import Path

from orchestration import report, search
from orchestration.cluster import connect
from orchestration.clusters.placement import require_room, require_room_for_trials
from orchestration.config import Experiment
from orchestration.plan import plan
from orchestration.prepare import prepare, require_one_tokenizer
from orchestration.records import progress
from orchestration.records.journal import sole
from orchestration.records.results import (
    begin,
    finished,
    require_same_data,
    trials_folder,
    trunk_of,
)
from orchestration.records.shipping import shipped
from orchestration.searching import evidence, summary
from orchestration.storing.mirroring import catch_up, mirrored
from orchestration.trainer import fit

log = logging.getLogger(__name__)


def train(experiment: Experiment) -> dict:
    """Train in the experiment's run folder, or go on where it stopped; returns the result.

    Raises:
        ValueError: if the folder holds a run of another identity; the differing fields are named.
        RuntimeError: if another process trains there.
    """
    folder, trunk = experiment.run_folder, experiment.checkpoint.trunk
    trunks = [Path(trunk)] if trunk else []
    # A finished run has its journal shipped all the same: the tracking store may have been away.
    with sole(folder), mirrored(experiment, *trunks):
        trunk_of(experiment)  # raises before any work where it is none
        begin(experiment, folder)
        with shipped(experiment, folder):
            if finished(experiment, folder) is None:
                workers = experiment.cluster.workers
                with connect(experiment):
                    require_room(experiment, workers=experiment.worker_counts(workers)[0])
                    prepared = Path(prepare(experiment)["folder"])
                    plan(experiment)  # raises where there are fewer samples than an update has
                    require_same_data(experiment, folder, prepared)
                    with progress.shown(experiment, experiment.name):
                        fit(experiment, folder, prepared, workers=workers)
                # What rank 0 wrote on a machine of its own is to reach the tracking store as well.
                catch_up(experiment, folder, lambda mirror: mirror.fetch(folder))
                report.keep(experiment, folder)
    result = finished(experiment, folder)
    assert result is not None
    return {"folder": str(folder)} | result


def sweep(experiment: Experiment) -> dict:
    """Search the experiment's space, all trials sharing one prepared data set; returns their results.

    Raises:
        ValueError: if there is no search section, the trials' folder holds another search, or the
            sizes do not share a tokenizer.
        RuntimeError: if another process sweeps there.
    """
    folder = trials_folder(experiment)
    require_one_tokenizer(experiment)
    with sole(folder), mirrored(experiment):
        begin(experiment, folder)
        with connect(experiment), shipped(experiment, folder):
            require_room_for_trials(experiment)
            prepared = Path(prepare(experiment)["folder"])
            plan(experiment)
            with progress.shown(experiment, f"{experiment.name} sweep"):
                search.search(experiment, prepared)
            if experiment.search and experiment.search.across:
                evidence.write(experiment)
            report.keep(experiment, folder)
    found = summary.summarize(experiment)
    for failure in found["failed"]:
        log.warning("trial %s", failure)
    if not found["trials"]:
        raise RuntimeError(f"no trial of {experiment.name} came to an end")
    return found | summary.compare(experiment, found["trials"])
