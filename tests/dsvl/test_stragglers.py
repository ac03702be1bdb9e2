"""Who holds the others up is named, with its machine; nobody is where all are alike."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dsvl import stragglers
from dsvl.stragglers import Pace, Stragglers, compared
from tests.dsvl.ranks import on_ranks

UPDATE_S, LATE_S = 0.1, 0.6


class Clock:
    """Time that passes as it is told to, and a millisecond whenever somebody looks."""

    now = 0.0

    def perf_counter(self):
        self.now += 0.001
        return self.now


def four_updates(rank, late):
    """Metrics and warnings of a rank; the late one pauses once between two of them, as a fault does."""
    stragglers.time = clock = Clock()  # in this process alone
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("dsvl.stragglers").addHandler(handler)
    counted = Stragglers(torch.device("cpu"))
    for number in range(4):
        if (rank, number) == (late, 2):
            clock.now += LATE_S
        with counted.update():
            clock.now += UPDATE_S
            dist.barrier()
    return counted.metrics(), told


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_late_is_named_on_rank_0(late):
    (found, told), (others, silent) = on_ranks(2, four_updates, late)
    assert found == others
    assert found["throughput/waited_s"] == pytest.approx(LATE_S / 4)
    assert silent == []
    (warning,) = told
    assert warning.startswith(f"rank {late} on ")
    assert " is late: it takes 0.1" in warning


def test_where_no_rank_is_late_nothing_is_said():
    for found, told in on_ranks(2, four_updates, None):
        assert found["throughput/waited_s"] == pytest.approx(0)
        assert told == []


def test_a_slow_device_is_named_with_its_machine():
    usual = Pace("node-a", alone_s=0.01, update_s=1.0, device_s=0.002)
    hot = replace(usual, host="node-b", device_s=0.005)
    found, warnings = compared([usual, usual, hot, usual])
    assert found == {"throughput/waited_s": 0.0, "throughput/device_spread": 2.5}
    (warning,) = warnings
    assert warning.startswith("rank 2 on node-b has a slow device: it takes 2.5 times as long")


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_workers_that_are_alike_are_not_warned_of(workers):
    paces = [
        Pace("node", alone_s=1.0 + 0.01 * n, update_s=2.0, device_s=0.002) for n in range(workers)
    ]
    assert compared(paces)[1] == []


def test_what_others_do_not_wait_for_is_no_matter():
    """A tenth of an update, and twice as long as others between updates, is no fault."""
    early = Pace("node-a", alone_s=0.1, update_s=1.1, device_s=0.002)
    late = Pace("node-b", alone_s=0.2, update_s=1.0, device_s=0.002)
    found, warnings = compared([early, late])
    assert found["throughput/waited_s"] == pytest.approx(0.1)
    assert warnings == []
    assert len(compared([early, replace(late, alone_s=0.31)])[1]) == 1
