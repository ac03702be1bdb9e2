"""Who may import whom (design, section 3)."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"ray", "torch", "mlflow", "transformers", "deepspeed"}
ABOVE_DSVL = {"ray", "mlflow", "pydantic", "yaml", "orchestration", "jobs"}
BELOW_DATA = {"__init__", "config", "template"}
MODEL = {
    f"dsvl.{path.stem}" for path in (ROOT / "dsvl").glob("*.py") if path.stem not in BELOW_DATA
}

PLANNING = ("problems", "settings", "domains", "space", "legal", "deploy", "config", "compose", "plan",
            "planning/*")  # fmt: skip
"""Modules of the orchestration that load nothing heavy."""

LAWS = (
    "scaling",
    *(f"searching/{name}" for name in ("fitting", "laws", "regret", "across", "verdicts")),
)
"""Arithmetic on what searches have seen."""

NEVER: list[tuple[str, set[str]]] = [
    ("dsvl/*", ABOVE_DSVL),
    ("dsvl/data/*", {"deepspeed"} | MODEL),
    ("dsvl/data/readers/*", {"torch", "PIL", "transformers"}),
    ("orchestration/*", {"jobs"}),
]
"""Pattern of files -> what none of them imports, at the top or within a function."""

ONLY: list[tuple[str, set[str]]] = [
    ("dsvl/config.py", set()),
    ("dsvl/data/types.py", set()),
    (
        "dsvl/data/readers/*",
        {"dsvl.config", "dsvl.data.types", "dsvl.data.readers", "dsvl.data.rows"},
    ),
    *(
        (
            f"orchestration/{name}.py",
            {"pydantic", "pydantic_core", "yaml", "dsvl.config", "orchestration"},
        )
        for name in PLANNING
    ),
    *(
        (
            f"orchestration/{name}.py",
            {"numpy", *(f"orchestration.{law.replace('/', '.')}" for law in LAWS)},
        )
        for name in LAWS
    ),
    ("orchestration/cli.py", {"pydantic_core", "orchestration"}),
    ("orchestration/verbs.py", {"orchestration"}),
    ("jobs/*", {"orchestration", "dsvl.qwen_vision"}),
]
"""Pattern of files -> all that they import beside the standard library."""

WHO: dict[str, set[str]] = {
    "deepspeed": {"dsvl/engine.py", "dsvl/checkpoint.py"},
    "peft": {"dsvl/lora.py"},
    "mlflow": {f"orchestration/{name}.py" for name in ("tracking", "records/registry", "report")},
}
"""Module -> the only files that import it."""

FILES = sorted(
    str(path.relative_to(ROOT))
    for part in ("dsvl", "orchestration", "jobs")
    for path in (ROOT / part).rglob("*.py")
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that a file imports, less what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def among(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def trespasses(file: str, source: str) -> list[str]:
    """What a file imports against the rules."""
    outside = {
        name
        for name in imports(ast.parse(source))
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    found = {
        name
        for pattern, modules in NEVER
        if fnmatch(file, pattern)
        for name in outside
        if among(name, modules)
    }
    found |= {
        name
        for pattern, modules in ONLY
        if fnmatch(file, pattern)
        for name in outside
        if not among(name, modules)
    }
    found |= {
        name
        for module, files in WHO.items()
        if file not in files
        for name in outside
        if among(name, {module})
    }
    return sorted(f"{file} imports {name}" for name in found)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_layer_may(file):
    assert trespasses(file, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dsvl/engine.py", "import ray.train"),
        ("dsvl/model.py", "def f():\n    import deepspeed"),
        ("dsvl/model.py", "from peft import LoraConfig"),
        ("dsvl/data/collate.py", "from dsvl import model"),
        ("dsvl/data/images.py", "from dsvl.projection import PROJECTIONS"),
        ("dsvl/data/readers/coco.py", "from PIL import Image"),
        ("dsvl/config.py", "import torch"),
        ("orchestration/plan.py", "from dsvl.train import Plan"),
        ("orchestration/searching/across.py", "from orchestration.search import search"),
        ("orchestration/trainer.py", "from mlflow import log_metric"),
        ("orchestration/cli.py", "def f():\n    import torch"),
        ("jobs/train.py", "import dsvl.config"),
    ],
)
def test_a_trespass_is_noticed(file, source):
    assert len(trespasses(file, source)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import orchestration.plan",
        "from orchestration.cli import main; "
        "assert main(['plan', 'configs/experiment/quickstart.yaml']) == 0",
    ],
)
def test_planning_loads_nothing_heavy(code):
    check = f"{code}\nimport sys\nassert not {HEAVY!r} & sys.modules.keys(), sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True, timeout=60)
