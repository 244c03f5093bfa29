"""A tiny model of each kind, whose answers differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..models.backbones import livelier, model_config

FAMILIES = {"SALMT5": "t5", "SALMGPT": "qwen3", "BestowGPT": "llama"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_asr) -> Callable:
    """The model of a class, on a tiny backbone with random weights; each is built once."""
    from nemo_emmett import models

    folder: Path = tmp_path_factory.mktemp("backbones")
    built = {}

    def build(kind: str):
        if kind not in built:
            section = model_config(FAMILIES[kind], folder, tiny_asr, max_new_tokens=8)
            built[kind] = livelier(getattr(models, kind)(section)).eval()
        return built[kind]

    return build
