"""Under ZeRO 3 no rank ever holds a whole decoder, and what is divided says what is whole would say."""

import json
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from dsvl.chat import transcript
from dsvl.config import EngineConfig, LanguageConfig, OptimConfig, TrainConfig
from dsvl.data.types import Part, Turn
from dsvl.engine import Engine, divided, join
from dsvl.generate import Sampling, generate
from dsvl.model import VisualChat
from tests.dsvl.conftest import open_gates
from tests.dsvl.ranks import on_ranks
from tests.dsvl.test_model import PIXELS, batch_of, example

LAYOUT = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""Layers and heads of LLaMA-2-70B, at a 32nd of its width."""
RANKS = 4
TRAIN = TrainConfig(epochs=1, batch=RANKS, precision="bf16")


class Most(threading.Thread):
    """The most memory of its own, files that it maps left out, that this process has had."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.before = threading.Event(), self.now()
        self.most = self.before
        self.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def run(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, self.now())

    def grown(self) -> int:
        self.ended.set()
        self.join()
        return self.most - self.before


def load_on(rank, port, config, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join(backend="gloo")
    memory = Most()
    with divided(config, engine=EngineConfig(zero_stage=3), train=TRAIN):
        model = VisualChat(config, precision="bf16", seed=0)
    held = sum(p.ds_tensor.nbytes + p.data.nbytes for p in model.language.parameters())
    (folder / f"{rank}.json").write_text(json.dumps({"most": memory.grown(), "held": held}))
    torch.distributed.destroy_process_group()


def test_no_rank_ever_holds_a_whole_decoder(model_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back at once
    torch.manual_seed(0)
    with torch.device("meta"):
        decoder = LlamaForCausalLM(LlamaConfig(**LAYOUT))
    decoder = decoder.to_empty(device="cpu").bfloat16()
    for parameter in decoder.parameters():
        parameter.data.normal_(std=0.02)
    decoder.save_pretrained(tmp_path / "language", max_shard_size="10MB")
    assert len(list((tmp_path / "language").glob("model-*-of-*.safetensors"))) >= 15
    whole = 2 * decoder.num_parameters()
    del decoder
    language = LanguageConfig(checkpoint=str(tmp_path / "language"), **LAYOUT)
    config = replace(model_config, size="70b", languages={"70b": language})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(load_on, (port, config, tmp_path), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["held"] == whole / RANKS
        # Beside its share a rank has the embedding for a moment, twice, and buffers of the process group.
        assert found["most"] < 0.65 * whole


class HeldOut:
    """Two conversations of prepared data, the second with images in both of its rounds."""

    pixels = staticmethod(PIXELS.__getitem__)

    def conversations(self, split, count):
        def turns(*questions):
            for question, images in questions:
                shown = (Part("image", image=k) for k in images)
                yield Turn("user", (*shown, Part("text", text=question)))
                yield Turn("assistant", (Part("text", text="True."),))

        assert (split, count) == ("eval", 2)
        yield "a", (), tuple(turns(("What is here?", ()), ("Why", ())))
        yield "b", ("3", "0"), tuple(turns(("Which is red?", (0,)), ("And this?", (1,))))


def answers(model, tokenizer) -> tuple[list[dict], list, int]:
    """Chats about held-out images, what is drawn after two prompts, and signs of life meanwhile."""
    alive: list[None] = []
    chats = transcript(
        model,
        tokenizer,
        HeldOut(),
        count=2,
        max_tokens=400,
        device=torch.device("cpu"),
        alive=lambda: alive.append(None),
    )
    model.eval()
    prompts = batch_of(example("tt1ttt"), example("t", seed=3))
    drawn = generate(model, prompts, end=-1, max_new_tokens=6, sampling=Sampling(seed=3))
    return chats, list(drawn), len(alive)


def built(config) -> VisualChat:
    return open_gates(VisualChat(config, precision="fp32", seed=0))


def answers_of_rank(rank, config, tokenizer):
    """The same by a model divided among the ranks, after an update; all but rank 0 differ in opinion."""
    world = torch.distributed.get_world_size()
    train = TrainConfig(epochs=1, batch=world, precision="fp32")
    small = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings = EngineConfig(zero_stage=3, deepspeed=small)
    with divided(config, engine=settings, train=train):
        model = built(config)
    engine = Engine(model, engine=settings, train=train, optim_config=OptimConfig())
    sample = batch_of(example("t1tTT"))
    engine.update([sample], targets=world * sample.targets, lr=0.0)
    assert all(not p.numel() for p in model.language.parameters()), "divided, down to the last"
    if rank:
        right = model.logits
        model.logits = lambda states: -right(states)
    return answers(model, tokenizer)


@pytest.mark.parametrize(
    ("world", "scheme"), [(1, "mmca"), (2, "mmca"), (2, "causal"), (2, "gated_cross")]
)
def test_a_divided_model_says_what_the_whole_one_says(
    model_config, language, tokenizer, world, scheme
):
    torch.set_num_threads(1)  # as the ranks
    config = replace(model_config, languages={"tiny": language}, attention=scheme, cross_every=1)
    expected = answers(built(config), tokenizer)
    chats, _, alive = expected
    said = [chat_round["model"] for chat in chats for chat_round in chat["rounds"]]
    assert len(set(said)) == 4
    assert alive > len(said)
    for found in on_ranks(world, answers_of_rank, config, tokenizer):
        assert found == expected
