"""What a search goes over, what for, and how."""

from collections.abc import Callable, Collection, Mapping
from graphlib import TopologicalSorter
from itertools import product
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dsvl.config import require
from orchestration.domains import Domain, Grid
from orchestration.settings import Section

if TYPE_CHECKING:
    from orchestration.config import Experiment  # which has these settings as a section

EPOCHS, SCHEDULE, SEED = "train.epochs", "optim.schedule", "train.seed"
ACROSS = {"model.size": "grid", "optim.lr": "loguniform", EPOCHS: "grid"}
"""What a search across sizes searches, and over what kind of domain."""


class NoScheduler(Section):
    """Every trial runs to its end."""

    kind: Literal["none"]


class _Halving(Section):
    grace: int = Field(default=1, gt=0)
    """Epochs that every trial gets."""
    reduction: int = Field(default=2, gt=1)
    """One trial in so many goes on."""


class Asha(_Halving):
    """Trials that do worse than their peers stop early."""

    kind: Literal["asha"]


class HyperBand(_Halving):
    """ASHA in brackets, to which trials are dealt at random: each grants more epochs than the one before."""

    kind: Literal["hyperband"]
    brackets: int = Field(default=3, gt=1)


class Median(Section):
    """Trials whose best value is worse than the median of their peers' averages so far stop early."""

    kind: Literal["median"]
    grace: int = Field(default=1, gt=0)
    """Epochs that every trial gets."""
    peers: int = Field(default=3, gt=1)
    """Trials that the median is taken of, at least."""


Objective = Literal["eval/loss", "eval/accuracy", "train/flops"]
MOST = ("eval/accuracy",)
"""Objectives of which more is better."""

ONLY_ACROSS = ("target_epochs", "verify", "confirm")
"""Fields of a search across sizes alone."""


class Budget(Section):
    """What a search may take; trials that have begun are not cut short, but none begins after that."""

    trials: int | None = Field(default=None, gt=0)
    hours: float | None = Field(default=None, gt=0)
    """By the clock, while the search runs."""
    gpu_hours: float | None = Field(default=None, gt=0)
    """Of all trials together; hours of workers, where those have no GPU."""
    money: float | None = Field(default=None, gt=0)
    """In the currency of `cluster.gpu_hour_price`."""


class SearchConfig(Section):
    """Which experiments a sweep tries."""

    across: Literal["model.size"] | None = None
    """Choose rate and epochs of the last size of `model.size` by what the smaller ones foretell, instead
    of trying the whole space."""
    target_epochs: float = Field(default=60, gt=0)
    """What a search across sizes may cost: so many epochs of the last size."""
    verify: int = Field(default=3, gt=0)
    """Trunks that it trains at the last size."""
    confirm: int = Field(default=0, ge=0)
    """Seeds with which it trains at last both the experiment as it stands and what it recommends."""
    space: dict[str, Domain] = Field(min_length=1)
    """Dotted field -> the values to try."""
    samples: int = Field(default=1, gt=0)
    """Draws from the space; a grid is tried whole at each."""
    seed: int = Field(0, ge=0)
    metric: Literal["eval/loss", "eval/accuracy"] = "eval/loss"
    """By which trials are ranked, and the best one is told from the others."""
    tradeoffs: tuple[Objective, ...] = ()
    """What else is searched for, `train/flops` for trainings that cost little: the answer is then a front,
    trials of which none is beaten in all of it."""
    sampler: Literal["random", "tpe"] = "random"
    """What draws from domains that are no grid: chance, or Optuna's tree-structured Parzen estimator, which
    learns from the trials that have ended, as many at a time as run at once."""
    scheduler: Annotated[NoScheduler | Asha | HyperBand | Median, Field(discriminator="kind")] = (
        NoScheduler(kind="none")
    )
    concurrent: int | None = Field(default=None, gt=0)
    """Trials at the same time; when empty, as many as `cluster.workers` are enough for."""
    workers: int = Field(default=1, gt=0)
    """Workers of a trial."""
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if all(domain.kind == "grid" for domain in self.space.values()):
            text = "must be 1 where every domain is a grid: a second draw would be the same trials"
            require(self.samples == 1, "samples", self.samples, text)
        return self

    @model_validator(mode="after")
    def _searches_across(self) -> Self:
        if self.across is None:
            for name in ONLY_ACROSS:
                value, default = getattr(self, name), SearchConfig.model_fields[name].default
                require(
                    value == default,
                    name,
                    value,
                    "needs search.across; set that, or leave this out",
                )
            return self
        kinds = {path: domain.kind for path, domain in self.space.items()}
        for path, kind in ACROSS.items():
            rule = f"across={self.across} needs {path} as a {kind}"
            require(kinds.get(path) == kind, "space", sorted(kinds), rule)
        sizes, epochs = (list(self.space[path].probes()) for path in ("model.size", EPOCHS))
        require(len(sizes) > 1, "space", sizes, "across needs two sizes or more in model.size")
        require(epochs == sorted(set(epochs)), "space", epochs, f"{EPOCHS} must ascend")
        others = {path: d for path, d in self.space.items() if path not in ACROSS}
        for path, domain in others.items():
            rule = "beside size, rate and epochs takes one value, as a grid of one"
            require(domain.kind == "grid" and len(domain.values) == 1, "space", path, rule)
        require(
            SEED not in others, "space", SEED, "across has seeds of its own: see search.confirm"
        )
        for path, domain in self.space.items():
            rule = "across searches no field under a condition; leave `when` out"
            require(not domain.when, "space", path, rule)
        require(self.metric == "eval/loss", "metric", self.metric, "across foretells eval/loss")
        rule = "must be left out with across, which foretells eval/loss alone"
        require(not self.tradeoffs, "tradeoffs", self.tradeoffs, rule)
        require(self.samples == 1, "samples", self.samples, "must be 1 with across")
        rule = "must be none with across, which stops trials itself"
        require(self.scheduler.kind == "none", "scheduler", self.scheduler.kind, rule)
        return self

    @model_validator(mode="after")
    def _sampler_draws(self) -> Self:
        if self.sampler != "random":
            require(self.across is None, "sampler", self.sampler, "must be random with across")
            grids = [path for path, domain in self.space.items() if domain.kind == "grid"]
            rule = f"draws every value, and would try {', '.join(grids)} whole: make it a choice"
            require(not grids, "sampler", self.sampler, rule)
            rule = f"would rank the schedules of {SCHEDULE} with one another; search them by sampler=random"
            require(SCHEDULE not in self.space, "sampler", self.sampler, rule)
        return self

    @model_validator(mode="after")
    def _objectives_differ(self) -> Self:
        if self.tradeoffs:
            rule = f"must differ from one another and from metric={self.metric}"
            require(
                len(self.objectives) == 1 + len(self.tradeoffs), "tradeoffs", self.tradeoffs, rule
            )
            rule = "must be none with tradeoffs: no single one of them says which trial is worse"
            require(self.scheduler.kind == "none", "scheduler", self.scheduler.kind, rule)
            rule = f"a front would rank the schedules of {SCHEDULE} with one another; leave it out"
            require(SCHEDULE not in self.space, "tradeoffs", self.tradeoffs, rule)
        return self

    @property
    def constants(self) -> dict[str, Any]:
        """What every trial of a search across sizes has beside its size, rate and epochs."""
        return {path: d.probes()[0] for path, d in self.space.items() if path not in ACROSS}

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more of the metric is better."""
        return "max" if self.metric in MOST else "min"

    @property
    def objectives(self) -> dict[str, int]:
        """All that is searched for, `metric` first: 1 where less is better, else -1."""
        return {name: -1 if name in MOST else 1 for name in (self.metric, *self.tradeoffs)}

    @property
    def order(self) -> list[str]:
        """The searched fields, each after those that its `when` names; a CycleError where that cannot be."""
        conditions = {path: domain.when for path, domain in self.space.items()}
        return [path for path in TopologicalSorter(conditions).static_order() if path in self.space]

    def values(self, of: Callable[[str], Any]) -> dict[str, Any]:
        """The values of a trial, asked for field by field; fields whose `when` does not hold are left out."""
        found: dict[str, Any] = {}
        for path in self.order:
            if self.space[path].when.items() <= found.items():
                found[path] = of(path)
        return {path: found[path] for path in self.space if path in found}

    def points(self) -> list[dict[str, Any]]:
        """The values of all trials, where it is known beforehand: each draw at the whole grid, none twice."""
        chance = Random(self.seed)
        grids = {p: domain.values for p, domain in self.space.items() if isinstance(domain, Grid)}
        found = {}
        for _ in range(self.samples):
            drawn = {
                path: domain.draw(chance)
                for path, domain in self.space.items()
                if not isinstance(domain, Grid)
            }
            for point in product(*grids.values()):
                values = self.values((drawn | dict(zip(grids, point, strict=True))).__getitem__)
                found.setdefault(repr(values), values)
        return list(found.values())

    def shapes(self, paths: Collection[str]) -> list[tuple[dict[str, Any], int]]:
        """Values that trials have together of some fields, each with the number of these trials.

        Where results decide which trials there are, all values that there may be.
        """
        if self.across is None and self.sampler == "random":
            points = self.points()
        else:
            conditions = {other for domain in self.space.values() for other in domain.when}
            names = [path for path in self.space if path in paths or path in conditions]
            all_of = product(*(self.space[path].probes() for path in names))
            points = [self.values(dict(zip(names, at, strict=True)).get) for at in all_of]
        alike: dict[str, list[dict[str, Any]]] = {}
        for values in points:
            shape = {path: value for path, value in values.items() if path in paths}
            alike.setdefault(repr(shape), []).append(shape)
        return [(same[0], len(same)) for same in alike.values()]

    def under(self, path: str) -> set[str]:
        """Fields that trials have with some values of this one alone."""
        found = {path}
        for other in self.order:
            if found & self.space[other].when.keys():
                found.add(other)
        return found - {path}

    def proposes(self, values: Mapping[str, object]) -> bool:
        """Whether these values of the searched fields are of this space."""
        if self.across and SEED in values:  # confirms what was found, and what the experiment is
            return values.keys() == self.space.keys() | {SEED}
        return values.keys() == self.values(values.get).keys() and all(
            self.space[path].holds(value) for path, value in values.items()
        )

    @property
    def trials(self) -> int | None:
        """How many trials the sweep has; not known of a search across sizes."""
        if self.across:
            return None
        return self.samples if self.sampler == "tpe" else len(self.points())


def searched(experiment: "Experiment") -> SearchConfig:
    """The search section of an experiment, without which there is nothing to search.

    Raises:
        ValueError: where it is empty.
    """
    if experiment.search is None:
        raise ValueError("search is empty: extend one of configs/search, or set search.space")
    return experiment.search
