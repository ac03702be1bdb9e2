"""All ranks of a run go on from the same checkpoint."""

import json

import torch.distributed as dist
import torch.multiprocessing as mp

from dsvl.checkpoint_folder import write_manifest
from orchestration.config import validated
from orchestration.records.journal import write_json
from orchestration.training import checkpoints


def resume_alone(rank, settings, root):
    """Resume on one of two ranks, whose machine shows it a folder of its own."""
    dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=2)
    loaded = []
    checkpoints.checkpoint.load = lambda engine, found, frozen: loaded.append(str(found.folder))
    step, _ = checkpoints.load_newest(
        None, validated(settings), root / f"seen-by-{rank}", frozen={}
    )
    write_json(root / f"{rank}.json", [step, *loaded])
    dist.destroy_process_group()


def test_all_ranks_resume_what_rank_0_has_chosen(settings, tmp_path):
    identity = validated(settings).identity()
    for rank, steps in enumerate([(5, 10), (5,)]):  # the newest has not appeared to rank 1 yet
        for step in steps:
            folder = tmp_path / f"seen-by-{rank}/checkpoints/step-{step:06d}"
            folder.mkdir(parents=True)
            write_manifest(folder, {"step": step, "identity": identity, "files": {}})
    mp.start_processes(resume_alone, (settings, tmp_path), nprocs=2, start_method="fork")
    chosen = [10, str(tmp_path / "seen-by-0/checkpoints/step-000010")]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [chosen] * 2
