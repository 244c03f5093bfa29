"""Profiles are found, checked, applied and written; also after NeMo's exp_manager has moved them to ``run_N``."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.buckets import read_groups
from nemo_emmett.oomptimizer.profile import Buckets, Event, Measure, MemoryLine, Profile
from nemo_emmett.oomptimizer.profile_store import ProfiledRun, ProfileStore, profile_of_recipe, restore_archived
from tests.models.batches import audio_batch
from tests.oomptimizer.fits import Data, trainer_with
from tests.oomptimizer.injected import Bomb

TRAIN_DS = {"bucket_duration_bins": [[1.5, 8], [3, 8]], "bucket_batch_size": [4, 2]}
MANAGER = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True, "create_tensorboard_logger": False}


FOUND = Profile({"": Buckets((4.0, 8.0), (32, 14))}, settings={"mode": "calibrate", "precision": 0.01})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda message, **_: lines.append(message))
    return lines


def run_of(
    folder: Path, train_ds: dict | None = None, precision: float = 0.01, width: int = 1, **options
) -> ProfiledRun:
    """A run without a trainer, whose fingerprint is the width of its model and its bins."""

    def fingerprint(config, planned: bool) -> dict:
        device = {} if planned else {"device": "cpu"}
        return {"width": width, "bins": OmegaConf.to_container(config).get("bucket_duration_bins"), **device}

    section = OmegaConf.create(train_ds or {"shuffle": True})
    OmegaConf.set_struct(section, True)
    settings = {"precision": precision}
    options = {"mode": "calibrate", "folder": folder, **options}
    return ProfiledRun(section, "data.train_ds", settings=settings, fingerprint=fingerprint, **options)


@pytest.mark.parametrize("given", [True, False], ids=["a given path", "a path of its own"])
def test_a_profile_that_is_added_is_found_and_applied_by_the_next_run(tmp_path: Path, given: bool) -> None:
    path = tmp_path / "mine.yaml" if given else None
    first = run_of(tmp_path)
    store = ProfileStore(path)
    assert store.find(first) is None
    assert "bucket_batch_size" not in first.train_ds
    store.add(FOUND, first)
    assert first.train_ds == {"shuffle": True, "bucket_duration_bins": [4, 8], "bucket_batch_size": [32, 14]}
    again, later = ProfileStore(path), run_of(tmp_path)
    assert again.find(later) == FOUND
    assert later.train_ds == first.train_ds
    assert again.path == store.path
    assert [str(file) for file in tmp_path.glob("*.yaml")] == [store.path]


@pytest.mark.parametrize("other", [{"width": 2}, {"precision": 0.1}, {"train_ds": {"bucket_duration_bins": [5]}}])
def test_without_a_path_runs_of_another_kind_have_profiles_of_their_own(tmp_path: Path, other: dict) -> None:
    store, first = ProfileStore(), run_of(tmp_path)
    store.find(first)
    path = store.path
    store.add(FOUND, first)
    assert store.find(run_of(tmp_path, **other)) is None  # of the same callback in another fit
    assert store.path != path


def test_only_rank_0_reads_and_writes_and_all_use_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "rank0.yaml"
    FOUND.write(path)
    other = run_of(tmp_path, is_rank_0=False, broadcast=lambda mine: (str(path), FOUND))
    store = ProfileStore(tmp_path / "on_my_disk.yaml")
    assert store.find(other) == FOUND
    assert other.train_ds.bucket_batch_size == [32, 14]
    assert store.path == str(path)
    path.unlink()
    store.add(FOUND, other)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_another_fingerprint_is_refused_and_a_plan_compares_no_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    fingerprint = {"width": 1, "bins": [4, 8], "device": "cuda"}
    replace(FOUND, fingerprint=fingerprint).write(path)
    with pytest.raises(ConfigError, match=r"made for something else \(device was cuda and is cpu\); delete the file"):
        ProfileStore(path).find(run_of(tmp_path))
    planned = {"width": 2, "bins": [4, 8]}
    replace(FOUND, settings={"mode": "plan"}, fingerprint=planned).write(path)
    with pytest.raises(ConfigError, match=r"width was 2 and is 1"):
        ProfileStore(path).find(run_of(tmp_path))
    assert ProfileStore(path).find(run_of(tmp_path, width=2)) is not None


def test_other_settings_cause_a_warning(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    FOUND.write(path)
    ProfileStore(path).find(run_of(tmp_path))
    assert said == [
        f"OOMptimizer: data.train_ds.bucket_batch_size is [32, 14] for the bins [4, 8], from {path}.",
    ]
    ProfileStore(path).find(run_of(tmp_path, precision=0.1))
    assert "measured with other settings (precision was 0.01 and is 0.1)" in said[-1]
    count = len(said)
    ProfileStore(path).find(run_of(tmp_path, precision=0.1, mode="guard"))
    assert len(said) == count + 1  # the batch sizes alone


def test_lowered_sizes_and_slopes_are_those_of_the_buckets() -> None:
    train_ds = OmegaConf.create({"bucket_duration_bins": [4, 8]})
    groups = read_groups(train_ds)
    small, large = groups[""].buckets
    store = ProfileStore()
    measures = (Measure(4.0, 32, 1, memory=MemoryLine(0.0, 1.0, 7.0)), Measure(8.0, 14, 1))
    store.profile = replace(FOUND, measures={"": measures})
    assert store.batch_sizes(groups) == {small: 32, large: 14}
    assert store.slopes(groups) == {small: 7.0}
    event = Event("2030-01-02T03:04:05+00:00", 17, str(large), "out of memory in backward", 14, 13)
    lowered = store.lowered({small: 32, large: 13}, [event])
    assert lowered.groups[""].bucket_batch_size == (32, 13)
    assert lowered.events == (event,)
    assert store.profile.events == ()


def test_a_recipes_own_batch_sizes_become_a_profile() -> None:
    speech = {"bucket_duration_bins": [4, 8], "bucket_batch_size": [3, 2]}
    text = {"batch_size": 9, "max_duration": 20}
    train_ds = OmegaConf.create({"multi_config": True, "speech": speech, "text": text})
    profile = profile_of_recipe(read_groups(train_ds), "data.train_ds", {"world_size": 1}, {"mode": "guard"})
    assert profile.groups == {
        "speech": Buckets((4.0, 8.0), (3, 2)),
        "text": Buckets((20.0,), (9,), "max_duration"),
    }
    train_ds.text.batch_size = 0
    with pytest.raises(ConfigError, match=r"^data\.train_ds\.text\.batch_size: 0 cannot be used; give a whole number"):
        profile_of_recipe(read_groups(train_ds), "data.train_ds", {}, {})


# NeMo's exp_manager


class Killed(Callback):
    """Kills the process before its first step."""

    def on_train_start(self, trainer, pl_module) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def start(
    folder: Path, config: dict, *callbacks: Callback, profile=None, fails_in=None, train_ds=TRAIN_DS
) -> list[int]:
    """One start of a training in a log folder; gives the batch sizes that the loader was built with."""
    torch.manual_seed(1)
    model = SALMT5(config)
    batches = [audio_batch(model, [(0.5 + 0.1 * i, "ein rotes haus") for i in range(4)], seed=s) for s in range(2)]
    data = Data(dict(train_ds), batches)
    if fails_in is not None:
        Bomb(model.perception).phase = fails_in
    trainer = trainer_with(None, OOMptimizer(mode="guard", profile=profile), *callbacks)
    exp_manager(trainer, {"explicit_log_dir": str(folder), "create_checkpoint_callback": False, **MANAGER})
    trainer.fit(model, datamodule=data)
    return data.seen["bucket_batch_size"]


def in_a_process_that_dies(function: Callable, *args, **kwargs) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("profile", [None, "log/oomptimizer.yaml", "{tmp}/log/oomptimizer.yaml"])
def test_lowered_sizes_outlive_starts_of_which_one_is_killed(
    tmp_path: Path, salm_t5_config: dict, monkeypatch: pytest.MonkeyPatch, profile: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = profile and profile.format(tmp=tmp_path)
    log = tmp_path / "log"
    assert start(log, salm_t5_config, profile=profile, fails_in="backward") == [4, 2]
    (path,) = log.glob("oomptimizer*.yaml")
    assert Profile.read(path).groups[""].bucket_batch_size == (3, 2)
    for when in (Killed(), _KilledEarly()):
        in_a_process_that_dies(start, log, salm_t5_config, when, profile=profile)
    assert start(log, salm_t5_config, profile=profile) == [3, 2]
    assert start(log, salm_t5_config, profile=profile) == [3, 2]
    assert [file.relative_to(log) for file in log.rglob("oomptimizer*.yaml")] == [Path(path.name)]


class _KilledEarly(Killed):
    """Kills the process when exp_manager has archived the profile and the callback has not yet looked for it."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.on_train_start(trainer, pl_module)


def test_of_archived_profiles_the_newest_that_fits_is_used(
    tmp_path: Path, salm_t5_config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    contents = {
        "run_0": {"train_ds": TRAIN_DS | {"bucket_batch_size": [1, 1]}},
        "run_1": {"train_ds": TRAIN_DS | {"bucket_batch_size": [2, 2]}},
        "run_2": {"train_ds": {"bucket_duration_bins": [9], "bucket_batch_size": [5]}},  # of other bins
        "run_3": {"train_ds": TRAIN_DS, "fingerprint": {"world_size": 64}},
        "run_4": "no profile",
    }
    for number, (run, content) in enumerate(contents.items()):
        (log / run).mkdir(parents=True)
        (log / run / "mine.yaml").write_text(yaml.safe_dump(content))
        os.utime(log / run / "mine.yaml", (number, number))
    lines: list[str] = []
    monkeypatch.setattr(logging, "info", lambda message, **_: lines.append(message))
    assert start(log, salm_t5_config, profile=log / "mine.yaml") == [2, 2]
    (line,) = [line for line in lines if "moved back" in line]
    assert str(log / "run_1" / "mine.yaml") in line
    assert not (log / "run_1" / "mine.yaml").exists()
    assert all((log / run / "mine.yaml").exists() for run in contents if run != "run_1")


def test_outside_of_exp_managers_log_folder_nothing_is_moved(tmp_path: Path) -> None:
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "mine.yaml").write_text(yaml.safe_dump({"train_ds": TRAIN_DS}))
    assert restore_archived(tmp_path / "mine.yaml", lambda profile: None) is None
    assert (tmp_path / "run_0" / "mine.yaml").exists()


def test_a_profile_that_does_not_fit_any_more_is_refused_and_where_the_sentence_says(
    tmp_path: Path, salm_t5_config: dict
) -> None:
    path = tmp_path / "log" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"train_ds": TRAIN_DS, "fingerprint": {"world_size": 64}}))
    with pytest.raises(ConfigError, match="world_size was 64 and is 1"):
        start(path.parent, salm_t5_config, profile=path)
    assert path.exists()
    path.unlink()
    assert start(path.parent, salm_t5_config, profile=path) == [4, 2]


def test_a_profile_that_another_rank_archives_while_it_is_read_is_none(tmp_path: Path) -> None:
    assert OOMptimizer(profile=tmp_path / "gone.yaml").profile is None
    (tmp_path / "corrupt.yaml").write_text("x: [")
    with pytest.raises(ConfigError, match="corrupt"):
        OOMptimizer(profile=tmp_path / "corrupt.yaml")
