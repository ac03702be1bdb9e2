"""Time, money and disk of a run or a sweep, where what decides them is known."""

from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from orchestration.config import Experiment
from orchestration.domains import Grid
from orchestration.planning.flops import fullest, step_flops
from orchestration.planning.memory import STATE_BYTES, gradient_checkpointing, weight_bytes
from orchestration.planning.parameters import parameters
from orchestration.space import EPOCHS, SCHEDULE

GRID_RATES = 8
"""Learning rates of a grid over the two or three orders of magnitude that a search across sizes covers."""
DECIDING = {
    EPOCHS, SCHEDULE, "optim.warmup_steps", "optim.decay_fraction", "train.batch", "train.precision"
}  # fmt: skip
"""What decides the cost of a trial beside its model."""


@dataclass(frozen=True)
class Cost:
    """Of updates, at most, every sample being full; None where something is not stated or not known yet.

    Evaluations come on top.
    """

    steps: int | None
    """Optimizer updates, of all trials together."""
    flops: float | None
    hours: float | None
    """By the clock."""
    gpu_hours: float | None
    money: float | None
    """In the currency of `cluster.gpu_hour_price`."""


def run_cost(experiment: Experiment, samples: int | None, *, branch: bool = False) -> Cost:
    """What a training costs; what a `branch` has in common with its trunk costs nothing."""
    cluster, train = experiment.cluster, experiment.train
    if samples is None:
        return Cost(None, None, None, None, None)
    steps = samples // train.batch * train.epochs
    if branch:
        steps -= experiment.optim.plateau_end(steps)
    flops = steps * sum(flops_of_a_step(experiment).values())
    seconds = seconds_of_a_step(experiment)
    hours = None if seconds is None else steps * seconds / 3600
    gpu_hours = None if hours is None else hours * cluster.workers
    price = cluster.gpu_hour_price
    money = None if gpu_hours is None or price is None else gpu_hours * price
    return Cost(steps, flops, hours, gpu_hours, money)


def sweep_cost(experiment: Experiment, samples: int | None) -> Cost:
    """What all trials of a search cost if none is stopped early, each at its full number of epochs.

    Where results decide what is tried, what costs most; trials that branch off a longer one cost their decay
    alone.
    """
    search = experiment.search
    assert search is not None
    if search.across:
        longest = search.space["train.epochs"].probes()[-1]
        confirmed = search.confirm * (experiment.train.epochs + longest)
        whole = _of_the_target(experiment, samples, search.target_epochs + confirmed)
        return _times(whole, _affordable(experiment, whole))
    assert search.trials is not None
    lengths = domain.values if isinstance(domain := search.space.get(EPOCHS), Grid) else ()

    def trial(values: dict[str, Any]) -> Cost:
        chosen = experiment.trial(values)
        shorter = chosen.train.epochs < max(lengths, default=0)
        return run_cost(chosen, samples, branch=shorter and chosen.optim.branching)

    deciding = [path for path in search.space if path.startswith("model.") or path in DECIDING]
    costs = [(trial(values), count) for values, count in search.shapes(deciding)]
    if search.sampler == "tpe":
        dearest = max((cost for cost, _ in costs), key=lambda cost: cost.flops or 0)
        costs = [(dearest, search.trials)]

    def total(name: str) -> Any:
        each = [(getattr(cost, name), count) for cost, count in costs]
        return None if None in dict(each) else sum(amount * count for amount, count in each)

    hours = total("hours")
    at_once = None if hours is None else hours / experiment.trials_at_once
    whole = Cost(total("steps"), total("flops"), at_once, total("gpu_hours"), total("money"))
    return _times(whole, _affordable(experiment, whole))


def exhaustive_cost(experiment: Experiment, samples: int | None) -> Cost | None:
    """What a search across sizes stands for: a grid at the last size, every point a training of its own."""
    search = experiment.search
    if search is None or not search.across:
        return None
    epochs = GRID_RATES * sum(search.space["train.epochs"].probes())
    return _of_the_target(experiment, samples, epochs)


def _of_the_target(experiment: Experiment, samples: int | None, epochs: float) -> Cost:
    """So many epochs of the experiment's trials at its own size."""
    assert experiment.search is not None
    one = run_cost(experiment.trial({"train.epochs": 1}), samples)
    whole = _times(one, epochs)
    hours = None if whole.hours is None else whole.hours / experiment.trials_at_once
    return replace(whole, hours=hours)


def _affordable(experiment: Experiment, cost: Cost) -> float:
    """The share of a search that `search.budget` has room for."""
    assert experiment.search is not None
    needed = asdict(cost) | {"trials": experiment.search.trials}
    budget = experiment.search.budget.model_dump(exclude_none=True)
    shares = [most / needed[name] for name, most in budget.items() if needed[name]]
    return min([1.0, *shares])


def _times(cost: Cost, factor: float) -> Cost:
    """So many times as much of all."""
    steps, *others = (None if one is None else one * factor for one in astuple(cost))
    return Cost(None if steps is None else round(steps), *others)


def flops_of_a_step(experiment: Experiment) -> dict[str, float]:
    """Operations of an update by part of the model, at most."""
    recompute = gradient_checkpointing(experiment)
    return step_flops(experiment, fullest(experiment), recompute=recompute)


def seconds_of_a_step(experiment: Experiment) -> float | None:
    """Seconds of an update, at most, at the stated share of the stated peak."""
    cluster = experiment.cluster
    if cluster.gpu_tflops is None:
        return None
    rate = cluster.workers * cluster.gpu_tflops * 1e12 * cluster.utilisation
    return sum(flops_of_a_step(experiment).values()) / rate


def checkpoints_kept(experiment: Experiment) -> int:
    """At most: the newest and best, those at which others branch off, and the end of a plateau."""
    config = experiment.checkpoint
    branches = len(config.branch_epochs) + experiment.optim.branching
    return config.keep + config.keep_best + branches


def disk(experiment: Experiment, prepared: Path | None) -> dict[str, int | None]:
    """Bytes in the storage: those of a run's checkpoints, and of prepared data once there are any.

    One checkpoint more than are kept, as the oldest goes when the newest is whole. Of data that are yet to be
    prepared it is known what an image takes, beside its own file.
    """
    model = experiment.model
    trained = sum(part.trainable for part in parameters(model).values())
    vision = model.vision
    sizes = {
        "checkpoints": (checkpoints_kept(experiment) + 1) * STATE_BYTES * trained,
        "prepared data": None,
        "pixels of an image": 3 * vision.image_size**2,
    }
    if experiment.engine.stored_features:
        sizes["features of an image"] = vision.tokens * vision.width * weight_bytes(experiment)
    if prepared is not None:
        files = (path for path in prepared.rglob("*") if path.is_file())
        sizes["prepared data"] = sum(path.stat().st_size for path in files)
    return sizes
