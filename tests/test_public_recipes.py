"""Public corpora from the publishers' files to a trained and evaluated model, all in miniature: scripts and recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from click.testing import CliRunner
from omegaconf import DictConfig, OmegaConf

from nemo_emmett import plugin
from nemo_emmett.cli import main
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import plain
from nemo_emmett.errors import DataError
from nemo_emmett.evaluation import from_json
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import check_data_section, check_recipe, train

from .conftest import ENCODER_DIM
from .corpora import layouts, speech_layouts
from .corpora.loading import LOCATOR, make_tokenizer
from .models.backbones import backbone

EXAMPLES = Path(__file__).parents[1] / "examples" / "speechlm"
LANGUAGES = ("en", "de", "es", "fr")
WITH_ENGLISH = {("en", "de"), ("en", "es"), ("en", "fr"), ("de", "en"), ("es", "en"), ("fr", "en")}
LEAKED = 3
"""Number of the sentence that FLORES and all speech corpora have in common."""


# The corpora. Of the script everything runs but nemo-emmett: what it is asked to do is done in this process.


def make_sources(folder: Path) -> Path:
    speech_layouts.make_flores(folder / "flores")
    speech_layouts.make_fleurs(folder / "fleurs", LANGUAGES)
    sentence = speech_layouts.sentence

    def other_sentence(language: str, number: int) -> str:
        return sentence(language, number if number == LEAKED else number + 1000)

    with patch.object(speech_layouts, "sentence", other_sentence):
        pairs = ("en_de", "de_en", "es_en", "fr_en")
        speech_layouts.make_covost2(folder / "covost2", folder / "common_voice", pairs)
        speech_layouts.make_must_c(folder / "must_c")  # en-de and en-fr alone
        speech_layouts.make_mtedx(folder / "mtedx")  # Spanish alone
    layouts.opus_moses(folder / "opus" / "Books")
    layouts.opus_moses(folder / "opus" / "TED2020", "TED2020", "en", "fr")
    layouts.tatoeba_by_language(folder / "tatoeba")  # not Spanish
    layouts.multi30k(folder / "multi30k")
    return folder


class Script:
    """``prepare_public_corpora.sh`` with a ``nemo-emmett`` on its path that notes what it is asked to do."""

    def __init__(self, folder: Path) -> None:
        self.asked = folder / "asked"
        self.path = {"PATH": f"{programs(folder, 'nemo-emmett', self.asked)}:{os.environ['PATH']}"}

    def run(self, sources: Path, out: Path, *options: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        """How it ended, and the commands."""
        self.asked.unlink(missing_ok=True)
        command = ["bash", str(EXAMPLES / "prepare_public_corpora.sh"), str(sources), str(out), *options]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **self.path})
        return result, lines_of(self.asked)


def programs(folder: Path, name: str, asked: Path, body: str = "") -> Path:
    """A folder with a program that notes its arguments and then does as ``body`` says."""
    program = folder / "bin" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/bash\necho "{name} $*" >>{asked}\n{body}\n')
    program.chmod(0o755)
    return program.parent


def lines_of(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The miniature of OUT, and the commands by which the script had it made."""
    folder = tmp_path_factory.mktemp("public")
    sources, out, script = make_sources(folder / "sources"), folder / "data" / "public", Script(folder)
    _, commands = script.run(sources, out, "--jobs", "1")
    for _, *arguments in commands:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    again, commands_again = script.run(sources, out, "--jobs", "1")
    assert again.returncode == 0, again.stderr
    assert commands_again == commands
    return out, commands


@pytest.fixture
def corpus(prepared) -> Path:
    return prepared[0]


def test_the_lists_hold_what_is_trained_on_and_nothing_else(corpus):
    speech = yaml.safe_load((corpus / "input_cfg" / "train_speech.yaml").read_text())
    assert [Path(source["manifest_filepath"]).parent.relative_to(corpus).as_posix() for source in speech] == [
        *(f"covost2/speech/train.{language}" for language in ("de", "en", "es", "fr")),
        "mtedx/speech/train.es",  # and not train.es-es, which is to transcribe
        "must_c/speech/train.en-de",
        "must_c/speech/train.en-fr",
    ]
    assert {source["type"] for source in speech} == {"nemo_tarred"}
    text = yaml.safe_load((corpus / "input_cfg" / "train_text.yaml").read_text())
    opus = tatoeba = [{"de", "en"}, {"en", "fr"}]
    assert [set(source["paths"]) for source in text] == [*opus, *tatoeba, {"en", "de", "fr"}]


def test_test_sentences_are_kept_out_of_training_and_the_leak_check_comes_last(prepared):
    corpus, commands = prepared
    leaked = speech_layouts.sentence("en", LEAKED)
    assert leaked in (corpus / "flores" / "text" / "dev.en").read_text()
    for name in ("covost2", "must_c", "mtedx"):
        parts = json.loads((corpus / name / "corpus.json").read_text())["parts"]
        assert all(part["skipped"]["occurs in held-out data"] == 1 for part in parts)
        assert all(leaked not in path.read_text() for path in corpus.glob(f"{name}/speech/*/manifest_*.json"))
    held_out = ["--held-out", f"{corpus}/flores", "--held-out", f"{corpus}/fleurs"]
    trained = [f"{corpus}/{name}" for name in ("covost2", "must_c", "mtedx", "opus", "tatoeba", "multi30k")]
    assert commands[-1] == ["nemo-emmett", "prepare", "leaks", "--no-near", *held_out, *trained]


def test_the_training_split_of_fleurs_which_has_sentences_of_devtest_is_not_prepared(corpus):
    splits = {part["split"] for part in json.loads((corpus / "fleurs" / "corpus.json").read_text())["parts"]}
    assert splits == {"dev", "test"}


def test_what_is_not_there_is_said_and_left_out(tmp_path):
    speech_layouts.make_flores(tmp_path / "sources" / "flores")
    result, commands = Script(tmp_path).run(tmp_path / "sources", tmp_path / "out")
    assert result.returncode == 0
    for name in ("fleurs", "covost2", "europarl_st", "must_c", "mtedx", "opus", "tatoeba", "multi30k"):
        assert f"{name} is not in {tmp_path}/sources and is left out." in result.stdout
    assert [command[2] for command in commands] == ["flores"]


def test_nothing_at_all_is_an_error(tmp_path):
    result, commands = Script(tmp_path).run(tmp_path, tmp_path / "out")
    assert (result.returncode, commands) == (1, [])
    assert result.stderr.startswith(f"There is no corpus in {tmp_path}")


# The recipe.


def recipe(name: str, corpus: Path, **overrides) -> DictConfig:
    values = {"emmett_data": "public_translation", "corpus": corpus, **overrides}
    return compose_recipe(name, [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("name", ["salm_t5", "salm_gpt", "bestow_gpt"])
def test_every_model_takes_the_public_corpora(name, corpus):
    cfg = recipe(name, corpus)
    check_recipe(cfg)
    check_data_section(cfg.data)
    assert parse_dataset(cfg.data.train_ds, "data.train_ds").unknown_keys == ()


def test_the_blend_and_buckets_are_those_of_the_other_recipe(corpus):
    ours, others = (plain(cfg.data.train_ds) for cfg in (recipe("salm_t5", corpus), compose_recipe("salm_t5")))
    for settings in (ours, others):
        for group in ("audio", "text"):
            del settings[group]["input_cfg"]
    assert ours == others


def test_another_list_leaves_corpora_out_by_one_override(corpus, tmp_path):
    mine = tmp_path / "text.yaml"
    shutil.copy(corpus / "multi30k" / "input_cfg" / "train.yaml", mine)
    cfg = recipe("salm_t5", corpus, **{"paths.train_text": mine})
    check_data_section(cfg.data)
    sources = parse_dataset(cfg.data.train_ds, "data.train_ds").sources
    assert [set(source.paths) for source in sources if source.is_text] == [{"en", "de", "fr"}]


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train_speech.yaml' cannot be read \(No such file or directory\)"):
        check_data_section(recipe("salm_t5", tmp_path).data)


def test_a_batch_holds_speech_and_text_of_every_corpus(corpus, tmp_path):
    tokenizer = make_tokenizer(tmp_path, LANGUAGES)
    cfg = recipe("salm_t5", corpus, **{"data.train_ds.num_workers": 0})
    settings = plain(cfg.data.train_ds) | {
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "sample_rate": 16000,
        "max_bad_records": 0,
        "index_dir": str(tmp_path),
    }
    for group in ("audio", "text"):
        settings[group] |= {"bucket_batch_size": [4, 4], "num_buckets": 1, "num_cuts_for_bins_estimate": 200}
    loader = get_multimodal_dataloader(settings, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    pairs: dict[str, set] = {"audio": set(), "text": set()}
    for _, batch in zip(range(30), loader, strict=False):
        assert set(batch) == {"audio", "text"}
        for modality, part in batch.items():
            pairs[modality] |= {(example["source_lang"], example["target_lang"]) for example in part["examples"]}
    # MuST-C and CoVoST have English speech, mTEDx Spanish with French; Multi30k has German with French.
    assert pairs["audio"] == {("en", "de"), ("en", "fr"), ("es", "en"), ("es", "fr"), ("de", "en"), ("fr", "en")}
    assert pairs["text"] == {(s, t) for s in ("en", "de", "fr") for t in ("en", "de", "fr") if s != t}


def test_what_is_trained_validates_and_is_evaluated_in_the_six_directions(corpus, tiny_asr, tmp_path, monkeypatch):
    plugin.register()
    monkeypatch.chdir(corpus.parents[1])  # where conf/evaluate_fleurs_flores.yaml looks for data/public
    cfg = recipe("salm_t5", "data/public", **tiny(tmp_path, tiny_asr))
    model = train(cfg)
    scored = {name for name in model.trainer.callback_metrics if name.startswith("val_bleu_") and "-" in name}
    sets = ("flores_dev", "fleurs_dev")
    assert scored == {f"val_bleu_{name}_{source}-{target}" for name in sets for source, target in WITH_ENGLISH}
    conf = EXAMPLES.parents[1] / "nemo_emmett" / "conf" / "evaluate_fleurs_flores.yaml"
    arguments = ["evaluate", str(tmp_path / "model"), str(conf), "--output", str(tmp_path / "evaluation")]
    result = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output
    evaluation = from_json(tmp_path / "evaluation" / "evaluation.json")
    sizes = {(s.test_set, s.modality, s.source_lang, s.target_lang): s.sentences for s in evaluation.scores}
    recordings = {
        language: len((corpus / f"fleurs/speech/test.{language}.jsonl").open().readlines()) for language in LANGUAGES
    }
    devtest = speech_layouts.NUM_SENTENCES - speech_layouts.FLORES_DEV
    assert sizes == {("flores", "text", *pair): devtest for pair in WITH_ENGLISH} | {
        ("fleurs", "audio", *pair): recordings[pair[0]] for pair in WITH_ENGLISH
    }
    assert set(evaluation.scores[0].metrics) == {"BLEU", "chrF++"}


def tiny(folder: Path, asr: Path) -> dict:
    """What makes two steps of training a matter of seconds on a CPU."""
    return {
        "exp_dir": folder,
        "model.pretrained_llm": backbone("t5", folder),
        "model.pretrained_asr": asr,
        "model.perception.modality_adapter.input_dim": ENCODER_DIM,
        "model.perception.spec_augment.freq_width": 4,
        "model.max_new_tokens": 2,
        "model.lr_scheduler.warmup_steps": 1,
        "data.train_ds.num_workers": 0,
        "data.train_ds.audio.num_buckets": 1,
        "data.train_ds.text.num_buckets": 1,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.limit_train_batches": 2,
        "+trainer.enable_progress_bar": "false",
        "+trainer.enable_model_summary": "false",
        "+trainer.callbacks.0.memory_budget": "24MiB",
        "+trainer.callbacks.0.max_batch_size": 4,
    }


# On a cluster.


class Job:
    """``slurm_emmett.sh`` in a job of two nodes, with an ``srun`` and a ``scontrol`` that note what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, folder / "asked"

    def run(self, *arguments: str, train_exit: int = 0) -> int:
        """The exit code, training having ended with ``train_exit``."""
        programs(self.folder, "scontrol", self.asked)
        path = programs(self.folder, "srun", self.asked, body=f'[[ "$*" != */train.py* ]] || exit {train_exit}')
        slurm = {
            "SLURM_SUBMIT_DIR": str(EXAMPLES),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "8",
        }
        env = {**os.environ, **slurm, "PATH": f"{path}:{os.environ['PATH']}"}
        command = ["bash", str(EXAMPLES / "slurm_emmett.sh"), *arguments]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True).returncode

    def commands(self) -> list[list[str]]:
        return lines_of(self.asked)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def overrides_of(command: list[str], script: str) -> list[str]:
    return command[command.index(str(EXAMPLES / script)) + 1 :]


def test_a_job_trains_and_then_evaluates_what_it_trained(job, tmp_path):
    assert job.run("salm_t5", "/data", "trainer.max_steps=7") == 0
    training, evaluating = job.commands()
    config_name, *overrides = overrides_of(training, "train.py")
    cfg = compose_recipe(config_name.removeprefix("--config-name="), overrides)
    assert cfg.name == "salm_t5"
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.trainer.max_steps) == (2, 8, 7)
    assert cfg.data.train_ds.audio.input_cfg == "/data/input_cfg/train_speech.yaml"
    config_name, *overrides = overrides_of(evaluating, "evaluate.py")
    evaluation = compose_recipe(config_name.removeprefix("--config-name="), overrides)
    assert evaluation.model == cfg.export_dir == "exp/salm_t5/model"
    assert evaluation.output == "exp/salm_t5/evaluation"
    assert evaluation.log_dir == cfg.exp_manager.explicit_log_dir
    OmegaConf.resolve(evaluation)
    assert evaluation.test_ds.datasets.flores.input_cfg[0].paths.de == "/data/flores/text/devtest.de"


def test_a_training_that_asks_to_be_queued_again_is_not_evaluated(job):
    assert job.run("salm_t5", "/data", train_exit=75) == 75
    _, requeue = job.commands()
    assert requeue == ["scontrol", "requeue", "17"]


def test_a_training_that_fails_is_neither_evaluated_nor_queued(job):
    assert job.run("salm_t5", "/data", train_exit=2) == 2
    assert len(job.commands()) == 1


def test_a_job_behind_a_finished_one_does_nothing(job, tmp_path):
    (tmp_path / "exp" / "salm_t5" / "evaluation").mkdir(parents=True)
    (tmp_path / "exp" / "salm_t5" / "evaluation" / "evaluation.json").write_text("{}")
    assert job.run("salm_t5", "/data") == 0
    assert job.commands() == []


def test_a_job_without_arguments_says_how_to_start_it(job):
    assert job.run("salm_t5") == 2
    assert job.commands() == []
