"""Memory of devices, of this machine or by name, and amounts of memory in recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import annotated_types
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.files import shown
from nemo_emmett.typed_config import Number, parse_value

_GIB = 2**30

_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")

MemoryFraction = Annotated[Number, annotated_types.Gt(0), annotated_types.Le(1)]
"""A share of a device's memory."""

MEMORY_FRACTION = 0.9
"""Default share of a device's memory that a step may take."""

CPU_BUDGET = 8 * _GIB
"""Most bytes that a step may take on a CPU, if neither a budget nor another fraction is given."""

CPU_SHARE = 4
"""One part in so many of a CPU's available memory is the budget then: its process holds over twice what its tensors
take, by what kernels allocate within themselves and what the allocator does not give back (2.4 times was measured)."""

_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Device:
    """A GPU that batch sizes are planned for.

    Args:
        name: in a recipe or on the command line.
        memory: bytes that the CUDA runtime reports in total; its context, some hundreds of MiB, comes out of them.
        flops_per_second: dense bfloat16 matrix products with float32 sums (float16 where there is no bfloat16).
    """

    name: str
    memory: int
    flops_per_second: float


# Memory in GiB is what the runtime reports (the "total capacity" of an out-of-memory message), below what the datasheet
# says by what ECC and the driver reserve; it differs a little between drivers, and these are the least that were found.
# TFLOP/s are those of NVIDIA's datasheets, halved where they are given with sparsity.
DEVICES: tuple[Device, ...] = tuple(
    Device(name, int(gib * _GIB), tflops * 10**12)
    for name, gib, tflops in (
        ("V100-16GB", 15.7, 125.0),  # Tesla V100 SXM2 datasheet: 16 GB HBM2, 125 (float16)
        ("V100-32GB", 31.7, 125.0),  # the same: 32 GB
        ("T4", 14.5, 65.0),  # T4 datasheet: 16 GB GDDR6, 65 (float16)
        ("A10", 21.9, 125.0),  # A10 datasheet: 24 GB GDDR6, 125
        ("A40", 44.3, 149.7),  # A40 datasheet: 48 GB GDDR6, 149.7
        ("A100-40GB", 39.3, 312.0),  # A100 datasheet: 40 GB HBM2, 312
        ("A100-80GB", 79.1, 312.0),  # the same: 80 GB HBM2e
        ("RTX3090", 23.5, 71.0),  # GA102 whitepaper: 24 GB GDDR6X, 71
        ("RTX4090", 23.5, 165.2),  # Ada whitepaper: 24 GB GDDR6X, 165.2
        ("L4", 22.0, 121.0),  # L4 datasheet: 24 GB GDDR6, 242 with sparsity
        ("L40S", 44.3, 362.0),  # L40S datasheet: 48 GB GDDR6, 362.05
        ("H100", 79.1, 989.4),  # H100 SXM datasheet: 80 GB HBM3, 1,979 with sparsity
        ("H200", 139.7, 989.4),  # H200 SXM datasheet: 141 GB HBM3e, 1,979 with sparsity
        ("B200", 178.3, 2250.0),  # HGX B200 datasheet: 180 GB HBM3e, 4,500 with sparsity
    )
)

_OTHER_NAMES = {"v100": "V100-16GB", "a100": "A100-80GB", "h10080gb": "H100"}


def find_device(name: str, key: str = "memory") -> Device:
    """The known device of a name; case, spaces, dashes and a leading ``NVIDIA`` do not matter.

    Args:
        name: such as ``H100`` or ``A100-40GB``; ``A100`` is the one with 80 GB, ``V100`` the one with 16 GB.
        key: under which the name was given, for the message.

    Raises:
        ConfigError: if it is not known; the message names the nearest one.

    Example:
        >>> find_device("h100").flops_per_second
        989400000000000.0
    """
    by_name = {_plain(device.name): device for device in DEVICES}
    by_name |= {other: by_name[_plain(known)] for other, known in _OTHER_NAMES.items()}
    if (device := by_name.get(_plain(name))) is not None:
        return device
    suggestion = nearest(_plain(name), by_name)
    choice = by_name[suggestion].name if suggestion else f"one of {', '.join(device.name for device in DEVICES)}"
    raise ConfigError(
        f"{key}: '{name}' is neither a known device nor an amount of memory; use {choice}, or write it like 80GiB."
    )


def parse_memory(memory: int | str, key: str = "memory_budget") -> int:
    """Bytes, from a number of them, an amount with a unit, or the name of a device.

    Args:
        memory: such as ``80GiB`` (2^30 bytes each), ``80GB`` (10^9), ``512MiB``, ``85899345920``, ``H100``.
        key: under which it was given, for the message.

    Raises:
        ConfigError: if it is none of these, or less than a byte.

    Example:
        >>> parse_memory("1.5GiB")
        1610612736
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        bytes_ = memory
    elif isinstance(memory, str) and (match := _QUANTITY.fullmatch(memory.strip().lower())):
        amount, unit = match.groups()
        if (unit or "b") not in _UNITS:
            raise ConfigError(f"{key}: '{memory}' has the unit '{unit}'; write KiB, MiB, GiB, TiB or KB, MB, GB, TB.")
        bytes_ = int(float(amount) * _UNITS[unit or "b"])
    elif isinstance(memory, str):
        bytes_ = find_device(memory, key).memory
    else:
        raise ConfigError(f"{key}: {memory!r} is no amount of memory; write it like 80GiB, or name a device like H100.")
    if bytes_ < 1:
        raise ConfigError(f"{key}: {memory!r} leaves no memory; write it like 80GiB.")
    return bytes_


def device_memory(device: torch.device) -> int:
    """Bytes that tensors of this process can take on a device.

    On CUDA, without what other processes hold and what this one holds outside of torch's allocator (the context,
    NCCL's buffers). On the CPU, the machine's memory, or the limit of the control group that the process runs in (a
    container, a SLURM job).

    Raises:
        ConfigError: for a device of another kind.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])
    raise ConfigError(
        f"trainer.accelerator: OOMptimizer can read the memory of CUDA devices and of the CPU, not of '{device}'."
    )


def budget_of(device: torch.device, memory_fraction: float, memory_budget: int | str | None = None) -> int:
    """Bytes that a step may take on a device.

    Args:
        device: of the training.
        memory_fraction: share of the device's memory, above 0 and at most 1; used if there is no budget. On the CPU,
            which shares its memory with other processes, ``MEMORY_FRACTION`` means a quarter of what is available, and
            ``CPU_BUDGET`` at most.
        memory_budget: what :func:`parse_memory` reads; None for the fraction.

    Raises:
        ConfigError: if the fraction or the budget cannot be used, or it is more than the device has.
    """
    memory_fraction = parse_value(MemoryFraction, memory_fraction, "OOMptimizer.memory_fraction")
    available = device_memory(device)
    if is_cpu_default(device, memory_fraction, memory_budget):
        return min(CPU_BUDGET, min(available, _unused_memory(available)) // CPU_SHARE)
    if memory_budget is None:
        return int(memory_fraction * available)
    budget = parse_memory(memory_budget, "OOMptimizer.memory_budget")
    if budget > available:
        raise ConfigError(
            f"OOMptimizer.memory_budget: {memory_budget} is more than the {shown(available)} that {device} has left; "
            "lower it, or free the device."
        )
    return budget


def is_cpu_default(device: torch.device, memory_fraction: float, memory_budget: int | str | None) -> bool:
    """Whether a CPU is used and neither a budget nor another fraction than the default is given."""
    return device.type == "cpu" and memory_budget is None and memory_fraction == MEMORY_FRACTION


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of running out of memory, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return True
    # Lightning searches the first argument for substrings, but not every exception has a string there.
    return bool(error.args) and isinstance(error.args[0], str) and is_oom_error(error)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


def _unused_memory(total: int) -> int:
    """Bytes that are unused or that the kernel can free; the total if that is not known."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMORY_INFO.read_text(), re.MULTILINE)
    except OSError:
        return total  # not on Linux
    return int(found[1]) * 1024 if found else total


def _cgroup_limits() -> Iterator[int]:
    """The limits of all control groups around this process, in bytes."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return  # not on Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            yield from _limits_up(_CGROUP_ROOT, path, "memory.max")
        elif "memory" in controllers.split(","):  # version 1
            yield from _limits_up(_CGROUP_ROOT / "memory", path, "memory.limit_in_bytes")


def _limits_up(root: Path, path: str, file: str) -> Iterator[int]:
    """A group's limit and those of the groups around it; in a container only the root may be there to read."""
    folder = root / path.lstrip("/")
    for group in [folder, *folder.parents]:
        if not group.is_relative_to(root):
            return
        try:
            limit = (group / file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():  # otherwise "max"
            yield int(limit)
