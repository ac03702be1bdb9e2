"""A small experiment as settings, so that tests do not depend on the shipped configurations."""

from copy import deepcopy
from typing import Any

import pytest

LANGUAGE = {
    "checkpoint": "language",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "size": "small",
        "languages": {"small": LANGUAGE, "large": LANGUAGE | {"num_hidden_layers": 4}},
        "vision": {
            "checkpoint": "vision",
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        },
    },
    "data": {
        "sets": {
            "chats": {"reader": "llava_json", "annotations": ["chats.json"], "images": "images"}
        },
        "max_tokens": 64,
    },
    "train": {"epochs": 2, "batch": 12},
}
SEARCH = {
    "space": {
        "model.size": {"kind": "grid", "values": ["small", "large"]},
        "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    },
    "samples": 3,
    "concurrent": 4,
}


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of a small, legal experiment; a test may change them."""
    return deepcopy(SETTINGS)


@pytest.fixture
def search() -> dict[str, Any]:
    """A small, legal search over them."""
    return deepcopy(SEARCH)
