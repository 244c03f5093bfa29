"""Our keys and callbacks in NeMo's trainings: where they would do nothing, they say so before the first step."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from nemo.collections.speechlm2.data import DataModule, SALMDataset
from omegaconf import OmegaConf

import nemo_emmett  # noqa: F401  # registers with NeMo
from nemo_emmett.callbacks import (
    OOMptimizer,
    RandomState,
    ResumableData,
    SkipNonFiniteSteps,
    StopOnSignal,
    TrainingClock,
)
from nemo_emmett.data.dataloader import MultimodalDataLoader
from nemo_emmett.errors import ConfigError
from tests.oomptimizer.fits import trainer_with
from tests.oomptimizer.models import tiny_ctc, tiny_multitask, tiny_rnnt, tiny_salm
from tests.oomptimizer.test_asr_training import BatchesSeen, manifest

MODELS = {"ctc": tiny_ctc, "rnnt": tiny_rnnt, "canary": tiny_multitask}


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> str:
    written = manifest(tmp_path_factory.mktemp("speech"))
    return str(written.rename(written.with_name("speech.jsonl")))  # NeMo refuses the first name for validation sets


@pytest.fixture
def train_ds(speech) -> dict:
    """As NeMo's CTC recipe has it: without ``use_lhotse``."""
    return {
        "manifest_filepath": speech,
        "sample_rate": 16000,
        "batch_size": 4,
        "shuffle": False,
        "num_workers": 0,
        "is_tarred": False,
        "shuffle_n": 2048,
    }


BINS = {"bucket_duration_bins": [[0.8, 12], [1.2, 12], [2.0, 30]]}
LHOTSE = {"use_lhotse": True, "bucket_buffer_size": 100}


def refusal(train) -> str:
    with pytest.raises(ConfigError) as refused:
        train()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def fit(model, folder, *callbacks, **options) -> Any:
    trainer = trainer_with(folder, *callbacks, **{"max_steps": 2, "max_epochs": -1, **options})
    trainer.fit(model)
    return trainer


# Keys of datasets in ASR recipes.


@pytest.mark.parametrize("kind", ["ctc", "rnnt"])
def test_use_emmett_is_refused_where_the_model_does_not_read_by_lhotse(kind, train_ds, tmp_path):
    seen = BatchesSeen()
    said = refusal(lambda: fit(MODELS[kind](tmp_path, train_ds=train_ds | {"use_emmett": True}), tmp_path, seen))
    assert said.startswith("model.train_ds.use_emmett: has no effect")
    assert "set ++model.train_ds.use_lhotse=true" in said
    assert not seen.sizes


@pytest.mark.parametrize("section", ["validation_ds", "test_ds"])
def test_in_every_dataset_of_an_asr_model(section, train_ds, tmp_path):
    model = tiny_ctc(tmp_path, train_ds=train_ds, **{section: train_ds | {"use_emmett": True}})
    assert refusal(lambda: fit(model, tmp_path)).startswith(f"model.{section}.use_emmett: has no effect")


def test_one_of_several_validation_sets_is_enough(train_ds, tmp_path):
    several = train_ds | {"manifest_filepath": [train_ds["manifest_filepath"]] * 2, "use_emmett": True}
    model = tiny_ctc(tmp_path, train_ds=train_ds, validation_ds=several)
    assert refusal(lambda: fit(model, tmp_path)).startswith("model.validation_ds.use_emmett")


def test_the_remedy_as_it_is_printed_gives_our_loader(train_ds, tmp_path):
    model = tiny_ctc(tmp_path, train_ds=train_ds | {"use_emmett": True, "use_lhotse": True})
    assert isinstance(fit(model, tmp_path).train_dataloader, MultimodalDataLoader)


def test_in_validation_alone_it_has_its_effect(train_ds, tmp_path):
    with_lhotse = train_ds | {"use_lhotse": True}
    model = tiny_ctc(tmp_path, train_ds=with_lhotse, validation_ds=with_lhotse | {"use_emmett": True})
    trainer = fit(model, tmp_path)
    assert not isinstance(trainer.train_dataloader, MultimodalDataLoader)
    assert isinstance(model.val_dataloader(), MultimodalDataLoader)


@pytest.mark.parametrize("reads_by_lhotse", [True, False])
@pytest.mark.parametrize(
    "ours",
    [
        {"sampling": "emmett"},
        {"max_bad_records": 3},
        {"allow_commands": False},
        {"weights": "auto"},
        {"num_sub_buckets": 2},
    ],
    ids=str,
)
def test_a_key_of_our_loader_without_our_loader_is_refused(ours, reads_by_lhotse, train_ds, tmp_path):
    config = train_ds | ours | ({"use_lhotse": True} if reads_by_lhotse else {})
    said = refusal(lambda: fit(tiny_ctc(tmp_path, train_ds=config), tmp_path))
    ((key, value),) = ours.items()
    assert said.startswith(f"model.train_ds.{key}: {value} has no effect")
    assert "set ++model.train_ds.use_emmett=true" in said


def test_recipes_that_do_not_mean_us_are_left_alone(train_ds, tmp_path):
    config = train_ds | {"weights": [1, 2], "sampling": "temperature", "use_emmett": False, "source_lang": "en"}
    assert fit(tiny_ctc(tmp_path, train_ds=config), tmp_path).global_step == 2


# Keys of datasets in recipes of NeMo's SALM.


@pytest.fixture
def salm(tmp_path):
    return tiny_salm(tmp_path)


def loader_of(model, data: dict) -> Any:
    cfg = OmegaConf.create({"data": data}).data  # as a script has it: a section of the recipe
    module = DataModule(cfg, model.tokenizer, SALMDataset(model.tokenizer))
    return module.train_dataloader()._source


@pytest.fixture
def group(speech) -> dict:
    source = {"type": "lhotse_as_conversation", "manifest_filepath": speech, "audio_locator_tag": "<|audio|>"}
    return {
        "prompt_format": "llama3",
        "token_equivalent_duration": 0.08,
        "batch_size": 2,
        "num_workers": 0,
        "seed": 0,
        "shard_seed": 0,
        "input_cfg": [source | {"tags": {"context": "Repeat"}}],
    }


@pytest.fixture
def text(tmp_path) -> dict:
    for language in ("en", "de"):
        (tmp_path / f"text.{language}").write_text("one\ntwo\n")
    source = {"source_paths": str(tmp_path / "text.en"), "target_paths": str(tmp_path / "text.de")}
    languages = {"source_language": "en", "target_language": "de"}
    return {
        "batch_size": 2,
        "prompt_format": "llama3",
        "use_multimodal_sampling": True,
        "input_cfg": [{"type": "parallel_text", **source, **languages, "target_lang": "de"}],
    }


@pytest.mark.parametrize("place", ["data", "group", "source"])
def test_use_emmett_anywhere_else_than_in_the_dataset_is_refused(place, salm, group):
    data: dict = {"train_ds": {"multi_config": True, "speech": group, "seed": 0, "shard_seed": 0}}
    at, where = {
        "data": (data, "data"),
        "group": (group, "data.train_ds.speech"),
        "source": (group["input_cfg"][0], "data.train_ds.speech.input_cfg.0"),
    }[place]
    at["use_emmett"] = True
    said = refusal(lambda: loader_of(salm, data))
    assert said.startswith(f"{where}.use_emmett: has no effect there")
    assert "set ++data.train_ds.use_emmett=true" in said


def test_a_value_of_the_section_that_another_dataset_refers_to_is_left_alone(salm, group):
    data = {"use_emmett": True, "train_ds": group, "validation_ds": {"use_emmett": True, "datasets": {}}}
    assert not isinstance(loader_of(salm, data), MultimodalDataLoader)


def test_our_text_in_nemos_loader_for_nemos_salm_is_refused(salm, group, text):
    data = {"train_ds": {"multi_config": True, "sampler_fusion": "zip", "speech": group, "text": text, "seed": 0}}
    said = refusal(lambda: loader_of(salm, data))
    assert said.startswith("data.train_ds.text.input_cfg.0.type: parallel_text cannot be read by NeMo's dataloader")
    data["train_ds"]["use_emmett"] = True
    assert isinstance(loader_of(salm, data), MultimodalDataLoader)


def test_mux_without_our_loader_is_refused(salm, group, text):
    data = {"train_ds": {"multi_config": True, "sampler_fusion": "mux", "speech": group, "seed": 0}}
    assert refusal(lambda: loader_of(salm, data)).startswith("data.train_ds.sampler_fusion: mux has no effect")


# What NeMo's SALM cannot take.


@pytest.mark.parametrize("fusion", [None, "round_robin", "randomized_round_robin", "mux"])
def test_a_fusion_with_batches_of_text_is_refused_before_training(fusion, salm, group, text):
    train_ds = {"use_emmett": True, "multi_config": True, "speech": group, "text": text, "seed": 0, "shard_seed": 0}
    train_ds |= {} if fusion is None else {"sampler_fusion": fusion}
    if fusion == "mux":
        train_ds |= {key: group[key] for key in ("prompt_format", "batch_size", "token_equivalent_duration")}
        train_ds |= {"use_multimodal_sampling": True}
        train_ds |= {name: {"input_cfg": train_ds[name]["input_cfg"]} for name in ("speech", "text")}
    said = refusal(lambda: loader_of(salm, {"train_ds": train_ds}))
    assert said.startswith(f"data.train_ds.text: holds text, so with sampler_fusion: {fusion or 'round_robin'} a batch")
    assert (
        said.index("SALMGPT")
        < said.index("++model._target_=salm_gpt")
        < said.index("++data.train_ds.sampler_fusion=zip")
    )


def test_the_fusion_that_is_advised_trains(salm, group, text, tmp_path):
    train_ds = {"use_emmett": True, "multi_config": True, "speech": group, "text": text, "seed": 0, "shard_seed": 0}
    cfg = OmegaConf.create({"data": {"train_ds": train_ds | {"sampler_fusion": "zip"}}})
    data = DataModule(cfg.data, salm.tokenizer, SALMDataset(salm.tokenizer))
    trainer = trainer_with(tmp_path, max_steps=2, max_epochs=-1, limit_val_batches=0)
    trainer.fit(salm, data)
    assert trainer.global_step == 2


@pytest.mark.parametrize("has_speech", [False, True])
def test_text_in_one_group_is_refused_and_zip_is_not_advised(has_speech, salm, group, text):
    train_ds = text | {"use_emmett": True, "seed": 0, "shard_seed": 0, "token_equivalent_duration": 0.08}
    if has_speech:
        train_ds["input_cfg"] = [*group["input_cfg"], *text["input_cfg"]]
    said = refusal(lambda: loader_of(salm, {"train_ds": train_ds}))
    assert said.startswith("data.train_ds: holds text, so a batch may hold nothing else")
    assert "zip" not in said
    assert said.endswith("or remove its text sources.")


# Callbacks.


def test_oomptimizer_is_refused_where_its_batch_sizes_are_not_read(train_ds, tmp_path):
    seen, profile = BatchesSeen(), tmp_path / "profile.yaml"
    callback = OOMptimizer(profile=profile, memory_budget="6MiB")
    said = refusal(lambda: fit(tiny_ctc(tmp_path, train_ds=train_ds | BINS), tmp_path, callback, seen))
    assert said.startswith("OOMptimizer: model.train_ds.use_lhotse is not set")
    assert "makes batches of 4, whatever bucket_batch_size is; set ++model.train_ds.use_lhotse=true" in said
    assert not profile.exists()
    assert not seen.sizes


def test_semi_sorted_batches_of_nemos_older_loader_are_none_of_oomptimizers(train_ds, tmp_path):
    model = tiny_ctc(tmp_path, train_ds=train_ds | BINS | {"use_semi_sorted_batching": True, "drop_last": False})
    callback = OOMptimizer(profile=tmp_path / "profile.yaml", memory_budget="6MiB")
    assert "makes its own batches, whatever" in refusal(lambda: fit(model, tmp_path, callback))


@pytest.mark.parametrize("keys", [LHOTSE, LHOTSE | {"use_bucketing": True}, LHOTSE | {"use_emmett": True}], ids=str)
def test_oomptimizer_has_its_effect_by_lhotse(keys, train_ds, tmp_path):
    seen = BatchesSeen()
    callback = OOMptimizer(profile=tmp_path / "profile.yaml", memory_budget="6MiB")
    fit(tiny_ctc(tmp_path, train_ds=train_ds | BINS | keys | {"batch_size": 1}), tmp_path, callback, seen)
    assert max(seen.sizes) > 1


def warnings_of(caplog, name: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and name in r.getMessage()]


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({}, ("use_lhotse=true", "use_emmett=true", "sampling=emmett")),
        ({"use_lhotse": True}, ("use_lhotse=true", "use_emmett=true", "sampling=emmett")),
        ({"use_lhotse": True, "use_emmett": True}, ("sampling=emmett",)),
        ({"use_lhotse": True, "use_emmett": True, "sampling": "emmett"}, None),
    ],
    ids=str,
)
def test_resumable_data_tells_where_the_data_does_not_resume(keys, remedy, train_ds, tmp_path, caplog):
    fit(tiny_ctc(tmp_path, train_ds=train_ds | keys), tmp_path, ResumableData())
    said = warnings_of(caplog, "ResumableData does not hold the position in the data of model.train_ds")
    if remedy is None:
        assert not said
    else:
        assert len(said) == 1
        keys = " ".join(f"++model.train_ds.{key}" for key in remedy)
        assert f"set {keys} ++trainer.limit_train_batches=1000 (the batches of an epoch" in said[0]


class Loader(torch.utils.data.DataLoader):
    def state_dict(self) -> dict:
        return {}


class Data(LightningDataModule):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.kind([torch.ones(2)] * 2, batch_size=None)


@pytest.mark.parametrize(("kind", "expected"), [(Loader, 0), (torch.utils.data.DataLoader, 1)])
def test_resumable_data_with_a_loader_of_somebody_else(kind, expected, tmp_path, caplog):
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            return self.layer(torch.ones(1, 32)).sum()

    trainer_with(tmp_path, ResumableData(), max_steps=1).fit(Model(), Data(kind))
    assert len(warnings_of(caplog, "ResumableData does not hold the position in the data of data.train_ds")) == expected


def test_callbacks_that_log_or_stop_tell_what_is_missing(train_ds, tmp_path, caplog):
    callbacks = (TrainingClock(), StopOnSignal(), RandomState(), SkipNonFiniteSteps())
    fit(tiny_ctc(tmp_path, train_ds=train_ds), tmp_path, *callbacks)
    assert len(warnings_of(caplog, "TrainingClock logs nothing in this training")) == 1
    assert len(warnings_of(caplog, "StopOnSignal: the trainer has no ModelCheckpoint")) == 1
    assert not warnings_of(caplog, "RandomState")
    assert not warnings_of(caplog, "SkipNonFiniteSteps")


def test_they_are_quiet_where_they_have_their_effect(train_ds, tmp_path, caplog):
    model = tiny_ctc(tmp_path, train_ds=train_ds, validation_ds=train_ds)
    trainer = fit(model, tmp_path, TrainingClock(), StopOnSignal(), enable_checkpointing=True, val_check_interval=2)
    assert "train_seconds" in trainer.callback_metrics
    assert not warnings_of(caplog, "TrainingClock")
    assert not warnings_of(caplog, "StopOnSignal")


def test_stop_on_signal_outside_of_the_main_thread_says_so(train_ds, tmp_path, caplog):
    model = tiny_ctc(tmp_path, train_ds=train_ds)
    thread = threading.Thread(target=fit, args=(model, tmp_path, StopOnSignal()))
    thread.start()
    thread.join()
    assert len(warnings_of(caplog, "StopOnSignal has no effect in this training: Python handles signals")) == 1


@pytest.mark.parametrize("build", [tiny_ctc, tiny_multitask])
def test_steps_with_losses_that_are_not_finite_are_skipped_in_asr_models(build, train_ds, tmp_path):
    model = build(tmp_path, train_ds=train_ds | {"use_lhotse": True})
    before = {name: value.clone() for name, value in model.named_parameters()}
    step = model.training_step
    model.training_step = lambda *batch, **named: {"loss": step(*batch, **named)["loss"] * float("nan")}
    fit(model, tmp_path, SkipNonFiniteSteps(max_steps=None))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_false_is_refused_where_our_loader_is_always_taken(tmp_path, text):
    from nemo_emmett.data.checks import check_data_config

    said = refusal(lambda: check_data_config(text | {"use_emmett": False}))
    assert said.startswith("data.train_ds.use_emmett: false has no effect")
    assert "++data.train_ds.sampling=nemo" in said
