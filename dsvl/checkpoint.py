"""Canonical checkpoints: what was trained, by name, independent of world size, ZeRO stage and precision.

A checkpoint is a folder `step-NNNNNN`, written under a temporary name and renamed:

- `parameters.safetensors`: the float32 master value of each trainable parameter under its own name, and
  `model.json`: together a model that `dsvl.pretrained` loads;
- `exp_avg.safetensors` and `exp_avg_sq.safetensors`: its moments, under the same names;
- `rng.safetensors`: the generator state of each rank;
- `state.json`: step, AdamW's updates, loss scale, and what the guard remembers; data position and schedule
  for whoever reads it elsewhere, as a resume computes both from the step;
- `manifest.json`: sha256 of each file and of itself, step, identity of the experiment, digests of the frozen
  parts, metrics; see `dsvl.checkpoint_folder`.

The first three are written by three ranks at once, if as many see the folder; rank 0 alone reads. So the
machines of a training need no folder in common.
"""

import errno
import json
import math
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from dsvl import pretrained
from dsvl.checkpoint_folder import Checkpoint, free_bytes, publish, remove_old, written
from dsvl.config import CheckpointConfig
from dsvl.engine import Engine, from_rank_0
from dsvl.pretrained import require_same

MASTER, MOMENTS = "parameters", ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save(
    engine: Engine,
    folder: Path,
    *,
    step: int,
    position: tuple[int, int],
    identity: str,
    fields: dict,
    frozen: dict[str, str],
    config: CheckpointConfig,
    guard: dict[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    stay: Collection[int] = (),
) -> Path:
    """Write the state after update `step`; every rank must call it. Returns the checkpoint's folder.

    Args:
        engine: what is trained.
        folder: where the run's checkpoints lie, the same for all ranks.
        step: updates done; the state before the first one can be written too.
        position: (epoch, index) of the next sample's batch.
        identity: of the experiment; `fields` are the settings behind it.
        fields: named in the message when a resume is refused.
        frozen: digest of each frozen part.
        config: how many checkpoints stay.
        guard: `dsvl.guard.Guard.state`.
        metrics: what was measured after this update.
        stay: steps whose checkpoints are never removed.

    Raises:
        OSError: if the disk has no room for it, on every rank and before anything is written.
        RuntimeError: if any of it is not finite, likewise.
    """
    require_room(engine, folder)
    if step == 0:
        _create_optimizer_state(engine, updates=0)
    target = folder / f"step-{step:06d}"
    unfinished = Path(from_rank_0(lambda: tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder)))
    seen: list[Any] = [None] * engine.workers
    dist.all_gather_object(seen, unfinished.is_dir())
    able = [rank for rank, sees in enumerate(seen) if sees]
    writers = {MASTER: 0} | {key: able[n % len(able)] for n, key in enumerate(MOMENTS, start=1)}
    tensors = _gather(engine, [key for key, rank in writers.items() if rank == engine.rank])
    try:
        _require_finite(tensors, step)
    except RuntimeError:
        if engine.rank == 0:
            unfinished.rmdir()
        raise
    generators = _all_ranks(torch.get_rng_state(), engine.device)
    if engine.rank == 0:
        unfinished.chmod(0o755)  # mkdtemp makes it private
        pretrained.write(unfinished, engine.model.config, tensors.pop(MASTER), frozen=frozen)
        save_file(
            {f"rank{r}": state for r, state in enumerate(generators)},
            unfinished / "rng.safetensors",
        )
        state = {
            "step": step,
            "updates": _updates(engine),
            "position": {"epoch": position[0], "index": position[1]},
            "schedule": {"name": engine.optim_config.schedule, "step": step},
            "loss_scale": _loss_scale(engine),
            "guard": guard or {},
        }
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
    dist.barrier()
    for key, values in tensors.items():
        save_file(values, unfinished / f"{key}.safetensors")
    entries: list[Any] = [None] * engine.workers
    mine = {f"{key}.safetensors": written(unfinished / f"{key}.safetensors") for key in tensors}
    dist.all_gather_object(entries, mine)
    if engine.rank == 0:
        files = {name: entry for each in entries for name, entry in each.items()}
        files |= {
            path.name: written(path) for path in unfinished.iterdir() if path.name not in files
        }
        manifest = {
            "step": step,
            "identity": identity,
            "fields": fields,
            "frozen": frozen,
            "metrics": dict(metrics or {}),
            "files": dict(sorted(files.items())),
        }
        publish(unfinished, target, manifest)
        remove_old(folder, config, step=step, stay=stay)
    dist.barrier()
    return target


def require_room(engine: Engine, folder: Path, *, checkpoints: int = 1) -> None:
    """Raise OSError on every rank unless the disk that rank 0 sees has room for so many checkpoints more."""
    needed = checkpoints * 3 * 4 * sum(math.prod(shape) for shape in engine.shapes.values())
    if (found := from_rank_0(lambda: free_bytes(folder))) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: {checkpoints} more checkpoints take {needed / 2**30:.2f} GiB but {found / 2**30:.2f} "
            "are free; make room or lower checkpoint.keep, and start again: earlier checkpoints are intact",
        )


def _require_finite(tensors: Mapping[str, Mapping[str, torch.Tensor]], step: int) -> None:
    """Raise RuntimeError on every rank if anything is not finite that any of them is to write."""
    mine = (
        f"{key} of {name}"
        for key, values in tensors.items()
        for name, value in values.items()
        if not value.isfinite().all()
    )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, next(mine, None))
    if faults := [fault for fault in found if fault]:
        raise RuntimeError(
            f"step {step}: {faults[0]} is not finite, and no checkpoint is written of it; the one before is "
            "whole: lower optim.lr, or look at what is wrong with the data"
        )


def load(engine: Engine, checkpoint: Checkpoint, *, frozen: dict[str, str]) -> dict[str, Any]:
    """Put the engine into the state of a checkpoint, whatever world size or ZeRO stage wrote it.

    A collective, in which rank 0 alone reads. Returns what the guard remembered.

    Raises:
        ValueError: if the frozen parts or the trainable parameters are others than those it was written with.
    """
    if checkpoint.manifest["frozen"] != frozen:
        raise ValueError(
            f"{checkpoint.folder}: trained on frozen parts {checkpoint.manifest['frozen']}, "
            f"but the checkpoints named now are {frozen}; point model to the former or use another name"
        )
    state, generators, shapes = from_rank_0(lambda: _about(checkpoint.folder))
    require_same(shapes, engine.shapes, where=checkpoint.folder)
    _create_optimizer_state(engine, updates=state["updates"])
    _link_moments(engine)
    # One tensor at a time, as a node holds as many copies as it has ranks.
    with ExitStack() as opened:
        held = {
            key: opened.enter_context(safe_open(checkpoint.folder / f"{key}.safetensors", "pt"))
            for key in (MASTER, *MOMENTS)
            if engine.rank == 0
        }
        for name, parameter in engine.parameters.items():
            value, *moments = (
                _handed_on(engine, held.get(key), name) for key in (MASTER, *MOMENTS)
            )
            _put(engine, parameter, value, dict(zip(MOMENTS, moments, strict=True)))
    if state["loss_scale"] is not None:
        vars(engine.wrapped.loss_scaler).update(state["loss_scale"])
    if f"rank{engine.rank}" in generators:
        torch.set_rng_state(generators[f"rank{engine.rank}"])
    return state["guard"]


def _about(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, tuple]]:
    """What is small in a checkpoint: its state, the generators of all ranks, and the shapes of parameters."""
    with safe_open(folder / f"{MASTER}.safetensors", "pt") as held:
        shapes = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
    state = json.loads((folder / "state.json").read_text())
    return state, load_file(folder / "rng.safetensors"), shapes


def _handed_on(engine: Engine, held: Any, name: str) -> torch.Tensor:
    """A tensor that rank 0 has in an open file, on the device of every rank; a collective."""
    if engine.rank == 0:
        tensor = held.get_tensor(name).to(engine.device)
    else:
        tensor = torch.empty(engine.shapes[name], dtype=torch.float32, device=engine.device)
    dist.broadcast(tensor, 0)
    return tensor


def _put(
    engine: Engine,
    parameter: torch.nn.Parameter,
    value: torch.Tensor,
    moments: dict[str, torch.Tensor],
) -> None:
    """Give a parameter its master value and moments; a collective."""
    if engine.stage == 3:
        safe_set_local_fp32_param(parameter, _share(engine, parameter, value))
        for key, moment in moments.items():
            safe_set_local_optimizer_state(parameter, _share(engine, parameter, moment), key)
    elif engine.stage > 0:
        safe_set_full_fp32_param(parameter, value)
        for key, moment in moments.items():
            safe_set_full_optimizer_state(parameter, moment, key)
    else:
        engine.optimizer.state[parameter].update(moments)
    # The working copy too: without it the first forward uses stale weights and the run silently diverges.
    with GatheredParameters([parameter], modifier_rank=0, enabled=engine.stage == 3):
        parameter.data.copy_(value)


def _gather(engine: Engine, keys: Collection[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Key -> name -> float32 tensor, whole and on the CPU, of what this rank is to write; a collective."""
    _link_moments(engine)
    gathered: dict[str, dict[str, torch.Tensor]] = {key: {} for key in keys}
    for name, parameter in engine.parameters.items():
        for key in (MASTER, *MOMENTS):
            if engine.stage == 0:
                whole = parameter.data if key == MASTER else engine.optimizer.state[parameter][key]
            elif key == MASTER:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, key)
            if key in gathered:
                gathered[key][name] = _on_cpu(whole)
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


def _create_optimizer_state(engine: Engine, *, updates: int) -> None:
    """Zero moments, as AdamW's first step would make them."""
    for master in engine.masters():
        engine.optimizer.state[master] = {"step": torch.tensor(float(updates))}
        engine.optimizer.state[master] |= {
            key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS
        }


def _updates(engine: Engine) -> int:
    """How many AdamW has made: fewer than steps where batches were skipped, or overflowed in fp16."""
    return int(engine.optimizer.state[engine.masters()[0]]["step"])


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
