"""Calibration of real models: on the same meter the batch sizes fit, and larger ones do not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Bucket, read_groups
from nemo_emmett.oomptimizer.cuda_meter import meter_for
from nemo_emmett.oomptimizer.meter import TensorMeter
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.oomptimizer.steps import TrainingSteps
from tests.oomptimizer.fits import AtFitStart, Data, trainer_with
from tests.oomptimizer.models import tiny_ctc, tiny_salm

MIB = 2**20
SPEECH_BINS = [[seconds, tokens] for seconds, tokens in product((1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12), (6, 15, 40))]
FEW_SPEECH_BINS = [[seconds, tokens] for seconds, tokens in product((1, 2, 4, 10), (6, 15, 40))]
TEXT_BINS = [[i, o] for i, o in product((8, 20, 60, 200), (10, 40, 90))]


def steps_at_fit_start(folder: Path, model: LightningModule, train_ds: dict, function: Callable) -> None:
    """Calls ``function(bucket, examples) -> peak``'s owner with every bucket, at the place where calibration runs."""

    def at_start(trainer: Trainer, module: LightningModule) -> None:
        adapter, device = adapter_for(module), torch.device("cpu")
        groups = read_groups(trainer.datamodule.cfg.train_ds, token_equivalent_duration=0.08)
        buckets = [bucket for group in groups.values() for bucket in group.buckets]
        with TrainingSteps(trainer, module, TensorMeter(device)) as steps:
            steps.warm_up(adapter.synthetic_batch(buckets[0].shape, 1, device))

            def peak(*sizes: tuple[Bucket, int]) -> int:
                batches = [adapter.synthetic_batch(bucket.shape, size, device) for bucket, size in sizes]
                return steps.run(batches[0] if len(batches) == 1 else adapter.join(batches)).peak

            function(buckets, peak)

    trainer_with(folder, AtFitStart(at_start)).fit(model, datamodule=Data(train_ds))


def assert_largest(size: int, fits: Callable[[int], bool]) -> None:
    """No batch size that fits is more than two percent larger: memory grows with the batch, so one step shows it."""
    assert fits(size)
    assert not fits(math.floor(size / 0.98) + 1)


def calibrated(folder: Path, model: LightningModule, train_ds: dict, **options) -> tuple[Profile, list]:
    results: list = []
    path = folder / "profile.yaml"
    callback = OOMptimizer(profile=path, safety_margin=0.0, guard=False, listener=results.append, **options)
    trainer_with(folder, callback).fit(model, datamodule=Data(train_ds))
    return Profile.read(path), results


CASES = {
    "SALMT5, speech": ("salm_t5", {"bucket_duration_bins": SPEECH_BINS}, 22),
    "SALMT5, text": (
        "salm_t5",
        {
            "bucket_duration_bins": TEXT_BINS,
            "use_multimodal_sampling": True,
            "input_cfg": [{"type": "parallel_text"}],
        },
        16,
    ),
    "SALM": ("salm", {"bucket_duration_bins": FEW_SPEECH_BINS}, 16),
    "CTC": ("ctc", {"bucket_duration_bins": FEW_SPEECH_BINS}, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_every_batch_size_is_the_largest_that_fits(
    name: str, tmp_path: Path, salm_t5_config: dict, request: pytest.FixtureRequest
) -> None:
    family, train_ds, mib = CASES[name]
    build = {
        "salm_t5": lambda: SALMT5(salm_t5_config),
        "salm": lambda: tiny_salm(tmp_path),
        "ctc": lambda: tiny_ctc(tmp_path),
    }[family]
    budget = mib * MIB
    profile, results = calibrated(tmp_path, build(), train_ds, memory_budget=budget)
    sizes = profile.groups[""].bucket_batch_size
    assert len(sizes) == len(train_ds["bucket_duration_bins"])

    def compare(buckets: list[Bucket], peak: Callable) -> None:
        for bucket, size in zip(buckets, sizes, strict=True):
            assert_largest(size, lambda n, bucket=bucket: peak((bucket, n)) <= budget)

    steps_at_fit_start(tmp_path, build(), train_ds, compare)
    assert sum(result.probes for result in results) <= (2.5 if len(sizes) == 30 else 4) * len(sizes)


def zip_of_speech_and_text() -> dict:
    return {
        "multi_config": True,
        "sampler_fusion": "zip",
        "sampler_weights": {"audio": 0.5, "text": 0.5},
        "audio": {"bucket_duration_bins": [[s, o] for s in (1, 5) for o in (6, 20)]},
        "text": {
            "bucket_duration_bins": [[i, o] for i in (10, 80) for o in (10, 40)],
            "use_multimodal_sampling": True,
            "input_cfg": [{"type": "parallel_text"}],
        },
    }


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_zip_all_pairs_of_buckets_fit_and_the_binding_pair_fills_the_budget(
    share: float, tmp_path: Path, salm_t5_config: dict
) -> None:
    budget = 40 * MIB
    train_ds = zip_of_speech_and_text()
    profile, _ = calibrated(tmp_path, SALMT5(salm_t5_config), train_ds, memory_budget=budget, modality_share=share)

    def compare(buckets: list[Bucket], peak: Callable) -> None:
        sized = [
            (bucket, profile.groups[bucket.group].bucket_batch_size[bucket.index])
            for bucket in sorted(buckets, key=lambda bucket: bucket.group)
        ]
        peaks = [peak(*pair) for pair in product(sized[:4], sized[4:])]
        assert max(peaks) <= budget
        assert max(peaks) >= 0.95 * budget

    steps_at_fit_start(tmp_path, SALMT5(salm_t5_config), train_ds, compare)


def test_the_share_of_the_most_tokens_per_second_is_found_by_timing(tmp_path: Path, salm_t5_config: dict) -> None:
    options = {"memory_budget": 40 * MIB, "modality_share": "auto"}
    profile, _ = calibrated(tmp_path, SALMT5(salm_t5_config), zip_of_speech_and_text(), **options)
    # Text makes many more tokens of a second than speech: it gets the larger part.
    assert profile.groups["text"].bucket_batch_size[0] > 3 * profile.groups["audio"].bucket_batch_size[0]


def test_what_was_measured_is_in_the_profile(tmp_path: Path, salm_t5_config: dict) -> None:
    train_ds = {"bucket_duration_bins": [[1, 6], [2, 6], [2, 20], [4, 20]]}
    profile, results = calibrated(tmp_path, SALMT5(salm_t5_config), train_ds, memory_budget="30MiB")
    assert [result.bucket.bin for result in sorted(results, key=lambda r: r.bucket.index)] == [
        *((1.0, 6.0), (2.0, 6.0), (2.0, 20.0), (4.0, 20.0))
    ]
    assert profile.settings["budget"] == 30 * MIB
    assert profile.settings["memory_budget"] == "30MiB"
    assert profile.fingerprint["model"]["class"] == "nemo_emmett.models.salm_t5.SALMT5"
    for measure, size in zip(profile.measures[""], profile.groups[""].bucket_batch_size, strict=True):
        assert measure.batch_size == size
        assert 0.8 * 30 * MIB < measure.confirmed_peak <= 30 * MIB
        assert measure.memory.peak(size) == pytest.approx(measure.confirmed_peak, rel=1e-6)
        assert measure.seconds > 0
        assert measure.time.seconds(size) == pytest.approx(measure.seconds, rel=3)


def test_the_optimizers_step_alone_may_be_too_much(tmp_path: Path, salm_t5_config: dict) -> None:
    with pytest.raises(ConfigError, match=r"OOMptimizer: the optimizer's step alone needs .* budget is 100.0 KiB"):
        calibrated(tmp_path, SALMT5(salm_t5_config), {"bucket_duration_bins": [1.0]}, memory_budget="100KiB")


def test_bins_that_exceed_the_budget_are_named(tmp_path: Path, salm_t5_config: dict) -> None:
    with pytest.raises(ConfigError, match=r"bucket_duration_bins: bucket 2 \[200, 5\] needs .* with one example"):
        calibrated(
            tmp_path, SALMT5(salm_t5_config), {"bucket_duration_bins": [[1, 5], [200, 5]]}, memory_budget="30MiB"
        )


def test_zip_with_a_model_that_needs_speech_in_every_batch(tmp_path: Path) -> None:
    """NeMo's SALM: its flat batch holds both, and one of text alone would not run."""
    train_ds = zip_of_speech_and_text() | {"token_equivalent_duration": 0.08}
    profile, _ = calibrated(tmp_path, tiny_salm(tmp_path), train_ds, memory_budget=30 * MIB)

    def compare(buckets: list[Bucket], peak: Callable) -> None:
        sized = [(bucket, profile.groups[bucket.group].bucket_batch_size[bucket.index]) for bucket in buckets]
        outer = [pair for pair in sized if pair[0].index in (0, 3)]
        audio, text = ([pair for pair in outer if pair[0].group == group] for group in ("audio", "text"))
        peaks = [peak(*pair) for pair in product(audio, text)]
        assert max(peaks) <= 30 * MIB

    steps_at_fit_start(tmp_path, tiny_salm(tmp_path), train_ds, compare)


def test_a_model_that_cannot_train_on_text_alone_is_reported(tmp_path: Path) -> None:
    train_ds = zip_of_speech_and_text() | {"sampler_fusion": "round_robin"}
    with pytest.raises(ConfigError, match="SALM cannot train on a batch of text alone; train nemo_emmett's SALMGPT"):
        calibrated(tmp_path, tiny_salm(tmp_path), train_ds, memory_budget=30 * MIB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_fill_the_budget_and_do_not_run_out_of_memory(tmp_path: Path, salm_t5_config: dict) -> None:
    budget, on_gpu = 2 * 2**30, {"accelerator": "gpu", "precision": "bf16-mixed"}
    train_ds = {"bucket_duration_bins": [[s, o] for s in (2, 5, 10, 20) for o in (20, 80)]}
    results: list = []
    callback = OOMptimizer(
        profile=tmp_path / "profile.yaml", memory_budget=budget, safety_margin=0.0, guard=False, listener=results.append
    )
    trainer_with(tmp_path, callback, **on_gpu).fit(SALMT5(salm_t5_config), datamodule=Data(train_ds))
    assert all(0.9 * budget <= result.confirmed.peak <= budget for result in results)

    def train(trainer: Trainer, module: LightningModule) -> None:
        adapter, device = adapter_for(module), trainer.strategy.root_device
        with TrainingSteps(trainer, module, meter_for(device)) as steps:
            steps.warm_up(adapter.synthetic_batch(results[0].bucket.shape, 1, device))
            for result in random.Random(0).choices(results, k=200):
                batch = adapter.synthetic_batch(result.bucket.shape, result.batch_size, device)
                assert not steps.run(batch).out_of_memory

    trainer_with(tmp_path, AtFitStart(train), **on_gpu).fit(SALMT5(salm_t5_config), datamodule=Data(train_ds))
