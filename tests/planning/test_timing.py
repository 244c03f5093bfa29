"""Operations counted in steps, and the seconds that they are predicted to take."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.buckets import read_groups
from nemo_emmett.planning.recipe import _NO_TRAINING
from nemo_emmett.planning.sharded import fake_ranks
from nemo_emmett.planning.timing import OperationCounter, Rate, operations_per_example


def test_operations_are_those_of_the_products() -> None:
    first, second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
    counter = OperationCounter()
    with counter.measuring():
        second(first(torch.ones(7, 3))).sum().backward()
    # Two operations for each product and sum; backward once for the weights, and once for the inputs that need it.
    assert counter.operations == 2 * 7 * (2 * 3 * 5 + 3 * 5 * 2)
    with counter.measuring():
        first(torch.ones(1, 3))
    assert counter.operations == 2 * 3 * 5
    assert (counter.peak, counter.alive) == (0, 0)


def test_operations_are_those_of_this_rank() -> None:
    """Of layers that four ranks share: a quarter."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False))
    counts = []
    for plan in ({}, {"0": ColwiseParallel(), "1": RowwiseParallel()}):
        with fake_ranks(4):
            parallelize_module(layers, init_device_mesh("cpu", (4,)), plan)
            counter = OperationCounter()
            for _ in range(2):  # in the first step torch runs each operation as a whole as well
                with counter.measuring():
                    layers(torch.ones(7, 8)).sum().backward()
        counts.append(counter.operations)
    assert counts[1] == counts[0] / 4 > 0


def test_seconds_follow_from_the_rate() -> None:
    rate = Rate("X", flops_per_second=1000.0, efficiency=0.5, overhead=0.25)
    model = rate.time_model([1.0, 2.0, 4.0], [500.0, 1000.0, 2000.0])
    assert model.of_step(10, 3.0) == pytest.approx(0.25 + 10 * 3.0)
    assert str(rate) == "X: 0 TFLOP/s at 50 %, and 250 ms a step"


def test_the_rate_is_that_of_the_device_or_shown_to_be_assumed() -> None:
    assert Rate.of("H100").device == "H100"
    assert Rate.of(" 80GiB").device.startswith("A100")
    with pytest.raises(ConfigError, match="--memory: 'H101' is neither a known device"):
        Rate.of("H101")


def test_operations_of_a_models_steps(salm_t5_config) -> None:
    train_ds = {
        "multi_config": True,
        "audio": {"bucket_duration_bins": [[1.0, 8], [2.0, 8], [4.0, 8]], "manifest_filepath": "a"},
        "text": {
            "use_multimodal_sampling": True,
            "input_cfg": [{"type": "parallel_text"}],
            "bucket_duration_bins": [[8, 8], [16, 8], [32, 8]],
        },
    }
    groups = read_groups(OmegaConf.create(train_ds))
    counts: dict = {}

    class Count(Callback):
        def on_fit_start(self, trainer, module) -> None:
            counts.update(operations_per_example(trainer, module, groups))

    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[Count()], **_NO_TRAINING)
    trainer.fit(SALMT5(salm_t5_config), torch.utils.data.DataLoader([0]))
    for name in groups:
        bins, operations = counts[name]
        assert sorted(bins) == list(groups[name].bins)
        by_length = [count for _, count in sorted(zip(bins, operations, strict=True))]
        assert by_length == sorted(by_length)
        assert by_length[0] > 0
    # Longer by the same number of positions: more by about as many operations, and those of attention.
    text = dict(zip(*counts["text"], strict=True))
    rise = (text[32.0, 8.0] - text[16.0, 8.0]) / (text[16.0, 8.0] - text[8.0, 8.0])
    assert 2.0 <= rise < 3.0
