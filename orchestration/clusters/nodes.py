"""Whether the nodes of a cluster can work together: one storage, one time, room, and a network."""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.doctor import FREE_DISK, GIB, Check

PATIENCE = 120
"""Seconds for which an answer of all nodes is waited for."""
CLOCKS = 2.0
"""Seconds by which they may differ: files are told old from new by time."""


def examine_nodes(experiment: Experiment) -> Iterator[Check]:
    """What is in order on every node, and between them; nothing is left behind."""
    address = experiment.cluster.address
    remedy = "start the cluster, or set cluster.address to one that runs; RAY_AUTH_TOKEN must be its token"
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray would wait for a minute
            socket.create_connection((host, int(port)), timeout=5).close()
        with connect(experiment):
            yield from _between(experiment)
    except (OSError, RuntimeError, RayError) as error:
        first = next(iter(str(error).splitlines()), "no message")
        text = f"{address}: {type(error).__name__}: {first}"
        yield Check("cluster", False, text, remedy)


def _between(experiment: Experiment) -> Iterator[Check]:
    nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
    member: Any = ray.remote(num_cpus=0)(_Member)
    members = [
        member.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in nodes
    ]
    yield Check("nodes", True, f"{len(nodes)}: {', '.join(sorted(set(nodes.values())))}")
    place = Path(experiment.storage.path).absolute() / f".doctor-{uuid.uuid4().hex}"
    try:
        wrote = _all([each.write.remote(str(place)) for each in members])
        saw = _all([each.count.remote(str(place)) for each in members])
    finally:
        _all([each.remove.remote(str(place)) for each in members])
    apart = [
        f"{name} ({text or f'sees {seen} of {len(nodes)} files'})"
        for name, text, seen in zip(nodes.values(), wrote, saw, strict=True)
        if text or seen != len(nodes)
    ]
    yield Check(
        "shared storage",
        not apart,
        ", ".join(apart) or f"{place.parent} is the same for all",
        "mount one folder under this name on every node, or set storage.path to one that is",
    )
    asked = time.time()
    looks = [(_all([each.look.remote()])[0], time.time()) for each in members]
    late = []
    for name, (look, answered) in zip(nodes.values(), looks, strict=True):
        away = max(asked - look["time"], look["time"] - answered)  # negative in between
        late += [f"{name} by {away:.0f} s"] if away > CLOCKS else []
        asked = answered
    yield Check(
        "clocks",
        not late,
        ", ".join(late) or f"within {CLOCKS:g} s",
        "run an NTP client on every node",
    )
    full = [
        f"{name} {look['free'] / GIB:.1f} GiB"
        for name, (look, _) in zip(nodes.values(), looks, strict=True)
        if look["free"] < FREE_DISK
    ]
    yield Check(
        "disks of nodes",
        not full,
        ", ".join(full) or f"{FREE_DISK / GIB:g} GiB or more are free in /tmp of each",
        "make room: Ray spills objects there",
    )
    if experiment.cluster.gpus_per_worker:
        having = {n["NodeID"] for n in ray.nodes() if n["Resources"].get("GPU")}
        asked_of = [
            (name, each.compute.remote())
            for (node, name), each in zip(nodes.items(), members, strict=True)
            if node in having
        ]
        faults = _all([answer for _, answer in asked_of])
        broken = [
            f"{name} ({text})" for (name, _), text in zip(asked_of, faults, strict=True) if text
        ]
        yield Check(
            "GPUs of nodes",
            not broken,
            ", ".join(broken) or f"torch computes on those of {len(asked_of)} nodes",
            "install a build of torch with CUDA there, and a driver that is new enough for it",
        )
    head = _all([members[0].meet.remote()])[0]
    sums = _all([each.reduce.remote(head, rank, len(nodes)) for rank, each in enumerate(members)])
    yield Check(
        "all-reduce",
        sums == [float(len(nodes))] * len(nodes),
        f"{len(nodes)} nodes add up to {sums[0]:g}, by gloo",
        "open the ports between nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their network",
    )


class _Member:
    """What is asked of a node, on that node."""

    def write(self, place: str) -> str:
        """Leave a file; returns what is wrong, or nothing."""
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            Path(place, uuid.uuid4().hex).touch()
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror}"
        return ""

    def count(self, place: str) -> int:
        """How many files there are."""
        return len(os.listdir(place)) if Path(place).is_dir() else 0

    def remove(self, place: str) -> None:
        """Leave nothing of it behind."""
        shutil.rmtree(place, ignore_errors=True)

    def look(self) -> dict[str, Any]:
        """Its time, and bytes free."""
        return {"time": time.time(), "free": shutil.disk_usage("/tmp").free}

    def compute(self) -> str:
        """What is wrong with its GPUs, as torch sees them, or nothing."""
        import torch

        try:
            torch.ones(1, device="cuda").item()
        except (AssertionError, RuntimeError) as error:
            return str(error).partition("\n")[0]
        return ""

    def meet(self) -> str:
        """An address where all can meet: this node's."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def reduce(self, head: str, rank: int, world: int) -> float:
        """The sum of a one from every node."""
        import torch
        from torch import distributed

        distributed.init_process_group("gloo", init_method=head, rank=rank, world_size=world)
        distributed.all_reduce(one := torch.ones(1))
        distributed.destroy_process_group()
        return one.item()


def _all(answers: list[Any]) -> list[Any]:
    return ray.get(answers, timeout=PATIENCE)
