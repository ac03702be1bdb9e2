"""Under ZeRO 3 no rank ever holds a whole decoder: LLaMA-2-70B's layout at a small width, from many files."""

import json
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from dsvl.config import EngineConfig, LanguageConfig, TrainConfig
from dsvl.engine import divided, join
from dsvl.model import VisualChat
from dsvl.optim import shape

LAYOUT = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""Layers and heads of the 70B, at a 32nd of its width."""
TRAIN = TrainConfig(epochs=1, batch=2, precision="bf16")


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


def load_on(rank, world, port, config, folder, stage):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join(backend="gloo")
    memory = Most()
    with divided(config, engine=EngineConfig(zero_stage=stage), train=TRAIN):
        model = VisualChat(config, precision="bf16", seed=0)
    found = {"grown": memory.grown(), "weights": 0}
    for parameter in model.language.parameters():
        found["weights"] += 2 * torch.Size(shape(parameter)).numel()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_no_rank_ever_holds_a_whole_decoder(model_config, tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        decoder = LlamaForCausalLM(LlamaConfig(**LAYOUT))
    decoder = decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        parameter.data.normal_(std=0.02)
    decoder.save_pretrained(tmp_path / "language", max_shard_size="20MB")
    assert len(list((tmp_path / "language").glob("model-*-of-*.safetensors"))) >= 15
    whole = 2 * decoder.num_parameters()
    del decoder
    language = LanguageConfig(checkpoint=str(tmp_path / "language"), **LAYOUT)
    config = replace(model_config, size="70b", languages={"70b": language})
    for stage, share in ((3, 1 / 2), (2, 1)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (2, port, config, tmp_path, stage)
        mp.start_processes(load_on, arguments, nprocs=2, start_method="fork")
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{rank}.json").read_text())
            assert found["weights"] == whole
            assert 0.9 * share < found["grown"] / whole < share + 0.15
