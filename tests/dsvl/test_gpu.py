"""On a GPU the model computes what it does on a CPU, in half precision too, and never waits for the GPU."""

import pytest
import torch

from dsvl.data.layout import Layout
from dsvl.decoder import Streams
from dsvl.model import VisualChat
from dsvl.train import Plan
from tests.dsvl import test_train
from tests.dsvl.test_model import batch_of, example

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture
def batch():
    """Rows of several lengths: images first, between and last, and none."""
    return batch_of(*(example(layout, seed=k) for k, layout in enumerate(test_train.LAYOUTS)))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_states_and_gradients_are_those_of_the_cpu(model_config, batch, precision, tolerance):
    expected = VisualChat(model_config, precision="fp32", seed=0)
    model = VisualChat(model_config, precision=precision, seed=0).to(GPU)
    loss, reference = model(batch.to(GPU)), expected(batch)
    assert loss.item() == pytest.approx(reference.item(), rel=tolerance)
    loss.backward()
    reference.backward()
    for name, parameter in expected.trainable().items():
        found = model.trainable()[name].grad
        assert found is not None
        assert parameter.grad is not None
        difference = (found.float().cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < tolerance, name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_over_the_layers_never_waits_for_the_device(model_config, batch, recompute):
    model = VisualChat(model_config, precision="bf16", seed=0).to(GPU)
    model.recompute = recompute
    moved = batch.to(GPU)
    assert isinstance(model.decoder, Streams)
    assert isinstance(moved.layout, Layout)
    model(moved).backward()  # the first pass sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(moved).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "bf16"), (2, "fp16"), (3, "bf16")]
)
def test_deepspeed_trains_on_it(model_config, tmp_path, stage, precision):
    options = {"stage": stage, "precision": precision, "micro": 2, "save": (12,), "device": "cuda"}
    records = test_train.run(model_config, tmp_path, world=1, **options)
    expected, _ = test_train.plain(model_config)
    assert len(records) == Plan(len(test_train.Prepared.train), test_train.TRAIN).steps
    losses, wanted = ([loss for loss, *_ in each] for each in (records, expected))
    tolerance = 1e-4 if precision == "fp32" else 0.15
    assert losses == pytest.approx(wanted, rel=tolerance)
