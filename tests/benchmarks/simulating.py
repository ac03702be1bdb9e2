"""What preparations, searches and failures come to on clusters that are not at hand, up to 10,000 nodes.

    python -m tests.benchmarks.simulating [--measure] [--write tests/benchmarks/results]

Simulated (`tests.benchmarks.fleet`) are the preparation of 100 million images and the search that repairs
the 70B. What a task costs is measured here by `--measure`, in real preparations and sweeps (some minutes of
an idle machine), of which others, larger or with more at once, are foretold and held to what they took; the
rest is assumed and listed (`ASSUMED`). Without `--measure` the costs of the last measurement count.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.plan import plan
from orchestration.planning.cost import flops_of_a_step, seconds_of_a_step
from orchestration.planning.memory import STATE_BYTES, weight_bytes
from orchestration.planning.parameters import parameters
from orchestration.scaling import Ladder, Run, Size, Trunk
from orchestration.searching.across import AcrossSizes
from tests.benchmarks.costs import SHARD, TOGETHER, TRIALS, UPDATES, Costs, agreement, measure
from tests.benchmarks.fleet import Fleet, Searched, Training, Trial, pool, search
from tests.benchmarks.mmca import machine
from tests.benchmarks.worlds import World

ROOT = Path(__file__).parents[2]
REPAIR = ROOT / "configs/experiment/visualchat_70b_repair.yaml"
IMAGES = 100_000_000
NODES = (1, 10, 100, 1000, 10_000)
SEARCH_NODES = (1, 8, 16, 32, 64, 128, 1000)
GIB = 2**30


@dataclass(frozen=True)
class Assumed:
    """What could not be measured here."""

    cores: int = 16
    """Of a node that prepares; each works as fast as one of the machine where costs were measured."""
    node_price: float = 0.8
    """Dollars an hour of such a node."""
    sets: int = 13
    """Into which the images are divided: sets are read side by side, each by one actor."""
    starts: float = 180.0
    """Seconds until a node that the autoscaler asks for works."""
    spread: float = 0.3
    """Standard deviation of the logarithm of a shard's time."""
    slow: float = 0.005
    """Share of nodes that are slow."""
    slowness: float = 1.1
    """How many times longer they take."""
    lasts_hours: float = 6335.0
    """Mean life of a node of eight GPUs: 419 interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783)."""
    spot_hours: float = 24.0
    """The same where nodes are taken away."""
    notice: float = 60.0
    """Until Ray believes that a node is gone."""
    gpus: int = 8
    """Of a node that trains."""
    disk: float = GIB
    """Bytes a second that rank 0 reads weights and writes checkpoints with."""


ASSUMED = Assumed()


def preparation(costs: Costs, nodes: int, *, images: int = IMAGES, lasts: float) -> dict[str, Any]:
    """One record an image, photographs of 640 x 480 at 448 pixels."""
    assumed = ASSUMED
    fleet = Fleet(
        nodes, assumed.cores, assumed.starts, 3600 * lasts, assumed.slow, assumed.slowness
    )
    read = images * costs.read / min(assumed.sets, nodes * assumed.cores)
    checked = pool(
        math.ceil(images / SHARD),
        fleet,
        seconds=SHARD * (costs.check + costs.image),
        spread=assumed.spread,
        dispatch=costs.dispatch,
    )
    merge = images * costs.merge
    phases = {"read": read, "check": checked.seconds, "merge": merge}
    seconds = sum(phases.values())
    return {
        "nodes": nodes,
        "hours": {name: found / 3600 for name, found in phases.items()},
        "total_hours": seconds / 3600,
        "dollars": nodes * seconds / 3600 * assumed.node_price,
        "utilisation_while_checking": checked.utilisation,
        "driver_at_work_while_checking": checked.driver / checked.seconds,
        "nodes_lost": checked.lost,
        "driver_gib": images * costs.driver_bytes / GIB,
        "longest": max(phases, key=phases.__getitem__),
    }


def rounds_of(experiment: Experiment, seed: int, nodes: int) -> list[list[Trial]]:
    """The trials of a search across sizes in a world of that seed, round by round, as it proposes them."""
    settings = experiment.search
    assert settings is not None
    horizons = tuple(map(float, settings.space["train.epochs"].probes()))
    sizes = {
        name: experiment.trial({"model.size": name} | settings.constants)
        for name in settings.space["model.size"].probes()
    }
    ladder = Ladder(
        tuple(
            Size(
                name,
                parameters=sum(part.total for part in parameters(trial.model).values()),
                cost=sum(flops_of_a_step(trial).values()),
            )
            for name, trial in sizes.items()
        ),
        horizons,
    )
    world = World(seed, ladder=ladder)
    policy = AcrossSizes(ladder, (5e-5, 5e-2), budget=settings.target_epochs, samples=50)
    steps = plan(experiment).steps_per_epoch
    assert steps is not None
    rounds: list[list[Trial]] = []
    trunks: tuple[Trunk, ...] = ()
    while runs := policy.propose(trunks):
        going = [Trunk(run, (), ended=False) for run in runs]
        while any(not trunk.ended for trunk in going):
            at = [trunk for trunk in going if not trunk.ended]
            rounds.append([_trial(sizes[t.run.size], t, steps, ladder.decay, nodes) for t in at])
            grown = [_grown(world, trunk) for trunk in at]
            others = [trunk for trunk in going if trunk.ended]
            going = others + [
                replace(trunk, ended=_over(policy, (*trunks, *others, *grown), trunk))
                for trunk in grown
            ]
        trunks = (*trunks, *going)
    found = policy.recommend(trunks)
    chosen = Run(found.size, found.lr, (found.horizon,))
    own = Run(found.size, experiment.optim.lr, (float(experiment.train.epochs),))
    confirmed = [
        _trial(sizes[found.size], Trunk(run, ()), steps, ladder.decay, nodes)
        for run in (own, chosen)
        for _ in range(settings.confirm)
    ]
    if confirmed:
        rounds.append(confirmed)
    return rounds


def _grown(world: World, trunk: Trunk) -> Trunk:
    run, done = trunk.run, len(trunk.losses)
    return replace(
        trunk, losses=(*trunk.losses, world.annealed(run.size, run.lr, run.horizons[done]))
    )


def _over(policy: AcrossSizes, trunks: Sequence[Trunk], trunk: Trunk) -> bool:
    whole = len(trunk.losses) == len(trunk.run.horizons)
    return whole or policy.stop(trunks, trunk) is not None


def _trial(experiment: Experiment, trunk: Trunk, steps: int, decay: float, nodes: int) -> Trial:
    """What a trunk trains next: on from the plateau before, and down."""
    horizons, done = trunk.run.horizons, len(trunk.losses)
    shared = (1 - decay) * horizons[done - 1] if done else 0.0
    workers = min(nodes * ASSUMED.gpus, experiment.cluster.workers)
    trial = experiment.with_overrides({"cluster.workers": workers})
    seconds = seconds_of_a_step(trial)
    assert seconds is not None
    parts = parameters(trial.model).values()
    weights = sum(part.total for part in parts) * weight_bytes(trial)
    state = STATE_BYTES * sum(part.trainable for part in parts)
    training = Training(
        updates=round((horizons[done] - shared) * steps),
        seconds=seconds,
        every=trial.checkpoint.every,
        save=state / ASSUMED.disk,
        start=(weights + state) / ASSUMED.disk,
        notice=ASSUMED.notice,
    )
    return Trial(training, workers // ASSUMED.gpus)


def repaired(experiment: Experiment, costs: Costs, nodes: int, *, lasts: float) -> dict[str, Any]:
    """The search that repairs the 70B, in one world, on so many nodes of eight GPUs."""
    assumed = ASSUMED
    rounds = [
        [
            replace(t, training=replace(t.training, start=t.training.start + costs.trial))
            for t in trials
        ]
        for trials in rounds_of(experiment, seed=0, nodes=nodes)
    ]
    fleet = Fleet(nodes, assumed.gpus, assumed.starts, 3600 * lasts, assumed.slow, assumed.slowness)
    spent: Searched = search(rounds, fleet)
    hours, price = spent.seconds / 3600, experiment.cluster.gpu_hour_price
    assert price is not None
    return {
        "nodes": nodes,
        "gpus_a_trial": max(trial.nodes for trials in rounds for trial in trials) * assumed.gpus,
        "days": hours / 24,
        "gpu_hours": nodes * assumed.gpus * hours,
        "dollars": nodes * assumed.gpus * hours * price,
        "utilisation": spent.utilisation,
        "waiting_for_the_slowest": sum(spent.waits) / len(spent.waits),
        "nodes_lost": spent.lost,
        "rounds": spent.rounds,
        "trials": spent.trials,
    }


def simulate(costs: Costs) -> dict[str, Any]:
    """All scenarios."""
    experiment, assumed = load(REPAIR), ASSUMED
    return {
        "preparation": [preparation(costs, nodes, lasts=assumed.lasts_hours) for nodes in NODES],
        "preparation_spot": [
            preparation(costs, nodes, lasts=assumed.spot_hours) for nodes in NODES
        ],
        "repair": [
            repaired(experiment, costs, nodes, lasts=assumed.lasts_hours) for nodes in SEARCH_NODES
        ],
        "repair_spot": [
            repaired(experiment, costs, nodes, lasts=assumed.spot_hours) for nodes in SEARCH_NODES
        ],
    }


def table(document: dict[str, Any]) -> Iterator[str]:
    """All of it as Markdown."""
    yield "# Simulated clusters\n"
    yield f"`{document['command']}`. Costs were measured on {document['machine']['cores']} cores."
    prepared, repaired = document["preparation"], document["repair"]
    yield "\n## Preparing 100 million images of 448 pixels\n"
    yield from _rows(
        {
            f"nodes of {ASSUMED.cores} cores": lambda found, _: f"{found['nodes']:,}",
            "read, h": lambda found, _: f"{found['hours']['read']:.1f}",
            "check, h": lambda found, _: f"{found['hours']['check']:.1f}",
            "merge, h": lambda found, _: f"{found['hours']['merge']:.1f}",
            "hours": lambda found, _: f"{found['total_hours']:.1f}",
            "dollars": lambda found, _: f"{found['dollars']:,.0f}",
            "cores at work while checking": lambda found, _: (
                f"{found['utilisation_while_checking']:.0%}"
            ),
            "nodes lost": lambda found, _: f"{found['nodes_lost']:,}",
            "hours, if taken away daily": lambda _, spot: f"{spot['total_hours']:.1f}",
            "longest": lambda found, _: found["longest"],
        },
        zip(prepared, document["preparation_spot"], strict=True),
    )
    limited = [found["nodes"] for found in prepared if found["longest"] == "merge"]
    yield (
        f"\nWhat breaks first is the driver, which merges what the nodes have checked by itself: it would "
        f"hold {prepared[0]['driver_gib']:.0f} GiB"
        + (f", and from {limited[0]:,} nodes on its work is the longest." if limited else ".")
    )
    yield "\n## Repairing the 70B\n"
    yield from _rows(
        {
            f"nodes of {ASSUMED.gpus} GPUs": lambda found, _: f"{found['nodes']:,}",
            "GPUs a trial": lambda found, _: str(found["gpus_a_trial"]),
            "days": lambda found, _: f"{found['days']:.1f}",
            "GPU-hours": lambda found, _: f"{found['gpu_hours']:,.0f}",
            "dollars": lambda found, _: f"{found['dollars']:,.0f}",
            "GPUs at work": lambda found, _: f"{found['utilisation']:.0%}",
            "waiting for the slowest": lambda found, _: f"{found['waiting_for_the_slowest']:.0%}",
            "nodes lost": lambda found, _: f"{found['nodes_lost']:,}",
            "days, if taken away daily": lambda _, spot: f"{spot['days']:.1f}",
        },
        zip(repaired, document["repair_spot"], strict=True),
    )
    busy = max(found["nodes"] for found in repaired if found["utilisation"] >= 0.5)
    yield (
        f"\nWith more than {busy:,} nodes less than half of the GPUs have work: rounds wait for the slowest "
        "trial, and the trials of a round are few."
    )
    yield "\n## Agreement with real runs\n"
    yield "| | foretold, s | took, s | ratio |\n|---|---|---|---|"
    for name, (foretold, took) in document["agreement"].items():
        yield f"| {name} | {foretold:.1f} | {took:.1f} | {foretold / took:.2f} |"
    _, together = document["agreement"][TOGETHER]
    alone = document["costs"]["trial"] + UPDATES * document["costs"]["update"]
    yield (
        "\nTwo that work at once are foretold a node each; here they share one of "
        f"{document['machine']['cores']} cores, on which two take {2 * together / TRIALS / alone:.1f} times "
        "as long as one, most of it to start their processes."
    )
    yield "\n## Measured and assumed\n"
    for name, value in document["costs"].items():
        yield f"- measured: {name} {value:.4g}"
    for name, value in document["assumed"].items():
        yield f"- assumed: {name} {value:g}"


def _rows(
    columns: dict[str, Callable[[Any, Any], str]], pairs: Iterable[tuple[Any, Any]]
) -> Iterator[str]:
    """A table: name of a column -> what it says of a scenario and of the same where nodes are taken away."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for pair in pairs:
        yield f"| {' | '.join(cell(*pair) for cell in columns.values())} |"


def main() -> None:
    """Measure if asked to, simulate, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--write", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    file = options.write / "simulating.json"
    if options.measure or not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            costs = measure(Path(folder))
            found = agreement(Path(folder), costs)
    else:
        last = json.loads(file.read_text(encoding="utf-8"))
        costs, found = Costs(**last["costs"]), last["agreement"]
    began = time.monotonic()
    document = {
        "command": "python -m tests.benchmarks.simulating --measure",
        "costs": asdict(costs),
        "assumed": asdict(ASSUMED),
        "agreement": found,
        **simulate(costs),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(torch.device("cpu")),
    }
    text = "\n".join(table(document))
    print(text)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
