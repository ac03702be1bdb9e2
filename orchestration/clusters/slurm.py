"""A batch script of Slurm for one work: Ray on all its nodes, started and ended with it."""

import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestration.clusters.package import described
from orchestration.config import Experiment
from orchestration.deploy import pools
from orchestration.plan import plan
from orchestration.problems import Problem
from orchestration.records.results import JOB

DAYS = 2
"""Of the limit of a job whose plan tells no time."""
SPARE = 1.5
"""How many times the planned hours, which tell of updates alone, are asked for."""
BEFORE = 300
"""Seconds before its limit in which a job is put in the queue again."""

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={limit}
#SBATCH --signal=B:USR1@{before}
{options}
# Singleton: typed twice, the second waits for the first and finds its work done.
# What its limit ends waits in the queue again, and goes on from its newest checkpoint.
set -euo pipefail
umask 077
{setup}
place={place}
mkdir -p "$place"
export {job}={name}
export PYTORCH_ALLOC_CONF=expandable_segments:True
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$place/token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
cat > "$place/experiment.yaml" <<'EXPERIMENT'
{experiment}EXPERIMENT

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpus-per-task={cpus} ray symmetric-run \\
  --address "$head:6379" --min-nodes {nodes} {start} -- python -m jobs.work {verb} "$place/experiment.yaml" &
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
wait "$!"
"""


def script(experiment: Experiment, verb: str, name: str) -> str:
    """What `sbatch` takes; the nodes are alike, and prepare data too.

    Raises:
        ValueError: if the plan does not fit, or the workers do not fit on the nodes.
    """
    node, deploy = pools(experiment)["gpu"], experiment.deploy
    cluster = experiment.cluster.model_copy(update={"cpu_labels": {}, "gpu_labels": {}})
    alike = experiment.model_copy(update={"cluster": cluster})
    planned, limit = plan(experiment), experiment.deploy.hours
    cost = {"train": planned.run, "sweep": planned.sweep}.get(verb)
    if limit is None:
        limit = SPARE * cost.hours if cost and cost.hours else 24 * DAYS
    options = [f"#SBATCH --gpus-per-node={node['gpus']}"] if node["gpus"] else []
    options += [f"#SBATCH --partition={deploy.partition}"] if deploy.partition else []
    start = f"--num-cpus={node['cpus']}" + (f" --num-gpus={node['gpus']}" if node["gpus"] else "")
    return SCRIPT.format(
        name=name,
        nodes=node["nodes"],
        cpus=node["cpus"],
        limit=f"{math.ceil(limit)}:00:00",
        before=BEFORE,
        options="\n".join(options),
        setup="\n".join(deploy.setup),
        place=shlex.quote(str(experiment.run_folder / "jobs" / name)),
        job=JOB,
        experiment=described(alike),
        start=start,
        verb=verb,
    )


def check(text: str) -> Iterator[Problem]:
    """What shellcheck finds in a script, every note an error.

    Raises:
        ValueError: if it is not installed.
    """
    yield from shell_problems(text)


def shell_problems(text: str) -> Iterator[Problem]:
    """The same for any script of bash."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}") or shutil.which(
        "shellcheck"
    )
    if program is None:
        raise ValueError("shellcheck is not installed; pip install 'dsvl[submit]'")
    done = subprocess.run(
        [program, "--shell=bash", "--format=gcc", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        yield Problem((), line.removeprefix("-:"))
