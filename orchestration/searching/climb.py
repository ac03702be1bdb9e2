"""The search across sizes as trials: which come next, and what those that ended have shown.

A run of `across` is a chain of trials: each begins where the plateau of the one before ended, and anneals at
its own horizon.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf, isfinite
from typing import Any

from orchestration.config import Experiment
from orchestration.domains import LogUniform
from orchestration.planning.cost import flops_of_a_step
from orchestration.planning.parameters import parameters
from orchestration.scaling import Ladder, Size, Trunk
from orchestration.searching.across import AcrossSizes, Recommendation
from orchestration.searching.proposals import Proposal
from orchestration.searching.rounds import Outcome
from orchestration.space import EPOCHS, SEED

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


def policy(experiment: Experiment) -> AcrossSizes:
    """The search that the experiment asks for.

    Raises:
        ValueError: if its sizes do not ascend.
        OSError: if a decoder's weights are not there.
    """
    from dsvl.pretrained import (
        embedding_rms,
    )  # takes seconds, which other searches need not wait for

    search = experiment.search
    assert search is not None
    rates = search.space["optim.lr"]
    assert isinstance(rates, LogUniform)
    epochs = search.space[EPOCHS].probes()
    sizes = []
    for name in search.space["model.size"].probes():
        trial = experiment.trial({"model.size": name} | search.constants)
        sizes.append(
            Size(
                name,
                parameters=sum(part.total for part in parameters(trial.model).values()),
                cost=sum(flops_of_a_step(trial).values()),
                embedding_rms=embedding_rms(trial.model.language.checkpoint),
            )
        )
    decay = experiment.trial(search.constants).optim.decay_fraction
    return AcrossSizes(
        Ladder(tuple(sizes), epochs, decay=decay),
        (rates.low, rates.high),
        budget=search.target_epochs,
        verify=search.verify,
        seed=search.seed,
    )


def values_of(experiment: Experiment, size: str, lr: float, horizon: float) -> dict[str, Any]:
    """The values of the trial that anneals a run at a horizon."""
    search = experiment.search
    assert search is not None
    epochs = next(n for n in search.space[EPOCHS].probes() if n == horizon)  # a whole number
    chosen = {"model.size": size, "optim.lr": lr, EPOCHS: epochs} | search.constants
    return {path: chosen[path] for path in search.space}


def proposal(experiment: Experiment, values: Mapping[str, Any]) -> Proposal:
    """A trial of the search, beginning where the one of the next shorter horizon branched off."""
    search = experiment.search
    assert search is not None
    shorter = [n for n in search.space[EPOCHS].probes() if n < values[EPOCHS]]
    if not shorter or SEED in values:
        return Proposal(dict(values))
    return Proposal(dict(values), trunk=dict(values) | {EPOCHS: shorter[-1]})


def confirmations(experiment: Experiment, found: Recommendation) -> list[dict[str, Any]]:
    """Trials of the experiment as it stands, and of what is recommended, with the same seeds each."""
    search = experiment.search
    assert search is not None
    own = experiment.searched()
    first = experiment.train.seed + 1  # what was found was found with the experiment's own
    return [
        values | {SEED: seed}
        for seed in range(first, first + search.confirm)
        for values in (own, values_of(experiment, found.size, found.lr, found.horizon))
    ]


class Climb:
    """A strategy: up the sizes, and then the trials that confirm what was found."""

    def __init__(self, experiment: Experiment, *, progress: Progress = log.info) -> None:
        """Nothing has been tried yet."""
        self.experiment, self.search = experiment, policy(experiment)
        self.trunks: list[Trunk] = []
        self._progress = progress
        self._confirming = False

    def recommended(self) -> Recommendation | None:
        """What to train at the target, if there is anything to judge by."""
        if not any(isfinite(loss) for trunk in self.trunks for loss in trunk.losses):
            return None
        return self.search.recommend(self.trunks)

    def next_round(self) -> list[dict[str, Any]]:
        """Trials of one size, or those that confirm; none when all is done."""
        self.trunks = [self._judged(trunk) for trunk in self.trunks]
        if all(trunk.ended for trunk in self.trunks) and not self._confirming:
            found = self.recommended()
            if self.trunks and (found is None or self._nothing_of_a_size()):
                return []
            runs = self.search.propose(self.trunks)
            self.trunks += [Trunk(run, (), ended=False) for run in runs]
            if not runs and found is not None:
                self._confirming = True
                return confirmations(self.experiment, found)
        going = [(trunk.run, len(trunk.losses)) for trunk in self.trunks if not trunk.ended]
        return [
            values_of(self.experiment, run.size, run.lr, run.horizons[done]) for run, done in going
        ]

    def _nothing_of_a_size(self) -> bool:
        """Whether every trial of a size has failed, of something else than its rate."""
        seen = {trunk.run.size: False for trunk in self.trunks}
        for trunk in self.trunks:
            seen[trunk.run.size] |= bool(trunk.losses)
        return not all(seen.values())

    def _judged(self, trunk: Trunk) -> Trunk:
        """The trunk, ended if it is at its end or should not go on."""
        if trunk.ended or not trunk.losses:
            return trunk
        whole = len(trunk.losses) == len(trunk.run.horizons)
        why = None if whole else self.search.stop(self.trunks, trunk)
        if why:
            self._progress(f"{trunk.run.size} at {trunk.run.lr:g} trains no longer: {why}")
        return replace(trunk, ended=whole or why is not None)

    def learn(self, values: Mapping[str, Any], outcome: Outcome) -> None:
        """Add what a trial ended with to its run; of one that failed nothing more is asked."""
        if SEED in values:
            return
        at = next(
            place
            for place, trunk in enumerate(self.trunks)
            if (trunk.run.size, trunk.run.lr) == (values["model.size"], values["optim.lr"])
        )
        trunk = self.trunks[at]
        if outcome.state == "failed":
            self.trunks[at] = replace(trunk, ended=True)
            return
        loss = outcome.metrics["eval/loss"] if outcome.state == "finished" else inf
        loss = loss if isfinite(loss) else inf
        self.trunks[at] = replace(trunk, losses=(*trunk.losses, loss))
