"""The whole path: a recipe through examples/speechlm/train.py, its mistakes, what it counts, and how it resumes."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.exporting import export_checkpoint
from nemo_emmett.models import SALMT5, load
from nemo_emmett.recipe_checks import build_trainer
from nemo_emmett.training import train

from .conftest import LANGUAGES, SENTENCES, write_tone
from .models.batches import audio_batch, text_batch
from .models.two_ranks import run_on_two_ranks

ROOT = Path(__file__).parents[1]


def run_train_py(recipe: dict, tmp_path: Path, monkeypatch, *overrides: str) -> None:
    """Run examples/speechlm/train.py in this process, as its command line would."""
    OmegaConf.save(OmegaConf.create(recipe), tmp_path / "recipe.yaml")
    spec = importlib.util.spec_from_file_location("train_py", ROOT / "examples" / "speechlm" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["train.py", "--config-path", str(tmp_path), "--config-name", "recipe", *overrides]
    monkeypatch.setattr("sys.argv", arguments)
    script.main()


def sentence_of_mistake(recipe: dict, tmp_path: Path, monkeypatch, capfd, *overrides: str) -> str:
    """What train.py says of a user's mistake; it must be one sentence, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run_train_py(recipe, tmp_path, monkeypatch, *overrides)
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (sentence,) = [line for line in error.splitlines() if line.startswith("Error: ")]
    return sentence


# Training


def test_a_recipe_trains_validates_exports_and_resumes(recipe, tmp_path, monkeypatch):
    run_train_py(recipe, tmp_path, monkeypatch)
    exported = load(recipe["export_dir"])
    assert len(exported.translate(["one red house"], "en", "de")) == 1
    assert list((tmp_path / "exp").glob("events.out.tfevents.*"))
    checkpoints = [path.name for path in (tmp_path / "exp" / "checkpoints").glob("*.ckpt")]
    assert any("val_bleu" in name for name in checkpoints)

    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    assert torch.load(last, weights_only=False)["global_step"] == 4
    run_train_py(recipe, tmp_path, monkeypatch, "trainer.max_steps=8")
    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    assert torch.load(last, weights_only=False)["global_step"] == 8


class Count(Callback):
    """Counts the trained batches of each modality, and the validated."""

    def __init__(self) -> None:
        self.batches = Counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.update(batch.keys())
        self.batches["steps"] += 1


def trained_batches(recipe: dict, steps: int, **train_ds) -> Counter:
    data = OmegaConf.create(recipe["data"] | {"train_ds": recipe["data"]["train_ds"] | train_ds})
    del data.validation_ds
    model = SALMT5({k: v for k, v in recipe["model"].items() if k != "_target_"})
    count = Count()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[count], enable_model_summary=False, **quiet)
    dataset = SpeechTextDataset(model.tokenizer)
    trainer.fit(model, MultimodalDataModule(data, model.tokenizer, dataset, defaults=model.data_defaults))
    return count.batches


def test_zip_trains_on_both_modalities_in_each_step(recipe):
    assert trained_batches(recipe, 7, sampler_fusion="zip") == {"audio": 7, "text": 7, "steps": 7}


def test_round_robin_trains_on_each_modality_in_turn(recipe):
    assert trained_batches(recipe, 8, sampler_fusion="round_robin") == {"audio": 4, "text": 4, "steps": 8}


def test_randomized_round_robin_trains_by_its_weights(recipe):
    weights = {"audio": 0.3, "text": 0.7}
    batches = trained_batches(recipe, 30, sampler_fusion="randomized_round_robin", sampler_weights=weights)
    assert batches["steps"] == 30
    assert batches["audio"] + batches["text"] == 30
    assert abs(batches["text"] - 21) <= 1  # drawn by credit, not independently


# Several ranks


def train_on_this_rank(rank: int, recipes: list[dict]) -> None:
    for recipe in recipes:
        train(OmegaConf.create(recipe))


@pytest.fixture
def parallel_recipe(recipe, tmp_path):
    """The recipe for two ranks with a strategy of conf/, named by its file."""

    def made(name: str, **trainer: int) -> dict:
        section = OmegaConf.load(ROOT / "conf" / "emmett_strategy" / f"{name}.yaml")
        section = section.get("trainer", section)  # one of the files changes more than the trainer
        if OmegaConf.is_missing(section.strategy, "data_parallel_size"):
            section.strategy.data_parallel_size = 2
        own = {"export_dir": str(tmp_path / name), "exp_manager": {"explicit_log_dir": str(tmp_path / f"exp_{name}")}}
        own["exp_manager"] |= {"seconds_to_sleep": 0.5, "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
        own["exp_manager"]["checkpoint_callback_params"] = {"monitor": "val_loss", "mode": "min", "save_top_k": 1}
        of_trainer = recipe["trainer"] | {"devices": 2, **OmegaConf.to_container(section), **trainer}
        return recipe | own | {"trainer": of_trainer}

    return made


def test_two_ranks_train_resume_and_export_with_the_strategies_of_the_recipes(parallel_recipe, tmp_path):
    recipes = [parallel_recipe("ddp"), parallel_recipe("fsdp2"), parallel_recipe("fsdp2", max_steps=6)]
    run_on_two_ranks(train_on_this_rank, tmp_path, recipes)
    for name in ("ddp", "fsdp2"):
        assert len(load(tmp_path / name).translate(["one red house"], "en", "de")) == 1
    checkpoints = tmp_path / "exp_fsdp2" / "checkpoints"
    (last,) = checkpoints.glob("*-last.ckpt")
    assert (last / ".metadata").is_file()
    export_checkpoint(last, tmp_path / "last", OmegaConf.create(recipes[2]))
    assert len(load(tmp_path / "last").translate(["one red house"], "en", "de")) == 1
    logs = (tmp_path / "rank0.log").read_text()
    assert logs.count("Restored all states from the checkpoint") == 1
    assert logs.count("does not translate in validation") == 2
    assert len(re.findall(r"The trained model is in .*: the checkpoint that is best by val_loss, \d", logs)) == 3


# One process


@pytest.fixture
def no_process_group(monkeypatch) -> Iterator[None]:
    """Ends the process group of a training under DDP in this process, and restores the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_one_process_trains_without_ddp_to_the_same_checkpoint(
    parallel_recipe, tmp_path, capfd, monkeypatch, no_process_group
):
    fit = training.Training.fit
    # DDP resets the generators, so that dropout is the same on all ranks.
    monkeypatch.setattr(training.Training, "fit", lambda self: (reset_seed(), fit(self)))
    alone, ddp = parallel_recipe("ddp", devices=1), parallel_recipe("ddp", devices=1)
    ddp["exp_manager"] |= {"explicit_log_dir": str(tmp_path / "real_ddp")}
    ddp["trainer"]["strategy"] = ddp["trainer"]["strategy"] | {"process_group_backend": "gloo"}  # so it is wanted
    checkpoints = []
    for recipe, name, of_strategy in ((alone, "exp_ddp", "SingleDevice"), (ddp, "real_ddp", "DDP")):
        train(OmegaConf.create(recipe))
        printed = capfd.readouterr()
        assert f"1 x CPU, {of_strategy}, precision" in printed.out
        assert of_strategy == "DDP" or "find_unused_parameters" not in printed.err
        (last,) = (tmp_path / name / "checkpoints").glob("*-last.ckpt")
        checkpoints.append(torch.load(last, weights_only=False))
    one, other = checkpoints
    assert one["global_step"] == 4
    assert one.keys() == other.keys()
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"devices": 1}, "SingleDeviceStrategy"),
        ({"devices": 2}, "DDPStrategy"),
        ({"devices": 1, "num_nodes": 2}, "DDPStrategy"),
        ({"devices": 1, "strategy": "ddp"}, "DDPStrategy"),  # as the user says
    ],
)
def test_ddp_is_left_out_for_one_process_alone(parallel_recipe, changes, expected, no_process_group):
    section = {**parallel_recipe("ddp")["trainer"], **changes}
    assert type(build_trainer(OmegaConf.create(section)).strategy).__name__ == expected


# Resuming


class Watch(Callback):
    """Keeps every step's loss; saves a checkpoint after one of them."""

    def __init__(self, save_after: int | None = None, path: Path | None = None) -> None:
        self.losses, self.save_after, self.path = [], save_after, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


class OnlyOnce:
    """Batches without a length, as an endless training loader gives them: a resumed one goes on where it was."""

    def __init__(self, batches: list[dict]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def fit(config: dict, batches: list[dict], watch: Watch, checkpoint: Path | None = None) -> list[float]:
    seed_everything(3)
    model = SALMT5(config)
    loader = OnlyOnce(batches)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=10, callbacks=[watch], enable_model_summary=False, **quiet)
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return watch.losses


SCHEDULES = {
    "nemo.core.optim.lr_scheduler.CosineAnnealing": {},
    "nemo_emmett.schedulers.InfiniteLR": {"cooldown_steps": 4, "constant_lr": 1e-4, "annealing_steps": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_with_dropout(salm_t5_config, tmp_path, schedule):
    common = {"_target_": schedule, "warmup_steps": 2, "max_steps": 10, "min_lr": 1e-5}
    config = salm_t5_config | {"lr_scheduler": common | SCHEDULES[schedule]}
    probe = SALMT5(config)
    assert probe.llm.config.dropout_rate > 0
    pairs = list(zip(SENTENCES["en"], SENTENCES["de"], strict=True))
    batches = [
        {"text": text_batch(probe, pairs[i % 3 :]), "audio": audio_batch(probe, [(0.5, pairs[i % 5][1])], seed=i)}
        for i in range(10)
    ]
    checkpoint = tmp_path / "middle.ckpt"
    whole = fit(config, batches, Watch(save_after=4, path=checkpoint))
    resumed = fit(config, batches[4:], Watch(), checkpoint)
    assert len(whole) == 10
    assert resumed == whole[4:]


# Mistakes that show before training


def test_a_missing_manifest(recipe, tmp_path, monkeypatch, capfd):
    recipe["data"]["train_ds"]["audio"]["input_cfg"][0]["manifest_filepath"] = "/no/such/manifest.jsonl"
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert "data.train_ds.audio.input_cfg.0.manifest_filepath" in sentence
    assert "/no/such/manifest.jsonl" in sentence


def test_parallel_files_of_unequal_length(recipe, corpus, tmp_path, monkeypatch, capfd):
    with open(corpus / "text" / "train.de", "a") as lines:
        lines.write("sieben\n")
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert "train.en" in sentence
    assert "train.de" in sentence
    assert "6" in sentence
    assert "7" in sentence


def test_an_unknown_target_language(recipe, tmp_path, monkeypatch, capfd):
    recipe["data"]["train_ds"]["audio"]["input_cfg"][0]["target_lang"] = "dex"
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert "'dex'" in sentence
    assert "target_lang" in sentence
    assert "'de'" in sentence


def test_a_tokenizer_without_the_locator_token(recipe, tmp_path, monkeypatch, capfd):
    recipe["data"]["train_ds"]["audio"]["audio_locator_tag"] = "<|sound|>"
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert "<|sound|>" in sentence
    assert "audio_locator_tag" in sentence


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("data.train_ds.audio", "max_durration", "max_duration"),
        ("model", "freeze_parms", "freeze_params"),
        ("trainer", "max_step", "max_steps"),
        ("exp_manager", "resume_if_exist", "resume_if_exists"),
        ("", "modle", "model"),
    ],
)
def test_a_misspelt_key(recipe, tmp_path, monkeypatch, capfd, section, key, nearest):
    config = OmegaConf.create(recipe)
    OmegaConf.update(config, f"{section}.{key}" if section else key, 1)
    sentence = sentence_of_mistake(OmegaConf.to_container(config), tmp_path, monkeypatch, capfd)
    assert key in sentence
    assert f"'{nearest}'" in sentence


def test_a_misspelt_key_on_the_command_line(recipe, tmp_path, monkeypatch, capfd):
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd, "trainer.max_stepz=3")
    assert "'max_steps'" in sentence


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mode": "guess"}, "OOMptimizer.mode: 'guess' cannot be used; give 'calibrate' or 'plan' or 'guard'"),
        ({"memory_fracton": 0.9}, "memory_fracton"),
        ({"profile": "corrupt.yaml"}, "corrupt.yaml: the profile is corrupt"),
    ],
)
def test_a_callback_that_cannot_use_what_it_is_given(recipe, tmp_path, monkeypatch, capfd, arguments, expected):
    (tmp_path / "corrupt.yaml").write_text("train_ds: [")
    if "profile" in arguments:
        arguments = {"profile": str(tmp_path / arguments["profile"])}
    recipe["trainer"]["callbacks"] = [{"_target_": "nemo_emmett.callbacks.OOMptimizer", **arguments}]
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert expected in sentence
    assert "InstantiationException" not in sentence


def test_nemos_legacy_keys_pass(recipe, tmp_path, monkeypatch):
    recipe["data"]["train_ds"]["audio"] |= {"labels": None, "trim_silence": False, "is_tarred": False}
    run_train_py(recipe, tmp_path, monkeypatch)
    assert Path(recipe["export_dir"], "config.json").exists()


def test_a_dataset_that_filters_to_nothing(recipe, tmp_path, monkeypatch, capfd):
    recipe["data"]["train_ds"]["audio"]["max_duration"] = 0.1
    sentence = sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd)
    assert "max_duration" in sentence
    assert "train.en.jsonl" in sentence


# Mistakes that show while it trains


def damage(corpus: Path) -> None:
    """A missing, an empty and a truncated recording, and a line that is not JSON, among English speech."""
    audio = corpus / "audio"
    (audio / "en-0.wav").unlink()
    (audio / "en-1.wav").write_bytes(b"")
    whole = (audio / "en-2.wav").read_bytes()
    (audio / "en-2.wav").write_bytes(whole[: len(whole) // 2])
    with open(corpus / "speech" / "train.en.jsonl", "a") as manifest:
        manifest.write('{"audio_filepath": "../audio/en-3.wav", "duration": \n')


def test_bad_records_are_skipped_counted_by_cause_and_reported(recipe, corpus, tmp_path, monkeypatch, caplog):
    damage(corpus)
    recipe["trainer"]["max_steps"] = 6
    recipe["data"]["validation_ds"]["max_bad_records"] = None
    loaders = []
    original = MultimodalDataModule.train_dataloader
    monkeypatch.setattr(
        MultimodalDataModule, "train_dataloader", lambda self: loaders.append(original(self)) or loaders[-1]
    )
    run_train_py(recipe, tmp_path, monkeypatch)
    table = loaders[0]._source.skipped_records.table()
    assert Path(recipe["export_dir"], "config.json").exists()
    for cause in ("missing audio", "empty audio", "truncated audio", "not JSON"):
        assert cause in table


def test_past_max_bad_records_the_run_stops_and_names_the_first_ten(recipe, corpus, tmp_path, monkeypatch, capfd):
    damage(corpus)
    recipe["data"]["train_ds"]["max_bad_records"] = 3
    recipe["trainer"]["max_steps"] = 50
    with pytest.raises(SystemExit) as stopped:
        run_train_py(recipe, tmp_path, monkeypatch)
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert "max_bad_records" in error
    for named in ("en-0.wav", "en-1.wav", "line 7"):
        assert named in error


def test_gzip_text_trains_like_plain_text(recipe, corpus, tmp_path, monkeypatch):
    for language in LANGUAGES:
        plain = corpus / "text" / f"train.{language}"
        Path(f"{plain}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    paths = {language: str(corpus / "text" / f"train.{language}.gz") for language in LANGUAGES}
    recipe["data"]["train_ds"]["text"]["input_cfg"] = [{"type": "parallel_text", "paths": paths}]
    del recipe["data"]["validation_ds"], recipe["exp_manager"]["checkpoint_callback_params"]
    run_train_py(recipe, tmp_path, monkeypatch)
    assert Path(recipe["export_dir"], "config.json").exists()


def test_the_corpus_of_these_tests_is_what_they_say(tiny_corpus, tmp_path):
    manifest = (tiny_corpus / "speech" / "train.de.jsonl").read_text().splitlines()
    assert json.loads(manifest[0])["translations"] == {"en": "one red house"}
    assert write_tone(tmp_path / "a.wav", 0.1).stat().st_size == 44 + 2 * 1600
