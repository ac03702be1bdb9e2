"""Manifests for KubeRay, Slurm and the cluster launcher: made from an experiment, and checked."""

import math
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestration import cli
from orchestration.clusters import kuberay, slurm
from orchestration.compose import load
from orchestration.plan import plan
from orchestration.submit import MANIFESTS
from tests.orchestration.conftest import CONFIGS
from tests.orchestration.machines import wait_until

JOBS = Path(__file__).parents[3] / "jobs"
EXPERIMENT = CONFIGS / "experiment/visualchat_13b_set1.yaml"
SETTINGS = (
    "cluster.workers=16", "model.vision.checkpoint=/shared/qwen_vision", "storage.path=/shared/runs",
    "storage.data=/shared/data", "deploy.secret=dsvl", "deploy.machines=[head, node-1, node-2]",
    "deploy.node_config={ImageId: ami-0123456789abcdef0}",
)  # fmt: skip
EXAMPLES = {
    "kuberay": "kuberay.yaml", "slurm": "slurm.sh", "aws": "aws.yaml", "machines": "machines.yaml",
}  # fmt: skip


def submit(capsys, *options: object) -> tuple[int, str, str]:
    """Exit status, results and messages of `dsvl submit train` with the examples' settings."""
    status = cli.main(["submit", "train", str(EXPERIMENT), *SETTINGS, *map(str, options)])
    out, said = capsys.readouterr()
    return status, out, said


@pytest.mark.parametrize("to", EXAMPLES)
def test_the_examples_are_what_is_printed_and_valid(capsys, monkeypatch, to):
    """To write them anew: DSVL_WRITE_EXAMPLES=1 pytest tests/orchestration/clusters -k examples."""
    monkeypatch.chdir(JOBS.parent)
    path = JOBS / EXAMPLES[to]
    status, out, said = submit(capsys, "--to", to, "--dry-run")
    assert status == 0, said
    if os.environ.get("DSVL_WRITE_EXAMPLES"):
        path.write_text(out)
    assert nameless(out) == nameless(path.read_text())
    assert not list(MANIFESTS[to].check(path.read_text()))


def nameless(text: str) -> str:
    """Without the digest of what is trained, which a new setting of the library changes."""
    return re.sub(r"-[0-9a-f]{8}\b", "-DIGEST", text)


def job() -> dict[str, Any]:
    return list(yaml.safe_load_all((JOBS / "kuberay.yaml").read_text()))[1]


def test_pools_come_from_the_experiment():
    cluster = job()["spec"]["rayClusterSpec"]
    cpu, gpu = cluster["workerGroupSpecs"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert (cpu["minReplicas"], cpu["labels"]) == (0, {"pool": "cpu"})
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert gpu["maxReplicas"] * int(limits["nvidia.com/gpu"]) == 16
    settings = next(yaml.safe_load_all((JOBS / "kuberay.yaml").read_text()))["data"]
    inside = yaml.safe_load(settings["experiment.yaml"])["cluster"]
    assert (inside["cpu_labels"], inside["gpu_labels"]) == (cpu["labels"], gpu["labels"])
    assert inside["autoscaled"], "or a training would be refused while there is no node yet"


def test_no_manifest_holds_a_secret_and_all_ask_for_a_token():
    texts = {to: (JOBS / name).read_text() for to, name in EXAMPLES.items()}
    assert "mode: token" in texts["kuberay"]
    assert "secretRef" in texts["kuberay"]
    assert all("RAY_AUTH_MODE=token" in texts[to] for to in ("slurm", "aws", "machines"))
    assert not any("HF_TOKEN" in text for text in texts.values())


def planted(change: Callable[[dict[str, Any]], object]) -> str:
    """The example for KubeRay with a mistake in it."""
    document = job()
    change(document["spec"])
    return yaml.safe_dump(document)


def gpu_group(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["rayClusterSpec"]["workerGroupSpecs"][1]


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return gpu_group(spec)["template"]["spec"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.update(backofLimit=1), "spec.backofLimit: no such field"),
        (lambda s: s.update(backoffLimit="3"), "backoffLimit: must be a valid integer"),
        (lambda s: s["rayClusterSpec"].pop("authOptions"), "authOptions: is missing"),
        (lambda s: s["rayClusterSpec"]["autoscalerOptions"].update(version="v3"), "version: must be 'v2'"),
        (lambda s: gpu_group(s).update(minReplicas=3), "minReplicas <= replicas <= maxReplicas"),
        (lambda s: pod(s)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "9"}),
         "the same nvidia.com/gpu"),
        (lambda s: pod(s)["containers"][0]["envFrom"][0]["secretRef"].pop("name"), "name: is missing"),
        (lambda s: pod(s)["volumes"].pop(0), "storage is none"),
        (lambda s: pod(s)["securityContext"].update(runAsUser=0), "runAsUser: must be greater"),
        (lambda s: pod(s).update(restartPolicy="Always"), "restartPolicy: must be 'Never'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rayjob_is_told(change, told):
    found = "\n".join(map(str, MANIFESTS["kuberay"].check(planted(change))))
    assert told in found


@pytest.mark.skipif("DSVL_CRD" not in os.environ, reason="DSVL_CRD names no ray.io_rayjobs.yaml")
def test_the_example_is_valid_by_the_schema_of_kuberay_itself_and_by_no_field_more():
    """DSVL_CRD=ray.io_rayjobs.yaml pytest tests/orchestration/clusters/test_manifests.py -k schema."""
    crd = yaml.load(Path(os.environ["DSVL_CRD"]).read_text(), Loader=yaml.CSafeLoader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}
    jsonschema.validate(job(), schema)
    for mistake in ({"backofLimit": 1}, {"backoffLimit": "3"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job(), "spec": job()["spec"] | mistake}, schema)


def closed(schema: Any) -> Any:
    """A schema that takes no fields but those it names, as Kubernetes does under strict validation."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    if parts.get("x-kubernetes-int-or-string"):
        parts.pop("type", None)
    return {"additionalProperties": False} | parts if "properties" in parts else parts


def test_a_mistake_in_a_cluster_or_a_script_is_told():
    cluster, script = ((JOBS / name).read_text() for name in ("aws.yaml", "slurm.sh"))
    for mistake in ("max_wrkers: 3\n", "idle_timeout_minutes: soon\n"):
        (problem,) = MANIFESTS["aws"].check(cluster + mistake)
        assert mistake.partition(":")[0] in str(problem) or "soon" in str(problem)
    unquoted = script.replace('"$head:6379"', "$head:6379")
    assert any("SC2086" in str(problem) for problem in MANIFESTS["slurm"].check(unquoted))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["deploy.gpu_nodes=1"], "16 workers need 2 nodes of 8 each; set it to 2"),
        (
            [
                "cluster.gpus_per_worker=0",
                "cluster.gpu_memory_gib=null",
                "cluster.cpus_per_worker=20",
            ],
            "deploy.cpus_per_node=16: must be at least cluster.cpus_per_worker=20",
        ),
        (["model.vision.checkpoint=data/qwen"], "no folder data/qwen in"),
        (["deploy.gpu_nods=1"], "no such field; did you mean 'deploy.gpu_nodes'?"),
        (["deploy.gpus_per_node=many"], "deploy.gpus_per_node: 'many' must be a valid integer"),
        (["deploy.image=dsvl:latest"], "must have a tag other than latest"),
        (["storage.data=/elsewhere"], "must lie in one volume"),
        (["cluster.gpu_labels={pool: '!cpu'}"], "must be a plain value"),
        (["model.vision.checkpoint=tests"], "no node has this folder"),
    ],
)
def test_a_wrong_request_is_refused_before_there_is_a_manifest(capsys, monkeypatch, options, told):
    monkeypatch.chdir(JOBS.parent)
    status, out, said = submit(capsys, "--to", "kuberay", "--check", *options)
    assert (status, out) == (2, "")
    assert told in said


@pytest.mark.parametrize("to", ["aws", "machines"])
def test_no_machine_gives_its_whole_disk_to_a_container(capsys, to):
    options = ("storage.path=/runs", "storage.data=/data")
    status, out, said = submit(capsys, "--to", to, "--dry-run", *options)
    assert (status, out) == (2, "")
    assert "must lie in one volume" in said


def test_machines_of_aws_have_an_image_of_their_own(capsys):
    others = [setting for setting in SETTINGS if "ImageId" not in setting]
    assert cli.main(["submit", "train", str(EXPERIMENT), *others, "--to", "aws", "--dry-run"]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert "deploy.node_config={ImageId: ami-...}, of us-west-2" in said


def test_nodes_that_train_get_what_their_network_needs(capsys, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    asked = 'deploy.gpu_resources={vpc.amazonaws.com/efa: "4"}'
    status, out, said = submit(capsys, "--to", "kuberay", "--dry-run", asked)
    assert status == 0, said
    cluster = list(yaml.safe_load_all(out))[1]["spec"]["rayClusterSpec"]
    given = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
            "vpc.amazonaws.com/efa"
        )
        for group in cluster["workerGroupSpecs"]
    ]
    assert given == [None, "4"]
    assert not list(MANIFESTS["kuberay"].check(out))


def test_what_is_sent_is_what_a_dry_run_prints(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(JOBS.parent)
    (program := tmp_path / "kubectl").write_text(f'#!/bin/sh\necho "$@"\ncat > {tmp_path}/got\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    status, out, _ = submit(capsys, "--to", "kuberay")
    assert status == 0
    assert "apply --filename=-" in out
    assert nameless((tmp_path / "got").read_text()) == nameless((JOBS / "kuberay.yaml").read_text())
    status, out, _ = submit(capsys, "--to", "kuberay", "--stop")
    (named,) = {
        one["metadata"]["name"] for one in yaml.safe_load_all((tmp_path / "got").read_text())
    }
    assert f"rayjob,configmap {named}\n" in out
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(capsys, "--to", "kuberay")[0] == 2


def test_two_works_never_have_one_name_in_kubernetes_however_long_theirs_are():
    stems = [f"train-Visual.Chat_13b-{'long-' * 12}run-{k}-{k * 8}" for k in "ab"]
    names = {kuberay.object_name(stem) for stem in stems}
    assert len(names) == 2
    assert all(re.fullmatch(r"[a-z0-9][-a-z0-9]{,45}[a-z0-9]", name) for name in names)
    assert {name[-8:] for name in names} == {"aaaaaaaa", "bbbbbbbb"}


def test_what_is_for_ray_jobs_alone_is_refused_elsewhere(capsys, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    status, out, said = submit(capsys, "--to", "slurm", "--wait", "--dry-run")
    assert (status, out) == (2, "")
    assert said.startswith("--wait: only with --to ray; with --to slurm, squeue tells how it is")


def test_a_script_asks_for_the_time_of_its_work_or_as_much_as_is_given():
    experiment = load(CONFIGS / "experiment/visualchat_13b_set1_seeds.yaml", SETTINGS)
    planned, given = plan(experiment), experiment.with_overrides({"deploy.hours": 12})
    assert planned.sweep.hours > planned.run.hours > 12
    wanted = {
        "train": math.ceil(slurm.SPARE * planned.run.hours),
        "sweep": math.ceil(slurm.SPARE * planned.sweep.hours),
        "evaluate": 24 * slurm.DAYS,
    }
    for verb, hours in wanted.items():
        assert f"#SBATCH --time={hours}:00:00" in slurm.script(experiment, verb, "name")
        assert "#SBATCH --time=12:00:00" in slurm.script(given, verb, "name")


@pytest.mark.parametrize("status", [0, 3])
def test_a_script_ends_as_its_work_does_and_is_queued_again_before_its_limit(tmp_path, status):
    programs = {
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "srun": f"test -e {tmp_path}/asked.2 && exit {status}; touch {tmp_path}/asked.2; sleep 60",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    settings = [*SETTINGS, f"storage.path={tmp_path}/runs", f"storage.data={tmp_path}"]
    (script := tmp_path / "script.sh").write_text(
        slurm.script(load(EXPERIMENT, settings), "train", "sent")
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
    }
    first = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
    wait_until((tmp_path / "asked.2").exists)
    first.send_signal(signal.SIGUSR1)
    first.wait(timeout=30)
    os.killpg(first.pid, signal.SIGKILL)  # as Slurm does
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"
    second = subprocess.run(["bash", str(script)], env=environment, check=False, timeout=60)
    assert second.returncode == status
    assert not list(tmp_path.glob("runs/*/jobs/sent/token-*"))


def test_the_image_is_pinned_not_root_and_of_the_same_ray():
    lines = (JOBS / "Dockerfile").read_text().splitlines()
    constraints = (JOBS.parent / "constraints.txt").read_text()
    (ray,) = (line for line in lines if line.startswith("ARG RAY="))
    version = ray.removeprefix("ARG RAY=").partition("-")[0]
    assert f"ray=={version}" in constraints
    assert job()["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert "USER ray" in lines
