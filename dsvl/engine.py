"""DeepSpeed: its configuration from ours, and one optimiser update over a global batch."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from transformers import AutoConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from dsvl import optim
from dsvl.config import EngineConfig, ModelConfig, OptimConfig, TrainConfig
from dsvl.data.types import Batch
from dsvl.model import VisualChat

T = TypeVar("T")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def deepspeed_config(
    engine: EngineConfig,
    train: TrainConfig,
    optim: OptimConfig,
    *,
    workers: int,
    trainable: int,
    largest: int,
) -> dict:
    """DeepSpeed's own configuration.

    Its communication buffers are bounded by `trainable` parameters, and those for weights on a disk have room
    for a worker's share of the `largest` one.

    Raises:
        ValueError: if the global batch is not a multiple of workers x micro batch.
    """
    passed = workers * engine.micro_batch
    if train.batch % passed:
        raise ValueError(
            f"train.batch={train.batch}: must be a multiple of workers x engine.micro_batch = "
            f"{workers} x {engine.micro_batch}; the nearest that is: {max(train.batch // passed, 1) * passed}"
        )
    config = {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": train.batch // passed,
        "gradient_clipping": optim.clip,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": min(trainable, 500_000_000),
            "offload_optimizer": _offload(engine.offload_optimizer),
            "offload_param": _offload(
                engine.offload_parameters,
                nvme_path=engine.nvme_path,
                buffer_size=max(100_000_000, -(-largest // workers)),
            ),
        },
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16", "loss_scale_window": 100},
        # ZeRO takes any torch optimiser; the flag only silences the question whether that is meant.
        "zero_allow_untested_optimizer": True,
        # Nor does offloading take DeepSpeed's own AdamW, which is compiled when it is first used.
        "zero_force_ds_cpu_optimizer": False,
    }
    return _laid_over(config, engine.deepspeed)


def _offload(device: str, **on_disk: Any) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that says where something lies while it is not used."""
    if device == "nvme":
        return {"device": device, **on_disk}
    return {"device": device, "pin_memory": torch.cuda.is_available()}


def _laid_over(base: Any, over: Any) -> Any:
    """`over` on `base`: mappings merge, all else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _laid_over(base.get(key), value) for key, value in over.items()}}


def join(*, backend: str) -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...)."""
    # Left to itself DeepSpeed probes which of its extensions would compile (seconds a worker), and then
    # compiles one for shared memory (half a minute once, and it takes a compiler). None is needed here.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    # Under ZeRO 3 DeepSpeed puts this in the place of torch's.
    partition_parameters.zero3_linear_wrap = _linear
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


@contextmanager
def divided(model: ModelConfig, *, engine: EngineConfig, train: TrainConfig) -> Iterator[None]:
    """Under ZeRO 3 parts that are loaded meanwhile are divided among the ranks, tensor by tensor.

    No rank then ever holds a whole one: rank 0 maps the files, and every rank keeps its share of a tensor.
    Small decoders, whose head shares the embedding, and quantised ones are loaded whole.
    """
    if (
        engine.zero_stage < 3
        or model.quantization != "none"
        or AutoConfig.from_pretrained(model.language.checkpoint).tie_word_embeddings
    ):
        yield
        return
    settings = deepspeed_config(
        engine,
        train,
        OptimConfig(),
        workers=dist.get_world_size(),
        trainable=1,
        largest=model.language.largest_weight,
    )
    active = HfDeepSpeedConfig(settings)  # transformers holds a weak reference
    yield
    del active


def from_rank_0(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: a collective, for what is small and must not differ.

    So is an error that it finds: every rank raises it, and none waits for the others.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


class Engine:
    """A model, its AdamW and the ranks that share its work."""

    def __init__(
        self,
        model: VisualChat,
        *,
        engine: EngineConfig,
        train: TrainConfig,
        optim_config: OptimConfig,
    ) -> None:
        """Hand the model to DeepSpeed; `join` comes first."""
        self.optim_config = optim_config
        self.stage = engine.zero_stage
        self.workers, self.rank = dist.get_world_size(), dist.get_rank()
        self.model = model
        model.recompute = bool(engine.gradient_checkpointing)
        self.parameters = model.trainable()
        self.shapes = {name: optim.shape(p) for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            optim.groups(self.parameters, optim_config, embedding=model.embedding.weight),
            lr=optim_config.lr,
            betas=optim_config.betas,
            eps=optim_config.eps,
        )
        config = deepspeed_config(
            engine,
            train,
            optim_config,
            workers=self.workers,
            trainable=sum(map(math.prod, self.shapes.values())),
            largest=model.config.language.largest_weight,
        )
        self.deepspeed, wrapped, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.wrapped: Any = wrapped
        """What ZeRO makes of the optimizer: master values and moments live there (stage 0: itself)."""
        if self.stage > 0:
            # The stages of DeepSpeed round their norms differently, and so clip to other bits.
            self.wrapped.get_grad_norm_direct = _grad_norm
        self.device: torch.device = torch.device(self.deepspeed.device or "cpu")
        self.accumulation: int = config["gradient_accumulation_steps"]
        """Passes of each rank for one update."""

    def update(
        self, micro_batches: Sequence[Batch], *, targets: int, lr: float
    ) -> tuple[float, float]:
        """One optimiser update from this rank's share of a global batch.

        Args:
            micro_batches: as many as there are accumulation steps; each is brought to the device in its turn.
            targets: supervised tokens of the whole global batch; the loss is the mean over them.
            lr: the learning rate of this update.

        Returns:
            The loss of the global batch in nats a token, and the norm of its gradient before clipping.
        """
        for group in self.wrapped.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        total, norm = torch.zeros((), device=self.device), None
        # DeepSpeed averages over ranks and accumulation steps; the loss is a sum over tokens.
        share = self.workers * len(micro_batches) / targets
        for batch in micro_batches:
            loss = self.deepspeed(batch.to(self.device))
            total += loss.detach().float()
            self.deepspeed.backward(loss * share)
            if self.stage == 0:
                # Without ZeRO DeepSpeed clips and forgets the norm; after the last pass these
                # are the averaged gradients.
                gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
            self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        assert norm is not None, "ZeRO measures the norm in every update"
        dist.all_reduce(total)
        return total.item() / targets, torch.as_tensor(norm).float().item()

    def masters(self) -> list[torch.Tensor]:
        """The tensors that this rank's AdamW updates."""
        if self.stage == 3:
            return self.wrapped.fp32_partitioned_groups_flat
        if self.stage > 0:
            return self.wrapped.single_partition_of_fp32_groups
        return list(self.parameters.values())

    def share(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, slice]:
        """The master that holds what this rank updates of a parameter, and where in it, flattened.

        Nothing of it where other ranks hold all (ZeRO 1 and 2), and all of it on every rank without ZeRO.
        """
        if self.stage == 0:
            return parameter, slice(None)
        if self.stage == 3:
            number, start, size = self.wrapped.grad_position[self.wrapped.get_param_id(parameter)]
            # Shares are equal: the last ones end in whatever was in memory.
            left = math.prod(optim.shape(parameter)) - size * self.rank
            length = min(max(left, 0), size)
        elif (held := vars(parameter)["_hp_mapping"]) is None:
            number = start = length = 0
        else:
            number, place = held.param_group_index, held.get_hp_fragment_address()
            start, length = place.start, place.numel
        return self.masters()[number], slice(start, start + length)


def _grad_norm(
    gradients: Sequence[torch.Tensor], params: object, norm_type: float = 2.0
) -> torch.Tensor:
    """Norm of the gradients that the ranks share, float64, and -1 where it is none; a collective.

    However they are shared out, it is the same in float32.
    """
    assert norm_type == 2, "gradients are clipped by their Euclidean norm"
    own = [g for g in gradients if not vars(g).get("_zero_padding")]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in own]
    total = sum(squares, torch.zeros((), dtype=torch.float64, device=gradients[0].device))
    dist.all_reduce(total)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def _linear(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """DeepSpeed's linear map for ZeRO 3, which keeps no gathered weight, rounded as torch rounds its own.

    Of more than two dimensions DeepSpeed rounds the product, then the sum with the bias; torch, where values
    are contiguous, the sum alone.
    """
    if bias is None or not values.is_contiguous():
        return zero3_linear_wrap(values, weight, bias)
    rows = zero3_linear_wrap(values.view(-1, values.shape[-1]), weight, bias)
    return rows.view(*values.shape[:-1], rows.shape[-1])
