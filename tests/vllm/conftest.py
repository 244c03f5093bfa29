"""vLLM on the CPU, in this process; without it these tests are skipped."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        mark = pytest.mark.skip(reason="vLLM is not installed here; run make test-vllm")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(mark)
