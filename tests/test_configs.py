"""Every shipped experiment loads, plans and survives a round trip; a default lives in one place."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from dsvl.config import SetConfig
from dsvl.data.readers import READERS
from orchestration.compose import load
from orchestration.config import Experiment, validated
from orchestration.plan import plan

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "configs/experiment").glob("*.yaml"))
DIGITS = ROOT / "dsvl/digits/checkpoints"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_shipped_experiment_loads_plans_and_survives_a_round_trip(path, tmp_path):
    experiment = load(path)
    assert plan(experiment).identity in plan(experiment).render()
    assert validated(json.loads(json.dumps(experiment.as_dict()))) == experiment
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(experiment.as_dict()))
    assert load(resolved) == experiment
    assert load(resolved).identity() == experiment.identity()


def test_experiments_have_names_of_their_own():
    names = [load(path).name for path in EXPERIMENTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "made"), [("set1", 222_681 - 6_520), ("set2", 222_681)])
def test_the_papers_blends_make_as_many_samples_as_its_table_1(name, made):
    samples = plan(load(ROOT / f"configs/experiment/visualchat_13b_{name}.yaml")).samples
    assert samples == pytest.approx(0.9 * made, rel=1e-4)  # a tenth is held out


def test_each_of_the_papers_datasets_has_a_part_of_its_name():
    generic = {"llava_json", "sharegpt", "hf_messages", "alpaca", "qa"}
    for name in READERS.keys() - generic:
        part = yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())
        (described,) = validated_sets(part["data"]["sets"]).items()
        assert (described[0], described[1].reader) == (name, name)


def validated_sets(sets: dict[str, Any]) -> dict[str, SetConfig]:
    return TypeAdapter(dict[str, SetConfig]).validate_python(sets)


def test_base_repeats_no_default_of_the_library():
    for section, settings in yaml.safe_load((ROOT / "configs/base.yaml").read_text()).items():
        schema: Any = Experiment.model_fields[section].annotation
        repeated = settings.keys() - set(TypeAdapter(schema).json_schema()["required"])
        assert not repeated, f"{section} has defaults for {repeated}"


@pytest.mark.skipif(len(list(DIGITS.glob("*/config.json"))) < 4, reason="not pretrained yet")
def test_the_digits_have_the_shapes_of_their_checkpoints():
    model = load(ROOT / "configs/experiment/quickstart.yaml").model
    for part in (*model.languages.values(), model.vision):
        stored = json.loads((ROOT / part.checkpoint / "config.json").read_text())
        for name, value in vars(part).items():
            if name not in ("checkpoint", "kind", "class_token", "queries", "output_size"):
                assert stored[name] == value, f"{part.checkpoint}: {name}"
