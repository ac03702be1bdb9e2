"""Ray Tune over any fields of an experiment; a trial is an Experiment like any other."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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

from orchestration.clusters.placement import TRIAL_CPUS, searched
from orchestration.config import Experiment
from orchestration.planning.planned import reached
from orchestration.records.journal import Journal, curve, read, read_json, write_json
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
from orchestration.searching.effects import Effect, Tried, effects, spread
from orchestration.searching.front import front
from orchestration.searching.parzen import Parzen
from orchestration.searching.proposals import Listed, Proposal, proposals
from orchestration.searching.rounds import Outcome, Rounds
from orchestration.searching.schedulers import scheduler
from orchestration.space import SCHEDULE, SEED
from orchestration.storing.mirroring import mirror_of
from orchestration.trainer import fit

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
    except BaseException as error:
        Journal(root).end("failed", reason=f"{type(error).__name__}: {error}")
        raise
    Journal(root).end("finished")


def trial_name(values: Mapping[str, object]) -> str:
    """A trial's name and folder, from its values alone: `size=small,lr=0.01,epochs=2`."""
    return ",".join(
        f"{path.rpartition('.')[2]}={quote(str(value), safe=' +')}"
        for path, value in values.items()
    )


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
    state, reason = _ended(folder)
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
            if trunk is not None and _ended(trunk)[0] in ("failed", "stopped"):
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
            if finished(chosen, folder) is None:  # else it was faster than its end
                journal.end("stopped", reason="scheduler", since=self.began)
                write_result(chosen, folder, state="stopped")
            self.stopped.remove(values)
            self._tell(folder)

    def _tell(self, folder: Path) -> None:
        self.done += 1
        best = summarize(self.experiment)["best"]
        with Journal(self.root) as journal:
            journal.metrics(
                self.done, {f"best/{name}": best[name] for name in ("eval/loss", "eval/accuracy")}
            )
        of_all = f" of {self.total}" if self.total else ""
        log.info("trial %d%s: %s: %s", self.done, of_all, folder.name, describe(folder))

    def on_trial_error(self, iteration: int, trials: list, trial: Trial, **info: object) -> None:
        """A failed trial has written its cause; the search goes on."""
        log.warning("trial %s failed", trial_name(trial.config))


def describe(folder: Path) -> str:
    """One line on a finished trial."""
    result = read_json(folder / "result.json")
    metrics = result["metrics"]
    return f"{result['state']}, loss {metrics['eval/loss']:.3f}, accuracy {metrics['eval/accuracy']:.1%}"


def summarize(experiment: Experiment) -> dict:
    """The finished trials, the best first by `search.metric`, and the names of those that failed.

    `front` names those that none beats in all `objectives`. Trials of another schedule than the best one's
    come after all of its own: they are no ranking together.
    """
    search, root = searched(experiment), trials_folder(experiment)
    trials, failures = [], []
    for path in sorted(root.glob("*/values.json")):
        folder, values = path.parent, read_json(path)
        if not search.proposes(values):
            continue  # left by a search of another space under this name
        if (folder / "result.json").exists():
            result = read_json(folder / "result.json")
            about = {"trial": folder.name, "folder": str(folder), "state": result["state"]}
            trials.append(about | values | result["metrics"])
        elif (ended := _ended(folder))[0] == "failed":
            failures.append(f"{folder.name}: {ended[1]}")
    sign = 1 if search.mode == "min" else -1
    # A trial that diverged has no number to compare: last.
    trials.sort(key=lambda t: (math.isnan(t[search.metric]), sign * t[search.metric]))
    first = list(dict.fromkeys(trial.get(SCHEDULE) for trial in trials))
    trials.sort(key=lambda trial: first.index(trial.get(SCHEDULE)))
    signs = search.objectives
    ends = [[s * trial.get(name, math.nan) for name, s in signs.items()] for trial in trials]
    names = [trials[at]["trial"] for at in front(ends)]
    return {
        "best": trials[0] if trials else None,
        "front": {"objectives": list(signs), "trials": names},
        "trials": trials,
        "failed": failures,
    }


def compare(experiment: Experiment, trials: Sequence[Mapping[str, Any]]) -> dict:
    """What single settings change among the trials of a summary."""
    search = searched(experiment)
    tried = [
        Tried(
            {path: trial[path] for path in (*search.space, SEED) if path in trial},
            trial[search.metric],
            len(curve(Path(trial["folder"]), "train/loss")),
        )
        for trial in trials
    ]
    relative = search.mode == "min"
    own = experiment.searched()
    changed = effects(tried, own, relative=relative, under=search.under)
    return {"relative": relative, "effects": [*map(asdict, changed)]}


def _ended(folder: Path) -> tuple[str | None, str]:
    """The state in which a trial has ended, if it has, and why."""
    entries = read(folder)[0]
    last = entries[-1] if entries else {}
    return last.get("state"), last.get("reason", "")


def render(summary: dict) -> str:
    """The trials as a table, the best first, those of the front, and what single settings change."""
    width = max(len(trial["trial"]) for trial in summary["trials"])
    lines = [f"{'trial':<{width}}  state     eval/loss  accuracy  blind"]
    lines += [
        f"{trial['trial']:<{width}}  {trial['state']:<8}  {trial['eval/loss']:9.4f}  "
        f"{trial['eval/accuracy']:8.1%}  {trial['eval/accuracy_blind']:5.1%}"
        for trial in summary["trials"]
    ]
    objectives, named = summary["front"]["objectives"], summary["front"]["trials"]
    if len(objectives) > 1:
        lines.append(f"beaten by none in {' and '.join(objectives)}:")
        lines += [
            f"  {', '.join(reached(name, trial[name]) for name in objectives)}: {trial['trial']}"
            for trial in summary["trials"]
            if trial["trial"] in named
        ]
    lines += [f"failed: {failure}" for failure in summary["failed"]]
    for effect in (Effect(**one) for one in summary["effects"]):
        change = spread(effect, relative=summary["relative"])
        counted = f"{effect.pairs} pairs, {effect.updates:.2f} of the updates"
        lines.append(f"{effect.what}: {change}, {counted}")
    return "\n".join(lines)
