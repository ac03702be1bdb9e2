"""A training whose number of workers follows the nodes: the most that they hold and the batch allows."""

from collections.abc import Sequence
from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer that takes only some numbers of workers: `counts`, fewest first.

    Ray's own takes any between two, and is asked for a policy in no public way: this one replaces what it
    hands to its controller.
    """

    def __init__(self, *arguments: Any, counts: Sequence[int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counts = counts

    def _initialize_and_run_controller(self, **controller: Any) -> Result:
        policy = _Legal(self.scaling_config, self._counts)
        return super()._initialize_and_run_controller(**controller | {"scaling_policy": policy})


class _Legal(ElasticScalingPolicy):
    """Ray's policy, held to the numbers that are legal."""

    def __init__(self, scaling: Any, counts: Sequence[int]) -> None:
        super().__init__(scaling)
        self._counts = counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)
