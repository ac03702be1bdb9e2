"""Two walks from a file to MLflow: of one sample, and of one field (design, section 5)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from dsvl.data.encode import load_tokenizer
from dsvl.data.readers import read
from dsvl.data.store import open_store
from dsvl.data.types import IGNORED, Kind
from dsvl.digits import chats
from orchestration.compose import load
from orchestration.plan import plan
from orchestration.records import journal
from tests.orchestration.conftest import digits, histories

pytestmark = pytest.mark.ray

QUESTION = "Quux: two zebras look at image 1 and at image 2.  Which\ndigit is it?"
ANSWER = "Seven, said the fox."
RATE = 0.0123
LANGUAGE = "dsvl/digits/checkpoints/small"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Fifteen ordinary chats to train on, and one that nobody can mistake."""
    folder = tmp_path_factory.mktemp("walk")
    raw = folder / "raw/digits"
    chats.write(raw, train=15, evaluation=2)
    for shade in (40, 200):
        Image.new("RGB", (11, 9), (shade, 7, 7)).save(raw / f"images/fox-{shade}.png")
    record = {
        "id": "the-fox",
        "image": ["fox-40.png", "fox-200.png"],
        "conversations": [
            {"from": "human", "value": f"<image>\n<image>\n{QUESTION}"},
            {"from": "gpt", "value": ANSWER},
        ],
    }
    path = raw / "train.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), record]))
    return folder


@pytest.fixture(scope="module")
def experiment(storage):
    """One epoch of two updates, which see each of the sixteen chats once."""
    train = {"batch": 8, "epochs": 1, "precision": "fp32"}
    path = digits(storage, "walk", train=train, optim={"lr": 0.5}, cluster={"workers": 1})
    return load(path, [f"optim.lr={RATE}"])


@pytest.fixture(scope="module")
def trained(experiment, cluster):
    """The folder of the prepared data, after the training."""
    from orchestration.commands import train
    from orchestration.prepare import prepare

    train(experiment)
    return prepare(experiment)["folder"]


def test_a_sample_walks_from_its_record_into_the_weights(experiment, storage, trained):
    # reader
    config = experiment.data.sets["digits_train"]
    conversations = list(
        read("digits_train", config=config, root=storage / "raw", max_images=8, seed=0)
    )
    (fox,) = [one for one in conversations if one.id == "digits_train/the-fox"]
    asked = QUESTION.replace("\n", " ")
    assert [part.text for part in fox.turns[0].content if part.type == "text"] == [asked]
    assert [image.path for image in fox.images] == ["fox-40.png", "fox-200.png"]

    # prepared samples
    prepared = open_store(trained)
    samples = {row["id"]: row for row in prepared.samples("train").to_pylist()}
    sample = samples[fox.id]
    paths = [storage / "raw/digits/images" / image.path for image in fox.images]
    keys = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert sample["images"] == keys
    assert [prepared.image(key) for key in keys] == [path.read_bytes() for path in paths]
    user, assistant = sample["messages"]
    assert [part["type"] for part in user["content"]] == ["image", "image", "text"]
    assert (user["content"][-1]["text"], assistant["content"][0]["text"]) == (asked, ANSWER)
    assert not any(row["images"] == keys for name, row in samples.items() if name != fox.id)

    # encoded
    examples = [prepared.train[i] for i in range(len(prepared.train))]
    (example,) = [one for one in examples if one.id == fox.id]
    tokenizer = load_tokenizer(LANGUAGE)
    supervised = example.labels[example.labels != IGNORED]
    assert tokenizer.decode(supervised[:-1]) == ANSWER
    assert supervised[-1] == tokenizer.eos_token_id
    assert asked in tokenizer.decode(example.ids[example.kinds == Kind.TEXT])
    assert example.images == tuple(keys)
    assert (example.kinds == Kind.IMAGE).sum() == 2 * experiment.model.vision.tokens
    assert np.abs(prepared.pixels(keys[0]) - prepared.pixels(keys[1])).max() > 0.5

    # trained: the embedding of a word that it alone holds has moved, that of an unseen one has not
    others = {int(token) for one in examples if one.id != fox.id for token in one.ids}
    own = sorted({int(token) for token in example.ids} - others)
    unseen = sorted(set(range(len(tokenizer))) - others - set(own))
    assert own
    assert unseen
    (name,) = [name for name in parameters(experiment) if "embed" in name]
    now = parameters(experiment)[name]
    before = load_file(f"{LANGUAGE}/model.safetensors")["model.embed_tokens.weight"].float()
    moved = (now != before).any(dim=1)
    assert moved[own].all()
    assert not moved[unseen].any()

    # measured
    loss = journal.curve(experiment.run_folder, "train/loss")
    assert histories(*mlflow_run(experiment))["train/loss"] == loss
    assert [step for step, _ in loss] == [1, 2]


def parameters(experiment) -> dict[str, torch.Tensor]:
    *_, folder = sorted((experiment.run_folder / "checkpoints").iterdir())
    return load_file(folder / "parameters.safetensors")


def mlflow_run(experiment) -> tuple[MlflowClient, str]:
    record = json.loads((experiment.run_folder / "mlflow.json").read_text())
    return MlflowClient(experiment.tracking_uri), record["run_id"]


def test_a_field_walks_from_an_override_to_the_tracker(experiment, trained):
    folder = experiment.run_folder
    assert experiment.optim.lr == RATE
    assert experiment.params()["optim.lr"] == RATE
    assert plan(experiment).identity == experiment.identity()
    assert plan(experiment.with_overrides({"optim.lr": 0.5})).identity != experiment.identity()

    stored = json.loads((folder / "experiment.json").read_text())
    assert stored["experiment"]["optim"]["lr"] == RATE
    assert stored["identity"] == experiment.identity()
    (start,) = [entry for entry in journal.read(folder)[0] if entry["kind"] == "start"]
    assert start["params"]["optim.lr"] == RATE
    rates = [rate for _, rate in journal.curve(folder, "train/lr")]
    assert max(rates) == RATE, "the rate that the optimiser was given"
    *_, checkpoint = sorted((folder / "checkpoints").iterdir())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["fields"]["optim.lr"] == RATE
    assert manifest["identity"] == experiment.identity()
    assert json.loads((folder / "result.json").read_text())["fields"]["optim.lr"] == RATE

    client, run = mlflow_run(experiment)
    assert client.get_run(run).data.params["optim.lr"] == str(RATE)
    assert max(rate for _, rate in histories(client, run)["train/lr"]) == RATE
    kept = client.download_artifacts(run, "experiment.json")
    with open(kept) as file:
        assert json.load(file) == stored
