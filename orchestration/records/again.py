"""A run made again from its record alone: what MLflow has of it, and the raw data."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestration.compose import load
from orchestration.config import Experiment, StorageConfig
from orchestration.records.journal import read_json, write_json

RUN_ID = re.compile(r"[0-9a-f]{32}")
"""How MLflow names runs."""


def again(run_id: str, overrides: Sequence[str]) -> Experiment:
    """The experiment of a recorded run under a name of its own, NAME-RUN unless an override says another.

    It trains by itself what the run shared with a trunk. In its run folder is written down which data the run
    was trained on; the training is held to them.

    Args:
        run_id: of the MLflow store at `tracking.uri`, if an override says so, at MLFLOW_TRACKING_URI, or that
            of the storage.
        overrides: `section.field=value`, on top of what the run had.

    Raises:
        ValueError: if the store knows no such run, or it is that of a sweep; if an override is wrong, or
            changes what is trained.
    """
    said = dict(override.split("=", 1) for override in overrides if "=" in override)
    storage = said.get("storage.path", StorageConfig().path)
    inside = f"sqlite:///{Path(storage) / 'mlflow.db'}"
    uri = said.get("tracking.uri") or os.environ.get("MLFLOW_TRACKING_URI") or inside
    if uri == inside and not Path(storage, "mlflow.db").is_file():  # which MLflow would make
        raise ValueError(
            f"{run_id}: no store {inside}; set tracking.uri, or storage.path as it was then"
        )
    with tempfile.TemporaryDirectory() as folder:
        from orchestration.tracking import download  # MLflow: seconds

        record = download(uri, run_id, Path(folder), ("experiment.json", "data.json"))
        stored = read_json(record["experiment.json"])
        if "data.json" not in record:
            raise ValueError(
                f"{run_id}: is the run of a sweep, or ended before it had data; name one of its trials"
            )
        settings = stored["experiment"]
        settings["name"] = f"{settings['name'][:80]}-{run_id[:8]}"
        settings["search"] = None
        settings["checkpoint"] |= {"trunk": None, "branch_epochs": []}
        path = Path(folder) / f"{run_id}.yaml"
        write_json(path, settings)
        experiment, data = load(path, overrides), read_json(record["data.json"])
    if experiment.identity() != stored["identity"]:
        changed = "; ".join(experiment.differences(stored["fields"]))
        raise ValueError(f"{run_id}: would be another run: {changed}; leave these overrides out")
    kept = experiment.run_folder / "data.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, data)
    return experiment
