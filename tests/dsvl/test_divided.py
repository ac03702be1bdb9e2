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

LAYOUT = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
"""Layers and heads of the 70B, at a 32nd of its width."""
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
