"""The shipped recipes: each composes, has no key that means nothing, and trains on files laid out as it says."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_emmett import plugin
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import plain
from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.objectives.registry import OBJECTIVES, parse_objectives
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import check_recipe, train

from .conftest import ENCODER_DIM, SAMPLING_RATE, SENTENCES
from .models.backbones import backbone

JOINT = ("salm_t5", "salm_gpt", "bestow_gpt")
SMALL = [
    f"{name}_{corpus}"
    for corpus in ("phrasebook", "captions")
    for name in ("salm_t5", "salm_gpt", "pretrain_t5", "pretrain_llm")
] + ["salm_t5_mboshi", "pretrain_t5_mboshi", "experiment_efficiency"]
BACKBONES = {"salm_t5": "t5", "salm_gpt": "llama", "bestow_gpt": "llama"}
LANGUAGES = ("en", "de", "es", "fr")
CONF = Path(__file__).parents[1] / "nemo_emmett" / "conf"
EXAMPLES = Path(__file__).parents[1] / "examples" / "speechlm" / "conf"
FREEZING = sorted(path.stem for path in (CONF / "emmett_freezing").glob("*.yaml"))


@pytest.mark.parametrize("name", [*SMALL, *JOINT])
def test_a_recipe_composes_and_all_its_keys_mean_something(name):
    cfg = compose_recipe(name if name in JOINT else str(EXAMPLES / f"{name}.yaml"))
    OmegaConf.resolve(cfg)
    check_recipe(cfg)
    for place, settings in datasets_of(cfg.data):
        assert parse_dataset(settings, place).unknown_keys == ()
    known = {"_target_", *ModelConfig.__dataclass_fields__}
    assert set(cfg.model) <= known


def test_the_package_holds_no_recipes_but_those_of_the_models():
    """Every Hydra program on a user's machine searches them."""
    assert {path.stem for path in CONF.glob("*.yaml")} == {*JOINT, "evaluate_fleurs_flores"}
    assert all(path.name.startswith("emmett_") for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_")


def test_every_recipe_that_is_named_by_its_path_exists():
    """In the docs, in docstrings and in the comments of scripts and recipes."""
    root = CONF.parents[1]
    suffixes = ("*.md", "*.py", "*.sh", "*.yaml")
    files = [root / "README.md"]
    files += [
        path
        for folder in ("docs", "nemo_emmett", "examples")
        for s in suffixes
        for path in root.glob(f"{folder}/**/{s}")
    ]
    missing = {}
    for file in files:
        for named in re.findall(r"[\w/.]*\bconf/[\w/]+\.yaml", file.read_text()):
            if not any((folder / named).exists() for folder in (root, file.parent)):
                missing[named] = file.relative_to(root).as_posix()
    assert not missing
    assert len(files) > 100


def datasets_of(data: DictConfig) -> Iterator[tuple[str, dict]]:
    for name, dataset in data.items():
        common = plain(dataset)
        parts = common.pop("datasets", None)
        for part, settings in ({"": {}} if parts is None else parts).items():
            yield f"data.{name}.{part}".rstrip("."), {**common, **settings}


@pytest.mark.parametrize("freezing", FREEZING)
def test_each_way_of_freezing_is_chosen_by_a_word(freezing):
    model = compose_recipe("salm_t5", [f"emmett_freezing={freezing}"]).model
    expected = {"full": [], "lora": [], "lora_speech": [], "frozen_llm": ["llm"], "frozen_encoder": ["encoder"]}
    assert model.freeze == expected[freezing]
    assert (model.lora is not None) is freezing.startswith("lora")


def test_objectives_are_chosen_by_words_several_at_a_time():
    groups = sorted(path.stem for path in (CONF / "emmett_objectives").glob("*.yaml"))
    assert groups == sorted(OBJECTIVES)
    model = compose_recipe("salm_t5", [f"+emmett_objectives=[{','.join(groups)}]"]).model
    assert [objective.name for objective in parse_objectives(plain(model.objectives))] == list(OBJECTIVES)
    one = compose_recipe("salm_gpt", ["+emmett_objectives=retention", "model.objectives.retention.weight=0.1"]).model
    assert [(objective.name, objective.weight) for objective in parse_objectives(plain(one.objectives))] == [
        ("retention", 0.1)
    ]


def test_each_way_of_distribution_is_chosen_by_a_word():
    ddp = hydra.utils.instantiate(compose_recipe("salm_gpt").trainer.strategy)
    assert ddp._ddp_kwargs == {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    sharded = ["emmett_strategy=fsdp2", "trainer.strategy.data_parallel_size=64"]
    recipe = compose_recipe("salm_gpt", sharded)
    fsdp2 = hydra.utils.instantiate(recipe.trainer.strategy)
    assert (fsdp2._data_parallel_size, fsdp2._tensor_parallel_size) == (64, 1)
    # A sharded model does not translate in validation, so there is no BLEU to choose checkpoints by.
    assert recipe.exp_manager.checkpoint_callback_params.monitor == "val_loss"
    assert recipe.exp_manager.checkpoint_callback_params.mode == "min"
    with pytest.raises(ConfigError, match=r"^trainer.strategy.data_parallel_size: the recipe leaves this to you"):
        compose_recipe("salm_gpt", sharded[:1])
    in_groups = compose_recipe("salm_gpt", ["emmett_strategy=hsdp", "trainer.strategy.replicas=8"])
    assert hydra.utils.instantiate(in_groups.trainer.strategy).replicas == 8
    assert in_groups.exp_manager.checkpoint_callback_params.monitor == "val_loss"


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (["trainer.precision=16-mixed"], True),
        (["trainer.precision=16-mixed", "model.optimizer.fused=false"], False),
        (["trainer.precision=16-mixed", "trainer.gradient_clip_val=null"], False),
        (["trainer.precision=bf16-mixed"], False),
    ],
)
def test_a_fused_optimizer_whose_gradients_cannot_be_clipped_is_refused(overrides, is_refused):
    cfg = compose_recipe("salm_t5", overrides)
    if is_refused:
        with pytest.raises(ConfigError, match=r"^model\.optimizer\.fused: true is not possible with"):
            check_recipe(cfg)
    else:
        check_recipe(cfg)


# Training.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_corpus) -> Path:
    """Speech and text of four languages as `paths` lays them out, one shard each."""
    folder = tmp_path_factory.mktemp("joint_translation")
    (folder / "speech").mkdir()
    (folder / "text").mkdir()
    sides = {language: SENTENCES["en" if language == "en" else "de"] for language in LANGUAGES}
    for language in LANGUAGES:
        write_speech(folder / "speech", language, tiny_corpus / "audio", sides[language])
        (folder / "text" / f"dev.{language}").write_text(sides[language][0] + "\n")
        for side in ("en", language):
            if language != "en":
                (folder / "text" / f"train.en-{language}.{side}").write_text("\n".join(sides[side]) + "\n")
    return folder


def write_speech(folder: Path, language: str, audio: Path, sentences: list[str]) -> None:
    """A tar file with its manifest for training, and a plain manifest of one recording for validation."""
    other = "de" if language == "en" else "en"
    records = []
    (folder / language).mkdir()
    with tarfile.open(folder / language / "audio_0.tar", "w") as tar:
        for i, sentence in enumerate(sentences):
            wav = audio / f"{'en' if language == 'en' else 'de'}-{i}.wav"
            tar.add(wav, arcname=f"{language}-{i}.wav")
            record = {"audio_filepath": f"{language}-{i}.wav", "duration": 0.5 + 0.1 * i, "shard_id": 0}
            records.append(record | {"sampling_rate": SAMPLING_RATE, "text": sentence, "target_lang": other})
    (folder / language / "manifest_0.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    dev = records[0] | {"audio_filepath": str(wav.with_name(f"{wav.name[:2]}-0.wav"))}
    (folder / f"dev.{language}.jsonl").write_text(json.dumps(dev) + "\n")


def small(name: str, freezing: str, corpus: Path, asr: Path, folder: Path) -> DictConfig:
    """A recipe with nothing changed but its size: two steps on the CPU, of a tiny model, on six sentences."""
    speech = {
        f"paths.speech.{language}.{key}": f"{corpus}/speech/{language}/{file}"
        for language in LANGUAGES
        for key, file in (("manifests", "manifest_0.json"), ("tars", "audio_0.tar"))
    }
    adapter = "d_model" if name == "bestow_gpt" else "input_dim"
    values = {
        "emmett_freezing": freezing,
        "corpus": corpus,
        **speech,
        "exp_dir": folder,
        "model.pretrained_llm": backbone(BACKBONES[name], folder),
        "model.pretrained_asr": asr,
        f"model.perception.modality_adapter.{adapter}": ENCODER_DIM,
        "model.perception.spec_augment.freq_width": 4,
        "model.max_new_tokens": 4,
        "model.lr_scheduler.warmup_steps": 1,
        "data.train_ds.num_workers": 0,
        "data.train_ds.audio.num_buckets": 1,
        "data.train_ds.text.num_buckets": 1,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.limit_train_batches": 2,
        "trainer.log_every_n_steps": 1,
        "+trainer.enable_progress_bar": "false",
        "+trainer.enable_model_summary": "false",
        "+trainer.callbacks.0.memory_budget": "24MiB",
        "+trainer.callbacks.0.max_batch_size": 4,
    }
    if name == "bestow_gpt":
        values["model.cross_attention.num_heads"] = 4
    overrides = [f"{key}={value}" for key, value in values.items()]
    return compose_recipe(name, [*overrides, "~data.train_ds.text"] if freezing == "frozen_llm" else overrides)


@pytest.mark.parametrize(
    ("name", "freezing"),
    [("salm_t5", "full"), ("salm_gpt", "lora"), ("bestow_gpt", "frozen_encoder"), ("salm_t5", "frozen_llm")],
)
def test_a_recipe_trains_and_what_it_freezes_stays(name, freezing, corpus, tiny_asr, tmp_path):
    plugin.register()
    cfg = small(name, freezing, corpus, tiny_asr, tmp_path)
    model = train(cfg)
    assert model.trainer.global_step == 2
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert ("llm" in trained) is (freezing != "frozen_llm")
    assert any(p.requires_grad for p in model.perception.encoder.parameters()) is (freezing != "frozen_encoder")
    assert all(p.isfinite().all() for p in model.parameters())
    if freezing == "lora":
        assert all(".lora_" in n for n, p in model.named_parameters() if n.startswith("llm") and p.requires_grad)
    groups = OmegaConf.load(tmp_path / "oomptimizer.yaml").train_ds
    assert [len(group.bucket_batch_size) for group in groups.values()] == [2] * (1 if freezing == "frozen_llm" else 2)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "checkpoints").glob("*val_bleu*.ckpt"))
    assert torch.is_tensor(model.trainer.callback_metrics["val_bleu"])
