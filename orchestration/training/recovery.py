"""How a training goes on when workers fail and nodes come and go: the policies that Ray Train decides by."""

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, Result, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
    FailurePolicy,
)
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.exceptions import ControllerError

from orchestration.records.results import place_of


class RecoveringTrainer(TorchTrainer):
    """A TorchTrainer with policies of ours.

    Ray is asked for them in no public way: they replace what it hands to its controller.
    """

    def __init__(self, *arguments: Any, policies: Mapping[str, object], **options: Any) -> None:
        """`policies` has a `failure_policy`, a `scaling_policy`, or both."""
        super().__init__(*arguments, **options)
        self._policies = dict(policies)

    def _initialize_and_run_controller(self, **controller: Any) -> Result:
        return super()._initialize_and_run_controller(**controller | self._policies)


class Patience(FailurePolicy):
    """Ray's policy, anew after each progress, and none for what would go wrong again.

    Progress is a newer checkpoint, which the controller looks for on the driver's node.
    """

    def __init__(self, failures: FailureConfig, newest: Callable[[], int]) -> None:
        """`newest` tells how many updates the newest checkpoint has that is known by now."""
        super().__init__(failures)
        self._find_newest = newest
        self._newest = newest()
        self._ray = DefaultFailurePolicy(failures)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether a training that failed starts anew."""
        if not all(map(may_mend, _worker_errors(training_failed_error).values())):
            return FailureDecision.RAISE
        if (newest := self._find_newest()) > self._newest:
            self._newest, self._ray = newest, DefaultFailurePolicy(self.failure_config)
        return self._ray.make_decision(training_failed_error)


class Legal(ElasticScalingPolicy):
    """Ray's policy, held to the numbers of workers that are legal: `counts`, fewest first."""

    def __init__(self, scaling: Any, counts: Sequence[int]) -> None:
        super().__init__(scaling)
        self._counts = counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)


def may_mend(error: Exception) -> bool:
    """Whether another start may do without a worker's error.

    Not what the project refuses (ValueError), a model that diverged (FloatingPointError) or a full disk.
    """
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return not (full or isinstance(error, (ValueError, FloatingPointError)))


def first_cause(error: TrainingFailedError) -> Exception:
    """What a training failed of: where several workers did, most of them only lost the others.

    An error that cannot mend counts before a worker that is gone, and that before the rest, by rank.
    """
    if isinstance(error, ControllerError):
        return error.controller_failure
    ranked = [
        (may_mend(failure), not isinstance(failure, WorkerHealthCheckFailedError), rank, failure)
        for rank, failure in _worker_errors(error).items()
    ]
    return min(ranked, key=lambda entry: entry[:3])[-1] if ranked else error


def told(error: TrainingFailedError, folder: Path) -> str:
    """What a training in this folder failed of: which rank, on which node, of which exception."""
    cause = first_cause(error)
    ranks = [rank for rank, failure in _worker_errors(error).items() if failure is cause]
    where = "".join(f"rank {rank} on {place_of(folder, rank)}: " for rank in ranks[:1])
    return f"{where}{type(cause).__name__}: {cause}"


def _worker_errors(error: TrainingFailedError) -> dict[int, Exception]:
    return error.worker_failures if isinstance(error, WorkerGroupError) else {}
