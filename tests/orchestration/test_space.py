"""What is searched, with which values of other fields, and for what."""

from typing import Any

import pytest

from orchestration.config import Experiment, validated
from orchestration.plan import plan
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


def test_a_value_need_be_legal_only_under_its_condition():
    """Blocks before every fourth layer, of which the smaller size has but two."""
    sizes = {"kind": "grid", "values": ["small", "large"]}
    schemes = {"kind": "grid", "values": ["mmca", "gated_cross"]}
    with pytest.raises(ConfigError, match="must be at most the 2 layers of size small"):
        searching({"model.size": sizes, "model.attention": schemes})
    space = {"model.size": sizes, "model.attention": schemes | {"when": {"model.size": "large"}}}
    planned = plan(searching(space))
    assert planned.trials == 3
    shapes = [(one.size, one.attention) for one in planned.sizes if one.purpose == "trial"]
    assert shapes == [("small", "mmca"), ("large", "mmca"), ("large", "gated_cross")]


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ({"optim.schedul": "wsd"}, ".when: optim.schedul must be searched as well, further up"),
        ({"optim.eps": 1e-8}, ".when: optim.eps must be searched as well, further up"),
        ({"optim.decay_fraction": 0.1}, ".when: optim.decay_fraction must be searched as well"),
        ({"optim.schedule": "linear"}, ".when: optim.schedule is never 'linear'; it is searched over cosine"),
        ({"optim.lr": 0.5}, ".when: optim.lr is never 0.5; it is searched over numbers"),
        ({"optim.schedule": "wsd"}, ": 1.5 must lie in (0, 1]"),
    ],
)  # fmt: skip
def test_a_condition_that_never_holds_is_refused_and_a_value_that_never_may_be(when, says):
    space = {
        "optim.schedule": SCHEDULES,
        "optim.lr": {"kind": "uniform", "low": 0.1, "high": 1.0},
        "optim.decay_fraction": {"kind": "grid", "values": [0.1, 1.5], "when": when},
        "optim.eps": {"kind": "grid", "values": [1e-8]},
    }
    with pytest.raises(ConfigError) as told:
        searching(space)
    assert str(told.value).startswith(f"search.space.optim.decay_fraction{says}")


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("optim.lr", {"kind": "loguniform", "low": 1e-4, "high": 1e-1}),
        ("optim.projection_lr", {"kind": "loguniform", "low": 1e-4, "high": 1e-1}),
        ("optim.embedding_lr", {"kind": "loguniform", "low": 1e-4, "high": 1e-1}),
        ("train.epochs", {"kind": "choice", "values": [1, 2]}),
        ("optim.schedule", {"kind": "grid", "values": ["cosine", "wsd", "linear", "constant"]}),
        ("optim.warmup_fraction", {"kind": "uniform", "low": 0, "high": 0.5}),
        ("optim.warmup_steps", {"kind": "choice", "values": [0, 300]}),
        ("optim.betas", {"kind": "choice", "values": [[0.0, 0.95], [0.9, 0.95]]}),
        ("train.precision", {"kind": "grid", "values": ["fp32", "bf16"]}),
        ("model.size", {"kind": "grid", "values": ["small", "large"]}),
        ("model.attention", {"kind": "grid", "values": ["mmca", "causal", "causal_cross"]}),
        ("model.projection", {"kind": "grid", "values": ["linear", "mlp", "vit"]}),
        ("train.seed", {"kind": "grid", "values": [1, 2, 3]}),
    ],
)
def test_all_of_a_training_may_be_searched(path, domain):
    for values in points({path: domain}):
        settings = searching({path: domain}).trial(values).as_dict()
        for key in path.split("."):
            settings = settings[key]
        assert settings == values[path]


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
