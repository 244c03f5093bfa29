"""A stock NeMo script uses nemo_emmett through its YAML alone, with only the built wheel installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from .fork_server import IMPORT_DEPENDENCIES

ROOT = Path(__file__).parents[1]

# As NeMo's own speechlm2 training script goes.
SCRIPT = """
import sys

import torch
from lightning.pytorch import Trainer
from nemo.collections.speechlm2 import SALM, DataModule, SALMDataset
from nemo.core.config import hydra_runner
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import OmegaConf


@hydra_runner(config_path="conf", config_name="salm")
def train(cfg):
    torch.set_num_threads(1)
    trainer = Trainer(**resolve_trainer_cfg(cfg.trainer))
    with trainer.init_module():
        model = SALM(OmegaConf.to_container(cfg.model, resolve=True))
    dataset = SALMDataset(model.tokenizer)
    datamodule = DataModule(cfg.data, model.tokenizer, dataset)
    trainer.fit(model, datamodule)
    report(trainer)


def report(trainer):
    # For the test; the names are looked up, not imported.
    import json

    loader = trainer.train_dataloader._source  # of NeMo's BroadcastingDataLoader
    datasets = [loader.dataset]
    while hasattr(datasets[-1], "dataset"):
        datasets.append(datasets[-1].dataset)
    package = sys.modules.get("nemo_emmett")
    print("REPORT " + json.dumps({
        "steps": trainer.global_step,
        "callbacks": [type(c).__module__ + "." + type(c).__name__ for c in trainer.callbacks],
        "loader": type(loader).__module__ + "." + type(loader).__name__,
        "datasets": [type(dataset).__name__ for dataset in datasets],
        "package": package and package.__file__,
        "batch_sizes": OmegaConf.to_container(trainer.datamodule.cfg.train_ds).get("bucket_batch_size"),
    }))


train()
"""

# Runs the script for each line that it reads, with its arguments and in a new process; answers with the exit code. The
# script's first imports are NeMo's (which have Hydra find nemo_emmett): they are done here once for all processes.
SERVER = """
import json, os, runpy, sys

from nemo.collections.speechlm2 import SALM, DataModule, SALMDataset
from nemo.core.config import hydra_runner

for line in sys.stdin:
    request = json.loads(line)
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    os.dup2(os.open(request["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.argv = ["train.py", *request["arguments"]]
    runpy.run_path(os.path.abspath("train.py"), run_name="__main__")
    break
"""

RECIPE = """
defaults:
  - emmett_callbacks: random_state
  - _self_

trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  limit_train_batches: 2
  limit_val_batches: 0
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  use_distributed_sampler: false

model:
  pretrained_llm: ${oc.env:TEST_FOLDER}/llm
  pretrained_weights: false
  audio_locator_tag: "<|audio|>"
  prompt_format: llama3
  perception:
    target: nemo.collections.speechlm2.modules.perception.AudioPerceptionModule
    output_dim: 16
    preprocessor:
      _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor
      features: 16
      n_fft: 512
      window_size: 0.025
      window_stride: 0.01
    encoder: &conformer
      _target_: nemo.collections.asr.modules.ConformerEncoder
      feat_in: 16
      feat_out: -1
      n_layers: 1
      d_model: 16
      n_heads: 2
      subsampling: dw_striding
      subsampling_factor: 8
      subsampling_conv_channels: 8
      conv_kernel_size: 5
      sync_max_audio_length: false
    modality_adapter:
      _target_: nemo.collections.speechlm2.modules.perception.IdentityConnector
      d_model: 16
  optimizer:
    _target_: torch.optim.AdamW
    lr: 0.001
  lr_scheduler:
    _target_: nemo.core.optim.lr_scheduler.CosineAnnealing
    warmup_steps: 0
    min_lr: 0.0001
    max_steps: ${trainer.max_steps}

data:
  train_ds:
    use_emmett: true
    prompt_format: llama3
    token_equivalent_duration: 0.08
    audio_locator_tag: "<|audio|>"
    sample_rate: 16000
    batch_size: 2
    num_workers: 0
    shuffle: false
    seed: 0
    shard_seed: randomized
    input_cfg:
      - type: lhotse_as_conversation
        manifest_filepath: ${oc.env:TEST_FOLDER}/speech.jsonl
        audio_locator_tag: "<|audio|>"
        token_equivalent_duration: 0.08
        tags:
          context: Translate
"""


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which nemo_emmett is there as the built wheel and in no other way."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("nemo_emmett", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    site_packages = Path(_output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    # The dependencies are lent: their folders are on the path, but the .pth files in them, by which an editable
    # install would reach the source tree, are not read.
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages / "lent.pth").write_text("\n".join(lent))
    install = ["--no-deps", "--no-index", "--ignore-installed", "--quiet", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *install]
    subprocess.run(pip, check=True, capture_output=True)
    shutil.rmtree(source)
    return python


def _output(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, cwd="/")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its script, a tiny language model, and four seconds of noise."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "conf").mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "conf" / "salm.yaml").write_text(RECIPE)
    _write_llm(folder / "llm")
    _write_speech(folder)
    return folder


def _write_llm(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|eot_id|>", "eins", "zwei", "Translate"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=32, **size).save_pretrained(folder)


def _write_speech(folder: Path) -> None:
    noise = np.random.default_rng(0)
    with (folder / "speech.jsonl").open("w") as manifest:
        for index in range(4):
            path = folder / f"{index}.wav"
            soundfile.write(path, 0.1 * noise.standard_normal(16000), 16000)
            record = {"audio_filepath": str(path), "duration": 1.0, "text": "eins zwei", "lang": "de"}
            manifest.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def train(clean_python: Path, experiment: Path):
    environment = {
        "TEST_FOLDER": str(experiment),
        "HOME": str(experiment),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }

    def run(*overrides: str) -> dict:
        log = experiment / "log"
        print(json.dumps({"arguments": overrides, "log": str(log)}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        printed = log.read_text()
        assert code == 0, printed[-6000:]
        (line,) = (line for line in printed.splitlines() if line.startswith("REPORT "))
        return json.loads(line.removeprefix("REPORT "))

    (experiment / "server.py").write_text(IMPORT_DEPENDENCIES + SERVER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [str(clean_python), "server.py"], cwd=experiment, env=environment, text=True, **pipes
    ) as server:
        yield run
        server.stdin.close()


def test_callback_config_group_and_dataloader_from_yaml_alone(train, clean_python: Path) -> None:
    found = train()
    assert found["steps"] == 2
    assert found["callbacks"].count("nemo_emmett.callbacks.random_state.RandomState") == 1
    assert found["loader"] == "nemo_emmett.data.dataloader.MultimodalDataLoader"
    assert found["datasets"][-1] == "SALMDataset"
    assert "FallbackDataset" not in found["datasets"]  # which would replay batches in silence
    assert found["package"].startswith(str(clean_python.parents[1]))
    assert not found["package"].startswith(str(ROOT))


def test_a_callback_listed_by_target(train) -> None:
    found = train("~emmett_callbacks", "+trainer.callbacks=[{_target_: nemo_emmett.callbacks.RandomState}]")
    assert found["callbacks"].count("nemo_emmett.callbacks.random_state.RandomState") == 1


def test_oomptimizer_by_its_yaml_alone_in_an_otherwise_stock_recipe(train, experiment: Path) -> None:
    """NeMo's model, data module and data loader, bins in the recipe; the budget leaves room for a few examples."""
    profile = experiment / "profile.yaml"
    callback = f"{{_target_: nemo_emmett.callbacks.OOMptimizer, memory_budget: 8MiB, profile: {profile}}}"
    overrides = [
        *("~emmett_callbacks", "~data.train_ds.use_emmett", f"+trainer.callbacks=[{callback}]"),
        *("+data.train_ds.use_multimodal_sampling=true", "+data.train_ds.bucket_duration_bins=[20,40]"),
    ]
    found = train(*overrides)
    assert found["steps"] == 2
    assert found["callbacks"].count("nemo_emmett.callbacks.oomptimizer.OOMptimizer") == 1
    assert found["loader"] == "torch.utils.data.dataloader.DataLoader"
    assert found["batch_sizes"] == yaml.safe_load(profile.read_text())["train_ds"]["bucket_batch_size"]
    assert found["batch_sizes"][0] > found["batch_sizes"][1] > 1


def test_without_the_key_nemo_builds_its_own_loader(train) -> None:
    found = train("~data.train_ds.use_emmett")
    assert found["steps"] == 2
    assert found["loader"] == "torch.utils.data.dataloader.DataLoader"
    assert found["datasets"] == ["FallbackDataset", "SALMDataset"]
