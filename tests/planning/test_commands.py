"""Batch sizes from a recipe: on this machine, for another, and with the bins that go with them."""

from __future__ import annotations

import re
from dataclasses import replace
from operator import lt
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from rich.console import Console

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.data.bucketing.length_stats import measure, solve
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import plain
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.profile import Buckets, Profile
from nemo_emmett.planning import checkpointing, oomptimize, plan
from nemo_emmett.planning.planner import Planner
from nemo_emmett.training import build_training

from ..oomptimizer.models import tiny_salm

BUDGET = 24 * 2**20


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def test_on_the_device_at_hand(recipe, path: Path, tmp_path: Path, console: Console) -> None:
    options = {"memory_budget": BUDGET, "predict_epoch": True, "output": tmp_path / "sizes.png"}
    found = oomptimize(recipe, build_training, profile=path, console=console, **options)

    assert Profile.read(path).groups == found.groups
    assert found.groups["audio"].bucket_duration_bins == (0.6, 1.0)
    peaks = [m.confirmed_peak or m.predicted_peak for of_group in found.measures.values() for m in of_group]
    assert all(0.95 * BUDGET < peak / 0.97 <= BUDGET for peak in peaks)
    # All that fits into the buckets, in full batches, in the measured time of each.
    lengths = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0] * 2
    first, second = found.measures["audio"]
    audio = 4 * first.seconds / first.batch_size + 8 * second.seconds / second.batch_size
    assert len(lengths) == 12
    assert found.epoch_seconds > audio
    text = console.export_text()
    for shown in ("audio: bucket 2 1", "text: bucket 3 [12, 9]", found.block().splitlines()[-1], str(path)):
        assert shown in text
    assert (tmp_path / "sizes.png").read_bytes()[1:4] == b"PNG"


class Sizes(Callback):
    """Notes the batch sizes that training begins with."""

    def on_train_start(self, trainer, module) -> None:
        self.seen = list(trainer.datamodule.cfg.train_ds.bucket_batch_size)


def assert_plan_is_measured(planned: Profile, measured: Profile) -> None:
    """Sizes agree within the precision of the search; where they are equal, so are the peaks."""
    assert planned.groups[""].bucket_duration_bins == measured.groups[""].bucket_duration_bins
    pairs = list(zip(planned.measures[""], measured.measures[""], strict=True))
    # On the device no step may exceed the budget, so its search goes another way; both end within a percent.
    assert all(p.batch_size == pytest.approx(m.batch_size, rel=0.01) for p, m in pairs)
    same = [(p.confirmed_peak, m.confirmed_peak) for p, m in pairs if p.batch_size == m.batch_size]
    assert same
    assert all(of_plan == of_device for of_plan, of_device in same)


def test_a_plan_finds_what_is_measured_and_a_training_takes_it(
    text_recipe, tmp_path: Path, console: Console, monkeypatch
) -> None:
    built = []
    original = SALMT5.__init__

    def note(self, cfg) -> None:
        original(self, cfg)
        built.append(type(next(self.parameters())).__name__)

    monkeypatch.setattr(SALMT5, "__init__", note)
    options = {"memory": str(BUDGET), "memory_fraction": 1.0, "console": console}
    planned = plan(text_recipe, build_training, profile=tmp_path / "plan.yaml", **options)
    assert built == ["FakeTensor"]  # no weights were made, nor read
    assert type(torch.ones(1)) is torch.Tensor
    assert torch.utils.swap_tensors.__module__ == "torch.utils"
    assert (planned.settings["memory"], planned.epoch_seconds) == (str(BUDGET), None)

    options = {"memory_budget": BUDGET, "console": console}
    measured = oomptimize(text_recipe, build_training, profile=tmp_path / "measured.yaml", **options)
    assert_plan_is_measured(planned, measured)

    quiet = {"max_steps": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    training = build_training(OmegaConf.merge(text_recipe, {"trainer": quiet}))
    sizes = Sizes()
    training.trainer.callbacks += [OOMptimizer(profile=tmp_path / "plan.yaml"), sizes]
    training.fit()
    assert sizes.seen == list(planned.groups[""].bucket_batch_size)


def test_ddp_leaves_less(text_recipe, path: Path, console: Console) -> None:
    text_recipe.trainer.devices = 8
    options = {"memory": str(BUDGET), "memory_fraction": 1.0, "console": console}
    found = plan(text_recipe, build_training, profile=path, **options)
    gradients = 4 * found.fingerprint["parameters"]["trainable"]
    assert found.settings["budget"] == BUDGET - gradients


def test_bins_with_the_shortest_epoch(text_recipe, path: Path, console: Console) -> None:
    options = {"optimise_bins": True, "num_buckets": 2, "num_sub_buckets": 2, "console": console}
    found = plan(text_recipe, build_training, memory="40MiB", profile=path, **options)
    bins = found.groups[""].bucket_duration_bins
    assert len(bins) <= 4
    measures = found.measures[""]
    assert all(m.seconds == pytest.approx(m.time.seconds(m.batch_size)) for m in measures)
    assert found.epoch_seconds == pytest.approx(self_made_epoch(text_recipe, found), rel=1e-3)
    text = console.export_text()
    for shown in ("least padding", "shortest epoch", "examples/s", "A100-80GB: 312 TFLOP/s at 35 %"):
        assert shown in text


def self_made_epoch(recipe, profile: Profile) -> float:
    """Each example's share of a full batch of the smallest bucket that it fits into."""
    settings = plain(recipe.data.train_ds) | {"prompt_format": "emmett_t5", "audio_locator_tag": "<|audio|>"}
    tokenizer = SALMT5({k: v for k, v in plain(recipe.model).items() if k != "_target_"}).tokenizer
    lengths = measure(parse_dataset(settings, "x").groups[0], tokenizer, ExampleKind.TRANSLATION, two_dimensional=True)
    assert solve(lengths, 2, 2)
    total = 0.0
    for pair in zip(*lengths.sides, strict=True):
        fitting = [
            m for m in profile.measures[""] if all(cap >= length for cap, length in zip(m.bin, pair, strict=True))
        ]
        strip = min(m.bin[0] for m in fitting)
        measure_of = min((m for m in fitting if m.bin[0] == strip), key=lambda m: m.bin[1])
        total += measure_of.seconds / measure_of.batch_size
    return total


@pytest.mark.parametrize(("memory", "shares", "best"), [("40MiB", (0.0, 0.5, 1.0), 1.0), ("64GiB", (0.0, 1.0), 0.0)])
def test_the_share_of_checkpointing_with_the_shortest_epoch(
    text_recipe, tmp_path: Path, console: Console, monkeypatch, memory: str, shares: tuple[float, ...], best: float
) -> None:
    """With little memory the larger batches count, with much of it the operations."""
    monkeypatch.setattr(checkpointing, "SHARES", shares)
    options = {"memory": memory, "console": console}
    found = plan(text_recipe, build_training, profile=tmp_path / "best", choose_checkpointing=True, **options)
    text = console.export_text()
    rows = re.findall(r"^(0|0\.25|0\.5|0\.75|1) +\d+ to \d+ +\S+ s +x (\S+)$", text, re.MULTILINE)
    ratios = {float(share): float(ratio) for share, ratio in rows}
    assert tuple(ratios) == shares
    assert ratios[0.0] == 1
    assert min(ratios, key=ratios.get) == best
    assert f"The profile is for trainings with `model.activation_checkpointing={best:g}`." in text
    assert "A100-80GB: 312 TFLOP/s at 35 %" in text

    assert found.epoch_seconds == pytest.approx(self_made_epoch(text_recipe, found), rel=1e-3)
    text_recipe.model.activation_checkpointing = best
    alone = plan(text_recipe, build_training, profile=tmp_path / "alone", **options)
    assert found.groups == alone.groups
    assert found.fingerprint == alone.fingerprint


def test_a_share_of_checkpointing_that_does_not_fit(text_recipe, console: Console) -> None:
    planner = Planner(text_recipe, build_training, BUDGET, 0.03, 0.5, "Batch sizes", console)
    bins = (2.0, 4.0)
    of = {
        0.5: Profile({"": Buckets(bins, (4, 9))}, epoch_seconds=50.0),
        0.75: Profile({"": Buckets(bins, (6, 12))}, epoch_seconds=40.0),
        1.0: Profile({"": Buckets(bins, (8, 16))}, epoch_seconds=60.0),
    }

    def find(of_share: Planner) -> Profile:
        share = of_share.cfg.model.activation_checkpointing
        if share in of:
            return of[share]
        raise ConfigError(f"too large at {share}", page=Help.OUT_OF_MEMORY)

    chosen, found = checkpointing.with_fastest_share(planner, find)
    assert (chosen.cfg.model.activation_checkpointing, found) == (0.75, of[0.75])
    assert "activation_checkpointing" not in text_recipe.model
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["0.25", "does", "not", "fit"] in lines
    assert ["0.5", "4", "to", "9", "50.0", "s", "x", "1.000"] in lines
    assert ["0.75", "6", "to", "12", "40.0", "s", "x", "0.800"] in lines

    of[0.5] = replace(of[0.5], epoch_seconds=40.7)
    assert checkpointing.with_fastest_share(planner, find)[1] == of[0.5]  # 2 % more are as good
    of.clear()
    with pytest.raises(ConfigError, match="too large at 1"):
        checkpointing.with_fastest_share(planner, find)


def test_the_epoch_of_packed_rows_is_not_predicted(text_recipe, console: Console) -> None:
    """Only how the shares compare is known: an example would count as a row."""
    planner = Planner(text_recipe, build_training, BUDGET, 0.03, 0.5, "Batch sizes", console)
    rows = {"": Buckets((256.0,), (8,), "row_tokens")}
    _, found = checkpointing.with_fastest_share(
        planner, lambda of_share: Profile(rows, epoch_seconds=50.0 + of_share.cfg.model.activation_checkpointing)
    )
    assert (found.groups, found.epoch_seconds) == (rows, None)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["1", "8", "to", "8", "–", "x", "1.020"] in lines


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory": None}, "--memory: is missing; name the device to plan for"),
        ({"memory": "much"}, "--memory: 'much' is neither a known device nor an amount of memory"),
        ({"memory": "80GX"}, "--memory: '80GX' has the unit 'gx'"),
        ({"memory": "10KiB"}, "the optimizer's step alone needs"),
        (
            {"memory": "1GiB", "memory_fraction": -1},
            "--memory-fraction: -1 cannot be used; give a number",
        ),
        ({"memory": "1GiB", "num_sub_buckets": 0}, "--num-sub-buckets: 0 cannot be used; give a whole number from 1"),
        ({"memory": "1GiB", "limit": "all"}, "--limit: 'all' cannot be used"),
    ],
)
def test_an_option_that_cannot_be_used(text_recipe, path: Path, console: Console, options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(text_recipe, build_training, profile=path, console=console, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


FSDP2 = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy", "tensor_parallel_size": 1}


def test_a_sharded_model_leaves_more(text_recipe, tmp_path: Path, console: Console) -> None:
    options = {"memory": str(BUDGET), "memory_fraction": 1.0, "console": console}
    whole = plan(text_recipe, build_training, profile=tmp_path / "whole.yaml", **options)
    text_recipe.trainer.strategy = FSDP2 | {"data_parallel_size": "auto"}
    text_recipe.trainer.update(devices=8, num_nodes=2)
    found = plan(text_recipe, build_training, profile=tmp_path / "sharded.yaml", **options)
    assert (whole.fingerprint["sharded_over"], found.fingerprint["sharded_over"]) == (1, 16)
    assert found.fingerprint["parameters"] == whole.fingerprint["parameters"]
    assert all(map(lt, whole.groups[""].bucket_batch_size, found.groups[""].bucket_batch_size))
    floors = [profile.measures[""][0].memory.floor for profile in (whole, found)]
    assert floors[1] < floors[0]
    assert "sharded over 16 devices" in console.export_text()
    assert not torch.distributed.is_initialized()

    # Two groups of eight: more on each device than of one of sixteen, less than of a whole model.
    text_recipe.trainer.strategy = {"_target_": "nemo_emmett.strategies.HybridShardedStrategy", "replicas": 2}
    hybrid = plan(text_recipe, build_training, profile=tmp_path / "hybrid.yaml", **options)
    assert hybrid.fingerprint["sharded_over"] == {"dp_replicate": 2, "dp_shard": 8, "tensor_parallel": 1}
    assert floors[1] < hybrid.measures[""][0].memory.floor < floors[0]
    assert "sharded over 8 devices, of which there are 2 groups" in console.export_text()


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (FSDP2, "trainer.strategy.data_parallel_size: is needed to plan for a model that is sharded;"),
        (
            FSDP2 | {"data_parallel_size": 0},
            "trainer.strategy.data_parallel_size: 0 cannot be used; give a whole number from 1.",
        ),
        (FSDP2 | {"data_parallel_size": 2, "tensor_parallel_size": 2}, "trainer.strategy.tensor_parallel_size: 2 is"),
        (
            FSDP2 | {"data_parallel_size": 2, "tensor_parallel_size": "auto"},
            "trainer.strategy.tensor_parallel_size: is",
        ),
    ],
)
def test_sharding_that_cannot_be_planned(text_recipe, path: Path, console: Console, strategy, sentence) -> None:
    text_recipe.trainer.strategy = strategy
    text_recipe.trainer.devices = "auto"
    with pytest.raises(ConfigError) as error:
        plan(text_recipe, build_training, memory="80GiB", profile=path, console=console)
    assert str(error.value).startswith(sentence)
    assert not torch.distributed.is_initialized()


def test_a_profile_is_not_overwritten(text_recipe, path: Path) -> None:
    path.touch()
    for command in (
        lambda: oomptimize(text_recipe, build_training, profile=path),
        lambda: plan(text_recipe, build_training, memory="80GiB", profile=path),
    ):
        with pytest.raises(ConfigError, match=r"--profile: '.*profile\.yaml' exists already; delete it, or name"):
            command()


def test_nemos_own_salm(tmp_path: Path, console: Console) -> None:
    model = OmegaConf.to_container(tiny_salm(tmp_path).cfg)
    train_ds = {
        "prompt_format": model["prompt_format"],
        "audio_locator_tag": model["audio_locator_tag"],
        "token_equivalent_duration": 0.08,
        "use_bucketing": True,
        "use_multimodal_sampling": True,
        "bucket_duration_bins": [20, 60],
        "input_cfg": [{"type": "multimodal_conversation", "manifest_filepath": "unread.jsonl"}],
    }
    recipe = OmegaConf.create(
        {
            "model": {"_target_": "nemo.collections.speechlm2.models.SALM", **model},
            "data": {"train_ds": train_ds},
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4},
        }
    )
    options = {"memory_budget": BUDGET, "console": console}
    measured = oomptimize(recipe, build_training, profile=tmp_path / "measured.yaml", **options)
    options = {"memory": str(BUDGET), "memory_fraction": 1.0, "console": console}
    planned = plan(recipe, build_training, profile=tmp_path / "plan.yaml", **options)
    assert_plan_is_measured(planned, measured)

    with pytest.raises(ConfigError, match=r"^--choose-checkpointing: SALM is no model of nemo_emmett"):
        plan(recipe, build_training, profile=tmp_path / "none.yaml", choose_checkpointing=True, **options)
