"""Functions on several processes that are ranks of one gloo group."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dsvl.engine import join


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns on each of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run, (world, port, folder, work, args), nprocs=world, start_method="fork"
        )
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def _run(rank, world, port, folder, work, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join(backend="gloo")
    torch.save(work(rank, *args), Path(folder, str(rank)))
    dist.destroy_process_group()
