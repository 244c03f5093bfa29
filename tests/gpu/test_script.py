"""benchmarks/gpu/run.sh: what it writes, rehearsed on the CPU with tiny models; what becomes of a part that fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script's module, with its neighbours importable."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_measure", FOLDER / "gpu" / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("name", ["salm_t5", "salm_gpt"])
def test_memory_is_calibrated_trained_with_and_planned(script, name) -> None:
    found = script.measure_memory(name, script.TINY, seconds=300)
    json.dumps(found)
    assert len(found["buckets"]) == 8
    for bucket in found["buckets"].values():
        assert 1 <= bucket["batch_size"] <= 16
        assert 0 < bucket["peak"] <= 64 * 2**20
        # On a CPU the plan is exact for encoder-decoders; fake tensors do not know its attention's kernel.
        assert abs(bucket["plan_error_percent"]) <= (0 if name == "salm_t5" else 3)
    assert found["steps"] == found["finite_losses"] == script.TINY.steps
    assert found["events_of_guard"] == 0


def test_the_speed_of_each_way_is_measured_or_said_why_not(script) -> None:
    ways = script.measure_speed(script.TINY, seconds=300)["ways"]
    assert list(ways) == list(script.TINY.ways)
    assert all(ways[way]["tokens_per_second"] > 0 for way in ("buckets", "packed rows"))
    assert "flash_attention_2" in ways["packed rows, flash_attention_2"]["failed"]


def test_results_are_written_after_each_part(script, monkeypatch, tmp_path) -> None:
    path, written = tmp_path / "gpu.json", []

    def run_part(name: str, is_tiny: bool, seconds: float) -> dict:
        written.append(json.loads(path.read_text())["parts"] if path.exists() else {})
        return {"seconds": 1.0} if name != "memory_salm_t5" else {"failed": "exit code 1", "seconds": 1.0}

    monkeypatch.setattr(script, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--tiny", "--output", str(path)])
    script.main()
    report = json.loads(path.read_text())
    assert [list(parts) for parts in written] == [list(script.PARTS[:number]) for number in range(4)]
    assert report["tiny"] is True
    assert report["machine"]["versions"].keys() == set(script.PACKAGES)
    assert report["parts"]["memory_salm_t5"]["failed"] == "exit code 1"

    monkeypatch.setattr(sys, "argv", ["measure.py", "--tiny", "--output", str(path), "--seconds", "5"])
    script.main()
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == list(script.PARTS)
    assert all(part == {"left_out": "no time was left"} for part in parts.values())


def test_a_part_that_fails_or_hangs_ends_no_other(script, monkeypatch) -> None:
    def failing(*_, **__):
        return subprocess.CompletedProcess([], 137, stdout="half a line")

    monkeypatch.setattr(script.subprocess, "run", failing)
    assert script.run_part("speed", True, 60)["failed"].startswith("exit code 137")

    def hanging(*_, timeout: float, **__):
        raise subprocess.TimeoutExpired([], timeout)

    monkeypatch.setattr(script.subprocess, "run", hanging)
    assert script.run_part("speed", True, 60)["failed"] == "was not done after 60 s"
