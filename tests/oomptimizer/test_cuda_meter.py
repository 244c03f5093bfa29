"""The CUDA meter: on counters that are made up, and on a device where there is one."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.cuda_meter import CudaMeter, meter_for
from nemo_emmett.oomptimizer.meter import TensorMeter

DEVICE = torch.device("cuda:0")
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MIB = 2**20


class Allocator:
    """Replaces torch.cuda: counts bytes and records the order of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.most_allocated = self.reserved = self.most_reserved = 0
        self.asked: list[str] = []
        for name, answer in {
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.most_allocated,
            "max_memory_reserved": lambda device: self.most_reserved,
            "reset_peak_memory_stats": self.reset,
            "empty_cache": self.empty,
            "synchronize": lambda device: self.asked.append("synchronize"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def allocate(self, bytes_: int) -> None:
        self.allocated += bytes_
        self.reserved = max(self.reserved, self.allocated)
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def reset(self, device: torch.device) -> None:
        self.asked.append("reset")
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def empty(self) -> None:
        self.asked.append("empty")
        self.reserved = self.allocated


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_the_peak_is_of_what_ran_inside(allocator: Allocator) -> None:
    meter = CudaMeter(DEVICE)
    allocator.allocate(900)
    allocator.allocate(-800)
    with meter.measuring():
        allocator.allocate(300)
        allocator.allocate(-200)
        assert (meter.alive, meter.peak, meter.reserved) == (200, 400, 400)
    # What comes later is not counted.
    allocator.allocate(5000)
    assert (meter.alive, meter.peak, meter.reserved) == (5200, 400, 400)
    with meter.measuring():
        pass
    assert meter.peak == 5200


def test_the_cache_is_emptied_before_counting_again(allocator: Allocator) -> None:
    meter = CudaMeter(DEVICE)
    with meter.measuring():
        # Otherwise the blocks of a step before, still in the cache, would count as this step's fragmentation.
        assert allocator.asked == ["synchronize", "empty", "reset"]


def test_the_peak_is_kept_after_an_error(allocator: Allocator) -> None:
    meter = CudaMeter(DEVICE)
    with suppress(torch.OutOfMemoryError), meter.measuring():
        allocator.allocate(700)
        allocator.allocate(-700)
        raise torch.OutOfMemoryError("CUDA out of memory.")
    allocator.allocate(9000)
    assert meter.peak == 700


def test_each_device_has_its_meter() -> None:
    assert isinstance(meter_for(torch.device("cpu")), TensorMeter)
    assert isinstance(meter_for(DEVICE), CudaMeter)
    with pytest.raises(ConfigError, match="OOMptimizer measures CUDA devices and the CPU, not 'mps'"):
        meter_for(torch.device("mps"))


@ON_A_GPU
def test_a_device_is_measured_to_the_block() -> None:
    meter = CudaMeter(DEVICE)
    kept = torch.empty(4 * MIB, dtype=torch.uint8, device=DEVICE)
    before = meter.alive
    with meter.measuring():
        larger = torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)
        del larger
        smaller = torch.empty(16 * MIB, dtype=torch.uint8, device=DEVICE)
    assert meter.peak == before + 64 * MIB
    assert meter.alive == before + 16 * MIB
    assert meter.reserved >= meter.peak
    del kept, smaller


@ON_A_GPU
def test_an_earlier_peak_does_not_count_as_fragmentation() -> None:
    meter = CudaMeter(DEVICE)
    with meter.measuring():
        torch.empty(512 * MIB, dtype=torch.uint8, device=DEVICE)
    with meter.measuring():
        torch.empty(32 * MIB, dtype=torch.uint8, device=DEVICE)
    assert meter.reserved < meter.alive + 128 * MIB


@ON_A_GPU
def test_a_device_has_at_most_its_total_and_about_what_is_free() -> None:
    from nemo_emmett.oomptimizer.memory import device_memory

    kept = torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE)
    available = device_memory(DEVICE)
    assert available <= torch.cuda.get_device_properties(DEVICE).total_memory
    del kept
    torch.cuda.empty_cache()
    # What torch holds itself is available to it, whether it is in use or not.
    assert abs(device_memory(DEVICE) - available) < 64 * MIB


@ON_A_GPU
def test_probes_on_a_device_have_no_side_effects_and_survive_running_out_of_memory() -> None:
    from torch.utils.data import DataLoader

    from tests.oomptimizer.probing import Probing, assert_no_side_effects, trainer_for
    from tests.oomptimizer.test_steps import WIDTH, Layers

    def rows(examples: int) -> torch.Tensor:
        return torch.ones(examples, WIDTH, device=DEVICE)

    def probe(steps) -> None:
        steps.warm_up(rows(1))
        small, large = steps.run(rows(100_000)), steps.run(rows(200_000))
        assert large.peak - small.peak == pytest.approx(4 * 100_000 * WIDTH * 4, rel=0.05)
        free, _ = torch.cuda.mem_get_info(DEVICE)
        alive = torch.cuda.memory_allocated(DEVICE)
        assert steps.run(rows(int(0.4 * free) // (4 * WIDTH))).out_of_memory
        assert torch.cuda.memory_allocated(DEVICE) <= alive
        assert not steps.run(rows(100_000)).out_of_memory

    probing = Probing(probe)
    trainer_for(probing, max_steps=1, accelerator="gpu").fit(Layers(), DataLoader([rows(2)], batch_size=None))
    assert_no_side_effects(probing)
