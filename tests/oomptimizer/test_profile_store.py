"""A profile outlives NeMo's exp_manager, which moves the loose files of its log folder to ``run_N`` at each start."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.oomptimizer.profile_store import restore_archived
from tests.models.batches import audio_batch
from tests.oomptimizer.fits import Data, trainer_with
from tests.oomptimizer.injected import Bomb

TRAIN_DS = {"bucket_duration_bins": [[1.5, 8], [3, 8]], "bucket_batch_size": [4, 2]}
MANAGER = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True, "create_tensorboard_logger": False}


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
