"""Tiny models and data that tests of several rooms share; all made here, none downloaded."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

# Read when torch loads MKL, whose results depend on where in memory the numbers are on some CPUs otherwise.
os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is then refused at once, with or without a network

LANGUAGES = ("en", "de")
SENTENCES = {
    "en": ["one red house", "two blue cars", "three green trees", "four old doors", "five new keys", "six big dogs"],
    "de": [
        "ein rotes haus",
        "zwei blaue autos",
        "drei grüne bäume",
        "vier alte türen",
        "fünf neue schlüssel",
        "sechs große hunde",
    ],
}
SAMPLING_RATE = 16000


def write_tone(path: Path, seconds: float, frequency: float = 440.0) -> Path:
    """A sine tone, 16 kHz, mono."""
    time = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * frequency * time), SAMPLING_RATE)
    return path


SLOWEST = (
    "models/test_fsdp2.py",
    "oomptimizer/test_calibration.py",
    "test_exact_resume.py",
    "docs/test_notebook.py",
    "docs/test_commands.py",
    "oomptimizer/test_fake.py",
    "test_training.py",
    "data/test_resumption.py",
    "oomptimizer/test_guard_ranks.py",
    "data/test_dataloader.py",
    "planning/test_exchange.py",
    "test_train_command.py",
    "test_documented_recipes.py",
    "data/test_epochs.py",
    "serving/test_process.py",
    "serving/test_load.py",
    "oomptimizer/test_token_bins.py",
    "data/test_ranks.py",
    "data/test_stationarity.py",
    "models/test_ddp.py",
    "test_nemo_recipe.py",
    "callbacks/test_oomptimizer.py",
    "planning/test_commands.py",
    "planning/test_shipped_recipes.py",
    "models/test_memorising_salm_t5.py",
    "safety/test_models.py",
    "models/test_export.py",
    "safety/test_exported_files.py",
    "test_recipes.py",
    "test_exporting.py",
    "data/test_nemo_configs.py",
    "data/test_fuzzed_manifests.py",
    "callbacks/test_resumable_loop.py",
    "oomptimizer/test_steps.py",
    "oomptimizer/test_recovery.py",
    "oomptimizer/test_edge_cases.py",
    "test_plugin.py",
)
"""Files that take longest, in the order in which they begin: one that began last would keep a process waiting."""

LEAVES_THREADS = "test_mutated_recipes.py"
"""Comes last: lhotse's threads never end, and a process with threads cannot be forked safely, as other tests do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)} | {LEAVES_THREADS: len(SLOWEST) + 1}
    folder = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(folder).as_posix(), len(SLOWEST)))


def pytest_collection_finish() -> None:
    """Exclude what is imported by now from garbage collections, which would scan all of NeMo each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Processes that share the tests can send one another valid text only; what is logged of damaged text is not."""
    return _escaped((yield))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_escaped, value))
    return value


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder as the phrasebook has it: `text/train.{en,de}`, `speech/train.{en,de}.jsonl` and tones for speech."""
    folder = tmp_path_factory.mktemp("corpus")
    for language in LANGUAGES:
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"train.{language}").write_text("\n".join(SENTENCES[language]) + "\n")
        (folder / "speech").mkdir(exist_ok=True)
        other = "de" if language == "en" else "en"
        records = []
        for i, sentence in enumerate(SENTENCES[language]):
            seconds = 0.5 + 0.1 * i
            path = write_tone(folder / "audio" / f"{language}-{i}.wav", seconds, 200 + 50 * i)
            records.append(
                {
                    "id": f"{language}-{i}",
                    "audio_filepath": f"../audio/{path.name}",
                    "duration": seconds,
                    "sampling_rate": SAMPLING_RATE,
                    "text": sentence,
                    "lang": language,
                    "translations": {other: SENTENCES[other][i]},
                }
            )
        manifest = folder / "speech" / f"train.{language}.jsonl"
        manifest.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tiny_corpus) -> Path:
    """A T5 of random weights and its tokenizer, in a Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from nemo_emmett.corpora.tokenizers import file_texts, train_t5_tokenizer

    folder = tmp_path_factory.mktemp("t5")
    texts = file_texts([tiny_corpus / "text" / f"train.{language}" for language in LANGUAGES])
    train_t5_tokenizer(texts, folder, vocab_size=120, languages=LANGUAGES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


ENCODER_DIM = 32


def perception_config() -> dict:
    """NeMo's AudioPerceptionModule on top of a pretrained encoder of width ENCODER_DIM."""
    adapter = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
    return {"modality_adapter": {"_target_": adapter, "d_model": ENCODER_DIM}}


@pytest.fixture(scope="session")
def tiny_asr(tmp_path_factory, tiny_corpus) -> Path:
    """A FastConformer CTC model of random weights, a .nemo file."""
    import torch
    from nemo.collections.asr.models import EncDecCTCModelBPE
    from omegaconf import OmegaConf

    from nemo_emmett.corpora.tokenizers import manifest_texts, train_sentencepiece

    folder = tmp_path_factory.mktemp("asr")
    manifests = [tiny_corpus / "speech" / f"train.{language}.jsonl" for language in LANGUAGES]
    train_sentencepiece(manifest_texts(manifests), folder / "tokenizer", vocab_size=60)
    torch.manual_seed(0)
    asr = "nemo.collections.asr.modules"
    config = OmegaConf.create(
        {
            "sample_rate": SAMPLING_RATE,
            "tokenizer": {"dir": str(folder / "tokenizer"), "type": "bpe"},
            "preprocessor": {
                "_target_": f"{asr}.AudioToMelSpectrogramPreprocessor",
                "sample_rate": SAMPLING_RATE,
                "features": 32,
                "dither": 0.0,
                "pad_to": 0,
            },
            "encoder": {
                "_target_": f"{asr}.ConformerEncoder",
                "feat_in": 32,
                "n_layers": 1,
                "d_model": ENCODER_DIM,
                "subsampling": "dw_striding",
                "subsampling_factor": 8,
                "subsampling_conv_channels": 16,
                "n_heads": 4,
                "conv_kernel_size": 5,
                "dropout": 0.1,
            },
            "decoder": {"_target_": f"{asr}.ConvASRDecoder", "feat_in": None, "num_classes": -1, "vocabulary": []},
            "optim": {"name": "adamw", "lr": 1e-3},
        }
    )
    path = folder / "encoder.nemo"
    EncDecCTCModelBPE(config).save_to(str(path))
    return path


@pytest.fixture
def salm_t5_config(tiny_t5, tiny_asr) -> dict:
    """The `model` section of a recipe for a tiny SALM-T5."""
    return {
        "pretrained_llm": str(tiny_t5),
        "pretrained_asr": str(tiny_asr),
        "perception": perception_config(),
        "max_new_tokens": 8,
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    }


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Runs `nemo-emmett` with some arguments in this process."""
    from click.testing import CliRunner

    from nemo_emmett import cli

    return lambda *arguments: CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def corpus(tiny_corpus, tmp_path) -> Path:
    """A copy of the tiny corpus that a test may damage."""
    # Without indexes of other tests, which would not fit the copies.
    shutil.copytree(tiny_corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns(".nemo_emmett"))
    return tmp_path / "corpus"


@pytest.fixture
def recipe(corpus, salm_t5_config, tmp_path) -> dict:
    """A recipe of four steps, with speech and text in each."""
    speech = [
        {"type": "nemo", "manifest_filepath": str(corpus / "speech" / f"train.{lang}.jsonl")} for lang in LANGUAGES
    ]
    text = [{"type": "parallel_text", "paths": {lang: str(corpus / "text" / f"train.{lang}") for lang in LANGUAGES}}]
    return {
        "seed": 0,
        "export_dir": str(tmp_path / "export"),
        "model": {"_target_": "salm_t5", "audio_locator_tag": "<|audio|>", **salm_t5_config},
        "data": {
            "train_ds": {
                "multi_config": True,
                "sampler_fusion": "zip",
                "seed": 0,
                "shard_seed": 0,
                "shuffle": True,
                "num_workers": 0,
                "max_bad_records": None,
                "audio": {"batch_size": 4, "max_duration": 20.0, "input_cfg": speech},
                "text": {"batch_size": 3, "use_multimodal_sampling": True, "input_cfg": text},
            },
            "validation_ds": {
                "batch_size": 4,
                "datasets": {
                    "dev_text": {"use_multimodal_sampling": True, "input_cfg": text},
                    "dev_speech": {"input_cfg": speech},
                },
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "limit_train_batches": 2,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        },
        "exp_manager": {
            "explicit_log_dir": str(tmp_path / "exp"),
            "seconds_to_sleep": 0.5,  # of ranks other than the first, while it makes the folder
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "checkpoint_callback_params": {"monitor": "val_bleu", "mode": "max", "save_top_k": 1},
        },
    }


@pytest.fixture(autouse=True)
def no_log_files_left() -> Iterator[None]:
    """Trainings in this process leave log files open: each later line would be written to all of them."""
    yield
    close_log_files()


def close_log_files() -> None:
    for name in ("nemo_logger", "lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
            logger.removeHandler(handler)
            with suppress(OSError):  # of a disk that is full
                handler.close()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """``small_disk("512k")`` is a folder on a file system of that size, which can be filled for real."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a file system can be mounted by root only, and not in every container")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Write to a disk until nothing more fits."""
    for size in (65536, 1):
        with open(disk / f"filling{size}", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


@pytest.fixture(scope="module")
def scripts_importable() -> Iterator[None]:
    """The scripts of examples/speechlm can be imported by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "speechlm"))
        yield
