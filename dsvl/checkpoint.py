"""Canonical checkpoints: what was trained, by name, independent of world size, ZeRO stage and precision.

A checkpoint is a folder `step-NNNNNN`, written under a temporary name and renamed:

- `parameters.safetensors`: the float32 master value of each trainable parameter under its own name, and
  `model.json`: together a model that `dsvl.pretrained` loads;
- `optimizer.safetensors`: its moments, as `exp_avg/NAME` and `exp_avg_sq/NAME`;
- `rng.safetensors`: the generator state of each rank;
- `state.json`: step, data position, schedule, loss scale;
- `manifest.json`: sha256 of each file, identity of the experiment, digests of the frozen parts.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from dsvl import pretrained
from dsvl.data.store import sha256
from dsvl.engine import Engine
from dsvl.pretrained import require_same

SCHEMA_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file has the size and sha256 that its manifest states."""

    folder: Path
    manifest: dict

    @property
    def step(self) -> int:
        """How many updates it holds."""
        return self.manifest["step"]


def save(
    engine: Engine,
    folder: Path,
    *,
    step: int,
    position: tuple[int, int],
    identity: str,
    fields: dict,
    frozen: dict[str, str],
    keep: int,
) -> Path:
    """Write the state after update `step`; every rank must call it. Returns the checkpoint's folder.

    Args:
        engine: what is trained.
        folder: where the run's checkpoints lie.
        step: updates done.
        position: (epoch, index) of the next sample's batch.
        identity: of the experiment; `fields` are the settings behind it.
        fields: named in the message when a resume is refused.
        frozen: digest of each frozen part.
        keep: older checkpoints than the newest `keep` are removed.
    """
    tensors = _gather(engine)
    generators = _all_ranks(torch.get_rng_state(), engine.device)
    target = folder / f"step-{step:06d}"
    if engine.rank == 0:
        unfinished = folder / f".{target.name}.{os.getpid()}"
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)  # by a save that was killed
        unfinished.mkdir(parents=True)
        pretrained.write(
            unfinished,
            engine.model.config,
            {name: value for name, (value, _) in tensors.items()},
            frozen=frozen,
        )
        save_file(
            {
                f"{key}/{name}": moments[key]
                for name, (_, moments) in tensors.items()
                for key in MOMENTS
            },
            unfinished / "optimizer.safetensors",
        )
        save_file(
            {f"rank{r}": state for r, state in enumerate(generators)},
            unfinished / "rng.safetensors",
        )
        state = {
            "step": step,
            "position": {"epoch": position[0], "index": position[1]},
            "schedule": {"name": engine.optim_config.schedule, "step": step},
            "loss_scale": _loss_scale(engine),
        }
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "identity": identity,
            "fields": fields,
            "frozen": frozen,
            "files": {path.name: _file_entry(path) for path in sorted(unfinished.iterdir())},
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return Checkpoint(path, json.loads((path / "manifest.json").read_text()))
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, fault)
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    if manifest["schema_version"] != SCHEMA_VERSION:
        return f"schema_version {manifest['schema_version']}, not {SCHEMA_VERSION}"
    for name, entry in manifest["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _file_entry(path / name) != entry:
            return f"{name} is not what its sha256 says"
    return None


def load(engine: Engine, checkpoint: Checkpoint, *, frozen: dict[str, str]) -> None:
    """Put the engine into the state of a checkpoint, whatever world size or ZeRO stage wrote it.

    Raises:
        ValueError: if the frozen parts or the trainable parameters are others than those it was written with.
    """
    if checkpoint.manifest["frozen"] != frozen:
        raise ValueError(
            f"{checkpoint.folder}: trained on frozen parts {checkpoint.manifest['frozen']}, "
            f"but the checkpoints named now are {frozen}; point model to the former or use another name"
        )
    values = load_file(checkpoint.folder / pretrained.PARAMETERS)
    moments = load_file(checkpoint.folder / "optimizer.safetensors")
    require_same(
        {name: tuple(value.shape) for name, value in values.items()},
        engine.shapes,
        where=checkpoint.folder,
    )
    _create_optimizer_state(engine, step=checkpoint.step)
    _link_moments(engine)
    for name, parameter in engine.parameters.items():
        value = values[name].to(engine.device)
        if engine.stage == 3:
            safe_set_local_fp32_param(parameter, _share(engine, parameter, value))
            for key in MOMENTS:
                moment = moments[f"{key}/{name}"].to(engine.device)
                safe_set_local_optimizer_state(parameter, _share(engine, parameter, moment), key)
        elif engine.stage > 0:
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                safe_set_full_optimizer_state(
                    parameter, moments[f"{key}/{name}"].to(engine.device), key
                )
        else:
            engine.optimizer.state[parameter].update(
                {k: moments[f"{k}/{name}"].to(engine.device) for k in MOMENTS}
            )
        # The working copy too: without it the first forward uses stale weights and the run silently diverges.
        with GatheredParameters([parameter], modifier_rank=0, enabled=engine.stage == 3):
            parameter.data.copy_(value)
    state = json.loads((checkpoint.folder / "state.json").read_text())
    if state["loss_scale"] is not None:
        vars(engine.wrapped.loss_scaler).update(state["loss_scale"])
    generators = load_file(checkpoint.folder / "rng.safetensors")
    if f"rank{engine.rank}" in generators:
        torch.set_rng_state(generators[f"rank{engine.rank}"])


def _gather(engine: Engine) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Name -> (float32 value, moments) of every trainable parameter, whole, on the CPU; a collective."""
    _link_moments(engine)
    gathered = {}
    for name, parameter in engine.parameters.items():
        if engine.stage > 0:
            value = safe_get_full_fp32_param(parameter)
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        else:
            state = engine.optimizer.state[parameter]
            value, moments = parameter.data, {key: state[key] for key in MOMENTS}
        whole = {key: _on_cpu(moment) for key, moment in moments.items()}
        gathered[name] = (_on_cpu(value), whole)
    return gathered


def _share(engine: Engine, parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor under ZeRO 3: shares are equal, filled up with zeros at the end.

    DeepSpeed's own setter of whole tensors fails where they do not divide among the ranks.
    """
    held = safe_get_local_fp32_param(parameter)
    assert held is not None, "every trainable parameter has a master value"
    size = held.numel()
    filled = pad(whole.flatten(), (0, size * engine.workers - whole.numel()))
    return filled[size * engine.rank : size * (engine.rank + 1)]


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "every trainable parameter has a master value and moments"
    return tensor.float().cpu().contiguous()


def _create_optimizer_state(engine: Engine, *, step: int) -> None:
    """Zero moments for each tensor that this rank's AdamW updates, as its first step would make them."""
    if engine.stage == 3:
        masters = engine.wrapped.fp32_partitioned_groups_flat
    elif engine.stage > 0:
        masters = engine.wrapped.single_partition_of_fp32_groups
    else:
        masters = list(engine.parameters.values())
    for master in masters:
        engine.optimizer.state[master] = {"step": torch.tensor(float(step))}
        engine.optimizer.state[master] |= {
            key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS
        }


def _link_moments(engine: Engine) -> None:
    """Tie each parameter to its slice of the moments (ZeRO 1 and 2).

    DeepSpeed does so once, after the first step of its first parameter group, when those of the other
    groups do not exist yet.
    """
    if engine.stage in (1, 2):
        groups = zip(
            engine.wrapped.bit16_groups,
            engine.wrapped.single_partition_of_fp32_groups,
            strict=True,
        )
        for group, master in groups:
            lazy_init_hp_params_optimizer_state(group, master, engine.optimizer.state)


def _loss_scale(engine: Engine) -> dict | None:
    """The dynamic loss scaler's counters in fp16, else None."""
    if not engine.deepspeed.fp16_enabled():
        return None
    scaler = engine.wrapped.loss_scaler
    return {name: vars(scaler)[name] for name in LOSS_SCALE}


def _all_ranks(tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """The tensors of the same shape that all ranks hold, on the CPU."""
    gathered = [torch.empty_like(tensor, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.to(device))
    return [each.cpu() for each in gathered]


def _file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
