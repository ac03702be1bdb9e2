"""What is searched, with which values of other fields, and for what."""

from typing import Any

import pytest

from orchestration.config import Experiment, validated
from orchestration.problems import ConfigError
from tests.orchestration.conftest import SETTINGS

SCHEDULES = {"kind": "grid", "values": ["cosine", "wsd"]}
DECAYS = {"kind": "grid", "values": [0.1, 0.2, 0.4], "when": {"optim.schedule": "wsd"}}
RATES = {"kind": "grid", "values": [1e-3, 1e-2]}


def searching(space: dict[str, Any], **settings: Any) -> Experiment:
    return validated(SETTINGS | {"search": {"space": space, **settings}})


def points(space: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    search = searching(space, **settings).search
    assert search is not None
    assert search.trials == len(search.points())
    assert all(search.proposes(values) for values in search.points())
    return search.points()


def test_a_field_is_searched_where_its_condition_holds_and_doubles_no_other_trial():
    found = points({"optim.schedule": SCHEDULES, "optim.decay_fraction": DECAYS, "optim.lr": RATES})
    assert len(found) == 2 * (1 + 3)
    assert [v["optim.lr"] for v in found if v["optim.schedule"] == "cosine"] == [1e-3, 1e-2]
    assert all(("optim.decay_fraction" in v) == (v["optim.schedule"] == "wsd") for v in found)


def test_conditions_may_hang_on_conditions():
    warmups = {"kind": "grid", "values": [4, 8], "when": {"optim.decay_fraction": 0.2}}
    space = {"optim.schedule": SCHEDULES, "optim.decay_fraction": DECAYS}
    found = points(space | {"optim.warmup_steps": warmups})
    assert len(found) == 1 + 2 + 2
    assert sum("optim.warmup_steps" in values for values in found) == 2


def test_where_a_condition_stands_does_not_matter():
    found = points({"optim.decay_fraction": DECAYS, "optim.schedule": SCHEDULES})
    assert len(found) == 1 + 3
    names = {tuple(values) for values in found}
    assert names == {("optim.schedule",), ("optim.decay_fraction", "optim.schedule")}


def test_what_is_drawn_twice_is_tried_once_and_a_condition_moves_no_other_draw():
    schedules, decays = ({**one, "kind": "choice"} for one in (SCHEDULES, DECAYS))
    space = {"optim.schedule": schedules, "optim.decay_fraction": decays}
    found = points(space, samples=50)
    assert len(found) == 1 + 3
    rates = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-1}}
    bound = points(space | rates, samples=9)
    free = points(space | {"optim.decay_fraction": {**decays, "when": {}}} | rates, samples=9)
    for one, other in zip(bound, free, strict=True):
        assert one.items() <= other.items()


def test_all_trials_have_the_same_parameters_whatever_is_searched_of_each():
    experiment = searching({"optim.schedule": SCHEDULES, "optim.decay_fraction": DECAYS})
    assert experiment.search is not None
    trials = [experiment.trial(values) for values in experiment.search.points()]
    assert len({tuple(trial.params()) for trial in trials}) == 1
    assert len({trial.identity() for trial in trials}) == 4


def test_values_that_are_searched_under_another_condition_are_of_no_trial():
    search = searching({"optim.schedule": SCHEDULES, "optim.decay_fraction": DECAYS}).search
    assert search is not None
    assert search.proposes({"optim.schedule": "cosine"})
    assert not search.proposes({"optim.schedule": "cosine", "optim.decay_fraction": 0.1})
    assert not search.proposes({"optim.schedule": "wsd"})
    assert not search.proposes({"optim.schedule": "wsd", "optim.decay_fraction": 0.3})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tradeoffs": ["eval/loss"]}, "must differ from one another and from metric=eval/loss"),
        ({"tradeoffs": ["train/flops"] * 2}, "must differ from one another"),
        ({"tradeoffs": ["train/flop"]}, "did you mean 'train/flops'?"),
        (
            {"tradeoffs": ["train/flops"], "scheduler": {"kind": "asha"}},
            "must be none with tradeoffs: no single one of them says which trial is worse",
        ),
        (
            {"tradeoffs": ["train/flops"], "space": {"optim.schedule": SCHEDULES}},
            "a front would rank the schedules of optim.schedule with one another",
        ),
    ],
)
def test_objectives_that_are_none_are_refused(settings, says):
    with pytest.raises(ConfigError) as told:
        searching(**{"space": {"optim.lr": RATES}} | settings)
    assert says in str(told.value)


def test_more_of_an_accuracy_is_better_and_less_of_all_else():
    tradeoffs = ["train/flops", "eval/accuracy"]
    search = searching({"optim.lr": RATES}, tradeoffs=tradeoffs).search
    assert search is not None
    assert search.objectives == {"eval/loss": 1, "train/flops": 1, "eval/accuracy": -1}
