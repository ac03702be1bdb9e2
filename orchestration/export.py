"""A trained model handed on: which, under what name, and what its card says of it."""

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from dsvl import export as library
from orchestration.config import Experiment
from orchestration.page import number, percent
from orchestration.parameters import parameters
from orchestration.record import read
from orchestration.trained import CHAT, Trained, choose, manner

log = logging.getLogger(__name__)


def export(
    source: Experiment | Path, *, form: library.Form, target: Path | None, step: int | None
) -> dict[str, Any]:
    """Write a trained model as a folder; `exports/` of its run has it where no target is named.

    Args:
        source: an experiment, or the folder of a run or a trial.
        form: see `dsvl.export`.
        target: the folder to write.
        step: of which checkpoint; the newest that is whole when empty.

    Returns:
        The `folder`, its `form`, the `step`, how many `parameters` it holds, its `bytes`, and those of each
        of its `files`.

    Raises:
        ValueError: if the target exists, the checkpoint is not there or of another experiment, or there is no
            such form of the model.
        FileNotFoundError: if nothing has been trained yet.
    """
    chosen = choose(source, step=step)
    target = target or chosen.folder / f"exports/{chosen.checkpoint.folder.name}-{form}"
    log.info("exporting %s as %s to %s", chosen.checkpoint.folder, form, target)
    count = library.export(
        chosen.checkpoint.folder,
        target,
        form=form,
        precision=chosen.experiment.train.precision,
        texts={
            "README.md": card(chosen, form=form),
            CHAT: json.dumps(manner(chosen.experiment), indent=1),
        },
    )
    files = {
        str(path.relative_to(target)): path.stat().st_size
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    return {
        "folder": str(target),
        "form": form,
        "step": chosen.checkpoint.step,
        "parameters": count,
        "bytes": sum(files.values()),
        "files": files,
    }


def render(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = [*result["files"].items(), ("in all", result["bytes"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            f"{result['folder']}: {result['form']}, {result['parameters']:,} parameters as of update "
            f"{result['step']}",
            *(f"  {name:<{width}}  {size:>15,} bytes" for name, size in rows),
        ]
    )


def card(chosen: Trained, *, form: library.Form) -> str:
    """The README.md of an exported model, as model hubs show it."""
    it, frozen = chosen.experiment, chosen.checkpoint.manifest["frozen"]
    language, vision = it.model.language.checkpoint, it.model.vision.checkpoint
    on_hub = [name for name in (language, vision) if not Path(name).exists()]
    about = {"library_name": "dsvl", "pipeline_tag": "image-text-to-text"}
    header = yaml.safe_dump(about | ({"base_model": on_hub} if on_hub else {}), sort_keys=False)
    trained = ", ".join(name for name, part in parameters(it.model).items() if part.trainable)
    model = {
        "decoder": f"`{language}`, sha256 `{frozen['language']}`",
        "image tower": f"`{vision}`, sha256 `{frozen['vision']}`",
        "attention": it.model.attention,
        "projection": f"{it.model.projection}, {it.model.image_tokens} positions an image",
        "trained": f"{trained}; all else is as it was",
        "template": it.model.template,
    }
    training = {
        "length": f"{chosen.checkpoint.step} updates of {it.train.batch} samples",
        "planned": f"{it.train.epochs} epochs",
        "optimiser": f"AdamW, learning rate {it.optim.lr:g}, {it.optim.schedule}, betas {it.optim.betas}",
        "precision, seed": f"{it.train.precision}, {it.train.seed}",
        "identity": f"`{it.identity()}`",
    }
    return "\n\n".join(
        [
            f"---\n{header}---",
            f"# {it.name}",
            "A chat model that sees several images over several rounds: an image tower, a trained projection "
            "and a decoder.",
            f"## Model\n\n{_table(model)}",
            f"## Data\n\n{_table(_blends(it))}",
            f"## Training\n\n{_table(training)}",
            f"## Results\n\n{_table(_metrics(chosen))}",
            f"## Use\n\n{USE[form]}{_rounding(it, form)}",
            f"```python\n{LOAD.format(precision=it.train.precision)}```",
            "## Licence\n\nThe licences of both base models hold for this one, and the terms of the data "
            "that it was trained on.",
        ]
    )


def _blends(experiment: Experiment) -> dict[str, str]:
    """What samples are made of."""
    sets = experiment.data.sets
    return {
        name: f"{', '.join(f'{part} ({sets[part].reader})' for part in blend.sets)}; "
        + (f"{blend.samples} samples" if blend.samples else f"{blend.epochs:g} times an epoch")
        + (f", weight {blend.weight:g}" if blend.weight != 1 else "")
        for name, blend in experiment.data.all_blends().items()
    }


def _metrics(chosen: Trained) -> dict[str, str]:
    """The last evaluation that the checkpoint had seen."""
    run = read(chosen.folder, name=chosen.experiment.name)
    found = {}
    for metric, (name, shown) in METRICS.items():
        seen = [value for step, value in run.curve(metric) if step <= chosen.checkpoint.step]
        found[name] = shown(seen[-1]) if seen else "not measured yet"
    return found


def _rounding(experiment: Experiment, form: library.Form) -> str:
    """What a merged model has of a quantised decoder."""
    kind = experiment.model.quantization
    if kind == "none" or form == "adapter":
        return ""
    return (
        f" The decoder was trained in {kind}: its weights are what those of {kind} stand for, and not what "
        "they were rounded from."
    )


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


METRICS = {
    "eval/loss": ("held-out loss, nats a token", number),
    "eval/accuracy": ("held-out answers exactly right", percent),
    "eval/accuracy_blind": ("the same with images zeroed", percent),
    "eval/accuracy_majority": ("most frequent answer", percent),
}

LOAD = """from pathlib import Path
from dsvl import pretrained

model = pretrained.load(Path("FOLDER"), precision="{precision}").eval()
"""

USE: dict[library.Form, str] = {
    "adapter": "This folder holds what was trained and no more. The base models must be where `model.json` "
    "says; they are refused where their digests are others.",
    "merged": "All of the model is here. `language/` and `vision/` are checkpoints of transformers; "
    '`AutoModelForCausalLM.from_pretrained("FOLDER/language")` is the decoder, which reads text alone.',
}
