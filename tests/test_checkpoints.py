"""A run resumes from the newest complete checkpoint, and says which others it did not take."""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_emmett import checkpoints
from nemo_emmett.checkpoints import checkpoint_fault, with_resume_point
from nemo_emmett.training import train


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found = []
    others = checkpoints.logging.warning
    monkeypatch.setattr(
        checkpoints.logging,
        "warning",
        lambda said: found.append(said) if said.startswith("Not resumed") else others(said),
    )
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "exp" / "checkpoints").mkdir(parents=True)
    return tmp_path / "exp" / "checkpoints"


def save(path: Path, age: int, step: int = 1) -> Path:
    """A checkpoint; the lower its age, the newer it is."""
    torch.save({"global_step": step, "state_dict": {"weight": torch.arange(1000.0)}}, path)
    os.utime(path, (10_000 - age, 10_000 - age))
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    age = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    os.utime(path, (age, age))
    return path


def save_sharded(path: Path, complete: bool) -> Path:
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"...")
    torch.save({"global_step": 1}, path / "meta.pt")
    if complete:
        (path / ".metadata").write_bytes(b"...")
    return path


def resumed_from(folder: Path) -> str | None:
    """What NeMo resumes from, as a name, once it has been given its section of the recipe by us."""
    config = {"explicit_log_dir": str(folder.parent), "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    config |= {"create_tensorboard_logger": False, "create_checkpoint_callback": False}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    exp_manager(trainer, with_resume_point(OmegaConf.create(config), trainer))
    return Path(trainer.ckpt_path).name if trainer.ckpt_path else None


def test_a_single_complete_last_checkpoint_is_resumed_from_without_a_word(folder, warnings):
    save(folder / "step=2-last.ckpt", age=1)
    save(folder / "step=2.ckpt", age=0)
    assert resumed_from(folder) == "step=2-last.ckpt"
    assert warnings == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_last_checkpoint_gives_way_to_the_newest_complete_one(folder, warnings, share):
    save(folder / "step=2.ckpt", age=5)
    save(folder / "step=4.ckpt", age=3)
    cut(save(folder / "step=6.ckpt", age=1))
    last = cut(save(folder / "step=6-last.ckpt", age=0), share)
    size = last.stat().st_size
    assert resumed_from(folder) == "step=4.ckpt"
    (warning,) = warnings
    assert str(last) in warning
    assert str(folder / "step=4.ckpt") in warning
    assert (folder / "step=6-last.ckpt.unreadable").stat().st_size == size
    assert resumed_from(folder) == "step=4.ckpt"  # killed before it wrote a checkpoint, and started again
    assert len(warnings) == 1


def test_damage_in_the_middle_is_found_where_torch_loads_it_all_the_same(folder, warnings):
    save(folder / "step=2.ckpt", age=5)
    last = save(folder / "step=4-last.ckpt", age=0)
    with zipfile.ZipFile(last) as archive:
        info = next(info for info in archive.infolist() if "/data/0" in info.filename)
    damaged = bytearray(last.read_bytes())
    place = info.header_offset + 1000
    damaged[place : place + 8] = bytes(8)
    last.write_bytes(damaged)
    assert torch.load(last, weights_only=True)["global_step"] == 1
    assert resumed_from(folder) == "step=2.ckpt"


def test_of_two_last_checkpoints_the_newer_is_taken(folder, warnings):
    save(folder / "step=2-last.ckpt", age=5)
    save(folder / "step=4-last.ckpt", age=0)
    assert resumed_from(folder) == "step=4-last.ckpt"
    assert "step=2-last.ckpt" in warnings[0]
    assert "step=4-last.ckpt" in warnings[0]
    assert (folder / "step=2-last.ckpt.older").is_file()


def test_of_two_last_checkpoints_a_truncated_newer_one_is_not_taken(folder, warnings):
    save(folder / "step=2-last.ckpt", age=5)
    cut(save(folder / "step=4-last.ckpt", age=0))
    assert resumed_from(folder) == "step=2-last.ckpt"
    assert "step=4-last.ckpt" in warnings[0]


def test_a_last_checkpoint_with_lightnings_version_is_one_of_them(folder, warnings):
    save(folder / "step=4-last.ckpt", age=5)
    save(folder / "step=4-last-v1.ckpt", age=0)
    assert resumed_from(folder) == "step=4-last-v1.ckpt"


def test_a_mark_of_a_killed_run_does_not_make_a_complete_checkpoint_unusable(folder, warnings):
    save(folder / "step=2-last.ckpt", age=0)
    (folder / "step=2-last-unfinished").touch()
    assert resumed_from(folder) == "step=2-last.ckpt"


def test_without_any_complete_checkpoint_training_starts_from_the_beginning(folder, warnings):
    cut(save(folder / "step=2-last.ckpt", age=0))
    cut(save(folder / "step=2.ckpt", age=0))
    assert resumed_from(folder) is None
    assert "starts from the beginning" in warnings[0]


def test_a_name_that_is_taken_is_not_overwritten(folder, warnings):
    (folder / "step=2-last.ckpt.unreadable").write_text("kept")
    cut(save(folder / "step=2-last.ckpt", age=0))
    assert resumed_from(folder) is None
    assert (folder / "step=2-last.ckpt.unreadable").read_text() == "kept"
    assert (folder / "step=2-last.ckpt.unreadable1").is_file()


def test_sharded_checkpoints(folder, warnings):
    save_sharded(folder / "step=2-last.ckpt", complete=True)
    save_sharded(folder / "step=4-last.ckpt", complete=False)
    assert resumed_from(folder) == "step=2-last.ckpt"
    assert "shards" in warnings[0]


def test_what_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("readme", "none")
    assert checkpoint_fault(tmp_path / "a.ckpt") == "it is not a checkpoint"
    assert "cut short" in checkpoint_fault(tmp_path / "missing.ckpt")


def test_without_resuming_nothing_is_touched(folder):
    path = cut(save(folder / "step=2-last.ckpt", age=0))
    config = OmegaConf.create({"explicit_log_dir": str(folder.parent)})
    assert with_resume_point(config, None) is config
    assert path.is_file()


def fit_in_child(recipe: dict) -> int:
    """Train in a process of its own, whose log files are closed when the disk is gone; returns the exit code."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(OmegaConf.create(recipe),))
    process.start()
    process.join()
    return process.exitcode


def test_after_a_full_disk_a_requeued_run_continues(recipe, small_disk):
    disk = small_disk("3m")
    recipe["exp_manager"] |= {"explicit_log_dir": str(disk / "exp"), "create_tensorboard_logger": False}
    recipe["exp_manager"]["checkpoint_callback_params"] = {"monitor": "val_loss", "save_top_k": 0}
    del recipe["export_dir"]
    recipe["trainer"] |= {"max_steps": 2}
    assert fit_in_child(recipe) == 0
    (first,) = (disk / "exp" / "checkpoints").glob("*last.ckpt")
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(free - first.stat().st_size // 2, 0)))
    recipe["trainer"] |= {"max_steps": 4}
    assert fit_in_child(recipe) != 0
    ballast.unlink()
    assert fit_in_child(recipe) == 0
    (last,) = (disk / "exp" / "checkpoints").glob("*last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
