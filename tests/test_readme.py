"""What README.md says is true: its commands run, its YAML loads, its table and tree name what there is."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from orchestration.cli import VERBS
from orchestration.compose import load
from orchestration.plan import plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = ROOT / "configs/experiment/quickstart.yaml"

RUN_HERE = ("dsvl --help", "dsvl plan")
"""Commands that answer at once, by how they begin."""

ELSEWHERE = {
    "make quickstart": ("tests/orchestration/test_quickstart.py", "quickstart"),
    "make test": (".ci/run", "make test"),
    "make slow": ("Makefile", "slow"),
    "python -m tests.benchmarks.mmca": ("tests/benchmarks/test_mmca.py", "mmca"),
    ". .venv/bin/activate": ("Makefile", "venv"),
    "mlflow ui": ("tests/orchestration/test_tracking.py", "mlflow"),
    "dsvl chat": ("tests/orchestration/serving/test_terminal.py", "chat"),
    "dsvl serve": ("tests/orchestration/serving/test_serve.py", "serve"),
    "dsvl export": ("tests/orchestration/test_export.py", "export"),
    "dsvl doctor": ("tests/orchestration/test_doctor.py", "doctor"),
    "dsvl check": ("tests/orchestration/test_prepare.py", "check"),
    "dsvl prepare": ("tests/orchestration/test_prepare.py", "prepare"),
    "dsvl stats": ("tests/orchestration/preparing/test_statistics.py", "stats"),
    "dsvl preview": ("tests/orchestration/preparing/test_preview.py", "preview"),
    "dsvl convert": ("tests/orchestration/preparing/test_convert.py", "convert"),
    "dsvl train": ("tests/orchestration/test_trainer.py", "train"),
    "dsvl sweep": ("tests/orchestration/test_search.py", "sweep"),
    "dsvl evaluate": ("tests/orchestration/evaluating/test_evaluation.py", "evaluate"),
    "dsvl status": ("tests/orchestration/test_status.py", "status"),
    "dsvl submit": ("tests/orchestration/test_submit.py", "submit"),
    "dsvl report": ("tests/orchestration/test_report.py", "report"),
}
"""How a longer command begins -> the file that tries it out, and a word that stands in it."""


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == kind]


def commands() -> list[str]:
    """Every command of the shell blocks, without its comment."""
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def carry_out(command: str) -> subprocess.CompletedProcess[str]:
    """Run a dsvl command of the README where a reader would, in the root of the repository."""
    dsvl, *arguments = shlex.split(command)
    assert dsvl == "dsvl"
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", commands())
def test_a_command_runs_or_has_a_test_that_tries_it_out(command):
    if command.startswith(RUN_HERE):
        done = carry_out(command)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
        return
    (begins,) = (begins for begins in ELSEWHERE if command.startswith(begins))
    file, word = ELSEWHERE[begins]
    assert re.search(rf"\b{word}\b", (ROOT / file).read_text(encoding="utf-8"))


def test_no_command_is_accounted_for_in_vain():
    unused = [begins for begins in (*RUN_HERE, *ELSEWHERE)
              if not any(command.startswith(begins) for command in commands())]  # fmt: skip
    assert not unused


def test_experiments_in_commands_exist():
    paths = [
        word for command in commands() for word in shlex.split(command) if "/experiment/" in word
    ]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_errors_are_told_as_shown():
    for block in blocks("console"):
        command, *shown = block.splitlines()
        done = carry_out(command.removeprefix("$ "))
        assert (done.returncode, done.stderr.splitlines()) == (2, shown)


def test_the_table_of_commands_has_every_verb_and_no_other():
    (table,) = re.findall(r"^\| verb \|.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(VERBS)


@pytest.mark.parametrize("part", ["data", "model", "search"])
def test_parts_to_write_yourself_load(part, tmp_path):
    (block,) = (block for block in blocks("yaml") if block.startswith(f"# configs/{part}/"))
    (tmp_path / "part.yaml").write_text(block)
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(f"extends: [{QUICKSTART}, part.yaml]\n")
    assert getattr(load(experiment), part) != getattr(load(QUICKSTART), part)


def test_the_experiment_to_write_yourself_loads(tmp_path):
    for block in blocks("yaml"):
        path = tmp_path / block.splitlines()[0].removeprefix("# configs/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
    for part in ("base.yaml", "model/digits.yaml", "cluster/laptop.yaml"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((ROOT / "configs" / part).read_text())
    assert load(tmp_path / "experiment/mine.yaml").name == "mine"


def test_the_tree_names_every_module():
    (tree,) = (block for block in blocks("") if block.startswith("dsvl/"))
    named, folders = set(), list[str]()
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        named.add("".join(folders))
    modules = {
        str(path.relative_to(ROOT))
        for pattern in ("dsvl/*.py", "orchestration/**/*.py")
        for path in ROOT.glob(pattern)
        if path.stem != "__init__"
    }
    assert {name for name in named if name.endswith(".py")} == modules
    assert all((ROOT / name).exists() for name in named)


def test_the_plan_of_70b_is_as_shown():
    (table,) = re.findall(r"^\| LLaMA-2-70B .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    shown = [re.split(r" *\| *", line)[1:-1] for line in table.strip().splitlines()]
    assert [[row[0], *row[2:]] for row in shown if row[0][0] != "-"] == seventy_billion()


def seventy_billion() -> list[list[str]]:
    """What the plans for 8, 16 and 64 GPUs say, by row."""
    path = ROOT / "configs/experiment/visualchat_70b.yaml"
    plans = [plan(load(path, [f"cluster.workers={count}"])) for count in (8, 16, 64)]
    sizes = [planned.sizes[0] for planned in plans]

    def gib(sizes: Iterable[float]) -> list[str]:
        return [f"{size / 2**30:.2f}" for size in sizes]

    needs = [(part, gib(size.memory[part] for size in sizes)) for part in sizes[0].memory]
    hours = [planned.run.hours or 0 for planned in plans]
    rows = [
        ("LLaMA-2-70B and Qwen-VL's tower, GiB a GPU", ["8 GPUs", "16 GPUs", "64 GPUs"]),
        *needs,
        ("**together**", [f"**{total}**" for total in gib(size.memory_bytes for size in sizes)]),
        ("passes an update", [str(size.accumulation) for size in sizes]),
        ("PFLOP an update, at most", [f"{sum(size.flops.values()) / 1e15:,.0f}" for size in sizes]),
        ("seconds an update, at most", [f"{size.seconds_per_step or 0:,.0f}" for size in sizes]),
        ("hours of 9,390 updates, at most", [f"{each:,.0f}" for each in hours]),
        ("dollars, at most", [f"{planned.run.money or 0:,.0f}" for planned in plans]),
    ]
    assert all(planned.run.steps == 9390 for planned in plans)
    return [[name, *cells] for name, cells in rows]


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
