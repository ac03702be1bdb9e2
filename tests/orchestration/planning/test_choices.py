"""Every ZeRO stage and offload is weighed, and what fits is told with the fewest workers that it takes."""

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from orchestration.config import validated
from orchestration.planning.choices import choices, fits, remedy
from orchestration.planning.memory import GIB, host_memory, memory, staying, updating


def by_settings(experiment):
    return {
        (each.zero_stage, each.offload_optimizer, each.offload_parameters): each
        for each in choices(experiment)
    }


def test_each_choice_is_what_the_experiment_would_need_with_it(settings):
    experiment = validated(settings | {"cluster": {"workers": 4}})
    found = by_settings(experiment)
    assert len(found) == 10  # ZeRO 0 keeps no master values in bf16
    for (stage, optimizer, parameters), choice in found.items():
        other = experiment.with_overrides(
            {
                "engine.zero_stage": stage,
                "engine.offload_optimizer": optimizer,
                "engine.offload_parameters": parameters,
                "engine.nvme_path": "disk" if parameters == "nvme" else None,
            }
        )
        assert choice.memory_bytes == sum(memory(other).values())
        assert choice.host_bytes == host_memory(other)
    assert [key for key, choice in found.items() if choice.configured] == [(2, "none", "none")]
    assert {choice.fits for choice in found.values()} == {None}


def test_precision_and_quantisation_rule_stages_out(settings):
    settings["train"]["precision"] = "fp32"
    assert (0, "none", "none") in by_settings(validated(settings))
    settings["model"]["quantization"] = "int8"
    assert all(stage < 3 for stage, *_ in by_settings(validated(settings)))


def test_the_fewest_workers_are_those_that_fit_and_one_step_fewer_do_not(settings):
    settings |= {"cluster": {"workers": 1}, "engine": {"zero_stage": 3}}
    needs = {
        workers: sum(memory(validated(settings | {"cluster": {"workers": workers}})).values())
        for workers in (1, 2, 3, 4, 6, 12)
    }
    settings["cluster"]["gpu_memory_gib"] = needs[4] / GIB
    choice = by_settings(validated(settings))[3, "none", "none"]
    assert choice.fewest_workers == min(n for n, need in needs.items() if need <= needs[4])
    assert choice.fits == (needs[1] <= needs[4])


def test_memory_of_the_machine_limits_what_is_offloaded(settings):
    settings |= {"engine": {"zero_stage": 3, "offload_parameters": "cpu"}}
    experiment = validated(settings)
    assert fits(experiment)
    needed = host_memory(experiment) / GIB
    assert fits(experiment.with_overrides({"cluster.host_memory_gib": needed * 1.01}))
    scarce = experiment.with_overrides({"cluster.host_memory_gib": needed * 0.99})
    assert not fits(scarce)
    assert remedy(scarce, "run") == "set engine.offload_parameters=none"


@pytest.mark.parametrize("workers", [1, 4])
def test_model_states_are_those_of_deepspeeds_estimators(settings, workers):
    """Which know models that are trained whole; so of what ours trains, with bf16.

    They give a weight 2 bytes and its gradient 2, then 4 more for it in float32 and 12 for master value and
    moments. Ours tell the float32 gradient only in the update, beside AdamW's temporaries, which theirs leave
    out; ZeRO 2 leaves a worker whole what it has a part of, where theirs divide; and a layer that ZeRO 3
    gathers is told by itself.
    """
    settings |= {"cluster": {"workers": workers}}
    trained = 8 * 8 + 8 + 32 * 8
    experiment = validated(settings)
    _, theirs = estimate_zero2_model_states_mem_needs(trained, workers, cpu_offload=False)
    ours = staying(experiment)
    update = updating(experiment)[1]
    temporary = 4 * trained // workers * 2
    whole = 2 * (min(trained, trained // workers + 32 * 8) - trained // workers)
    states = ours["trainable weights"] + ours["optimizer"] + sum(update.values())
    assert states - temporary - whole == theirs
    third = experiment.with_overrides({"engine.zero_stage": 3})
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        trained, 32 * 8, workers, cpu_offload=False
    )
    ours, update = staying(third), updating(third)[1]
    states = ours["trainable weights"] + ours["optimizer"] + sum(update.values())
    bucket = 2 * trained
    # What theirs give the weights after ZeRO 3's division is in the 18 bytes; ours has them beside.
    assert states - temporary - bucket == theirs - layer + 2 * trained // workers
