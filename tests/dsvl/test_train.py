"""Real DeepSpeed engines on gloo train as plain PyTorch does, and alike however a run is cut up."""

import json
import math
import os
import resource
import socket
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dsvl import checkpoint
from dsvl.checkpoint_folder import find_fault, newest
from dsvl.config import CheckpointConfig, EngineConfig, OptimConfig, TrainConfig
from dsvl.engine import Engine, deepspeed_config, divided, join
from dsvl.guard import WINDOW, Guard, guarded
from dsvl.model import VisualChat
from dsvl.optim import groups, learning_rate
from dsvl.rehearse import rehearse
from dsvl.train import Plan, Step, ahead
from dsvl.vision import VisionTower
from tests.dsvl.test_model import PIXELS, batch_of, example

LAYOUTS = ("t1tTTtT", "tTTT", "t11ttTtTT", "ttT1tT", "tt1TTT", "t1t1tT", "tttTtT", "1TTT", "t1T")
slow = partial(pytest.param, marks=pytest.mark.slow)
"""What the others of its list cover in other pairs."""

TRAIN = TrainConfig(epochs=3, batch=4, precision="fp32", seed=7)
OPTIM = OptimConfig(lr=0.05, warmup_fraction=0.2)


class Examples(list):
    """Encoded samples in memory, as the store gives them."""

    def __init__(self, layouts=LAYOUTS):
        """Eighteen samples, four of them without an image."""
        super().__init__(example(layout, seed=k) for k, layout in enumerate(layouts * 2))
        self.targets = np.array([int((e.labels[1:] != -100).sum()) for e in self])
        self.lengths = np.array([len(e.ids) for e in self])
        self.images = np.array([len(e.images) for e in self])

    def epoch(self, _):
        """The samples of any epoch: these, not blended."""
        return self

    def take(self, samples):
        """Those samples, in that order."""
        return [self[i] for i in samples]


class Prepared:
    """What training needs of a prepared set."""

    train = eval = Examples()
    pixels = vision_input = staticmethod(PIXELS.__getitem__)
    vision_shape = (3, 8, 8)
    image_tokens, pad_id = 4, 0


def _worker(rank, world, port, config, folder, options):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if options.get("apart") and rank:  # on a machine that has no checkpoints
        kind = type(Path())
        vars(checkpoint)["Path"] = type("Elsewhere", (kind,), {"is_dir": lambda _: False})
        for name in ("safe_open", "load_file", "save_file"):
            delattr(checkpoint, name)
    join(backend="nccl" if options.get("device") == "cuda" else "gloo")
    engine_config = EngineConfig(
        zero_stage=options["stage"],
        micro_batch=options.get("micro", 1),
        gradient_checkpointing=options.get("recompute"),
        **options.get("engine", {}),
    )
    train = TrainConfig(**{**vars(TRAIN), "precision": options.get("precision", "fp32")})
    with divided(config, engine=engine_config, train=train):
        model = VisualChat(config, precision=train.precision, seed=0)
    prepared = Prepared()
    if options.get("features"):
        tower = VisionTower(config.vision, dtype=torch.float32).eval()
        with torch.no_grad():
            made = {k: tower(torch.from_numpy(p)[None])[0].numpy() for k, p in PIXELS.items()}
        prepared.vision_input = made.__getitem__
        prepared.vision_shape = (config.vision.tokens, config.vision.width)
    engine = Engine(model, engine=engine_config, train=train, optim_config=OPTIM)
    torch.manual_seed(rank)
    guard = Guard(train)

    def save(step):
        checkpoint.save(
            engine,
            folder,
            step=step,
            position=(0, 0),
            identity="i",
            fields={},
            frozen={},
            config=CheckpointConfig(keep=options.get("keep", 9)),
            guard=guard.state(),
        )

    def resume(*_):
        found = newest(folder)
        guard.restore(checkpoint.load(engine, found, frozen={}))
        return found.step

    if newest(folder) is None:
        save(0)
    # What a rehearsal leaves behind is overwritten by the checkpoint.
    rehearse(
        engine,
        prepared,
        Prepared.train,
        config=engine_config,
        epoch=0,
        held_out=Prepared.eval,
        evaluation_batch=4,
    )
    records = []
    for step in guarded(
        engine,
        prepared,
        Prepared.train,
        train=train,
        config=engine_config,
        start=resume(),
        guard=guard,
        back=resume,
    ):
        records.append((step.loss, step.grad_norm, step.lr))
        if step.number == options.get("full"):  # the disk: no file can grow any further
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        if step.number in options.get("save", ()):
            save(step.number)
        if step.number in options.get("corrupt", ()) and step.number not in guard.skipped:
            options["corrupt"].remove(step.number)
            next(iter(engine.parameters.values())).data.fill_(math.nan)
        if step.number == options.get("stop"):
            break
    if rank == 0:
        torch.save(records, folder / "records.pt")
    dist.destroy_process_group()


def run(config, folder: Path, *, world: int = 2, **options):
    """(loss, gradient norm, lr) of each update, from `world` workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    # CUDA does not survive a fork.
    method = options.get("method", "spawn" if options.get("device") == "cuda" else "fork")
    mp.start_processes(
        _worker, (world, port, config, folder, options), nprocs=world, start_method=method
    )
    return torch.load(folder / "records.pt")


def plain(config, *, skip=()):
    """The same training as a plain PyTorch loop on whole batches, without some updates."""
    model = VisualChat(config, precision="fp32", seed=0)
    parameters = model.trainable()
    optimizer = torch.optim.AdamW(
        groups(parameters, OPTIM), lr=1.0, betas=OPTIM.betas, eps=OPTIM.eps
    )
    plan, prepared, records = Plan(len(Prepared.train), TRAIN), Prepared(), []
    for step in range(plan.steps):
        if step + 1 in skip:
            continue
        batch = batch_of(*(prepared.train[int(i)] for i in plan.indices(step)))
        loss = model(batch) / batch.targets
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIM.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, OPTIM)
        optimizer.step()
        records.append((loss.item(), norm.item(), group["lr"]))
    return records, parameters


@pytest.fixture(scope="module")
def reference(model_config):
    torch.set_num_threads(1)
    return plain(model_config)


@pytest.mark.parametrize(
    ("stage", "world", "micro", "recompute"),
    [
        (0, 1, 4, False),
        (0, 2, 1, True),
        (1, 2, 2, False),
        (1, 4, 1, True),
        (2, 1, 1, False),
        (2, 2, 1, True),
        (3, 2, 2, True),
        (3, 4, 1, True),
        slow(0, 4, 1, False),
        slow(1, 1, 2, True),
        slow(2, 4, 1, False),
        slow(3, 1, 4, True),
        slow(3, 2, 1, False),
    ],
)
def test_every_way_of_sharding_trains_as_a_plain_loop_does(
    model_config, reference, tmp_path, stage, world, micro, recompute
):
    options = {"stage": stage, "world": world, "micro": micro, "recompute": recompute}
    records = run(model_config, tmp_path, **options, save=(12,))
    np.testing.assert_allclose(records, reference[0], rtol=2e-5, atol=2e-6)
    losses, expected = np.array(records)[:, 0], np.array(reference[0])[:, 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=0)
    values = checkpoint.load_file(tmp_path / "step-000012/parameters.safetensors")
    for name, expected in reference[1].items():
        torch.testing.assert_close(values[name], expected.detach(), rtol=1e-4, atol=1e-5)


def test_with_stored_features_ranks_without_an_image_take_part_in_what_the_others_do(
    model_config, reference, tmp_path
):
    """The tower is divided too; who has no image must not run it while the others do not."""
    records = run(model_config, tmp_path, stage=3, features=True)
    np.testing.assert_allclose(records, reference[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("stage", "precision"),  # bf16 needs master weights, which ZeRO 0 does not keep
    [
        (0, "fp32"),
        (1, "bf16"),
        (2, "fp32"),
        (3, "bf16"),
        slow(1, "fp32"),
        slow(2, "bf16"),
        slow(3, "fp32"),
    ],
)
def test_killed_and_resumed_is_bit_identical_to_unbroken(model_config, tmp_path, stage, precision):
    """And what is trained twice has the same bits: both parts of a killed run are trained anew."""
    options = {"stage": stage, "precision": precision, "save": (5, 12)}
    unbroken = run(model_config, tmp_path / "unbroken", **options)
    first = run(model_config, tmp_path / "broken", stop=8, **options)
    second = run(model_config, tmp_path / "broken", apart=True, **options)
    assert first + second[3:] == unbroken
    five, twelve = (
        files_of(tmp_path / "unbroken" / step) for step in ("step-000005", "step-000012")
    )
    assert five == files_of(tmp_path / "broken/step-000005")
    assert twelve == files_of(tmp_path / "broken/step-000012") != five


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        slow(1, {"offload_optimizer": "cpu"}),
        (2, {"offload_optimizer": "cpu"}),
        (3, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
        (3, {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}),
    ],
)
def test_offloaded_states_train_and_resume_as_others_do(
    model_config, reference, tmp_path, stage, offload
):
    options = {"stage": stage, "engine": offload, "save": (5, 12)}
    unbroken = run(model_config, tmp_path / "unbroken", **options)
    np.testing.assert_allclose(unbroken, reference[0], rtol=2e-5, atol=2e-6)
    first = run(model_config, tmp_path / "broken", stop=8, **options)
    assert first + run(model_config, tmp_path / "broken", **options)[3:] == unbroken
    assert files_of(tmp_path / "unbroken/step-000012") == files_of(tmp_path / "broken/step-000012")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_projection_and_embedding_learn_at_rates_of_their_own(
    model_config, tmp_path, stage, monkeypatch
):
    """AdamW's first step moves every weight by its rate, whatever the gradient."""
    config = replace(model_config, projection="mlp")
    rates = replace(OPTIM, lr=0.3, projection_lr=0.02, embedding_lr=0.1, eps=1e-12)
    monkeypatch.setitem(globals(), "OPTIM", rates)
    before = VisualChat(config, precision="fp32", seed=0).trainable()
    run(config, tmp_path, stage=stage, save=(1,), stop=1)
    after = checkpoint.load_file(tmp_path / "step-000001/parameters.safetensors")
    rise = 1 / math.ceil(OPTIM.warmup_fraction * Plan(len(Prepared.train), TRAIN).steps)
    for name, value in after.items():
        moved = (value - before[name].detach()).abs().max().item()
        rate = 0.02 if name.startswith("projection.") else 0.1
        assert moved == pytest.approx(rate * rise, rel=1e-3), name


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 2), (3, 2)), ((3, 2), (0, 1)), ((0, 1), (2, 4)), slow((2, 2), (2, 1))],
)
def test_a_checkpoint_resumes_at_another_stage_and_world_size(
    model_config, reference, tmp_path, before, after
):
    run(model_config, tmp_path, stage=before[0], world=before[1], save=(5,), stop=5)
    records = run(model_config, tmp_path, stage=after[0], world=after[1])
    np.testing.assert_allclose(records, reference[0][5:], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("world", "precision", "stages"),
    [
        (1, "fp32", (3, 2, 3, 1, 3)),
        (2, "fp32", (1, 2, 1, 2, 1)),
        (2, "bf16", (3, 2, 3, 1, 3)),
        slow(2, "fp32", (3, 2, 3, 1, 3)),
        slow(1, "bf16", (3, 2, 3, 1, 3)),
    ],
)
def test_resumed_at_other_stages_it_ends_with_the_same_bits(
    model_config, tmp_path, world, precision, stages, monkeypatch
):
    """One pass an update: with several, stage 1 adds up a rank's own before it asks the others."""
    one_pass = {"world": world, "micro": 4 // world, "precision": precision}
    if (world, precision, 3 in stages) == (2, "fp32", True):
        # Weights that were gathered lie elsewhere in memory, on which sums of MKL depend otherwise.
        monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
        one_pass["method"] = "spawn"
    run(model_config, tmp_path / "whole", stage=1, save=(12,), **one_pass)
    for stage, end in zip(stages, (3, 5, 8, 10, 12), strict=True):
        run(model_config, tmp_path / "cut", stage=stage, save=(end,), stop=end, **one_pass)
    whole, cut = (tmp_path / name / "step-000012" for name in ("whole", "cut"))
    for file in ("parameters", "exp_avg", "exp_avg_sq", "rng"):
        name = f"{file}.safetensors"
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_a_run_that_changes_its_number_of_workers_trains_on_the_same_samples(
    model_config, tmp_path, monkeypatch, stage
):
    """4, 2, 3 and again 4 workers; the rate of the paper, as a large one makes much of rounding."""
    monkeypatch.setitem(globals(), "TRAIN", replace(TRAIN, batch=12, epochs=8))
    monkeypatch.setitem(globals(), "OPTIM", replace(OPTIM, lr=1e-3))
    torch.set_num_threads(1)
    expected, _ = plain(model_config)
    records = []
    for world, stop in ((4, 2), (2, 4), (3, 6), (4, 8)):
        records += run(model_config, tmp_path, stage=stage, world=world, save=(stop,), stop=stop)
    np.testing.assert_allclose(records, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("stage", "epochs"), [(2, 5), (3, 5), slow(2, 20), slow(3, 20)])
def test_text_alone_leaves_no_rank_waiting(model_config, tmp_path, monkeypatch, stage, epochs):
    """11 updates an epoch on samples of which 9 % are text: alone on a rank, and on both."""
    monkeypatch.setitem(globals(), "TRAIN", replace(TRAIN, batch=2, epochs=epochs, seed=1))
    layouts = ("tTTtT",) + ("t1tTT",) * 10
    monkeypatch.setattr(Prepared, "train", Examples(layouts))
    plan = Plan(len(Prepared.train), TRAIN)
    texts = [
        sum(not Prepared.train[int(i)].images for i in plan.indices(s)) for s in range(plan.steps)
    ]
    assert len(texts) == 11 * epochs
    assert {0, 1, 2} == set(texts)
    records = run(model_config, tmp_path, stage=stage)
    assert len(records) == 11 * epochs
    assert np.isfinite(records).all()


@pytest.fixture
def gated_config(model_config, monkeypatch):
    """With gated cross-attention, and text between every image and an answer."""
    apart = tuple(layout.replace("1T", "1tT") for layout in LAYOUTS)
    monkeypatch.setattr(Prepared, "train", Examples(apart))
    # Behind gates just above zero gradients are tiny, and Adam would take rounding for a direction.
    monkeypatch.setitem(globals(), "OPTIM", replace(OPTIM, lr=0.01, eps=1e-2))
    return replace(model_config, attention="gated_cross", cross_every=1)


@pytest.mark.parametrize(
    ("stage", "world", "micro", "recompute"),
    [slow(0, 2, 1, False), (1, 2, 2, False), (2, 2, 1, True), (3, 2, 1, False)],
)
def test_gated_cross_attention_trains_as_a_plain_loop_does(
    gated_config, tmp_path, stage, world, micro, recompute
):
    torch.set_num_threads(1)
    records, parameters = plain(gated_config)
    options = {"stage": stage, "world": world, "micro": micro, "recompute": recompute}
    found = run(gated_config, tmp_path, **options, save=(12,))
    np.testing.assert_allclose(found, records, rtol=2e-5, atol=2e-6)
    values = checkpoint.load_file(tmp_path / "step-000012/parameters.safetensors")
    assert values["cross.0.attention_gate"].abs() > 1e-3
    for name, expected in parameters.items():
        torch.testing.assert_close(values[name], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_gated_cross_attention_resumes_bit_for_bit(gated_config, tmp_path, stage):
    unbroken = run(gated_config, tmp_path / "unbroken", stage=stage, save=(5, 12))
    first = run(gated_config, tmp_path / "broken", stage=stage, save=(5,), stop=8)
    second = run(gated_config, tmp_path / "broken", stage=stage, save=(12,))
    assert first + second[3:] == unbroken
    assert files_of(tmp_path / "unbroken/step-000012") == files_of(tmp_path / "broken/step-000012")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_torn_write_and_flipped_byte_is_found_and_named(model_config, tmp_path):
    run(model_config, tmp_path, stage=2, world=1, save=(4,), stop=4)
    whole = tmp_path / "step-000004"
    assert find_fault(whole) is None
    for path in sorted(whole.iterdir()):
        content = path.read_bytes()
        cuts = [len(content) * tenth // 10 for tenth in range(10)]
        torn = [content[:cut] for cut in cuts]
        flipped = [content[:cut] + bytes([content[cut] ^ 4]) + content[cut + 1 :] for cut in cuts]
        for damaged in torn + flipped:
            path.write_bytes(damaged)
            assert path.name in (find_fault(whole) or "")
        path.unlink()
        assert path.name in (find_fault(whole) or "")
        assert newest(tmp_path).step == 0
        path.write_bytes(content)
    assert newest(tmp_path).step == 4


@pytest.mark.parametrize("stage", [0, 2])
def test_an_update_that_is_not_finite_is_undone_and_its_batch_skipped(
    model_config, tmp_path, stage
):
    torch.set_num_threads(1)
    options = {"stage": stage, "save": (4, 12), "corrupt": [6]}
    found = run(model_config, tmp_path / "whole", **options)
    records, _ = plain(model_config, skip=(7,))
    again = [*records[:6], *records[4:6], *records[6:]]  # updates 5 and 6 are made twice
    assert [i for i, (loss, *_) in enumerate(found) if loss == 0.0] == [8]
    del found[8]
    np.testing.assert_allclose(found, again, rtol=2e-5, atol=2e-6)
    state = json.loads((tmp_path / "whole/step-000012/state.json").read_text())
    assert state["guard"]["skipped"] == [7]
    assert state["guard"]["norms"] == [norm for _, norm, _ in found[:4] + found[6:]]


def test_what_is_usual_and_what_was_skipped_survives_a_resume(model_config, tmp_path):
    options = {"stage": 2, "save": (4, 8, 12), "corrupt": [6]}
    unbroken = run(model_config, tmp_path / "unbroken", **options)
    run(model_config, tmp_path / "broken", **options | {"stop": 9})
    assert run(model_config, tmp_path / "broken", **options | {"corrupt": []}) == unbroken[-4:]
    assert files_of(tmp_path / "unbroken/step-000012") == files_of(tmp_path / "broken/step-000012")


class Rehearsed:
    """An engine on two workers whose updates take no memory."""

    workers, accumulation, device = 2, 1, torch.device("cpu")
    model = None

    def update(self, *_, **__):
        return 1.0, 1.0


def test_the_longest_held_out_samples_are_evaluated_first_and_must_fit(monkeypatch):
    seen = {}

    def out_of_memory(model, prepared, samples, *, batch, device):
        ranks = [samples[: batch * 2][rank::2] for rank in (0, 1)]
        seen.update({rank: [len(e.ids) for e in part] for rank, part in enumerate(ranks)})
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr("dsvl.rehearse.evaluate", out_of_memory)
    config = EngineConfig(micro_batch=1)
    rule = (
        r"^3 samples of up to 15 tokens, the longest that are evaluated together, need more memory "
        r"than the GPU has; lower evaluation\.batch: tried"
    )
    with pytest.raises(ValueError, match=rule):
        rehearse(
            Rehearsed(),
            Prepared(),
            Prepared.train,
            config=config,
            epoch=0,
            held_out=Prepared.eval,
            evaluation_batch=3,
        )
    longest = sorted(Prepared.eval.lengths)[-3:]
    assert seen == {0: longest, 1: longest}


def step_of(number, norm, loss=1.0):
    return Step(number, 0, False, loss, 1e-3, norm, tokens=1, targets=1, images=0, seconds=1.0)


def test_a_spike_is_held_against_the_median_of_those_before():
    guard = Guard(replace(TRAIN, spike=5.0, max_skipped=1))
    assert guard.fault(step_of(1, 100.0)) is None  # nothing is usual yet
    for number in range(2, WINDOW + 2):
        assert guard.fault(step_of(number, 1.0 + number % 3)) is None
    assert guard.fault(step_of(40, 9.9)) is None
    fault = guard.fault(step_of(41, 10.1))
    assert fault == "its gradient's norm is 10.1, where 2 is usual"
    restored = Guard(guard.train)
    restored.restore(json.loads(json.dumps(guard.state())))
    assert restored.fault(step_of(41, 10.1)) == fault
    guard.skip(step_of(41, 10.1), fault)
    assert guard.state()["skipped"] == [41]
    with pytest.raises(FloatingPointError, match=r"update 42 diverged: .* 1 were skipped before"):
        guard.skip(step_of(42, math.nan), "its loss is nan")


def test_fp16_leaves_what_overflows_to_the_loss_scaler():
    guard = Guard(replace(TRAIN, precision="fp16", spike=5.0))
    for number in range(WINDOW + 1):
        assert guard.fault(step_of(number, 1.0)) is None
    assert guard.fault(step_of(40, math.inf)) is None
    assert guard.fault(step_of(41, math.nan)) is None
    assert guard.fault(step_of(42, 6.0)) == "its gradient's norm is 6, where 1 is usual"
    assert set(guard.norms) == {1.0}
    assert guard.fault(step_of(43, 1.0, loss=math.nan))
    assert Guard(TRAIN).fault(step_of(1, math.inf))


def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(model_config, tmp_path):
    options = {"stage": 2, "world": 1, "save": (4, 8, 12)}
    unbroken = run(model_config, tmp_path / "unbroken", **options)
    with pytest.raises(mp.ProcessRaisedException, match="File too large"):
        run(model_config, tmp_path / "broken", full=8, **options)
    assert newest(tmp_path / "broken").step == 4
    assert run(model_config, tmp_path / "broken", **options) == unbroken[4:]
    assert not list((tmp_path / "broken").glob(".step-*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(model_config, tmp_path, caplog):
    run(model_config, tmp_path, stage=2, world=1, save=(4, 8), stop=8)
    assert newest(tmp_path).step == 8
    damaged = tmp_path / "step-000008/exp_avg.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert newest(tmp_path).step == 4
    assert "exp_avg.safetensors is not what its sha256 says" in caplog.text
    (tmp_path / "step-000004/manifest.json").unlink()
    (tmp_path / "step-000000/exp_avg_sq.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole, of the first .* is missing"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("workers", "expected"), [(1, 262_144_000), (2, 131_072_000), (8, 100_000_000)]
)
def test_buffers_for_weights_on_a_disk_hold_a_share_of_the_largest_one(workers, expected):
    on_disk = EngineConfig(zero_stage=3, offload_parameters="nvme", nvme_path="disk")
    train = TrainConfig(batch=8, epochs=1)
    made = deepspeed_config(
        on_disk, train, OptimConfig(lr=1e-3), workers=workers, trainable=1, largest=32_000 * 8192
    )
    offload = made["zero_optimization"]["offload_param"]
    assert (offload["buffer_size"], offload["nvme_path"]) == (expected, "disk")


def test_what_comes_next_is_made_while_the_one_before_is_in_use():
    begun: dict[int, threading.Event] = {number: threading.Event() for number in range(4)}

    def make(number: int) -> int:
        begun[number].set()
        return number

    seen = []
    for number in ahead(make, range(4)):
        assert number == 3 or begun[number + 1].wait(60)
        assert number > 1 or not begun[number + 2].is_set()
        seen.append(number)
    assert seen == [0, 1, 2, 3]
    assert list(ahead(make, ())) == []


def test_what_cannot_be_made_is_told_where_it_is_wanted():
    made = ahead(lambda number: 1 // (2 - number), range(4))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_samples_of_an_epoch_are_each_taken_once_in_an_order_of_their_own():
    plan = Plan(18, TrainConfig(epochs=2, batch=6, seed=3))
    epochs = [np.concatenate([plan.indices(s) for s in range(e * 3, e * 3 + 3)]) for e in range(2)]
    for order in epochs:
        assert sorted(order) == list(range(18))
    assert list(epochs[0]) != list(epochs[1])
    assert list(plan.indices(4)) == list(epochs[1][6:12])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ValueError, match=r"train.batch=32: must not exceed the 18 training samples"
    ):
        Plan(18, TrainConfig(epochs=1, batch=32))


def test_trainings_of_any_length_are_alike_until_the_shorter_decays():
    config = OptimConfig(schedule="wsd", warmup_steps=7, decay_fraction=0.25)
    rates = {
        steps: [learning_rate(step, steps, config) for step in range(steps)] for steps in (40, 61)
    }
    shared = config.plateau_end(40)
    assert shared == 30
    assert rates[40][:shared] == rates[61][:shared]
    assert rates[61][:8] == pytest.approx([1e-3 * min(1, k / 7) for k in range(1, 9)])
    assert rates[40][31] < rates[61][31] == 1e-3
    assert replace(config, schedule="constant").plateau_end(40) == 40


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_rise_to_the_peak_and_end_low(schedule):
    config = OptimConfig(lr=0.5, schedule=schedule, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (k + 1) for k in range(10)])
    assert max(rates) == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 0.5 if schedule == "constant" else rates[-1] <= 0.5 * 0.06
    if schedule == "wsd":
        assert rates[79] == 0.5
        assert rates[90] == pytest.approx(0.25)
    if schedule == "cosine":
        assert rates[55] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
