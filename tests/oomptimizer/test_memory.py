"""Amounts of memory, as recipes write them and as devices have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer import memory
from nemo_emmett.oomptimizer.memory import (
    DEVICES,
    budget_of,
    device_memory,
    find_device,
    is_out_of_memory,
    parse_memory,
    shown,
)

CPU = torch.device("cpu")
GIB = 1_073_741_824


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [
        ("80GiB", 85_899_345_920),
        ("80GB", 80_000_000_000),
        ("80 gb", 80_000_000_000),
        ("512MiB", 536_870_912),
        ("1.5KiB", 1536),
        ("2TB", 2_000_000_000_000),
        ("1TiB", 1_099_511_627_776),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_amounts(written: int | str, bytes_: int) -> None:
    assert parse_memory(written) == bytes_


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("80G", "plan.memory: '80G' has the unit 'g'; write KiB"),
        ("80GiBi", "has the unit 'gibi'"),
        ("0GiB", "plan.memory: '0GiB' leaves no memory"),
        (-1, "-1 leaves no memory"),
        (True, "True is no amount of memory"),
        (0.5, "0.5 is no amount of memory"),
        (None, "None is no amount of memory"),
        ("H1O0", "'H1O0' is neither a known device nor an amount of memory; use H100, or"),
        ("A100-40G", "use A100-40GB, or write it like 80GiB"),
        ("abacus", "use one of V100-16GB, .*B200, or write it like 80GiB"),
        ("-80GiB", "plan.memory: '-80GiB' is neither a known device"),
    ],
)
def test_what_is_no_amount_is_refused(written, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_memory(written, "plan.memory")


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_known_devices_have_less_than_their_name_says_and_not_much_less(device: memory.Device) -> None:
    nominal = {"T4": 16, "A10": 24, "A40": 48, "RTX3090": 24, "RTX4090": 24, "L4": 24, "L40S": 48}
    nominal |= {"H100": 80, "H200": 141, "B200": 180}
    gigabytes = nominal.get(device.name) or int(device.name.split("-")[1].removesuffix("GB"))
    assert 0.9 * gigabytes * GIB < device.memory < gigabytes * GIB
    assert find_device(device.name) is device
    assert 50e12 < device.flops_per_second < 3e15


def test_devices_are_found_however_they_are_written() -> None:
    assert find_device("h100") is find_device("NVIDIA H100") is find_device("H100-80GB")
    assert find_device("RTX 4090") is find_device("rtx-4090")
    assert find_device("A100") is find_device("A100-80GB")
    assert find_device("V100") is find_device("V100 16GB")
    assert parse_memory("H100") == find_device("H100").memory
    assert find_device("A100").flops_per_second == 312e12


def test_the_cpu_has_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "missing")
    meminfo = Path("/proc/meminfo").read_text().split()
    assert device_memory(CPU) == pytest.approx(int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024, rel=0.01)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "3000", "memory.max": "9000"}, 3000),
        ("0::/job/step", {"memory.max": "5000"}, 5000),  # a container sees the root alone
        ("0::/", {"memory.max": "max"}, None),
        ("4:cpu,memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": "2000"}, 2000),
        ("4:memory:/job", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),  # version 1's "no limit"
        ("4:cpu:/job", {"memory/job/memory.limit_in_bytes": "2000"}, None),
    ],
)
def test_a_control_group_limits_the_memory(monkeypatch, tmp_path: Path, groups: str, files: dict, limit) -> None:
    own = tmp_path / "self"
    own.write_text(groups + "\n")
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", own)
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path / "cgroup")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(CPU) == (machine if limit is None else limit)


def test_a_cuda_device_has_what_others_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # 80 in all: 10 free, 50 held by torch's allocator, hence 20 by the context and other processes.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * GIB)
    assert device_memory(torch.device("cuda:0")) == 60 * GIB


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accelerator: OOMptimizer can read .* not of 'mps'"):
        device_memory(torch.device("mps"))


def test_the_budget_is_a_share_or_an_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 100 * GIB)
    assert budget_of(CPU, 0.5) == 50 * GIB
    assert budget_of(CPU, 1) == 100 * GIB
    assert budget_of(CPU, 0.5, "80GiB") == 80 * GIB
    for fraction in (0, 1.5, -0.1, "all", True):
        with pytest.raises(ConfigError, match=f"OOMptimizer.memory_fraction: {fraction!r} cannot be used"):
            budget_of(CPU, fraction)
    with pytest.raises(ConfigError, match=r"OOMptimizer.memory_budget: H200 is more than the 100.0 GiB that cpu has"):
        budget_of(CPU, 0.9, "H200")
    with pytest.raises(ConfigError, match=r"OOMptimizer.memory_budget: '80G'"):
        budget_of(CPU, 0.9, "80G")


def test_a_cpu_that_nobody_gave_a_budget_takes_a_quarter_of_what_is_available_and_no_more_than_8_gib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 100 * GIB)
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "meminfo")
    for available, budget in ((64, 8), (24, 6), (4, 1)):
        (tmp_path / "meminfo").write_text(f"MemTotal:  104857600 kB\nMemAvailable:  {available * 1024 * 1024} kB\n")
        assert budget_of(CPU, 0.9) == budget * GIB
    assert budget_of(CPU, 0.8) == 80 * GIB  # asked for
    assert budget_of(CPU, 0.9, "80GiB") == 80 * GIB
    (tmp_path / "meminfo").unlink()
    monkeypatch.setattr(memory, "device_memory", lambda device: 8 * GIB)  # a container's limit
    assert budget_of(CPU, 0.9) == 2 * GIB
    monkeypatch.setattr(memory, "device_memory", lambda device: 100 * GIB)
    assert budget_of(torch.device("cuda:0"), 0.9) == int(0.9 * 100 * GIB)


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (13_207_024_435, "12.3 GiB"),
        (2 * 2**40, "2.0 TiB"),
        (3 * 2**20 + 2**19, "3.5 MiB"),
    ],
)
def test_bytes_as_one_reads_them(bytes_: int, text: str) -> None:
    assert shown(bytes_) == text


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (RuntimeError(2), False),
        (RuntimeError(), False),
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_running_out_of_the_machines_memory_for_real() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
