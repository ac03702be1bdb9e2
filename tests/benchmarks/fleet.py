"""Clusters in simulation: nodes that come, fail, are taken away and are slow, and work that waits for them.

Three kinds of work: tasks that any slot of a node can do by itself (a preparation), workers that wait for one
another at every update (a training), and rounds of trainings that share the nodes (a search). Time is in
seconds and passes from event to event, so that a week of 10,000 nodes takes seconds. All draws follow from
a seed.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind."""

    nodes: int
    slots: int = 1
    """Tasks, or workers, of a node at once."""
    starts: float = 0.0
    """From asking for a node until it works; also for one in the place of one that was lost."""
    lifetime: float = math.inf
    """Mean time until a node fails or is taken away: memoryless."""
    slow: float = 0.0
    """Share of nodes that are slow."""
    slowness: float = 1.0
    """How many times longer these take."""

    def paces(self, draw: np.random.Generator) -> np.ndarray:
        """(nodes,) how many times longer than usual each takes."""
        return np.where(draw.random(self.nodes) < self.slow, self.slowness, 1.0)


@dataclass
class Spent:
    """What work has taken."""

    seconds: float = 0.0
    """By the clock."""
    slot_seconds: float = 0.0
    """Of slots that were held."""
    busy: float = 0.0
    """Of these, in which something was done that counts."""
    lost: int = 0
    """Nodes that failed under it."""
    driver: float = 0.0
    """In which the driver, of which there is one, was at work."""

    @property
    def utilisation(self) -> float:
        """Share of the held time that counts."""
        return self.busy / self.slot_seconds if self.slot_seconds else 0.0


def pool(
    tasks: int,
    fleet: Fleet,
    *,
    seconds: float,
    spread: float = 0.0,
    dispatch: float = 0.0,
    seed: int = 0,
) -> Spent:
    """Tasks of `seconds` each, on average, that a driver hands out one by one, `dispatch` seconds each.

    Their times are log-normal, `spread` being the standard deviation of the logarithm. What a node that is
    lost was doing is done again.
    """
    draw, spent, order = np.random.default_rng(seed), Spent(), count()
    paces = fleet.paces(draw)
    fails = fleet.starts + draw.exponential(1, fleet.nodes) * fleet.lifetime
    times = seconds * np.exp(spread * draw.standard_normal(tasks) - spread**2 / 2)
    waiting = list(range(tasks))[::-1]
    # (time, tie-break, node, the task that it has at hand until then, whether it is lost with it)
    events = [
        (fleet.starts, next(order), node, -1, False)
        for node in range(fleet.nodes)
        for _ in range(min(fleet.slots, math.ceil(tasks / fleet.nodes)))
    ]
    heapq.heapify(events)
    driver, left, idle = fleet.starts, tasks, []
    while left:
        now, _, node, task, lost = heapq.heappop(events)
        if lost:
            waiting.append(task)
            if fails[node] <= now:  # the first of its slots
                spent.lost += 1
                fails[node] = now + fleet.starts + draw.exponential(1) * fleet.lifetime
            heapq.heappush(events, (now + fleet.starts, next(order), node, -1, False))
            if idle:
                heapq.heappush(events, (now, next(order), idle.pop(), -1, False))
            continue
        if task >= 0:
            left -= 1
            spent.busy += times[task]
            spent.seconds = now
        if not waiting:
            idle.append(node)
            continue
        driver = max(driver, now) + dispatch
        spent.driver += dispatch
        task = waiting.pop()
        end = driver + times[task] * paces[node]
        while fails[node] < driver:  # it was lost, and replaced, while it had nothing to do
            fails[node] += fleet.starts + draw.exponential(1) * fleet.lifetime
        lost = bool(end > fails[node])
        heapq.heappush(events, (fails[node] if lost else end, next(order), node, task, lost))
    spent.slot_seconds = spent.seconds * fleet.nodes * fleet.slots
    return spent


@dataclass(frozen=True)
class Training:
    """A training of workers that wait for one another."""

    updates: int
    seconds: float
    """Of an update on nodes none of which is slow."""
    every: int
    """Updates from one checkpoint to the next."""
    save: float = 0.0
    """Seconds of a checkpoint."""
    start: float = 0.0
    """From nodes that are there to the first update."""
    notice: float = 0.0
    """Until a node that is lost is believed to be gone."""


def train(
    training: Training,
    fleet: Fleet,
    *,
    draw: np.random.Generator,
    slow: bool | None = None,
) -> Spent:
    """One training on the whole fleet, which goes on from its newest checkpoint when a node is lost.

    `slow` says whether a slow node is among them; drawn unless given.
    """
    if slow is None:
        slow = bool((fleet.paces(draw) > 1).any())
    pace = training.seconds * (fleet.slowness if slow else 1.0)
    period = training.every * pace + training.save
    spent, done, now = Spent(), 0, 0.0
    while True:
        left = training.updates - done
        whole = training.start + left * pace + left // training.every * training.save
        until = draw.exponential(1) * fleet.lifetime / fleet.nodes
        if until >= whole:
            now += whole
            break
        done += max(0, int((until - training.start) / period)) * training.every
        spent.lost += 1
        now += until + training.notice + fleet.starts
    spent.seconds = now
    spent.slot_seconds = now * fleet.nodes * fleet.slots
    spent.busy = training.updates * training.seconds * fleet.nodes * fleet.slots
    return spent


@dataclass(frozen=True)
class Trial:
    """A training of a search, and the nodes that it takes."""

    training: Training
    nodes: int


@dataclass
class Searched(Spent):
    """What a search has taken."""

    rounds: int = 0
    trials: int = 0
    waits: list[float] = field(default_factory=list)
    """Share of each round in which nodes waited for its slowest trial."""


def search(rounds: Sequence[Sequence[Trial]], fleet: Fleet, *, seed: int = 0) -> Searched:
    """Rounds of trials, of which the next begins when the one before has ended whole.

    Raises:
        ValueError: if a trial takes more nodes than there are.
    """
    draw, spent = np.random.default_rng(seed), Searched(seconds=fleet.starts)
    paces = fleet.paces(draw)
    for trials in rounds:
        if (most := max(trial.nodes for trial in trials)) > fleet.nodes:
            raise ValueError(f"a trial takes {most} nodes of {fleet.nodes}")
        # Nodes are divided into places of as many as the largest trial of the round takes.
        places = [
            (0.0, place, bool((paces[place * most : (place + 1) * most] > 1).any()))
            for place in range(fleet.nodes // most)
        ]
        heapq.heapify(places)
        ends = []
        for trial in trials:
            free, place, slow = heapq.heappop(places)
            own = Fleet(trial.nodes, fleet.slots, fleet.starts, fleet.lifetime, 0.0, fleet.slowness)
            took = train(trial.training, own, draw=draw, slow=slow)
            ends.append(free + took.seconds)
            heapq.heappush(places, (ends[-1], place, slow))
            spent.busy += took.busy
            spent.lost += took.lost
        length = max(ends)
        held = sum(end for end, *_ in places) / len(places)
        spent.waits.append(1 - held / length)
        spent.seconds += length
        spent.rounds += 1
        spent.trials += len(trials)
    spent.slot_seconds = spent.seconds * fleet.nodes * fleet.slots
    return spent
