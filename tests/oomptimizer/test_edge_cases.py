"""What goes wrong only in a second look: wavering readings, other settings, ranks that see different files."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import EXIT_USER_ERROR, ConfigError
from nemo_emmett.oomptimizer.adapters.base import Extent
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape
from nemo_emmett.oomptimizer.cuda_meter import CudaMeter
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.meter import Reading
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.oomptimizer.search import Search
from nemo_emmett.oomptimizer.zip_search import ZipSearch
from tests.callbacks.test_oomptimizer import AUDIO, BINS, built
from tests.callbacks.test_oomptimizer import Model as Plain

from .fits import Data, trainer_with
from .injected import Blind, Bomb, Charges, Guarded, fit
from .rows import Rows, RowsAdapter, batches_of_rows, text_group
from .test_search import GIB, JointProgram, program, thirty_buckets, true_maximum, two_groups

GROUP = text_group((4.0, 4.0), (8.0, 8.0))
SMALL, LARGE = GROUP.buckets


# Search


@pytest.mark.parametrize("seed", range(10, 25))
def test_readings_that_waver_by_two_percent_cost_a_few_percent(seed: int) -> None:
    """Of two sizes that lie close together they give any line, by which the others must not go."""
    of_program, numbers = program(seed), random.Random(seed)
    budget = int(of_program.base * random.Random(seed).uniform(3, 40))
    peaks = []

    def probe(bucket: Any, examples: int) -> Reading:
        above = of_program.peak(bucket.shape, examples) - of_program.base
        peaks.append(of_program.base + above * numbers.uniform(0.98, 1.02))
        return Reading(int(peaks[-1]), of_program.base, 0, 0.0)

    for result in Search(probe, budget, of_program.base).run(thirty_buckets(seed)):
        best = true_maximum(lambda n, shape=result.bucket.shape: of_program.peak(shape, n) <= budget)
        assert 0.9 * best - 1 <= result.batch_size <= 1.1 * best
    assert max(peaks) <= 1.1 * budget
    assert len(peaks) <= 4 * 30


def test_zip_a_last_step_that_runs_out_of_memory_lowers_what_leaves_so_much_behind() -> None:
    """The allocator gives up where the counted bytes are still far from the budget."""
    budget, groups = 40 * GIB, two_groups()
    of_program = JointProgram()
    plain = {r.bucket: r.batch_size for r in ZipSearch(groups, of_program.probe, budget, GIB, GIB, 0.5).run()}
    kept = {bucket: of_program.parts({bucket: n})["text"][1] for bucket, n in plain.items() if bucket.group == "text"}
    worst = max(kept, key=kept.get)

    def probe(sizes: dict) -> Reading:
        reading = of_program.probe(sizes)
        fails = len(sizes) == 2 and sizes.get(worst) == plain[worst]
        return Reading(budget // 2, GIB, reading.held, 0.0, out_of_memory=True) if fails else reading

    found = {r.bucket: r.batch_size for r in ZipSearch(groups, probe, budget, GIB, GIB, 0.5).run()}
    assert found[worst] < plain[worst]


# Arguments, and values of the recipe


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_batch_size": 0}, "OOMptimizer.max_batch_size: 0 cannot be used; give a whole number from 1."),
        ({"max_batch_size": 2.5}, "OOMptimizer.max_batch_size: 2.5 cannot be used"),
        ({"tokens_per_second": -1}, "OOMptimizer.tokens_per_second: -1 cannot be used; give a number above 0."),
        ({"tokens_per_second": "many"}, "OOMptimizer.tokens_per_second: 'many' cannot be used; give a number above 0."),
        ({"guard": "no"}, "OOMptimizer.guard: 'no' cannot be used; give true or false, or null."),
        ({"then_train": "false"}, "OOMptimizer.then_train: 'false' cannot be used; give true or false, or null."),
    ],
)
def test_an_argument_without_meaning_is_reported_at_once(arguments: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        OOMptimizer(**arguments)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (8, ": 8 cannot be used; give a list, each item a whole number from 1."),
        ([3, 2, 0], ".2: 0 cannot be used; give a whole number from 1."),
        ([3, 2, "1"], ".2: '1' cannot be used"),
        ([3, 2, 1.5], ".2: 1.5 cannot be used"),
        ([3, 2], ": one is needed for each of the 3 bins"),
    ],
)
def test_guard_alone_refuses_batch_sizes_that_are_none(
    tmp_path: Path, salm_t5_config: dict, sizes: Any, sentence: str
) -> None:
    data = Data(BINS | {"bucket_batch_size": sizes})
    with pytest.raises(ConfigError, match=rf"^data\.train_ds\.bucket_batch_size{re.escape(sentence)}"):
        trainer_with(tmp_path, OOMptimizer(mode="guard")).fit(built(salm_t5_config), datamodule=data)


def test_the_callback_given_twice_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.callbacks: OOMptimizer is there 2 times; leave one"):
        trainer_with(tmp_path, OOMptimizer(), OOMptimizer()).fit(Plain(), datamodule=Data(dict(BINS)))


# The profile


def calibrated(folder: Path, model: LightningModule, train_ds: dict, **options: Any) -> OOMptimizer:
    callback = OOMptimizer(**{"memory_budget": "40MiB", "guard": False, **options})
    trainer_with(folder, callback).fit(model, datamodule=Data(train_ds))
    return callback


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("nemo.utils.logging.warning", lambda sentence, *_, **__: lines.append(sentence))
    return lines


def test_a_profile_of_other_settings_is_used_but_not_unnoticed(
    tmp_path: Path, salm_t5_config: dict, warnings: list[str]
) -> None:
    path = tmp_path / "profile.yaml"
    first = calibrated(tmp_path, built(salm_t5_config), dict(BINS), profile=path)
    again = calibrated(tmp_path, built(salm_t5_config), dict(BINS), profile=path)
    assert again.profile.groups == first.profile.groups
    assert not [sentence for sentence in warnings if "other settings" in sentence]
    calibrated(tmp_path, built(salm_t5_config), dict(BINS), profile=path, memory_budget="30MiB")
    (sentence,) = [sentence for sentence in warnings if "other settings" in sentence]
    assert "memory_budget was 40MiB and is 30MiB" in sentence


def test_without_a_path_other_settings_have_another_profile(tmp_path: Path, salm_t5_config: dict) -> None:
    larger = calibrated(tmp_path, built(salm_t5_config), dict(BINS)).profile
    smaller = calibrated(tmp_path, built(salm_t5_config), dict(BINS), memory_budget="30MiB").profile
    assert sum(smaller.groups[""].bucket_batch_size) < sum(larger.groups[""].bucket_batch_size)


def test_without_a_path_the_next_fit_of_another_model_has_its_own_profile(tmp_path: Path, salm_t5_config: dict) -> None:
    callback = OOMptimizer(memory_budget="40MiB", guard=False)
    for bins in ([1, 2], [1, 3]):
        trainer_with(tmp_path, callback).fit(built(salm_t5_config), datamodule=Data({"bucket_duration_bins": bins}))
        assert callback.profile.groups[""].bucket_duration_bins == tuple(bins)


def test_equal_bins_that_measure_something_else_are_refused(tmp_path: Path, salm_t5_config: dict) -> None:
    path, bins = tmp_path / "profile.yaml", {"bucket_duration_bins": [1, 2]}
    calibrated(tmp_path, built(salm_t5_config), dict(bins), profile=path)
    with pytest.raises(ConfigError, match=r"longest_example\.output_tokens was 24 and is 60"):
        calibrated(tmp_path, built(salm_t5_config), dict(bins), profile=path, tokens_per_second=30)


def test_a_profile_of_groups_in_turn_is_refused_for_a_zip(tmp_path: Path, salm_t5_config: dict) -> None:
    """Together in a step they would take the memory of both."""
    path = tmp_path / "profile.yaml"
    text = {"bucket_duration_bins": [[8, 8]], "input_cfg": [{"type": "txt_pair"}], "use_multimodal_sampling": True}
    groups = {"multi_config": True, "audio": {"bucket_duration_bins": [[1, 8]]}, "text": text}
    calibrated(tmp_path, built(salm_t5_config), dict(groups), profile=path)
    with pytest.raises(ConfigError, match="zip was False and is True"):
        calibrated(tmp_path, built(salm_t5_config), {**groups, "sampler_fusion": "zip"}, profile=path)


def test_all_ranks_go_by_what_the_first_one_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own disk this rank finds no profile, and would wait for the others in a collective of calibration."""
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"train_ds": AUDIO}))
    profile = Profile.read(path)
    callback = OOMptimizer(profile=tmp_path / "on_my_disk.yaml", guard=False)
    trainer, data = trainer_with(tmp_path, callback), Data({})
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda mine, src=0: (str(path), profile))
    trainer.fit(Plain(), datamodule=data)
    assert data.seen["bucket_batch_size"] == AUDIO["bucket_batch_size"]
    assert callback.path == str(path)


def test_what_guard_lowered_holds_in_the_next_fit_and_its_events_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("train_ds: {bucket_duration_bins: [[4, 4], [8, 8]], bucket_batch_size: [40, 20]}\n")
    monkeypatch.setattr("nemo_emmett.callbacks.oomptimizer.adapter_for", RowsAdapter)
    callback = OOMptimizer(profile=path)
    for phase in ("forward", "backward"):
        model, size = Rows(), Profile.read(path).groups[""].bucket_batch_size[1]
        charges = Charges(Bomb(model.first), {1: phase})
        text = {"use_multimodal_sampling": True, "input_cfg": [{"type": "txt_pair"}]}
        data = Data(text, batches_of_rows(*[size] * 3))
        trainer_with(tmp_path, callback, charges).fit(model, datamodule=data)
        assert data.seen["bucket_batch_size"] == [40, size]
    after = Profile.read(path)
    assert [(event.before, event.after) for event in after.events] == [(20, 19), (19, 18)]
    assert after.groups[""].bucket_batch_size == (40, 18)


# Guard


def refuse(sizes: dict, events: list) -> None:
    raise ConfigError("profile.yaml: the file cannot be written: no space left; name another place.")


def guard_of(model: Rows) -> Guard:
    return Guard(RowsAdapter(model), [GROUP], {SMALL: 40, LARGE: 20}, Blind(), 100, refuse)


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path: Path, warnings: list[str]) -> None:
    model = Rows()
    charges = Charges(Bomb(model.first), {1: "forward"})
    trainer = fit(model, batches_of_rows(20, 20, 20), tmp_path, [Guarded(guard_of(model)), charges])
    assert trainer.global_step == 3
    assert "holds for this run only: profile.yaml: the file cannot be written" in warnings[-1]


def test_leaving_without_a_profile_is_no_reason_to_start_again(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = Rows(capacity=0)
    with pytest.raises(SystemExit) as end:
        fit(model, batches_of_rows(20), tmp_path, [Guarded(guard_of(model))])
    assert end.value.code == EXIT_USER_ERROR
    assert "ran out of memory, and profile.yaml: the file cannot be written" in capfd.readouterr().err


def test_a_training_that_is_watched_keeps_the_allocators_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptying it makes every step wait for the device and for the driver."""
    asked: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 7)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda:0")))
    meter = OOMptimizer()._guard_meter(trainer)
    assert isinstance(meter, CudaMeter)
    with meter.measuring():
        pass
    assert asked == ["reset_peak_memory_stats"]
    assert meter.peak == 7


@pytest.mark.parametrize(("examples", "group"), [(30, "asr"), (12, "ast"), (20, "asr"), (7, "ast"), (99, "asr")])
def test_of_two_groups_of_speech_the_one_with_batches_of_that_size_is_lowered(examples: int, group: str) -> None:
    buckets = {
        name: tuple(Bucket(name, i, s, Shape("audio", s, 0, 12)) for i, s in enumerate((4.0, 8.0)))
        for name in ("asr", "ast")
    }
    groups = [Group(name, GROUP.config, of_group) for name, of_group in buckets.items()]
    sizes = dict(zip([*buckets["asr"], *buckets["ast"]], (60, 30, 24, 12), strict=True))
    guard = Guard(RowsAdapter(Rows()), groups, sizes, Blind(), 100, refuse)
    assert guard._bucket(Extent("audio", examples, 7.5, 3, 9)) == buckets[group][1]
