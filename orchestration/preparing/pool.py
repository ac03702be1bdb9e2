"""A pool of actors that grows and shrinks with the work, by Ray Data."""

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

Progress = Callable[[str], None]
"""Takes a line that says how far something is."""


def each(
    jobs: Sequence[Any],
    worker: type,
    settings: dict[str, Any],
    *,
    most: int,
    gpus: int = 0,
    labels: Mapping[str, str],
) -> Iterator[Any]:
    """What a pool of 1 to `most` actors, which grows with the work, makes of the jobs, in any order.

    An actor has `gpus` GPUs and is on a node with these labels.
    """
    import ray.data  # takes seconds, and a set that is prepared already needs none

    if not jobs:
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    class Actor:
        def __init__(self) -> None:
            self._worker = worker(**settings)

        def __call__(self, block: pa.Table) -> pa.Table:
            done = [self._worker(pickle.loads(job.as_py())) for job in block["job"]]
            return pa.table({"done": pa.array(map(pickle.dumps, done), pa.large_binary())})

    # Of tables Ray would ask for metadata by tasks on any node, whatever its labels.
    items = [{"job": pickle.dumps(job)} for job in jobs]
    with ray.data.DataContext.current(context):  # a dataset takes its context when it is made
        results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(jobs))),
            num_gpus=gpus,
            label_selector=dict(labels),
        )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for done in block["done"]:
            yield pickle.loads(done.as_py())
