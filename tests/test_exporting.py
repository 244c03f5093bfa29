"""Exports and the folders of a training: the best checkpoint, the recipe, locks, and full disks."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from safetensors.torch import load_file

from nemo_emmett import exporting, training
from nemo_emmett.cli import main
from nemo_emmett.errors import EXIT_NOT_FINITE, EXIT_NOT_WRITTEN, ConfigError, ModelError, NonFiniteError, OutputError
from nemo_emmett.exporting import BestCheckpoint, check_export, export_trained
from nemo_emmett.models import SALMT5, load
from nemo_emmett.models.card import model_card
from nemo_emmett.models.checkpoint import read_weights
from nemo_emmett.models.exported import only_source, trained_targets, untrained_warning
from nemo_emmett.models.public_names import without_paths
from nemo_emmett.run_folders import SaveRecipe, check_space
from nemo_emmett.training import train

from .conftest import fill


def recipe_of(corpus: Path, t5: Path, folder: Path, **trainer) -> OmegaConf:
    """Text alone, four steps, a validation after every second; the best checkpoint is the first, for once."""
    paths = {language: str(corpus / "text" / f"train.{language}") for language in ("en", "de")}
    text = [{"type": "parallel_text", "paths": paths}]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    saving = {"monitor": "val_loss", "mode": "max", "save_top_k": 1, "save_nemo_on_train_end": False}
    return OmegaConf.create(
        {
            "seed": 0,
            "export_dir": str(folder / "export"),
            "model": {
                "_target_": "salm_t5",
                "pretrained_llm": str(t5),
                "max_new_tokens": 4,
                "validation_bleu": False,
                "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.05},
            },
            "data": {
                "train_ds": {"seed": 0, "shard_seed": 0, "batch_size": 4, "input_cfg": text, "num_workers": 0}
                | {"use_multimodal_sampling": True},
                "validation_ds": {
                    "batch_size": 8,
                    "datasets": {"dev": {"use_multimodal_sampling": True, "input_cfg": text}},
                },
            },
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "limit_train_batches": 2}
            | {"val_check_interval": 2, **quiet, **trainer},
            "exp_manager": {
                "explicit_log_dir": str(folder / "exp"),
                "create_tensorboard_logger": False,
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                "checkpoint_callback_params": saving,
            },
        }
    )


@pytest.fixture(scope="module")
def trained(tiny_corpus, tiny_t5, tmp_path_factory) -> SimpleNamespace:
    """A training that has ended, by ``train``."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = recipe_of(tiny_corpus, tiny_t5, folder)
    as_written = OmegaConf.to_container(cfg, resolve=True)
    kept = []
    build = training.build_training
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_training", lambda cfg: kept.append(build(cfg)) or kept[0])
        before = os.umask(0o027)
        model = train(cfg)
        os.umask(before)
    (best,) = [path for path in (folder / "exp" / "checkpoints").glob("*.ckpt") if "-last" not in path.name]
    (last,) = (folder / "exp" / "checkpoints").glob("*-last.ckpt")
    trainer = kept[0].trainer
    (best_checkpoint,) = [callback for callback in trainer.callbacks if isinstance(callback, BestCheckpoint)]

    def export(**cfg) -> str | None:
        return export_trained(trainer, model, OmegaConf.create(cfg), best_checkpoint)

    return SimpleNamespace(
        folder=folder, cfg=cfg, as_written=as_written, model=model, trainer=trainer, export=export, best=best, last=last
    )


@pytest.fixture
def recipe(tiny_corpus, tiny_t5, tmp_path):
    """As for ``trained``, to be changed."""
    return recipe_of(tiny_corpus, tiny_t5, tmp_path)


def exported(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    """Whether an export holds the weights of a state."""
    return all(torch.equal(value, other[name]) for name, value in one.items())


# What is exported


def test_the_checkpoint_with_the_best_score_is_exported(trained, tmp_path, caplog):
    best, last = read_weights(trained.best), read_weights(trained.last)
    assert same(exported(trained.cfg.export_dir), best)
    assert not same(exported(trained.cfg.export_dir), last)
    assert same(trained.model.state_dict(), last)  # what train returns
    assert len(load(trained.cfg.export_dir).translate(["one red house"], "en", "de")) == 1
    for wanted, weights, said, step in (
        (
            "best",
            best,
            rf"the checkpoint that is best by val_loss, \d\.\d{{4}} \({trained.best}\)",
            "step 2, val_loss ",
        ),
        ("last", last, "the weights after the last step, 4", "step 4"),
    ):
        caplog.clear()
        folder = tmp_path / wanted
        assert trained.export(export_dir=str(folder), export=wanted).startswith(step)
        assert same(exported(folder), weights)
        assert re.search(f"The trained model is in {folder}: {said}", caplog.text)
    assert float(re.search(r"val_loss=([\d.]+)-", trained.best.name)[1]) > 0


def test_without_a_score_or_a_readable_checkpoint_the_last_weights_are_exported(trained, tmp_path, caplog, monkeypatch):
    checkpoint = trained.trainer.checkpoint_callback
    last = read_weights(trained.last)
    folder = str(tmp_path / "export")
    (tmp_path / "torn.ckpt").write_bytes(trained.best.read_bytes()[:5000])
    for attribute, value in {
        "best_model_path": "",
        "monitor": None,
        "best_model_score": torch.tensor(-math.inf),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, attribute, value)
            trained.export(export_dir=folder)
            assert "WARNING" not in caplog.text
            trained.export(export_dir=folder, export="best")
        assert same(exported(folder), last)
        assert "export: best: no checkpoint has a score" in caplog.text
        caplog.clear()
    monkeypatch.setattr(checkpoint, "best_model_path", str(tmp_path / "torn.ckpt"))
    trained.export(export_dir=folder)
    assert same(exported(folder), last)
    assert "torn.ckpt' cannot be read as a checkpoint" in caplog.text


def test_an_export_has_the_mode_of_the_umask(trained):
    paths = [path for path in Path(trained.cfg.export_dir).rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json"} <= {path.name for path in paths}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_exported(trained, tmp_path, caplog, monkeypatch, value):
    parameter = trained.model.llm.shared.weight
    before = parameter.data[3, 5].item()
    parameter.data[3, 5] = value
    try:
        with pytest.raises(NonFiniteError, match=r"'llm.*' *\), so they are not exported"):
            trained.export(export_dir=str(tmp_path / "export"), export="last")
        with pytest.raises(NonFiniteError):
            trained.model.save_pretrained(tmp_path / "export")
    finally:
        parameter.data[3, 5] = before
    assert not (tmp_path / "export").exists()
    assert "The trained model is in" not in caplog.text


def test_the_best_of_the_runs_before_is_remembered():
    def best(mode: str, path: str, score: float | None, before: dict | None = None) -> dict | None:
        callback = BestCheckpoint()
        score = None if score is None else torch.tensor(score)
        checkpoint = SimpleNamespace(monitor="val_bleu", mode=mode, best_model_path=path, best_model_score=score)
        callback.setup(SimpleNamespace(checkpoint_callback=checkpoint), None, "fit")
        callback.load_state_dict(before or {})
        return callback.state_dict()

    first = best("max", "a", 4.0)
    assert first == {"path": "a", "monitor": "val_bleu", "score": 4.0}
    assert best("max", "", None, first) == best("max", "b", 3.0, first) == best("max", "b", math.inf, first) == first
    assert best("min", "b", 3.0, first)["path"] == best("max", "b", 5.0, first)["path"] == "b"
    assert best("max", "", None, first | {"monitor": "val_loss"}) == {}


# The card, and what an export does not say


def private_texts(folder: Path, *private: str) -> list[tuple[str, str]]:
    """The files of a folder that hold one of some texts."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [(path.name, one) for one in private if one in text]
    return found


def privacies(*paths: Path) -> list[str]:
    """Paths, the home folder, the user and the host, as they must not occur."""
    user = getpass.getuser()
    return [*map(str, paths), str(Path.home()), f"/{user}", f"{user}@", socket.gethostname(), "/tmp/"]


def test_no_exported_file_holds_a_path_a_user_or_a_host(trained, tiny_t5, salm_t5_config, tmp_path):
    private = privacies(trained.folder, tiny_t5, tmp_path, Path(salm_t5_config["pretrained_asr"]).parent)
    assert private_texts(trained.folder / "exp", *private), "the recipe next to the checkpoints has them"
    assert private_texts(Path(trained.cfg.export_dir), *private) == []
    run(trained.last, tmp_path / "from_checkpoint")
    assert private_texts(tmp_path / "from_checkpoint", *private) == []
    speech = SALMT5(salm_t5_config)
    speech.save_pretrained(tmp_path / "speech")
    assert private_texts(tmp_path / "speech", *private) == []
    again = load(tmp_path / "speech")
    again.save_pretrained(tmp_path / "again")
    assert private_texts(tmp_path / "again", *private) == []
    names = {"language_model": tiny_t5.name, "speech_encoder": "encoder.nemo"}
    for folder in ("speech", "again"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["base_models"] == names
        assert (config["pretrained_llm"], config["pretrained_asr"]) == tuple(names.values())
    assert same(load(tmp_path / "again").state_dict(), speech.state_dict())


def test_an_export_says_how_it_was_trained(trained, tmp_path):
    config = json.loads(Path(trained.cfg.export_dir, "config.json").read_text())
    record = config["training"]
    # Of the best checkpoint, after an epoch: two batches of 4 of the 12 pairs, six sentences in both directions.
    assert record["steps"] == 2
    assert record["examples"] == {"text": 8}
    assert record["directions"] == {"text": [["de", "en"], ["en", "de"]]}
    assert record["data"] == {"train": ["train.en", "train.de"]}
    assert list(record["validation"]) == ["val_loss"]
    assert trained_targets(config) == {"de", "en"}
    for checkpoint, steps, examples in ((trained.best, 2, 8), (trained.last, 4, 16)):
        run(checkpoint, tmp_path / checkpoint.name)
        of_checkpoint = json.loads((tmp_path / checkpoint.name / "config.json").read_text())["training"]
        of_step = record | {"steps": steps, "examples": {"text": examples}}
        assert of_checkpoint == {key: of_step[key] for key in of_step if key != "validation"}
    trained.export(**trained.as_written | {"export_dir": str(tmp_path / "of_trainer"), "export": "last"})
    assert json.loads((tmp_path / "of_trainer" / "config.json").read_text())["training"] == of_checkpoint


def test_what_a_model_was_trained_on_is_known_by_any_code():
    config = {"training": {"directions": {"audio": [["eng", "deu_Latn"]], "text": [["mdw", "fra"]]}}}
    assert trained_targets(config) == {"de", "fr"}
    assert untrained_warning(config, ["deu", "fre"]) is None
    assert "translate to it, but to de, fr" in untrained_warning(config, ["ita"])
    assert (only_source(config, "ger"), only_source(config, "fr")) == ("en", "mdw")


def test_a_model_warns_once_of_a_language_that_it_never_saw(trained, caplog):
    model = load(trained.cfg.export_dir)
    for _ in range(2):
        model.translate(["one red house"], "en", "fr")
        model.translate(["one red house"], "en", "de")
    said = [record.message for record in caplog.records if "not trained to translate" in record.message]
    assert said == [f"target_lang: {untrained_warning(model.cfg, ['fr'])}"]


def test_the_card_is_read_by_the_hub_and_its_code_runs(trained, tmp_path, capsys):
    folder = Path(trained.cfg.export_dir)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "unknown"
    assert (data["language"], data["pipeline_tag"]) == (["de", "en"], "translation")
    assert "base_model" not in data, "a local folder is no model of the Hub"
    for said in (
        "German (de), English (en)",
        "- text: de → en, en → de",
        "- steps: 2\n",
        "8 examples, 4.0 a step over 1 p",
    ):
        assert said in card.text, card.text
    assert re.search(r"`val_loss` on the validation data: \d\.\d+, the checkpoint that was exported", card.text)
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    exec(code.replace("FOLDER", str(folder)), {})
    assert capsys.readouterr().out.startswith("['")
    command, serve = re.findall("```bash\nnemo-emmett (.*?)\n```", card.text, re.DOTALL)
    assert serve == "serve FOLDER"
    assert "--from de --to en" in command
    done = CliRunner().invoke(main, shlex.split(command.replace("FOLDER", str(folder))))
    assert done.exit_code == 0, done.output


def test_a_card_without_a_record_says_so():
    text = model_card(
        {"_target_": "nemo_emmett.models.salm_gpt.SALMGPT", "base_models": {"language_model": "Qwen/Qwen3-1.7B"}}
    )
    assert "The languages that this model was trained on are not recorded." in text
    assert text.count("Not recorded.") == 2
    assert "base_model:\n- Qwen/Qwen3-1.7B\n" in text
    assert "the language model `Qwen/Qwen3-1.7B`." in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("written", "public"),
    [
        ({"a": ["/x/y.json", {"b": "~/z"}], "c": "/"}, {"a": ["y.json", {"b": "z"}], "c": "/"}),
        ({"pretrained_llm": "google/t5-small", "n": 3}, {"pretrained_llm": "google/t5-small", "n": 3}),
        ({"pretrained_asr": "exp/encoder.nemo", "freeze_params": ["^llm/x"]}, {"pretrained_asr": "encoder.nemo"}),
        ({"pretrained_llm": "tests"}, {"pretrained_llm": "tests"}),
    ],
)
def test_names_in_the_place_of_paths(written, public):
    assert without_paths(written) == written | public


# From a checkpoint to a folder


def run(*arguments) -> SimpleNamespace:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_a_checkpoint_becomes_a_folder(trained, tmp_path):
    done = run(trained.last, tmp_path / "a")
    assert (done.exit_code, done.stdout) == (0, f"The model of {trained.last} is in {tmp_path / 'a'}\n")
    assert same(exported(tmp_path / "a"), read_weights(trained.last))
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(trained.best.read_bytes())
    assert f"Error: '{tmp_path / 'recipe.yaml'}' does not exist" in run(moved, tmp_path / "b").stderr
    assert run(moved, tmp_path / "b", "--config", trained.best.parent / "recipe.yaml").exit_code == 0
    assert same(load(tmp_path / "b").state_dict(), read_weights(trained.best))
    recipe = OmegaConf.load(trained.best.parent / "recipe.yaml")
    recipe.model.pretrained_llm = "../models/t5"
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    done = run(moved, tmp_path / "c")
    assert done.exit_code == 2
    assert "Error: model.pretrained_llm: '../models/t5' does not exist, as seen from this folder; " in done.stderr
    assert "or correct the path in a copy of recipe.yaml and give that by --config.\n" in done.stderr


def test_what_cannot_be_exported_is_one_sentence(trained, tiny_t5, tmp_path):
    torn, other, plain = (tmp_path / f"{name}.ckpt" for name in ("torn", "other", "plain"))
    torn.write_bytes(trained.last.read_bytes()[:20000])
    weights = read_weights(trained.last)
    torch.save({"state_dict": {**weights, "llm.surplus": torch.ones(2)}}, other)
    torch.save({"weights": 1}, plain)
    torch.save(
        {"state_dict": {**weights, "llm.shared.weight": weights["llm.shared.weight"] * math.nan}},
        nan := tmp_path / "nan.ckpt",
    )
    (tmp_path / "empty").mkdir()
    for checkpoint, code, said in (
        (tmp_path / "gone.ckpt", 2, "there is no such checkpoint"),
        (torn, 2, "cannot be read as a checkpoint"),
        (plain, 2, "holds no 'state_dict'"),
        (tmp_path / "empty", 2, "is no distributed checkpoint"),
        (other, 2, "of 'llm.surplus' it holds (2,), the model nothing; give the recipe"),
        (nan, EXIT_NOT_FINITE, "the weights are not finite ('llm."),
    ):
        done = run(checkpoint, tmp_path / "export", "--config", trained.last.parent / "recipe.yaml")
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert (done.exit_code, said in line) == (code, True), done.stderr
    assert not (tmp_path / "export").exists()
    done = run(trained.last, tiny_t5)
    assert (done.exit_code, "holds another model, which would be overwritten" in done.output) == (2, True)


class Opened:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("opened"),)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Opened()}, "evil.ckpt")
    with pytest.raises(ModelError, match="not unpickled"):
        read_weights("evil.ckpt")
    assert not Path("opened").exists()


# The recipe


def test_the_resolved_recipe_is_next_to_the_checkpoints(trained):
    assert OmegaConf.to_container(OmegaConf.load(trained.best.parent / "recipe.yaml")) == trained.as_written


def test_another_recipe_does_not_replace_the_first(tmp_path, caplog):
    trainer = SimpleNamespace(is_global_zero=True, checkpoint_callback=SimpleNamespace(dirpath=str(tmp_path)))
    recipes = [
        {"a": {"b": 1, "c": "${a.b}"}},
        {"a": {"b": 1, "c": 1}},
        {"a": {"b": 2, "d": 0}},
        {"a": {"b": 3, "d": 0}},
    ]
    for recipe in recipes:
        SaveRecipe(OmegaConf.create(recipe)).on_train_start(trainer, None)
    found = {path.name: OmegaConf.load(path) for path in tmp_path.iterdir()}
    assert found == {"recipe.1.yaml": recipes[1], "recipe.2.yaml": recipes[2], "recipe.yaml": recipes[3]}
    said = [record.message for record in caplog.records]
    assert said[0].startswith("The recipe differs from that of the checkpoints in a.b, a.c, a.d; that one is now in ")
    assert len(said) == 2


# Folders and disks, before training


def refused(recipe) -> str:
    """What ``train`` says before it builds anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_training", lambda cfg: pytest.fail("it was built"))
        with pytest.raises(ConfigError) as error:
            train(recipe)
    return str(error.value)


@pytest.mark.parametrize("key", ["export_dir", "exp_manager.explicit_log_dir"])
def test_a_folder_that_cannot_be_written_to_is_refused(recipe, tmp_path, key):
    (tmp_path / "file").touch()
    OmegaConf.update(recipe, key, str(tmp_path / "file" / "folder"))
    assert re.match(rf"{key}: '.*file/folder' cannot be written to \(Not a directory\)", refused(recipe))


def test_an_export_replaces_no_other_model(recipe, tiny_t5, trained):
    recipe.export_dir = str(tiny_t5)
    assert (
        refused(recipe)
        == f"export_dir: '{tiny_t5}' holds another model, which would be overwritten; give another folder."
    )
    check_export(OmegaConf.create({"export_dir": trained.cfg.export_dir}))
    with pytest.raises(ConfigError, match="export: 'first' is unknown; use best or last"):
        check_export(OmegaConf.create({"export": "first"}))


@pytest.mark.parametrize("manager", [{}, {"explicit_log_dir": None, "exp_dir": "{}", "name": "exp"}])
def test_a_second_training_in_a_folder_is_refused(recipe, tmp_path, manager):
    recipe.exp_manager.update({key: value and value.format(tmp_path) for key, value in manager.items()})
    code = "import sys, time; from nemo_emmett.files import hold_folder\nwith hold_folder(sys.argv[1]):\n"
    code += "    print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path / "exp")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        try:
            sentence = refused(recipe)
        finally:
            first.kill()
    assert re.match(rf"exp_manager\.exp\w+: '{tmp_path}/exp' is in use by process {first.pid} on", sentence)


def test_a_disk_without_room_is_refused_and_a_scarce_one_warned_of(trained, small_disk, caplog):
    weights = sum(t.numel() * t.element_size() for t in (*trained.model.parameters(), *trained.model.buffers()))
    tight, enough = small_disk(f"{weights // 1024 - 64}k"), small_disk(f"{2 * weights // 1024}k")
    with pytest.raises(ConfigError, match=rf"export_dir: '{tight}/model' has .* free, and .* are needed"):
        check_space(trained.trainer, trained.model, str(tight / "model"))
    check_space(trained.trainer, trained.model, str(enough / "model"))
    assert not caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.trainer.checkpoint_callback, "dirpath", str(enough / "checkpoints"))
        check_space(trained.trainer, trained.model, None)  # weights fit, but not Adam's states, and all of it thrice
        assert "with checkpoints of about" in caplog.text
        (enough / "filling").write_bytes(bytes(weights // 2))
        with pytest.raises(ConfigError, match=rf"export_dir: '{enough}/model' has .* free"):
            check_space(trained.trainer, trained.model, str(enough / "model"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.validation_ds": None}, r"monitor: 'val_loss' will never exist, since the recipe has no data"),
        ({"exp_manager.checkpoint_callback_params.monitor": "val_bleu"}, "since model.validation_bleu is false"),
        (
            {"trainer.val_check_interval": 3},
            r"trainer.val_check_interval: 3 cannot be used: .* number of the training batch",
        ),
        ({"trainer.limit_train_batches": None, "trainer.val_check_interval": 0.5}, "val_check_interval: 0.5 cannot be"),
        (
            {"trainer.check_val_every_n_epoch": None, "trainer.val_check_interval": 1.0},
            "trainer.val_check_interval: 1.0 cannot be used: .*check_val_every_n_epoch",
        ),
    ],
)
def test_a_validation_that_cannot_come_is_refused(recipe, changes, said):
    for key, value in changes.items():
        OmegaConf.update(recipe, key, value)
    with pytest.raises(ConfigError, match=said):
        train(recipe)


# Disks that are full at the end


class Fill(Callback):
    """Fills a disk when the training ends, or begins."""

    def __init__(self, disk: Path, at_start: bool = False) -> None:
        self.disk = disk
        self.hook = "on_train_start" if at_start else "on_train_end"

    def on_train_start(self, trainer, module) -> None:
        if self.hook == "on_train_start":
            fill(self.disk)

    def on_train_end(self, trainer, module) -> None:
        if self.hook == "on_train_end":
            fill(self.disk)


def train_on_full_disk(recipe, monkeypatch, callback: Callback) -> str:
    build = training.build_training

    def build_with_callback(cfg):
        built = build(cfg)
        built.trainer.callbacks.insert(0, callback)
        return built

    monkeypatch.setattr(training, "build_training", build_with_callback)
    with pytest.raises(OutputError) as error:
        train(recipe)
    assert error.value.exit_code == EXIT_NOT_WRITTEN == 73
    return str(error.value)


def test_an_export_that_finds_its_disk_full_is_elsewhere(recipe, small_disk, tmp_path, monkeypatch, caplog):
    disk = small_disk("8m")
    recipe.export_dir = str(disk / "model")
    sentence = train_on_full_disk(recipe, monkeypatch, Fill(disk))
    said = re.fullmatch(
        rf"export_dir: '{disk}/model' could not be written to \((.*)\); the trained model is in '(.*)' instead\.",
        sentence,
    )
    assert "No space left on device" in said[1]
    assert Path(said[2]).parent == tmp_path / "exp"
    assert len(load(said[2]).translate(["one red house"], "en", "de")) == 1
    assert not [path for path in (disk / "model").rglob("*") if path.is_file()]
    assert "The trained model is in" not in caplog.text


def test_a_checkpoint_that_finds_its_disk_full_does_not_cost_the_model(recipe, small_disk, monkeypatch, caplog):
    disk = small_disk("8m")
    recipe.exp_manager.explicit_log_dir = str(disk / "exp")
    sentence = train_on_full_disk(recipe, monkeypatch, Fill(disk, at_start=True))
    assert re.match(r"step 2: the training ended because it could not write \(.*No space left on device\)", sentence)
    assert f"the weights of that step are exported to '{recipe.export_dir}'" in sentence
    assert exported(recipe.export_dir)


def test_after_a_failed_write_the_process_can_write_again(recipe, small_disk, tmp_path, monkeypatch):
    disk = small_disk("8m")
    recipe.exp_manager.explicit_log_dir = str(disk / "exp")
    train_on_full_disk(recipe, monkeypatch, Fill(disk, at_start=True))
    logger = CSVLogger(tmp_path / "log")
    logger.log_metrics({"loss": 1.5}, step=0)
    logger.save()
    assert "1.5" in Path(logger.log_dir, "metrics.csv").read_text()


def test_nowhere_to_write(trained, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(exporting, "new_folder_elsewhere", lambda name, places: iter([tmp_path / "file"]))
    with pytest.raises(OutputError, match=r"could not be written to \(Not a directory\), nor any other folder; make"):
        trained.export(export_dir=str(tmp_path / "file" / "model"))
