"""What is refused before anything of a checkpoint is written."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from dsvl import checkpoint
from dsvl.config import CheckpointConfig
from tests.dsvl.ranks import on_ranks


def test_a_checkpoint_that_has_no_room_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    engine = SimpleNamespace(shapes={"weight": (2**20, 2**8)})
    monkeypatch.setattr(checkpoint, "from_rank_0", lambda find: find())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**31))
    with pytest.raises(
        OSError, match=r"1 more .* 3\.00 GiB but 2\.00 are free; .*checkpoints are intact"
    ):
        checkpoint.require_room(engine, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**33))
    checkpoint.require_room(engine, tmp_path, checkpoints=2)
    with pytest.raises(OSError, match=r"3 more checkpoints take 9\.00 GiB but 8\.00 are free"):
        checkpoint.require_room(engine, tmp_path, checkpoints=3)


def test_what_a_killed_save_has_left_takes_no_room_from_the_next(tmp_path, monkeypatch):
    left = tmp_path / ".step-000004-killed"
    (left / "folder").mkdir(parents=True)
    engine = SimpleNamespace(shapes={"weight": (2**20, 2**8)})
    monkeypatch.setattr(checkpoint, "from_rank_0", lambda find: find())
    disk = lambda _: SimpleNamespace(free=0 if left.exists() else 2**32)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", disk)
    checkpoint.require_room(engine, tmp_path)


def _saved(rank, folder, value, kind):
    """What a rank is told when one of its values is saved that all have."""
    parameters = {
        "sound": torch.nn.Parameter(torch.ones(3)),
        "other": torch.nn.Parameter(torch.ones(2)),
    }
    state = {
        p: {key: torch.zeros_like(p) for key in checkpoint.MOMENTS} for p in parameters.values()
    }
    if kind == checkpoint.MASTER:
        parameters["other"].data[1] = value
    else:
        state[parameters["other"]][kind][1] = value
    engine = SimpleNamespace(
        shapes={"sound": (3,), "other": (2,)},
        stage=0,
        rank=rank,
        workers=2,
        parameters=parameters,
        optimizer=SimpleNamespace(state=state),
        device=torch.device("cpu"),
    )
    try:
        checkpoint.save(
            engine,
            folder,
            step=7,
            position=(0, 7),
            identity="i",
            fields={},
            frozen={},
            config=CheckpointConfig(),
        )
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("kind", [checkpoint.MASTER, *checkpoint.MOMENTS])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_refused_by_every_rank_and_nothing_is_written(tmp_path, value, kind):
    for said in on_ranks(2, _saved, tmp_path, value, kind):
        assert said.startswith(
            f"step 7: {kind} of other is not finite, and no checkpoint is written"
        )
    assert list(tmp_path.iterdir()) == []


def found_on_one(rank, fails):
    def find():
        assert rank == 0, "only rank 0 looks"
        if fails:
            raise ValueError("no checkpoint is whole")
        return "step-000005"

    try:
        return checkpoint.from_rank_0(find)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("fails", "told"), [(0, "step-000005"), (1, "no checkpoint is whole")])
def test_what_rank_0_finds_or_fails_to_find_all_ranks_know(fails, told):
    assert on_ranks(2, found_on_one, fails) == [told, told]
