"""What an experiment is: its identity, its rules across sections, and trials as experiments."""

import json
import pickle

import pytest

from dsvl.config import FieldsConfig
from orchestration.config import Experiment, validated
from orchestration.problems import ConfigError
from orchestration.settings import merge, path_keys

EXECUTION = {
    "name": "other",
    "cluster.workers": 3,
    "cluster.address": "head:6379",
    "cluster.gpus_per_worker": 1,
    "cluster.gpu_memory_gib": 80,
    "cluster.host_memory_gib": 100,
    "cluster.gpu_tflops": 312,
    "cluster.utilisation": 0.5,
    "cluster.gpu_hour_price": 2.5,
    "engine.zero_stage": 3,
    "engine.micro_batch": 4,
    "engine.offload_optimizer": "cpu",
    "engine.deepspeed": {"wall_clock_breakdown": True},
    "checkpoint.every": 7,
    "checkpoint.keep_best": 1,
    "checkpoint.trunk": "runs/longer",
    "checkpoint.branch_epochs": [1],
    "cluster.min_workers": 1,
    "cluster.hang_timeout_s": 60,
    "evaluation.samples": 5,
    "evaluation.inspect_every": 7,
    "storage.path": "elsewhere",
    "tracking.experiment": "other",
    "search": {"space": {"optim.lr": {"kind": "grid", "values": [0.1]}}},
    "data.sets.chats.records": 99,
    "data.blends.chats.records": 99,
}
WHAT = {
    "model.size": "large",
    "model.languages.small.checkpoint": "other",
    "model.languages.small.vocab_size": 64,
    "model.languages.small.hidden_size": 16,
    "model.languages.small.intermediate_size": 32,
    "model.languages.small.num_hidden_layers": 3,
    "model.languages.small.num_attention_heads": 4,
    "model.languages.small.num_key_value_heads": 2,
    "model.vision.checkpoint": "other",
    "model.vision.image_size": 16,
    "model.vision.patch_size": 2,
    "model.vision.hidden_size": 16,
    "model.vision.intermediate_size": 32,
    "model.vision.num_hidden_layers": 2,
    "model.vision.class_token": True,
    "model.projection": "mlp",
    "model.projection_layers": 2,
    "model.projection_queries": 8,
    "model.template": "original",
    "model.attention": "causal",
    "model.cross_every": 2,
    "model.train_embedding": False,
    "model.language_lora.rank": 4,
    "model.language_lora.alpha": 32,
    "model.language_lora.targets": "attention",
    "model.vision_lora.rank": 4,
    "model.vision_lora.alpha": 32,
    "model.vision_lora.targets": "attention",
    "model.quantization": "int8",
    "data.sets.chats.reader": "qa",
    "data.sets.chats.annotations": ["chats.json", "more.json"],
    "data.sets.chats.images": "other",
    "data.sets.chats.image_name": "{image}.jpg",
    "data.sets.chats.image_rewrite": ["^IMG_", ""],
    **{f"data.sets.chats.fields.{name}": "other" for name in FieldsConfig.__annotations__},
    "data.sets.chats.split": "train",
    "data.sets.chats.max_dropped": 0.5,
    "data.blends.chats.concat": [1, 2],
    "data.blends.chats.join": True,
    "data.blends.chats.samples": 9,
    "data.blends.chats.epochs": 2,
    "data.blends.chats.weight": 2,
    "data.temperature": 2,
    "data.seed": 1,
    "data.max_images": 3,
    "data.max_rounds": 3,
    "data.max_tokens": 32,
    "data.max_image_pixels": 99,
    "data.max_dropped": 0.5,
    "data.eval_fraction": 0.5,
    "optim.lr": 0.5,
    "optim.projection_lr": 0.5,
    "optim.embedding_lr": 0.5,
    "optim.betas": [0.9, 0.95],
    "optim.eps": 1e-5,
    "optim.weight_decay": 0.1,
    "optim.clip": 2,
    "optim.schedule": "wsd",
    "optim.warmup_fraction": 0.2,
    "optim.warmup_steps": 3,
    "optim.decay_fraction": 0.3,
    "train.epochs": 3,
    "train.batch": 24,
    "train.precision": "fp32",
    "train.seed": 1,
    "train.spike": 5,
    "train.max_skipped": 1,
}
TOGETHER = {
    "model.vision.kind",
    "model.vision.queries",
    "model.vision.output_size",
    "data.blends.chats.sets",
    "data.blends.chats.followups",
}
"""Fields that cannot change by themselves."""


def lines(settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validated(settings)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", EXECUTION)
def test_where_and_how_an_experiment_runs_leaves_its_identity(settings, path):
    experiment = validated({**settings, "optim": {"schedule": "wsd", "warmup_steps": 0}})
    other = experiment.with_overrides({path: EXECUTION[path]})
    assert other != experiment
    assert other.identity() == experiment.identity()
    assert other.differences(experiment.identity_fields()) == []


@pytest.mark.parametrize("path", WHAT)
def test_what_is_trained_makes_the_identity(settings, path):
    experiment = validated(settings)
    other = experiment.with_overrides({path: WHAT[path]})
    assert other.identity() != experiment.identity()
    named = [text.split(" ")[0] for text in other.differences(experiment.identity_fields())]
    assert path.replace("languages.small", "language") in named


def test_every_field_of_the_identity_is_tried(settings):
    tried = {path.replace("languages.small", "language") for path in WHAT}
    assert validated(settings).identity_fields().keys() == tried | TOGETHER


def test_the_kind_of_the_tower_and_what_it_resamples_to_make_the_identity(settings):
    kinds = [
        {"kind": "clip"},
        {"kind": "siglip"},
        *({"kind": "qwen", "queries": q, "output_size": o} for q in (4, 9) for o in (128, 256)),
    ]
    vision = settings["model"]["vision"]
    found = [
        validated({**settings, "model": {**settings["model"], "vision": vision | kind}}).identity()
        for kind in kinds
    ]
    assert len(set(found)) == len(kinds)
    assert found[0] == validated(settings).identity()


def test_the_sets_of_a_blend_and_their_follow_ups_make_the_identity(settings):
    sets = settings["data"]["sets"]
    sets["others"] = sets["chats"]
    blends = [
        {"sets": ["chats"], "join": True},
        {"sets": ["chats", "others"], "join": True},
        {"sets": ["chats", "others"], "join": True, "followups": True},
    ]
    experiments = [
        validated(settings).with_overrides({"data.blends.chats": blend}) for blend in blends
    ]
    assert len({experiment.identity() for experiment in experiments}) == len(blends)
    assert len({experiment.blending() for experiment in experiments}) == len(blends)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.blends.chats.concat", [1, 2]),
        ("data.blends.chats.weight", 2),
        ("data.temperature", 2),
        ("data.max_rounds", 3),
    ],
)
def test_blends_leave_prepared_data_as_they_are(settings, path, value):
    experiment = validated(settings)
    other = experiment.with_overrides({path: value})
    assert other.preparation() == experiment.preparation()
    assert other.blending() != experiment.blending()
    assert experiment.with_overrides({"data.max_tokens": 32}).blending() == experiment.blending()


def test_trainings_with_seeds_of_their_own_share_their_data_and_what_they_are_held_to(settings):
    experiment = validated(settings)
    other = experiment.with_overrides({"train.seed": 1})
    assert other.preparation() == experiment.preparation()
    assert other.seed_of("eval") == experiment.seed_of("eval")
    assert other.seed_of("train") != experiment.seed_of("train")
    assert experiment.with_overrides({"data.seed": 1}).preparation() != experiment.preparation()


def test_the_other_sizes_of_the_family_are_not_part_of_the_identity(settings):
    before = validated(settings).identity()
    settings["model"]["languages"]["large"]["num_hidden_layers"] = 9
    assert validated(settings).identity() == before


def test_the_identity_does_not_depend_on_how_numbers_are_written(settings):
    settings["optim"] = {"lr": 1, "betas": (0, 0.95)}
    written = validated(settings).identity()
    settings["optim"] = {"lr": "1.0", "betas": [0.0, 0.95]}
    assert validated(settings).identity() == written
    assert len(written) == 16


def test_stored_identity_fields_survive_json(settings):
    experiment = validated(settings)
    stored = json.loads(json.dumps(experiment.identity_fields()))
    assert experiment.differences(stored) == []
    stored["optim.lr"] = 0.5
    del stored["train.seed"]
    assert experiment.differences(stored) == [
        "optim.lr (0.5 before, 0.001 now)",
        "train.seed ('absent' before, 1234 now)",
    ]


def test_settings_fed_back_give_an_equal_experiment(settings, search):
    experiment = validated({**settings, "search": search})
    assert validated(json.loads(json.dumps(experiment.as_dict()))) == experiment


def test_an_experiment_is_frozen(settings):
    experiment = validated(settings)
    with pytest.raises(ValueError, match="frozen"):
        experiment.name = "other"


def section_paths(tree: dict, prefix: tuple = ()) -> list[tuple]:
    inner = [section_paths(v, (*prefix, k)) for k, v in tree.items() if isinstance(v, dict)]
    return [prefix, *(path for paths in inner for path in paths)]


def test_every_section_at_every_depth_refuses_unknown_fields(settings, search):
    whole = validated({**settings, "search": search}).as_dict()
    # Their keys are the user's.
    free = {("model", "languages"), ("data", "sets"), ("data", "blends"), ("search", "space")}
    free |= {("cluster", "cpu_labels"), ("cluster", "gpu_labels"), ("engine", "deepspeed")}
    free |= {("deploy", "gpu_resources"), ("deploy", "node_config")}
    free |= {("search", "space", path, "when") for path in search["space"]}
    for path in set(section_paths(whole)) - free:
        broken = json.loads(json.dumps(whole))
        section = broken
        for key in path:
            section = section[key]
        section["zzz"] = 1
        problems = lines(broken)
        assert len(problems) == 1, path
        assert problems[0].startswith(".".join((*path, "zzz: no such field")))


@pytest.mark.parametrize(
    ("path", "wrong", "meant"),
    [
        ("optm", {}, "optim"),
        ("optim.lrr", 1, "optim.lr"),
        ("model.vision.patchsize", 4, "model.vision.patch_size"),
        ("model.languages.small.vocab", 4, "model.languages.small.vocab_size"),
        ("lr", 1, "optim.lr"),
        ("zero_stage", 1, "engine.zero_stage"),
    ],
)
def test_an_unknown_field_names_the_nearest(settings, path, wrong, meant):
    (problem,) = lines(merge(settings, nested(path, wrong)))
    assert problem == f"{path}: no such field; did you mean '{meant}'?"


def nested(path: str, value: object) -> dict:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def test_a_batch_that_cannot_be_divided_names_batches_and_workers_that_can(settings):
    settings |= {"cluster": {"workers": 5}, "engine": {"micro_batch": 2}}
    assert lines(settings) == [
        "train.batch: 12 must be a multiple of cluster.workers x engine.micro_batch = 5 x 2; "
        "set train.batch=10, or cluster.workers to one of 1, 2, 3, 6"
    ]
    settings["engine"] = {"micro_batch": 5}
    assert lines(settings)[0].endswith("or engine.micro_batch to a divisor of 12")


def test_fp16_without_gpus_is_refused_beside_the_other_rules(settings, search):
    settings["train"]["precision"] = "fp16"
    says = "'fp16' needs GPUs; set cluster.gpus_per_worker=1, or this to bf16 or fp32"
    assert lines({**settings, "search": search}) == [f"train.precision: {says}"], "told once"
    assert len(lines({**settings, "engine": {"zero_stage": 0, "micro_batch": 5}})) == 3
    assert validated({**settings, "cluster": {"gpus_per_worker": 1}}).train.precision == "fp16"
    settings["train"]["precision"] = "fp32"
    search["space"] = {"train.precision": {"kind": "grid", "values": ["fp32", "fp16"]}}
    assert lines({**settings, "search": search | {"samples": 1}}) == [
        f"search.space.train.precision: {says}"
    ]


def test_int8_is_not_divided_by_zero_3(settings):
    settings["model"]["quantization"] = "int8"
    settings["engine"] = {"zero_stage": 3}
    assert lines(settings) == [
        "engine.zero_stage: 3 does not divide the weights of model.quantization=int8; "
        "set that to nf4, or this to 2"
    ]
    assert validated(settings | {"engine": {"zero_stage": 2}})


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"offload_parameters": "cpu"}, "offload_parameters: 'cpu' must be none unless zero_stage is 3"),
        ({"offload_optimizer": "nvme", "nvme_path": "d"}, "'nvme' must be one of 'none' or 'cpu'"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "'cpu' must be none without zero_stage 1, 2"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "nvme_path: None must name a folder for nvme"),
        ({"nvme_path": "d"}, "nvme_path: 'd' must name a folder for nvme, and nothing else"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "['zero_optimization.stage'] must not be"),
        ({"deepspeed": {"fp16": {"loss_scale": 128}}}, "['fp16.loss_scale'] must not be set there, but by"),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}},
         "['zero_optimization.offload_optimizer.ratio'] must not be set there, but by"),
        ({"deepspeed": {"optimizer": {}}}, "deepspeed: ['optimizer'] must not be set there, but by the"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_is_refused_where_it_stands(settings, engine, says):
    settings["train"]["precision"] = "fp32"
    settings["engine"] = engine
    (problem,) = lines(settings)
    assert problem.startswith("engine.")
    assert says in problem


def test_nf4_takes_whole_blocks_of_a_row(settings):
    settings["model"]["quantization"] = "nf4"
    assert lines(settings) == [
        "model.quantization: 'nf4' must be int8 or none, as nf4 rounds 64 numbers of a row at a time, and "
        "hidden_size and intermediate_size of languages.small, 8 and 16, are no multiples"
    ]
    settings["model"]["languages"]["small"] |= {"hidden_size": 128, "intermediate_size": 192}
    assert validated(settings | {"engine": {"zero_stage": 3}})


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "\x1b[31m", "x" * 101])
def test_a_set_has_a_name_that_no_id_and_no_file_mistakes(settings, name):
    settings["data"]["sets"][name] = settings["data"]["sets"]["chats"]
    with pytest.raises(ConfigError) as caught:
        validated(settings)
    assert f"data.sets: ({name!r},) must be called by up to 100 letters" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "blend", "says"),
    [
        ("mine", {"sets": []}, "mine.sets: () must name at least one of data.sets"),
        ("mine", {"sets": ["chats", "chats"]}, "each once"),
        ("mine", {"sets": ["chat"]}, "mine.sets: ('chat',) must be among data.sets: chats, others"),
        ("others", {}, "blends: ('others',) must have another name, or that set among its sets"),
        ("mine", {"concat": [0, 2]}, "mine.concat: (0, 2) must be [fewest, most], from 1"),
        ("mine", {"concat": [3, 2]}, "mine.concat: (3, 2) must be [fewest, most], from 1"),
        ("mine", {"concat": [1, 2], "join": True}, "mine.concat: (1, 2) must be [1, 1] with join"),
        ("mine", {"followups": True}, "mine.followups: True must be false without join: true"),
        ("mine", {"samples": 0}, "mine.samples: 0 must be positive"),
        (
            "mine",
            {"samples": 9, "epochs": 2},
            "mine.samples: 9 must be positive, and stand without",
        ),
        ("mine", {"epochs": 0}, "mine.epochs: 0.0 must be positive"),
        ("mine", {"weight": -1}, "mine.weight: -1.0 must be positive"),
    ],
)
def test_a_blend_that_cannot_be_is_refused_where_it_stands(settings, name, blend, says):
    settings["data"]["sets"]["others"] = settings["data"]["sets"]["chats"]
    settings["data"]["blends"] = {name: {"sets": ["chats"], **blend}}
    (problem,) = lines(settings)
    assert problem.startswith("data.blends")
    assert says in problem


@pytest.mark.parametrize(("field", "value"), [("rank", -1), ("alpha", 0.0)])
def test_an_adapter_that_cannot_be_is_refused_where_it_stands(settings, field, value):
    settings["model"]["vision_lora"] = {field: value}
    (problem,) = lines(settings)
    assert problem.startswith(f"model.vision_lora.{field}: {value} must")


def test_the_fewest_workers_are_no_more_than_the_most(settings, search):
    settings["cluster"] = {"workers": 2, "min_workers": 3}
    assert lines(settings) == ["cluster.min_workers: 3 must not exceed cluster.workers=2"]
    settings["cluster"] = {"workers": 4, "min_workers": 3}
    trial = validated({**settings, "search": search}).trial({"optim.lr": 1e-3})
    assert (trial.cluster.workers, trial.cluster.min_workers) == (1, None)


@pytest.mark.parametrize(
    "optim", [{}, {"schedule": "wsd"}, {"schedule": "linear", "warmup_steps": 1}]
)
def test_only_plateaus_have_branches_and_trunks(settings, optim):
    settings |= {"optim": optim, "checkpoint": {"branch_epochs": [1], "trunk": "runs/longer"}}
    said = "trunk and branch begin alike only with optim.schedule=wsd and optim.warmup_steps"
    assert [line.partition(";")[0] for line in lines(settings)] == [
        f"checkpoint.trunk: {said}",
        f"checkpoint.branch_epochs: {said}",
    ]


@pytest.mark.parametrize("checkpoint", [{"trunk": "runs/longer"}, {"branch_epochs": [1]}])
def test_a_search_says_itself_what_branches_off(settings, search, checkpoint):
    settings |= {"optim": {"schedule": "wsd", "warmup_steps": 1}, "checkpoint": checkpoint}
    validated(settings)
    (said,) = lines(settings | {"search": search})
    (field,) = checkpoint
    assert said.startswith(f"checkpoint.{field}: a search says itself which trial branches off")


@pytest.mark.parametrize("field", ["path", "data"])
def test_a_store_that_is_no_folder_is_refused(settings, field):
    settings |= {"storage": {field: "s3://bucket/runs"}}
    (said,) = lines(settings)
    assert said.startswith(
        f"storage.{field}: 's3://bucket/runs' must be a folder; name the store in storage.remote"
    )


def test_a_branch_is_shorter_than_its_trunk(settings):
    settings |= {"optim": {"schedule": "wsd", "warmup_steps": 1}}
    settings |= {"checkpoint": {"branch_epochs": [1, 2, 3]}}
    said = "checkpoint.branch_epochs: [2, 3] must be less than train.epochs=2"
    assert lines(settings) == [said]


def test_the_default_engine_is_held_to_the_rule_too(settings):
    settings["cluster"] = {"workers": 5}
    assert lines(settings)[0].startswith("train.batch: 12 must be a multiple of cluster.workers")


def test_a_batch_must_divide_among_the_workers_of_a_trial(settings, search):
    (problem,) = lines({**settings, "search": search | {"workers": 5}})
    assert problem.startswith(
        "search.workers: train.batch: 12 must be a multiple of search.workers"
    )


def test_rules_across_sections_are_told_beside_other_problems(settings, search):
    settings |= {"cluster": {"workers": 5}, "optim": {"lr": -1}, "search": search}
    search["space"]["train.seeed"] = {"kind": "grid", "values": [1]}
    search["space"]["train.epochs"] = {"kind": "grid", "values": [1, 0]}
    problems = lines(settings)
    assert [problem.split(": ")[0] for problem in problems] == [
        "optim.lr",
        "train.batch",
        "search.space.train.seeed",
        "search.space.train.epochs",
    ]


@pytest.mark.parametrize(
    ("path", "domain", "says"),
    [
        ("optim.lrr", {"kind": "grid", "values": [1]}, "did you mean 'optim.lr'?"),
        ("optim", {"kind": "grid", "values": [1]}, "is a section; name one of its fields"),
        ("data.max_images", {"kind": "grid", "values": [2]}, "decides the prepared data"),
        ("model.projection_queries", {"kind": "grid", "values": [4]}, "decides the prepared data"),
        ("model.template", {"kind": "grid", "values": ["original"]}, "decides the prepared data"),
        (
            "model.projection",
            {"kind": "choice", "values": ["linear", "perceiver"]},
            "decides the prepared data",
        ),
        ("model.projection", {"kind": "grid", "values": ["linar"]}, "did you mean 'linear'?"),
        ("cluster.workers", {"kind": "grid", "values": [1]}, "a search varies what is trained"),
        ("optim.lr", {"kind": "choice", "values": [1, -1]}, "-1.0 must be positive"),
        ("optim.schedule", {"kind": "grid", "values": ["cosin"]}, "did you mean 'cosine'?"),
        ("model.size", {"kind": "grid", "values": ["tiny"]}, "must be one of small, large"),
        ("optim.warmup_fraction", {"kind": "uniform", "low": 0, "high": 1}, "must lie in [0, 1)"),
        ("train.epochs", {"kind": "uniform", "low": 1, "high": 3}, "must be a valid integer"),
        ("train.batch", {"kind": "grid", "values": [12, 13]}, "13 must be a multiple of search"),
        ("optim.lr", {"kind": "loguniform", "low": 0, "high": 1}, "0.0 must be positive"),
        ("optim.lr", {"kind": "uniform", "low": 2, "high": 1}, "must be below high=1.0"),
        ("optim.lr", {"kind": "gird", "values": [1]}, "did you mean 'grid'?"),
        ("optim.lr", {"values": [1]}, "kind: is missing; set it"),
        ("optim.lr", {"kind": "grid", "values": []}, "must have at least 1 item"),
    ],
)
def test_a_search_refuses_what_no_trial_could_be(settings, search, path, domain, says):
    search |= {"workers": 2, "samples": 1, "space": {path: domain}}
    problems = lines({**settings, "search": search})
    assert all(problem.startswith(f"search.space.{path}") for problem in problems)
    assert any(says in problem for problem in problems)


@pytest.mark.parametrize(
    ("queries", "kinds"), [(64, ["mlp", "vit"]), (4, ["linear", "perceiver", "qformer"])]
)
def test_projections_that_give_as_many_vectors_an_image_are_searched(
    settings, search, queries, kinds
):
    settings["model"]["projection_queries"] = queries
    search |= {"samples": 1, "space": {"model.projection": {"kind": "grid", "values": kinds}}}
    experiment = validated({**settings, "search": search})
    assert [experiment.trial({"model.projection": k}).model.image_tokens for k in kinds] == [
        4 for _ in kinds
    ]


def test_a_search_refuses_to_draw_the_same_trials_again(settings, search):
    search |= {"samples": 2, "space": {"optim.lr": {"kind": "grid", "values": [0.1, 0.2]}}}
    (problem,) = lines({**settings, "search": search})
    assert problem.startswith("search.samples: 2 must be 1 where every domain is a grid")


def test_a_trial_is_an_experiment_with_the_workers_of_a_trial(settings, search):
    experiment = validated({**settings, "search": search | {"workers": 2}})
    trial = experiment.trial({"model.size": "large", "optim.lr": 0.01})
    assert (trial.model.size, trial.optim.lr) == ("large", 0.01)
    assert (trial.cluster.workers, trial.search) == (2, None)
    assert experiment.search is not None
    assert experiment.search.trials == 6


def test_overrides_of_code_are_checked_like_those_of_people(settings):
    experiment = validated(settings)
    assert experiment.with_overrides({"optim.lr": 0.01}).optim.lr == 0.01
    with pytest.raises(ConfigError, match=r"optim\.lrr: no such field; did you mean 'optim\.lr'"):
        experiment.with_overrides({"optim.lrr": 0.01})
    with pytest.raises(ConfigError, match=r"optim\.lr is a value \(0\.001\), not a section"):
        experiment.with_overrides({"optim.lr.x": 0.01})


def test_mappings_merge_and_lists_are_replaced():
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_a_mapping_of_another_kind_replaces_the_first():
    grid, uniform = {"kind": "grid", "values": [1]}, {"kind": "uniform", "low": 0, "high": 1}
    assert merge({"x": grid}, {"x": uniform}) == {"x": uniform}
    assert merge(grid, {"values": [2]}) == {"kind": "grid", "values": [2]}
    assert merge({"grace": 2}, {"kind": "asha"}) == {"grace": 2, "kind": "asha"}


def test_a_searched_field_is_one_key():
    assert path_keys("optim.lr") == ("optim", "lr")
    assert path_keys("search.space.optim.lr") == ("search", "space", "optim.lr")
    assert path_keys("search.space.optim.lr.low") == ("search", "space", "optim.lr", "low")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "prepared", "x" * 101, "é"])
def test_a_name_that_is_no_safe_folder_is_refused(settings, name):
    (problem,) = lines(settings | {"name": name})
    assert problem.startswith("name: ")


def test_a_tracking_uri_with_a_password_is_refused_without_repeating_it(settings):
    (problem,) = lines(settings | {"tracking": {"uri": "http://me:hunter2@host/"}})
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in problem
    assert "hunter2" not in problem


def test_runs_and_their_records_lie_in_the_storage(settings):
    experiment = validated(settings | {"storage": {"path": "there"}})
    assert str(experiment.run_folder) == "there/tiny"
    assert experiment.tracking_uri == "sqlite:///there/mlflow.db"
    other = experiment.with_overrides({"tracking.uri": "http://host:5000"})
    assert other.tracking_uri == "http://host:5000"


def test_an_address_is_local_auto_or_a_host_and_port(settings):
    (problem,) = lines(settings | {"cluster": {"address": "somewhere"}})
    assert problem == "cluster.address: 'somewhere' must be local, auto or HOST:PORT"


def test_errors_travel_between_processes():
    with pytest.raises(ConfigError) as caught:
        validated({"name": "x"})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_params_are_flat_and_hold_where_as_well_as_what(settings):
    params = validated(settings).params()
    assert params["optim.lr"] == 1e-3
    assert params["cluster.workers"] == 1
    assert not any(isinstance(value, dict) for value in params.values())


def test_the_schema_documents_its_fields():
    schema = Experiment.model_json_schema()
    assert schema["$defs"]["ClusterConfig"]["properties"]["workers"]["description"]
