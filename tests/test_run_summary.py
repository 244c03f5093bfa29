"""The two tables of a training: of what it starts with, and of what came of it, however it ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Timer
from omegaconf import OmegaConf
from rich.console import Console

from nemo_emmett import training
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.lengths.counting import Size
from nemo_emmett.errors import ConfigError
from nemo_emmett.exporting import BestCheckpoint
from nemo_emmett.recipe_checks import mistakes_in_fit
from nemo_emmett.run_summary import GroupFacts, RunSummary, _batch_rows, _data_table, _table

from .test_train_command import table_of


class AtStep(BestCheckpoint):
    """Does something at the end of a step."""

    step, action = 0, staticmethod(lambda trainer: None)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(3, action)``: trainings of this test call it at the end of that step."""

    def set_up(step: int, action) -> None:
        monkeypatch.setattr(training, "BestCheckpoint", type("At", (AtStep,), {"step": step, "action": action}))

    return set_up


def tables(recipe: dict, capfd, *titles: str) -> list[dict[str, str]]:
    training.train(OmegaConf.create(recipe))
    return printed_tables(capfd, *titles)


def printed_tables(capfd, *titles: str) -> list[dict[str, str]]:
    lines = capfd.readouterr().out.splitlines()
    return [table_of(lines, title) for title in titles]


def test_a_signal_and_the_run_that_resumes(recipe, at_step, capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe["trainer"]["max_steps"] = 6
    at_step(3, lambda self, trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        training.train(OmegaConf.create(recipe))
    assert stopped.value.code == 75
    (end,) = printed_tables(capfd, "Interrupted")
    assert end["steps"] == "3 of 6"
    assert end["audio"].startswith("12 examples, ")
    assert Path(end["saved"]).is_file()
    assert end["saved"].endswith("-last.ckpt")
    assert end["resume"] == "run the same command"
    assert "exported" not in end

    at_step(0, lambda self, trainer: None)
    start, end = tables(recipe, capfd, "Training", "Trained")
    assert start["steps"] == "6, from step 3"  # and the checkpoint on the next line
    assert end["steps"] == "6 of 6, 3 of them in this run"
    assert end["audio"].startswith("12 examples, ")  # of this run, as is the time
    assert "saved" not in end
    assert re.fullmatch(r"export \(step 2, val_bleu \d\.\d{4}\)", end["exported"])
    assert end["exported"][end["exported"].index("val_bleu") : -1] == end["best"].split(":")[0]


def test_an_exception_passes_after_the_table(recipe, at_step, capfd, tmp_path) -> None:
    del recipe["data"]["validation_ds"]
    recipe["exp_manager"] |= {"resume_if_exists": False, "create_checkpoint_callback": True}
    every_step = {"every_n_train_steps": 1, "every_n_epochs": None, "monitor": "loss", "mode": "min"}
    recipe["exp_manager"]["checkpoint_callback_params"] = every_step

    def fail(self, trainer) -> None:
        raise ZeroDivisionError("a fault")

    at_step(1, fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        training.train(OmegaConf.create(recipe))
    (end,) = printed_tables(capfd, "Failed")
    assert end["steps"] == "1 of 4"
    assert end["saved"] == "no checkpoint in this run"

    at_step(2, fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        training.train(OmegaConf.create(recipe))
    printed = "".join(capfd.readouterr().out.split())  # lines are folded at 80 columns
    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    override = shlex.quote(f'++exp_manager.resume_from_checkpoint="{last}"')
    assert f"saved{last}resumeadd{override}tothecommand" in printed


def test_a_fault_of_the_summary_does_not_hide_that_of_the_training(recipe, at_step, monkeypatch) -> None:
    def fail(self, trainer) -> None:
        raise ZeroDivisionError("a fault")

    at_step(1, fail)
    monkeypatch.setattr(RunSummary, "_end_rows", lambda *_: 1 / 0.0)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        training.train(OmegaConf.create(recipe))


def test_out_of_time(recipe, at_step, capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe["trainer"]["max_time"] = "00:10:00:00"

    def let_time_pass(self, trainer) -> None:
        (timer,) = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
        timer._duration = 0.0

    at_step(2, let_time_pass)
    start, end = tables(recipe, capfd, "Training", "Trained")
    assert start["steps"] == "4, at most 10.0 h"
    assert end["steps"] == "2 of 4, out of time (max_time)"
    assert Path(end["saved"]).is_file()
    assert end["resume"] == "run the same command"


def test_skipped_records_are_counted_by_cause_and_file(recipe, corpus, capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (corpus / "audio" / "en-0.wav").unlink()
    with open(corpus / "speech" / "train.de.jsonl", "a") as manifest:
        manifest.write("not JSON\nnor this\n")
    recipe["trainer"]["max_steps"] = 6
    recipe["data"]["validation_ds"]["max_bad_records"] = None
    training.train(OmegaConf.create(recipe))
    printed = capfd.readouterr().out
    assert table_of(printed.splitlines(), "Trained")["skipped"] == "2 x not JSON: corpus/speech/train.de.jsonl"
    assert "          1 x missing audio: corpus/speech/train.en.jsonl\n" in printed


def test_wandb_without_a_key_is_one_sentence() -> None:
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})("No API key configured.")
    sentence = "exp_manager.create_wandb_logger: No API key configured; or set .* WANDB_MODE=offline"
    with pytest.raises(ConfigError, match=sentence), mistakes_in_fit(OmegaConf.create({"trainer": {}})):
        raise error


# The tables of the data, by hand.


def group(section: dict, **facts) -> GroupFacts:
    (config,) = parse_dataset(section, "data.train_ds").groups
    return GroupFacts(config, **facts)


def index(records: int, size: Size) -> SimpleNamespace:
    return SimpleNamespace(num_records=records, size=size)


def shown(table) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as printed:
        console.print(table)
    return [line.split() for line in printed.get().splitlines()]


def test_sources_are_added_up_by_languages() -> None:
    entries = [
        {"type": "nemo", "manifest_filepath": f"{n}.json", "source_lang": "en", "target_lang": target}
        for n, target in enumerate(["de", "fr", "de"])
    ]
    sizes = [Size(10, 3600.0), Size(20, 60.0), Size(5, 3600.0)]
    of = group(
        {"input_cfg": entries},
        indexes=[index(11, sizes[0]), index(20, sizes[1]), index(6, sizes[2])],
        shares=[0.5, 0.3, 0.2],
    )
    assert shown(_data_table([of]))[1:] == [
        ["speech", "en-de", "2", "17", "15", "2.0", "h", "70.0%"],
        ["speech", "en-fr", "1", "20", "20", "1.0", "min", "30.0%"],
    ]


def test_many_pairs_are_cut_and_what_is_not_known_is_left_out() -> None:
    entries = [
        {"type": "parallel_text", "source_paths": "a", "target_paths": "b", "source_lang": "en", "target_lang": f"x{n}"}
        for n in range(9)
    ]
    of = group({"input_cfg": entries, "batch_size": 4, "use_multimodal_sampling": True})
    titles, *rows = shown(_data_table([of]))
    assert titles == ["data", "languages", "sources"]
    assert rows[0] == ["text", "en-x0", "1"]
    assert rows[-1] == ["others", "4", "more", "pairs", "4"]
    assert len(rows) == 6


def test_an_n_way_source_names_its_directions() -> None:
    paths = {"en": "a.en", "de": "a.de", "fr": "a.fr"}
    all_pairs = {"type": "parallel_text", "paths": paths}
    to_english = {"type": "parallel_text", "paths": paths, "directions": ["de-en", "fr-en", "fr-de"]}
    rows = shown(_data_table([group({"input_cfg": [all_pairs, to_english], "batch_size": 4})]))
    assert rows[1] == ["text", "all", "of", "en,de,fr", "1"]
    assert rows[2] == ["text", "de,fr", "to", "en,de", "1"]


def test_brackets_in_a_path_are_no_markup() -> None:
    assert shown(_table([("log", "runs/[bold]/a.log")])) == [["log", "runs/[bold]/a.log"]]


def test_batches_and_buckets() -> None:
    section = {
        "multi_config": True,
        "sampler_fusion": "randomized_round_robin",
        "sampler_weights": {"audio": 0.3, "text": 0.7},
        "audio": {
            "input_cfg": [{"type": "nemo", "manifest_filepath": "a.json"}],
            "use_bucketing": True,
            "bucket_duration_bins": [2.5, 5.0],
            "bucket_batch_size": [8, 4],
        },
        "text": {
            "input_cfg": [{"type": "parallel_text", "source_paths": "a", "target_paths": "b"}],
            "use_multimodal_sampling": True,
            "batch_tokens": 4000,
        },
    }
    dataset = parse_dataset(section, "data.train_ds")
    audio, text = (GroupFacts(config) for config in dataset.groups)
    audio.bins, audio.batch_sizes = [2.5, 5.0], [8, 4]
    text.bins = list(range(10, 300, 10))
    assert dict(_batch_rows(dataset, [audio, text])) == {
        "blend": "randomized_round_robin (a batch of one in every step): audio 0.3, text 0.7",
        "audio batch": "8, 4 examples, 2 buckets at 2.5, 5 s",
        "text batch": "4,000 tokens, 30 buckets at 10, 20, ..., 280, 290 tokens",
    }
    section["text"] = {**section["text"], "batch_tokens": None, "batch_size": 6, "batch_ratio": 0.5, "every_n_steps": 4}
    zipped = parse_dataset({**section, "sampler_fusion": "zip"}, "data.train_ds")
    rows = dict(_batch_rows(zipped, [audio, GroupFacts(zipped.groups[1])]))
    assert rows["blend"].startswith("zip (a batch of each in every step, of text once in 4 steps)")
    assert rows["text batch"] == "6 examples or 0.5 for each of audio"
    audio.bins, text.bins = [(2.5, 9), (5.0, 17)], [(12, 4)]
    two_dimensional = dict(_batch_rows(dataset, [audio, text]))
    assert two_dimensional["audio batch"] == "8, 4 examples, 2 buckets at 2.5 x 9, 5 x 17 (s x output tokens)"
    assert two_dimensional["text batch"].endswith("2 buckets at 12 x 4 (input x output tokens)")
