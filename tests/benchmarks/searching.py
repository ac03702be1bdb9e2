"""How near searches across sizes come to the best training of the target, and for how much.

    python -m tests.benchmarks.searching [--worlds 100] [--first 0] [--kinds standard hard] [--write DIR]

Worlds (`tests.benchmarks.worlds`) from 1000 on are those that the search was developed on, those from 0 on
are for reports. Regret is by how much the target's true loss, trained as recommended, exceeds its least one;
costs are in epochs of the target, where an exhaustive grid of 17 rates and six cosine runs each takes 1,394.
A world takes four seconds of one core.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, wilcoxon

from orchestration.scaling import Run, Trunk
from orchestration.searching.across import AcrossSizes, Recommendation
from orchestration.searching.verdicts import undertrained
from tests.benchmarks.tuning import BUDGET, TARGET, TUNED, USUAL, Found
from tests.benchmarks.worlds import KINDS, LADDER, RATES, World

VERIFY = 3
UNDERTRAINED = 0.005
"""Gain of the loss from more epochs, from which a training counts as undertrained."""


def train(world: World, search: AcrossSizes, run: Run, trunks: Sequence[Trunk]) -> Trunk:
    """A run in a world, horizon by horizon, until it ends or is stopped."""
    losses: tuple[float, ...] = ()
    for horizon in run.horizons:
        losses = (*losses, world.annealed(run.size, run.lr, horizon))
        trunk = Trunk(run, losses, ended=False)
        if search.stop([*trunks, trunk], trunk):
            break
    return Trunk(run, losses)


def searched(
    world: World, search: AcrossSizes
) -> Iterator[tuple[tuple[Trunk, ...], Recommendation]]:
    """What has been seen and is recommended before the target is trained, and after each time it was."""
    trunks: tuple[Trunk, ...] = ()
    while runs := search.propose(trunks):
        if runs[0].size == TARGET:
            yield trunks, search.recommend(trunks)
        trunks = (*trunks, *(train(world, search, run, trunks) for run in runs))
    yield trunks, search.recommend(trunks)


def paper(world: World) -> Found:
    """The recipe of the paper's 13B: 1e-3 and the horizon next to its six epochs."""
    return 1e-3, 5, 0.0


def random(world: World) -> Found:
    """Cosine runs of random rates and horizons, for the same budget; the least loss seen."""
    draw = np.random.default_rng([world.seed, 4])
    best, spent = (np.inf, 0.0, 0.0), 0.0
    while True:
        lr = float(np.exp(draw.uniform(*np.log(USUAL))))
        horizon = float(draw.choice(LADDER.horizons))
        if spent + horizon > BUDGET:
            return best[1], best[2], spent
        spent += horizon
        loss = world.midway(TARGET, lr, horizon, horizon)
        if loss < best[0]:
            best = (loss, lr, horizon)


def sweep(count: int) -> Callable[[World], Found]:
    """Trunks at the target alone, with so many rates spaced alike; the least loss seen.

    Where all diverge, a quarter of those rates are tried.
    """

    def swept(world: World) -> Found:
        low, high = np.log(USUAL)
        lrs = np.exp(low + (np.arange(count) + 0.5) * (high - low) / count)
        spent, seen = 0.0, []
        while not seen:
            for lr in map(float, lrs):
                losses = [world.annealed(TARGET, lr, horizon) for horizon in LADDER.horizons]
                kept = int(np.isfinite([*losses, np.nan]).argmin())
                spent += LADDER.cost(TARGET, LADDER.horizons[: kept + 1])
                seen += [(losses[at], lr, LADDER.horizons[at]) for at in range(kept)]
            lrs = lrs / 4
        _, lr, horizon = min(seen)
        return lr, horizon, spent

    return swept


RIVALS: dict[str, Callable[[World], Found]] = {
    "the paper's recipe": paper,
    "random": random,
    "target-only trunks, 1 rate": sweep(1),
    "target-only trunks, 2 rates": sweep(2),
    "target-only trunks, 3 rates": sweep(3),
    **TUNED,
}
"""Each sees nothing but the target."""
STRONGEST = "target-only trunks, 3 rates"


def measure(world: World) -> dict:
    """All methods in one world, and how far what the search tells of it is true."""
    methods = {}
    for name, rival in RIVALS.items():
        lr, horizon, cost = rival(world)
        methods[name] = {"regret": world.regret(lr, horizon), "cost": cost}
    search = AcrossSizes(LADDER, RATES, budget=BUDGET, verify=VERIFY)
    stages = list(searched(world, search))
    for count in range(VERIFY + 1):
        _, told = stages[min(count, len(stages) - 1)]
        name = f"across sizes, {count} at the target"
        methods[name] = {"regret": world.regret(told.lr, told.horizon), "cost": told.cost}
    return {
        "methods": methods,
        "swept": stages[-1][1].swept,
        "before": judged(world, search, *stages[0]),
        "after": judged(world, search, *stages[-1]),
    }


def judged(
    world: World, search: AcrossSizes, trunks: Sequence[Trunk], told: Recommendation
) -> dict:
    """Whether intervals hold what they should, and the verdicts of being undertrained beside the truth."""
    loss = float(world.loss(TARGET, told.lr, told.horizon))
    rate = world.best_rate(TARGET, told.horizon)
    surface = search.surface(trunks)
    steps = [LADDER.horizons.index(h) for h in (told.horizon, world.fewest_epochs(search.eps))]
    verdicts = [undertrained(surface, horizon) for horizon in LADDER.horizons[:-1]]
    return {
        "loss_covered": told.loss_interval[0] <= loss <= told.loss_interval[1],
        "rate_covered": told.lr_interval[0] <= rate <= told.lr_interval[1],
        "steps_off": steps[0] - steps[1],
        "scores": [verdict.score for verdict in verdicts],
        "truths": [world.gain(horizon) > UNDERTRAINED for horizon in LADDER.horizons[:-1]],
    }


def area(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Under the curve of true against false alarms: the chance that a true case scores above a false one."""
    true = np.asarray(truths)
    ranks = rankdata(scores)[true].sum() - true.sum() * (true.sum() + 1) / 2
    return float(ranks / (true.sum() * (~true).sum()))


def table(kind: str, worlds: Sequence[Mapping]) -> Iterator[str]:
    """What the worlds of a kind come to, as Markdown."""
    yield f"### {len(worlds)} {kind} worlds\n"
    yield "| method | median regret | 90th percentile | largest | within 1 % | cost, median | cost, largest |"
    yield "|---|---|---|---|---|---|---|"
    for name in worlds[0]["methods"]:
        regret, cost = (
            np.array([world["methods"][name][key] for world in worlds])
            for key in ("regret", "cost")
        )
        yield (
            f"| {name} | {np.median(regret):.2%} | {np.quantile(regret, 0.9):.2%} | {regret.max():.2%} "
            f"| {np.mean(regret <= 0.01):.0%} | {np.median(cost):.0f} | {cost.max():.0f} |"
        )
    yield ""
    rival = np.array([world["methods"][STRONGEST]["regret"] for world in worlds])
    for count in range(1, VERIFY + 1):
        name = f"across sizes, {count} at the target"
        ours = np.array([world["methods"][name]["regret"] for world in worlds])
        yield (
            f"- {name}, less regret than {STRONGEST} in {np.mean(ours < rival):.0%} of the worlds, "
            f"Wilcoxon p = {wilcoxon(ours, rival)[1]:.1e}"
        )
    swept = np.mean([world["swept"] for world in worlds])
    yield (
        f"- the law was found violated, and the target swept with three trunks at once, in {swept:.0%}; "
        "the rows of 1, 2 and 3 at the target are then the same"
    )
    for moment in ("before", "after"):
        of = [world[moment] for world in worlds]
        scores, truths = (
            [value for found in of for value in found[key]] for key in ("scores", "truths")
        )
        yield (
            f"- {moment} the target was trained: intervals of 90 % hold its loss in "
            f"{np.mean([found['loss_covered'] for found in of]):.0%}, its best rate in "
            f"{np.mean([found['rate_covered'] for found in of]):.0%}; fewest epochs within one step in "
            f"{np.mean([abs(found['steps_off']) <= 1 for found in of]):.0%}, exact in "
            f"{np.mean([found['steps_off'] == 0 for found in of]):.0%}; undertrained or not: area under the "
            f"curve {area(scores, truths):.3f} of {len(truths)} cases, {sum(truths)} true"
        )
    yield ""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--worlds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first world")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--write", type=Path, help="folder for searching.md")
    options = parser.parse_args(None if arguments is None else list(arguments))
    seeds = range(options.first, options.first + options.worlds)
    lines = [
        "# Searches across sizes\n",
        f"`python -m tests.benchmarks.searching`, worlds of seeds {seeds[0]} to {seeds[-1]}. Regret is a "
        "share of the target's least loss, cost is in epochs of the target.\n",
    ]
    for kind in options.kinds:
        worlds = []
        for seed in seeds:
            worlds.append(measure(World(seed, KINDS[kind])))
            print(f"{kind} world {seed}", end="\r", file=sys.stderr)
        lines += table(kind, worlds)
        print("\n".join(table(kind, worlds)), flush=True)
    if options.write:
        (options.write / "searching.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
