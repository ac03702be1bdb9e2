"""What may be searched, and what no trial could be: see test_config.py as well."""

import pytest

from orchestration.config import validated
from orchestration.plan import plan
from orchestration.problems import ConfigError
from tests.orchestration.conftest import SETTINGS
from tests.orchestration.test_space import SCHEDULES, points, searching


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
        ({"optim.schedul": "wsd"}, ".when: optim.schedul is not searched; search it as well"),
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
    }
    with pytest.raises(ConfigError) as told:
        searching(space)
    assert str(told.value).startswith(f"search.space.optim.decay_fraction{says}")


def test_values_that_are_legal_each_but_not_together_are_refused():
    """Blocks before every fourth layer, as above, but of a model that has four."""
    space = {
        "model.size": {"kind": "grid", "values": ["large", "small"]},
        "model.attention": {"kind": "grid", "values": ["mmca", "gated_cross"]},
    }
    large = SETTINGS | {"model": SETTINGS["model"] | {"size": "large"}, "search": {"space": space}}
    with pytest.raises(ConfigError) as told:
        validated(large)
    assert str(told.value) == (
        "search.space: with model.size=small, model.attention=gated_cross: model.cross_every: 4 must be at "
        "most the 2 layers of size small, or there is no block"
    )


def test_conditions_that_wait_for_one_another_are_refused():
    values = {"kind": "grid", "values": [0.1, 0.2]}
    space = {
        "optim.decay_fraction": {**values, "when": {"optim.warmup_fraction": 0.1}},
        "optim.warmup_fraction": {**values, "when": {"optim.clip": 0.1}},
        "optim.clip": {**values, "when": {"optim.decay_fraction": 0.1}},
    }
    with pytest.raises(ConfigError) as told:
        searching(space)
    assert str(told.value).startswith("search.space: optim.")
    assert str(told.value).count(" needs ") == 3


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
