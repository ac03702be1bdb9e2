"""The search that draws from what it has learnt, on losses that are known at once."""

from collections.abc import Mapping
from math import inf, isfinite, log10, nan
from statistics import mean, median
from typing import Any

import pytest

from orchestration.config import Experiment, validated
from orchestration.problems import ConfigError
from orchestration.searching.parzen import Parzen
from orchestration.searching.proposals import proposals
from orchestration.searching.rounds import Outcome
from tests.orchestration.conftest import SETTINGS
from tests.orchestration.searching.test_climb import Cluster, Known

SPACE = {
    "optim.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-1},
    "optim.weight_decay": {"kind": "uniform", "low": 0.0, "high": 1.0},
    "optim.betas": {"kind": "choice", "values": [[0.0, 0.95], [0.9, 0.95], [0.9, 0.999]]},
}


def searching(space: Mapping[str, Any] = SPACE, **settings: Any) -> Experiment:
    search = {"space": space, "samples": 40, "concurrent": 4, "sampler": "tpe", **settings}
    return validated(SETTINGS | {"search": search})


def loss(values: Mapping[str, Any]) -> float:
    """Least at a rate of 1e-3, no decay and the second betas; none at rates over 0.03."""
    if values["optim.lr"] > 0.03:
        return inf
    off = (log10(values["optim.lr"]) + 3) ** 2 + values.get("optim.weight_decay", 0)
    return 1 + off + 0.5 * (tuple(values["optim.betas"]) != (0.9, 0.95))


def tried(experiment: Experiment, seed: int = 0) -> list[dict]:
    cluster = Cluster(seed, {}, loss)
    cluster.run(Parzen(experiment))
    return cluster.trained


def test_it_comes_nearer_to_the_best_than_chance():
    learnt = [min(map(loss, tried(searching(seed=seed)))) for seed in range(7)]
    drawn = [
        min(loss(p.values) for p in proposals(searching(seed=seed, sampler="random")))
        for seed in range(7)
    ]
    assert median(learnt) - 1 < (median(drawn) - 1) / 2


def test_what_is_tried_does_not_depend_on_which_trial_was_faster():
    assert sorted(map(str, tried(searching(), 1))) == sorted(map(str, tried(searching(), 2)))


def test_killed_and_begun_again_it_tries_what_is_left_and_nothing_twice():
    whole = sorted(map(str, tried(searching())))
    for trials in (1, 6, 23):
        known: Known = {}
        first, again = Cluster(0, known, loss), Cluster(1, known, loss)
        first.run(Parzen(searching()), trials=trials)
        again.run(Parzen(searching()))
        assert sorted(map(str, first.trained + again.trained)) == whole


def test_values_that_are_drawn_again_are_not_tried_again():
    space = {"optim.betas": SPACE["optim.betas"], "optim.lr": {"kind": "choice", "values": [1e-3]}}
    found = tried(searching(space | {"optim.weight_decay": {"kind": "choice", "values": [0.0]}}))
    assert len(found) == 3
    assert len({str(values) for values in found}) == 3


def test_a_trial_that_failed_leaves_the_others_alone():
    cluster = Cluster(0, {}, loss)
    cluster.run(Parzen(searching()), failing="0.9, 0.999")
    assert len(cluster.trained) == 40


def test_a_field_under_a_condition_is_drawn_with_that_alone():
    decay = {"kind": "uniform", "low": 0.0, "high": 1.0, "when": {"optim.betas": [0.9, 0.95]}}
    space = SPACE | {"optim.eps": {"kind": "choice", "values": [1e-8, 1e-6]}}
    space["optim.weight_decay"] = decay
    found = tried(searching({path: space[path] for path in sorted(space)}))
    assert len(found) == 40
    assert {"optim.weight_decay" in values for values in found} == {True, False}
    for values in found:
        assert ("optim.weight_decay" in values) == (values["optim.betas"] == [0.9, 0.95])


LENGTHS = list(range(1, 17))


def ends(values: Mapping[str, Any]) -> dict[str, float]:
    """Losses fall with length and towards a rate of 1e-3; far from it there are none."""
    epochs, off = values["train.epochs"], (log10(values["optim.lr"]) + 3) ** 2
    return {
        "eval/loss": 1 + off + 4 / epochs if off < 3 else nan,
        "train/flops": 1e12 * epochs,
    }


def tried_for_both(seed: int, sampler: str) -> list[dict[str, Any]]:
    """Values of trials that are to lose little and to cost little."""
    lengths = {"kind": "choice", "values": LENGTHS}
    space = {"optim.lr": SPACE["optim.lr"], "train.epochs": lengths}
    experiment = searching(space, samples=60, seed=seed, sampler=sampler, tradeoffs=["train/flops"])
    if sampler == "random":
        return [dict(proposal.values) for proposal in proposals(experiment)]
    strategy, found = Parzen(experiment), []
    while values := strategy.next_round():
        for one in values:
            strategy.learn(one, Outcome("finished", ends(one)))
        found += values
    return found


def above_the_front(found: list[dict[str, Any]]) -> float:
    """How far the least losses at most so long are above those that there are, on average."""
    losses = [(ends(values)["eval/loss"], values["train.epochs"]) for values in found]
    least = [
        min([loss for loss, epochs in losses if epochs <= n and isfinite(loss)], default=8.0)
        for n in LENGTHS
    ]
    return mean(loss - (1 + 4 / n) for loss, n in zip(least, LENGTHS, strict=True))


def test_for_several_objectives_it_comes_nearer_to_their_front_than_chance():
    learnt, drawn = (
        [above_the_front(tried_for_both(seed, sampler)) for seed in range(5)]
        for sampler in ("tpe", "random")
    )
    assert median(learnt) < median(drawn) / 2
    assert tried_for_both(0, "tpe") == tried_for_both(0, "tpe")


def test_a_grid_is_refused():
    space = SPACE | {"train.epochs": {"kind": "grid", "values": [1, 2]}}
    with pytest.raises(ConfigError, match=r"train\.epochs whole: make it a choice"):
        searching(space)
