"""What a search may take, and what it has taken."""

from typing import Any

import pytest
from ray.tune.search import Searcher

from orchestration.config import Experiment, validated
from orchestration.planning.cost import sweep_cost
from orchestration.problems import ConfigError
from orchestration.records.journal import Journal, write_json
from orchestration.searching.budget import Budgeted, spent
from orchestration.searching.proposals import Listed, Proposal
from orchestration.space import Budget
from tests.orchestration.conftest import SETTINGS

SPACE = {"optim.lr": {"kind": "uniform", "low": 0.0001, "high": 0.01}}
CLUSTER = {"workers": 4, "gpus_per_worker": 1, "gpu_tflops": 1e-6, "gpu_hour_price": 3.0}


def searching(**budget: float) -> Experiment:
    search = {"space": SPACE, "samples": 8, "workers": 2, "budget": budget}
    return validated(SETTINGS | {"cluster": CLUSTER, "search": search})


class Sweep:
    """Five trials in a list, each of which takes an hour once it runs."""

    def __init__(self, begun: tuple[int, ...] = (), **budget: float) -> None:
        listed = [Proposal({"number": number}) for number in range(5)]
        self.taken = {"trials": float(len(begun)), "hours": 0.0, "gpu_hours": 0.0, "money": 0.0}
        self.held = Budgeted(
            Listed(listed),
            Budget(**budget),
            spent=lambda: self.taken,
            begun=lambda values: values["number"] in begun,
        )

    def run(self) -> list[int]:
        """The trials that it starts, one after another."""
        started: list[int] = []
        while isinstance(values := self.held.suggest(str(len(started))), dict):
            for name, hours in {"trials": 1, "hours": 1, "gpu_hours": 4, "money": 12}.items():
                self.taken[name] += hours
            self.held.on_trial_complete(str(len(started)))
            started.append(values["number"])
        assert values == Searcher.FINISHED or len(started) == 5
        return started


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ({}, 5),
        ({"trials": 3}, 3),
        ({"hours": 2}, 2),
        ({"hours": 1.5}, 2),
        ({"gpu_hours": 8}, 2),
        ({"money": 37}, 4),
        ({"trials": 4, "money": 12}, 1),
        ({"trials": 9}, 5),
    ],
)
def test_no_trial_begins_after_the_budget_is_spent(budget, count):
    assert Sweep(**budget).run() == list(range(count))


def test_a_trial_that_had_begun_goes_on_whatever_is_left():
    assert Sweep(begun=(0, 1, 2), trials=3).run() == [0, 1, 2]


def test_time_is_counted_by_trial_and_without_interruptions(tmp_path, monkeypatch):
    experiment, clock = searching(), iter([0, 60, 3600, 9000, 9000 + 1800])
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    folder = tmp_path / "lr=1"
    folder.mkdir()
    write_json(folder / "values.json", {"optim.lr": 1.0})
    journal: Any = Journal(folder)
    journal.start(identity="", params={}, step=0)
    journal.metrics(1, {})
    journal.metrics(2, {})
    journal.start(identity="", params={}, step=2)  # killed, and begun again after more than an hour
    journal.end("finished")
    found = spent(experiment, tmp_path)
    assert found == {"trials": 1, "hours": 0, "gpu_hours": 2 * 1.5, "money": 2 * 1.5 * 3}


def test_a_plan_tells_no_more_than_the_budget():
    free = sweep_cost(searching(), 1200)
    half = sweep_cost(searching(trials=4), 1200)
    assert (half.gpu_hours, half.money) == (free.gpu_hours / 2, free.money / 2)
    assert sweep_cost(searching(money=free.money / 4), 1200).money == free.money / 4
    assert sweep_cost(searching(money=free.money * 4), 1200) == free


def test_money_without_a_price_is_refused():
    cluster = CLUSTER | {"gpu_hour_price": None}
    search = {"space": SPACE, "budget": {"money": 5}}
    with pytest.raises(ConfigError, match=r"search\.budget\.money.*gpu_hour_price"):
        validated(SETTINGS | {"cluster": cluster, "search": search})
