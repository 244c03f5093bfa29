"""Tests that need a GPU, skipped without one; `NEMO_EMMETT_GPU_TESTS=cpu` rehearses on the CPU those that can."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

IS_REHEARSAL = os.environ.get("NEMO_EMMETT_GPU_TESTS") == "cpu"
HAS_GPU = torch.cuda.is_available() and not IS_REHEARSAL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.path == Path(__file__).parent / "test_device.py" and not (
            IS_REHEARSAL and "cuda_only" not in item.keywords
        ):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    if HAS_GPU:
        # Products as exact as float32 is.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the backbones are kept."""
    return tmp_path_factory.mktemp("backbones")
