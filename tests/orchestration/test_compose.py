"""Files and overrides become an experiment, or one clear line for every problem."""

from pathlib import Path

import pytest
import yaml

from orchestration.compose import load
from orchestration.domains import Grid
from orchestration.problems import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch, settings) -> Path:
    """A folder with `tiny.yaml`; messages name files relative to it."""
    monkeypatch.chdir(tmp_path)
    write("tiny.yaml", yaml.safe_dump(settings))
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def lines(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


pytestmark = pytest.mark.usefixtures("folder")


def test_files_are_merged_from_left_to_right_and_the_file_itself_is_last():
    write("left.yaml", "optim: {lr: 1, clip: 1, eps: 1}")
    write("right.yaml", "optim: {lr: 2, clip: 2}")
    write("x.yaml", "extends: [tiny.yaml, left.yaml, right.yaml]\noptim: {lr: 3}")
    optim = load("x.yaml").optim
    assert (optim.lr, optim.clip, optim.eps) == (3, 2, 1)


def test_overrides_are_last_and_in_order():
    write("x.yaml", "extends: tiny.yaml\noptim: {lr: 3}")
    assert load("x.yaml", ["optim.lr=4", "optim.lr=5"]).optim.lr == 5


def test_paths_of_extends_start_at_the_file_that_names_them():
    write("sub/base.yaml", "extends: ../tiny.yaml\noptim: {lr: 3}")
    write("other/x.yaml", "extends: ../sub/base.yaml")
    assert load("other/x.yaml").optim.lr == 3


def test_a_file_may_be_extended_twice_without_being_a_circle():
    write("a.yaml", "extends: tiny.yaml")
    write("x.yaml", "extends: [a.yaml, tiny.yaml]")
    assert load("x.yaml") == load("tiny.yaml")


def test_lists_are_replaced():
    write("x.yaml", "extends: tiny.yaml\ndata: {sets: {chats: {annotations: [a.json, b.json]}}}")
    assert load("x.yaml").data.sets["chats"].annotations == ("a.json", "b.json")
    shorter = load("x.yaml", ["data.sets.chats.annotations=[c.json]"])
    assert shorter.data.sets["chats"].annotations == ("c.json",)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001", "+1e-4"])
def test_numbers_in_powers_of_ten_are_numbers(text):
    write("x.yaml", f"extends: tiny.yaml\noptim: {{lr: {text}}}")
    assert load("x.yaml").optim.lr == 1e-4
    assert load("tiny.yaml", [f"optim.lr={text}"]).optim.lr == 1e-4
    searched = f"search.space.optim.lr={{kind: grid, values: [{text}]}}"
    search = load("tiny.yaml", [searched]).search
    assert search is not None
    assert search.space["optim.lr"] == Grid(kind="grid", values=(1e-4,))


def test_the_resolved_file_gives_an_equal_experiment():
    searched = "search.space={optim.lr: {kind: loguniform, low: 1e-8, high: 1}}"
    experiment = load("tiny.yaml", ["optim.eps=1e-9", searched])
    write("resolved.yaml", yaml.safe_dump(experiment.as_dict()))
    assert load("resolved.yaml") == experiment


def test_an_override_reaches_into_a_searched_field():
    searched = "search.space.optim.lr={kind: grid, values: [1, 2]}"
    experiment = load("tiny.yaml", [searched, "search.space.optim.lr.values=[3]"])
    assert experiment.search is not None
    assert experiment.search.space["optim.lr"] == Grid(kind="grid", values=(3,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optm: {lr: 1}", "2: optm: no such field; did you mean 'optim'?"),
        ("optim:\n  clip: 1\n  lrr: 2", "4: optim.lrr: no such field; did you mean 'optim.lr'?"),
        ("zzz: 1", "2: zzz: no such field; the fields here are name, model, data, optim, "
                   "train, cluster, deploy, engine, checkpoint, evaluation, storage, tracking, search"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "3: optim: is set twice, first in line 2; keep one"),
        ("train: {epochs: 1.5}", "2: train.epochs: 1.5 must be a valid integer, "
                                 "got a number with a fractional part"),
        ("train: {epochs: many}", "2: train.epochs: 'many' must be a valid integer, "
                                  "unable to parse string as an integer"),
        ("optim: {lr: -1}", "2: optim.lr: -1.0 must be positive, for instance 1e-3"),
        ("optim: 3", "2: optim: must be a mapping of fields, not 3"),
        ("optim: {betas: [0]}", "2: optim.betas.1: is missing; set it"),
        ("model: {attention: mmcaa}", "2: model.attention: 'mmcaa' must be one of 'causal', "
                                      "'causal_cross', 'mmca' or 'gated_cross'; did you mean 'mmca'?"),
        ("model: {size: huge}", "2: model.size: 'huge' must be one of large, small"),
        ("train: {batch: 10}\ncluster: {workers: 4}",
         "2: train.batch: 10 must be a multiple of cluster.workers x engine.micro_batch = "
         "4 x 1; set train.batch=8, or cluster.workers to one of 1, 2, 5, 10"),
        ("search:\n  space:\n    optim.lrr: {kind: grid, values: [1]}",
         "4: search.space.optim.lrr: no such field; did you mean 'optim.lr'?"),
        ("search:\n  space:\n    optim.lr: {kind: grid, values: [1, -1]}",
         "4: search.space.optim.lr: -1.0 must be positive, for instance 1e-3"),
        ("search:\n  space:\n    optim.lr:\n      kind: grid\n      values: [1]\n      value: 1",
         "7: search.space.optim.lr.value: no such field; "
         "did you mean 'search.space.optim.lr.values'?"),
        ("search: {space: {optim.lr: {kind: grid, values: [1]}}, scheduler: {kind: ash}}",
         "2: search.scheduler: 'ash' must be one of 'none', 'asha', 'hyperband', "
         "'median'; did you mean 'asha'?"),
        ("optim: [\n", "4: not YAML: expected the node content, but found '<stream end>'"),
        ("optim:\n\tlr: 1", "3: not YAML: found character '\\t' that cannot start any token"),
        ("optim: &a {lr: 1}\ntrain: *a", "3: not YAML: aliases are not read; use extends"),
        ("name: !!python/name:os.system x",
         "2: not YAML: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/name:os.system'"),
        ("name: 2024-13-45", "2: name: '2024-13-45' cannot be read: month must be in 1..12; "
                             "put it in quotes if it is text"),
        ("name: !!bool maybe", "2: name: 'maybe' cannot be read: 'maybe'; put it in quotes if it is text"),
        ("name: 010", "2: name: '010' cannot be read: YAML 1.1 takes it for 8, so write that if it is meant; "
                      "put it in quotes if it is text"),
        ("1: 2", "2: the key 1 must be text; put it in quotes"),
        ("[1, 2]: 2", "2: the key a list or mapping must be text; put it in quotes"),
    ],
)  # fmt: skip
def test_a_broken_file_gives_one_line_that_names_file_and_line(text, says):
    write("x.yaml", f"extends: tiny.yaml\n{text}\n")
    assert lines("x.yaml") == [f"x.yaml:{says}"]


def test_a_problem_stands_where_its_value_came_from():
    write("base.yaml", "extends: tiny.yaml\n\noptim:\n  lr: -1\n  clip: -1\n")
    write("x.yaml", "extends: base.yaml\ntrain:\n  epochs: 0\n")
    assert [problem.split(": ")[0] for problem in lines("x.yaml")] == ["base.yaml:4", "x.yaml:3"]
    assert lines("x.yaml", "optim.lr=-2", "train.epochs=2") == [
        "override 'optim.lr=-2': optim.lr: -2.0 must be positive, for instance 1e-3"
    ]


def test_all_problems_come_together():
    write(
        "x.yaml",
        """extends: [tiny.yaml, lost.yaml]
name: a/b
optim:
  lr: -1
  lr: 1
model:
  attention: none
data: {max_token: 3}
engine: {micro_batch: 5}
lr: 1
""",
    )
    problems = lines("x.yaml", "train.epochs=x", "oops", "optim.lr.x=1", "optim.eps=[")
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["x.yaml:5", "optim.lr"],
        ["x.yaml:1", "no file 'lost.yaml'; . holds tiny.yaml, x.yaml"],
        ["override 'oops'", "must read section.field=value"],
        ["override 'optim.lr.x=1'", "optim.lr.x"],
        ["override 'optim.eps=['", "not YAML"],
        ["x.yaml:2", "name"],
        ["x.yaml:7", "model.attention"],
        ["x.yaml:8", "data.max_token"],
        ["x.yaml:4", "optim.lr"],
        ["override 'train.epochs=x'", "train.epochs"],
        ["x.yaml:10", "lr"],
    ]


def test_an_experiment_that_is_not_there_names_its_neighbors():
    assert lines("tinny.yaml") == ["no file 'tinny.yaml'; did you mean 'tiny.yaml'?"]
    assert lines("qqq.yaml") == ["no file 'qqq.yaml'; . holds tiny.yaml"]
    assert lines("nowhere/x.yaml") == ["no file 'nowhere/x.yaml'"]


def test_what_an_unreadable_file_would_have_set_is_not_reported_missing():
    write("x.yaml", "extends: tinny.yaml\nname: x\n")
    assert lines("x.yaml") == ["x.yaml:1: no file 'tinny.yaml'; did you mean 'tiny.yaml'?"]


def test_a_circle_of_files_is_named():
    write("a.yaml", "extends: [tiny.yaml,\n  b.yaml]")
    write("b.yaml", "extends: a.yaml")
    assert lines("a.yaml") == [
        "b.yaml:1: extends in a circle: a.yaml -> b.yaml -> a.yaml; remove one of them"
    ]


def test_extends_must_name_files():
    write("x.yaml", "extends: {a: b}\nname: x")
    assert lines("x.yaml") == [
        "x.yaml:1: extends: must be a path or a list of paths, not {'a': 'b'}"
    ]


@pytest.mark.parametrize(("text", "kind"), [("- 1", "a list"), ("words", "'words'")])
def test_a_file_must_hold_sections(text, kind):
    write("x.yaml", text)
    assert lines("x.yaml") == [f"x.yaml:1: must hold a mapping of sections, not {kind}"]


def test_an_empty_file_lacks_what_has_no_default():
    write("x.yaml", "")
    assert lines("x.yaml") == [
        f"x.yaml:1: {section}: is missing; set it" for section in ("name", "model", "data", "train")
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x01", b"a: " + b"[" * 5000])
def test_a_file_that_is_no_text_or_too_deep_gives_one_line(content):
    Path("x.yaml").write_bytes(content)
    (problem,) = lines("x.yaml")
    assert "x.yaml" in problem


def test_a_folder_is_no_file_and_tells_what_it_holds():
    Path("parts").mkdir()
    write("parts/one.yaml", "name: x")
    assert lines("parts") == ["'parts' is a folder, not a YAML file; parts holds one.yaml"]


@pytest.mark.parametrize("override", ["optim.lr", "=1", "optim.=1", ".lr=1", ""])
def test_an_override_must_name_a_field_and_a_value(override):
    assert lines("tiny.yaml", override) == [f"override '{override}': must read section.field=value"]


def test_an_override_through_a_default_is_blamed_on_the_override():
    (problem,) = lines("tiny.yaml", "optim.lr.x=1")
    assert problem == "override 'optim.lr.x=1': optim.lr: {'x': 1} must be a valid number"


def test_a_password_in_an_override_is_not_repeated():
    (problem,) = lines("tiny.yaml", "tracking.uri=http://me:hunter2@host")
    assert problem.startswith("override 'tracking.uri=http://me:***@host': tracking.uri: ")
