"""The job that takes the tower out of a Qwen-VL checkpoint, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from dsvl.qwen_vision import PREFIX, QwenVisionConfig, QwenVisionModel

VISUAL = {
    "heads": 1,
    "image_size": 14,
    "layers": 1,
    "mlp_ratio": 2.0,
    "n_queries": 4,
    "output_dim": 128,
    "patch_size": 7,
    "width": 8,
}


def job(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.extract_qwen_vision", *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_the_job_extracts_once_and_says_in_a_line_why_not_again(tmp_path):
    tower = QwenVisionModel(
        QwenVisionConfig(
            image_size=14,
            patch_size=7,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            queries=4,
            output_size=128,
        )
    )
    source, target = tmp_path / "Qwen-VL", tmp_path / "tower"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"visual": VISUAL}))
    weights = {f"{PREFIX}{name}": weight for name, weight in tower.state_dict().items()}
    save_file(weights, source / "model.safetensors")
    done = job(source, target)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (target / "model.safetensors").is_file()
    again = job(source, target)
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    assert again.stderr.strip().endswith("exists; remove it or name another folder")
