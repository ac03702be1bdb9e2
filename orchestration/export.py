"""A trained model handed on: which, under what name, and what its card says of it."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import yaml

from dsvl import export as library
from orchestration.config import Experiment
from orchestration.pages.page import number, percent
from orchestration.planning.parameters import parameters
from orchestration.records.journal import NOTES, Journal, curve
from orchestration.records.record import read
from orchestration.records.shipping import shipped
from orchestration.trained import CHAT, Trained, manner

log = logging.getLogger(__name__)


def export(chosen: Trained, *, form: library.Form, target: Path | None) -> dict[str, Any]:
    """Write a trained model as a folder; `exports/` of its run has it where no target is named.

    Args:
        chosen: the model.
        form: see `dsvl.export`.
        target: the folder to write.

    Returns:
        The `folder`, its `form`, the `step`, how many `parameters` it holds, its `bytes`, and those of each
        of its `files`.

    Raises:
        ValueError: if the target exists, or there is no such form of the model.
    """
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
    try:
        note(chosen, target)
    except OSError as error:  # the run's storage may be read alone
        log.warning("%s: MLflow will not know of this model", error)
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


def note(chosen: Trained, target: Path) -> None:
    """Have the exported model registered, with what decides whether it is the best so far."""
    search = chosen.experiment.search
    metric, mode = (search.metric, search.mode) if search else ("eval/loss", "min")
    seen = [v for step, v in curve(chosen.folder, metric) if step <= chosen.checkpoint.step]
    with Journal(chosen.folder / NOTES) as notes:
        notes.export(
            os.path.relpath(target, chosen.folder),
            step=chosen.checkpoint.step,
            metric=metric,
            value=seen[-1] if seen else math.nan,
            mode=mode,
        )
    with shipped(chosen.experiment, chosen.root):
        pass


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
    it, held = chosen.experiment, chosen.checkpoint
    model, frozen = it.model, held.manifest["frozen"]
    language, vision = model.language.checkpoint, model.vision.checkpoint
    hub = [name for name in (language, vision) if not Path(name).exists()]
    header = {"library_name": "dsvl", "pipeline_tag": "image-text-to-text"}
    trained = ", ".join(name for name, part in parameters(model).items() if part.trainable)
    parts = {
        "decoder": f"`{language}`, sha256 `{frozen['language']}`",
        "image tower": f"`{vision}`, sha256 `{frozen['vision']}`",
        "an image": f"{model.image_tokens} positions",
        "trained": f"{trained}; nothing else",
    }
    settings = {
        name: value
        for name, value in held.manifest["fields"].items()
        if not name.startswith("data.")
    }
    return CARD.format(
        header=_yaml(header | ({"base_model": hub} if hub else {})),
        name=it.name,
        parts=_table(parts),
        blends=_table(_blends(it)),
        step=held.step,
        identity=held.manifest["identity"],
        settings=_yaml(settings),
        metrics=_table(_metrics(chosen)),
        use=USE[form] + (ROUNDED if form == "merged" and model.quantization != "none" else ""),
        precision=it.train.precision,
    )


def _blends(experiment: Experiment) -> dict[str, str]:
    """What samples are made of."""
    rows = {}
    for name, blend in experiment.data.all_blends().items():
        sets = {part: experiment.data.sets[part] for part in blend.sets}
        named = ", ".join(f"{part} ({each.reader})" for part, each in sets.items())
        share = f"{blend.samples} samples" if blend.samples else f"{blend.epochs:g} of it"
        drawn = f"an epoch has {share}, weight {blend.weight:g}"
        held_out = all(each.split == "eval" for each in sets.values())
        rows[name] = f"{named}; {'held out' if held_out else drawn}"
    return rows


def _metrics(chosen: Trained) -> dict[str, str]:
    """The last evaluation that the checkpoint had seen."""
    run = read(chosen.folder, name=chosen.experiment.name)
    found = {}
    for metric, (name, shown) in METRICS.items():
        seen = [value for step, value in run.curve(metric) if step <= chosen.checkpoint.step]
        found[name] = shown(seen[-1]) if seen else "not measured yet"
    return found


def _table(rows: dict[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {told} |" for name, told in rows.items())]
    )


def _yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


METRICS = {
    "eval/loss": ("held-out loss, nats a token", number),
    "eval/accuracy": ("held-out answers exactly right", percent),
    "eval/accuracy_blind": ("the same with images zeroed", percent),
    "eval/accuracy_majority": ("most frequent answer", percent),
}

USE: dict[library.Form, str] = {
    "adapter": "This folder holds what was trained and no more. The base models must be where `model.json` "
    "says; they are refused where their digests are others.",
    "merged": "This folder holds all of the model. `language/` and `vision/` are checkpoints of "
    'transformers; `AutoModelForCausalLM.from_pretrained("FOLDER/language")` is the decoder, without images.',
}

ROUNDED = (
    " The decoder was trained with `model.quantization`: the weights here are what its quantised ones stand "
    "for, and not those that were rounded."
)

CARD = """---
{header}---

# {name}

A chat model that sees several images over several rounds: an image tower, a projection and a decoder.

## Model

{parts}

## Data

{blends}

## Training

{step} updates, by these settings (identity `{identity}`):

```yaml
{settings}```

## Results

{metrics}

## Use

{use}

```sh
dsvl chat FOLDER
```

```python
from pathlib import Path
from dsvl import pretrained

model = pretrained.load(Path("FOLDER"), precision="{precision}").eval()
```

## Licence

The licences of both base models hold for this one, and the terms of the data that it was trained on.
"""
