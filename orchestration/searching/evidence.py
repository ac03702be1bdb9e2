"""What a search across sizes has found, as files: the numbers behind it, and an experiment to train."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import yaml

from orchestration.config import Experiment
from orchestration.planning.cost import GRID_RATES
from orchestration.records.journal import write_json, write_whole
from orchestration.records.results import EVIDENCE, finished, trials_folder
from orchestration.scaling import Trunk
from orchestration.search import outcome, trial_name
from orchestration.searching.across import AcrossSizes, Recommendation
from orchestration.searching.climb import Climb, confirmations, values_of
from orchestration.searching.effects import paired
from orchestration.searching.laws import Law, interval
from orchestration.searching.regret import surface
from orchestration.searching.rounds import Rounds
from orchestration.searching.verdicts import (
    Verdict,
    above_the_law,
    at_the_edge,
    undertrained,
    violated,
)

log = logging.getLogger(__name__)
RECOMMENDED = "recommended.yaml"
CONFIRMED = ("eval/loss", "eval/accuracy")
"""What the experiment as it stands and what is recommended are compared by."""


def write(experiment: Experiment) -> None:
    """Write both files into the run folder, from what the trials have left; nothing while none has ended."""
    climb = seen(experiment)
    found = climb.recommended()
    if found is None:
        return
    search, trunks, ladder = climb.search, climb.trunks, climb.search.ladder
    law, confirmed = search.law(trunks), _confirmed(experiment, found)
    document = {
        "sizes": [asdict(size) for size in ladder.sizes],
        "horizons": ladder.horizons,
        "trunks": [
            {"size": trunk.run.size, "lr": trunk.run.lr, "losses": _numbers(trunk.losses)}
            for trunk in trunks
        ],
        "best_rates": {
            size.name: [
                [
                    law.probable_rate(size.name, horizon),
                    *interval(law.best_rate(size.name, horizon)),
                ]
                for horizon in ladder.horizons
            ]
            for size in ladder.sizes
        },
        "surface": _surface(search, trunks),
        "maps": {size.name: _map(search, law, size.name) for size in ladder.sizes},
        "recommendation": asdict(found),
        "recipe": {"lr": experiment.optim.lr, "epochs": experiment.train.epochs},
        "verdicts": [asdict(one) for one in _verdicts(experiment, search, trunks, confirmed)],
        "cost": {"search": found.cost, "grid": GRID_RATES * sum(ladder.horizons)},
        "confirmed": confirmed,
    }
    write_json(experiment.run_folder / EVIDENCE, document)
    chosen = experiment.with_overrides(
        values_of(experiment, found.size, found.lr, found.horizon)
        | {"search": None, "name": f"{experiment.name}-recommended"}
    )
    reasons = "".join(f"# {reason}\n" for reason in found.reasons)
    text = yaml.safe_dump(chosen.as_dict(), sort_keys=False, allow_unicode=True)
    write_whole(experiment.run_folder / RECOMMENDED, f"{reasons}{text}")


def seen(experiment: Experiment) -> Climb:
    """The search as far as its trials have ended."""
    climb = Climb(experiment, progress=log.debug)
    Rounds(climb, partial(outcome, experiment)).suggest("next")
    return climb


def _surface(search: AcrossSizes, trunks: Sequence[Trunk]) -> list[dict[str, float]]:
    """What the law foretells of the target: the median loss of each rate and number of epochs."""
    surface = search.surface(trunks)
    losses = np.exp(np.median(surface.log_loss, axis=0))
    rows = zip(surface.lrs, surface.horizons, losses, surface.expected, strict=True)
    return [
        {"lr": float(lr), "epochs": float(epochs), "loss": float(loss), "regret": float(regret)}
        for lr, epochs, loss, regret in rows
    ]


def _map(search: AcrossSizes, law: Law, size: str) -> list[dict[str, float]]:
    """What the law says of a size: the median loss of each rate and number of epochs."""
    on = surface(law, size, search.rates)
    losses = np.exp(np.median(on.log_loss, axis=0))
    rows = zip(on.lrs, on.horizons, losses, strict=True)
    return [
        {"lr": float(lr), "epochs": float(epochs), "loss": float(loss)} for lr, epochs, loss in rows
    ]


def _verdicts(
    experiment: Experiment,
    search: AcrossSizes,
    trunks: Sequence[Trunk],
    confirmed: dict[str, Any] | None,
) -> list[Verdict]:
    """On the experiment as it stands, at the target, and on the search."""
    target, law = search.ladder.target.name, search.law(trunks)
    epochs, choice = experiment.train.epochs, search.choice(trunks)
    verdicts = [undertrained(search.surface(trunks), epochs)]
    if confirmed:
        loss = float(np.mean(confirmed["eval/loss"]["before"]))
        verdicts.append(above_the_law(law, target, epochs, loss))
    tried = [trunk.run.lr for trunk in trunks if trunk.run.size == target]
    if tried:
        verdicts.append(at_the_edge(tried, law.probable_rate(target, choice.horizon)))
    if (gate := search.gate(trunks)) is not None:
        verdicts.append(violated(gate))
    return verdicts


def _confirmed(experiment: Experiment, found: Recommendation) -> dict[str, Any] | None:
    """Both of each pair of trials of the same seed, where both have ended, and how they differ."""
    results = [
        finished(experiment.trial(values), trials_folder(experiment) / trial_name(values))
        for values in confirmations(experiment, found)
    ]
    pairs = [
        (before["metrics"], after["metrics"])
        for before, after in zip(results[::2], results[1::2], strict=True)
        if before and after and before["state"] == after["state"] == "finished"
    ]
    if not pairs:
        return None
    return {
        metric: {
            "before": [before[metric] for before, _ in pairs],
            "after": [after[metric] for _, after in pairs],
            "difference": paired([after[metric] - before[metric] for before, after in pairs]),
        }
        for metric in CONFIRMED
    }


def _numbers(losses: Sequence[float]) -> list[float | None]:
    """Losses as JSON can hold them."""
    return [loss if math.isfinite(loss) else None for loss in losses]
