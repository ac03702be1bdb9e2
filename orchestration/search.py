"""Ray Tune over any fields of an experiment; a trial is an Experiment like any other."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray import tune
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from orchestration.clusters.placement import TRIAL_CPUS
from orchestration.config import Experiment, digest
from orchestration.records.journal import Journal, write_json
from orchestration.records.results import (
    begin,
    evaluations,
    finished,
    require_same_data,
    trials_folder,
    write_result,
)
from orchestration.searching.budget import Budgeted, spent
from orchestration.searching.climb import Climb, proposal
from orchestration.searching.parzen import Parzen
from orchestration.searching.proposals import Listed, Proposal, proposals
from orchestration.searching.rounds import Outcome, Rounds
from orchestration.searching.schedulers import scheduler
from orchestration.searching.summary import describe, ended, summarize
from orchestration.space import searched
from orchestration.storing.mirroring import mirror_of
from orchestration.trainer import fit

LONGEST = 200
"""Characters of the name of a folder, which may get an ending."""
ProposalOf = Callable[[Mapping[str, Any]], Proposal]
log = logging.getLogger(__name__)

# Where several Ray clusters share a machine, Train's clean-up after a stopped trial finds its own by this.
ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def search(experiment: Experiment, prepared: Path) -> None:
    """Try every trial of `search.space` that has no result yet, on the data prepared in a folder.

    Run again after any interruption, it proposes the same trials: those with a result are not trained
    again, the others go on from their checkpoints. A trial that fails leaves the others alone.
    """
    root, settings = trials_folder(experiment), searched(experiment)
    space = {path: str(domain) for path, domain in settings.space.items()}
    trials = settings.trials or 0
    with Journal(root) as journal:
        journal.start(identity=experiment.identity(), params=space, step=0, steps=trials)
    ledger, decides = Ledger(experiment, root), scheduler(experiment)
    searcher, proposal_of = _searcher(experiment)
    held = Budgeted(
        searcher,
        settings.budget,
        spent=lambda: spent(experiment, root),
        begun=lambda values: (root / trial_name(values)).exists(),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable(experiment, prepared, proposal_of), {"CPU": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=settings.trials or -1,  # as many as the searcher suggests
            search_alg=ConcurrencyLimiter(held, max_concurrent=experiment.trials_at_once),
            scheduler=decides,
            # The process of a stopped trial still waits for its training: only its end ends that.
            reuse_actors=type(decides) is FIFOScheduler,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((root / "ray").absolute()),
            verbose=0,
            callbacks=[ledger],
        ),
    )
    try:
        tuner.fit()
        ledger.settle(wait=True)
    except Exception as error:
        Journal(root).end("failed", reason=f"{type(error).__name__}: {error}")
        raise
    if summarize(experiment)["trials"]:
        Journal(root).end("finished")
    else:
        Journal(root).end("failed", reason="no trial came to an end")


def trial_name(values: Mapping[str, object]) -> str:
    """A trial's name and folder, from its values alone: `size=small,lr=0.01,epochs=2`.

    What would be too long for a folder ends in a digest.
    """
    name = ",".join(
        f"{path.rpartition('.')[2]}={quote(str(value), safe=' +')}"
        for path, value in values.items()
    )
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 17]}-{digest(name)}"


def _searcher(experiment: Experiment) -> tuple[Searcher, ProposalOf]:
    """What suggests the values of trials, and what else belongs to such values."""
    if searched(experiment).across:
        rounds = Rounds(Climb(experiment), partial(outcome, experiment))
        return rounds, partial(proposal, experiment)
    if searched(experiment).sampler == "tpe":
        return Rounds(Parzen(experiment), partial(outcome, experiment)), Proposal
    listed = proposals(experiment)
    by_name = {trial_name(one.values): one for one in listed}
    return Listed(listed), lambda values: by_name[trial_name(values)]


def outcome(experiment: Experiment, values: Mapping[str, Any]) -> Outcome | None:
    """How the trial with these values has ended, unless it is to be trained, once more perhaps."""
    folder = trials_folder(experiment) / trial_name(values)
    if result := finished(experiment.trial(values), folder):
        return Outcome(result["state"], result["metrics"])
    state, reason = ended(folder)
    diverged = state == "failed" and reason.startswith(FloatingPointError.__name__)
    return Outcome("diverged", {}) if diverged else None


def trainable(
    experiment: Experiment, prepared: Path, proposal_of: ProposalOf
) -> Callable[[dict], None]:
    """The function that Tune calls with the values of a trial."""
    workers = searched(experiment).workers
    root, prepared = trials_folder(experiment).absolute(), prepared.absolute()

    def trial(values: dict) -> None:
        chosen = experiment.trial(values)
        folder = root / trial_name(values)
        done = finished(chosen, folder) is not None
        if not done:
            proposed = proposal_of(values)
            trunk = root / trial_name(proposed.trunk) if proposed.trunk else None
            if trunk is not None and ended(trunk)[0] in ("failed", "stopped"):
                trunk = None  # then it trains by itself what they would have shared
            chosen = chosen.with_overrides(proposed.settings(trunk))
            begin(chosen, folder)
            require_same_data(chosen, folder, prepared)
            write_json(folder / "values.json", values)
        # The scheduler learns what it would have learnt had all of the trial run now.
        for metrics in evaluations(folder):
            tune.report(metrics | {"epoch": int(metrics["train/epoch"])})
        if not done:
            fit(chosen, folder, prepared, workers=workers, callbacks=[TuneReportCallback()])

    return trial


class Ledger(tune.Callback):
    """Writes down, in the driver, how trials ended, and the best so far into the sweep's journal."""

    def __init__(self, experiment: Experiment, root: Path) -> None:
        """`root` holds the trials and the sweep's own journal."""
        self.experiment, self.root = experiment, root
        self.done, self.total = 0, searched(experiment).trials
        self.stopped: list[dict] = []
        self.began = time.time()

    def on_trial_complete(self, iteration: int, trials: list, trial: Trial, **info: object) -> None:
        """A trial that the scheduler stopped cannot write its result itself."""
        folder = self.root / trial_name(trial.config)
        if mirror := mirror_of(self.experiment):
            try:
                mirror.fetch(folder)  # what a worker on another machine has made
            except RuntimeError as error:  # which Tune would take for a failure of the trial
                log.warning("%s; the sweep goes on with what is here", error)
        if finished(self.experiment.trial(trial.config), folder):
            self._tell(folder)
        else:
            # Tune ends its workers after this call; until then one of them has the journal open.
            self.stopped.append(trial.config)

    def on_step_end(self, iteration: int, trials: list, **info: object) -> None:
        """Tune's loop went round: workers of a stopped trial may be gone by now."""
        self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Write the results of stopped trials whose workers are gone, or wait until they are."""
        for values in list(self.stopped):
            folder, chosen = self.root / trial_name(values), self.experiment.trial(values)
            try:
                journal = Journal(folder, wait=wait)
            except BlockingIOError:
                continue
            with journal:
                if finished(chosen, folder) is None:  # else it was faster than its end
                    journal.end("stopped", reason="scheduler", since=self.began)
                    write_result(chosen, folder, state="stopped")
            self.stopped.remove(values)
            self._tell(folder)

    def _tell(self, folder: Path) -> None:
        self.done += 1
        best = summarize(self.experiment)["best"]
        shown = ("eval/loss", "eval/accuracy") if best else ()
        with Journal(self.root) as journal:
            journal.metrics(self.done, {f"best/{name}": best[name] for name in shown})
        of_all = f" of {self.total}" if self.total else ""
        log.info("trial %d%s: %s: %s", self.done, of_all, folder.name, describe(folder))

    def on_trial_error(self, iteration: int, trials: list, trial: Trial, **info: object) -> None:
        """A failed trial has written its cause; the search goes on."""
        log.warning("trial %s failed", trial_name(trial.config))
