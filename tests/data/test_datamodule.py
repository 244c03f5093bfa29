"""The datamodule: NeMo's, with our loaders."""

from __future__ import annotations

import random
import re
from itertools import islice

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities import CombinedLoader
from nemo.collections.common.data.lhotse.broadcasting import BroadcastingDataLoader
from nemo.collections.speechlm2.data.datamodule import DataModule
from nemo.core.classes.common import Serialization
from omegaconf import OmegaConf

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d
from nemo_emmett.data.bucketing.length_stats import measure
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError


@pytest.fixture
def config(speech, pairs):
    text = {"input_cfg": [{"type": "parallel_text", **pairs(5)}], "batch_size": 2}
    spoken = {"manifest_filepath": str(speech(3)), "target_lang": "de", "batch_size": 2}
    common = {"prompt_format": "emmett_t5", "audio_locator_tag": "<|audio|>"}
    fusion = {"multi_config": True, "sampler_fusion": "zip", "seed": 0, "shard_seed": 0}
    dev = {**common, "batch_size": 2, "datasets": {"dev_text": text, "dev_speech": spoken}}
    return OmegaConf.create(
        {
            "train_ds": {**common, **fusion, "spoken": spoken, "written": text},
            "validation_ds": dev,
            "test_ds": dev,
            "predict_ds": dev,
        }
    )


@pytest.fixture
def datamodule(config, tokenizer) -> MultimodalDataModule:
    return MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))


def test_it_is_nemos_and_admitted_by_its_allow_list(datamodule) -> None:
    assert isinstance(datamodule, (DataModule, Serialization))
    assert issubclass(MultimodalDataModule, DataModule)
    assert issubclass(MultimodalDataModule, Serialization)


def test_training_is_endless_and_holds_both_modalities(datamodule) -> None:
    loader = datamodule.train_dataloader()
    assert isinstance(loader, BroadcastingDataLoader)
    assert [sorted(batch) for batch in islice(loader, 9)] == [["audio", "text"]] * 9


def test_evaluation_sees_each_example_once(datamodule) -> None:
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        assert isinstance(loader, CombinedLoader)
        sizes = {
            name: [len(part["examples"]) for batch in iterable for part in batch.values()]
            for name, iterable in loader.iterables.items()
        }
        assert sizes == {"dev_text": [2, 2, 1], "dev_speech": [2, 1]}
    first, _, _ = next(iter(datamodule.val_dataloader()))
    assert {name: list(batch) for name, batch in first.items()} == {"dev_text": ["text"], "dev_speech": ["audio"]}


def test_predict_takes_one_set_after_the_other(datamodule) -> None:
    batches = [batch for batch, *_ in datamodule.predict_dataloader()]
    assert [list(batch) for batch in batches] == [["text"]] * 3 + [["audio"]] * 2


def test_the_recipe_is_not_changed_by_its_loaders(datamodule, config) -> None:
    before = OmegaConf.to_container(datamodule.cfg)
    datamodule.train_dataloader()
    datamodule.val_dataloader()
    assert OmegaConf.to_container(datamodule.cfg) == before


def test_absent_sections_have_no_loader(tokenizer) -> None:
    empty = MultimodalDataModule({}, tokenizer, SpeechTextDataset(tokenizer))
    assert empty.train_dataloader() is None
    assert empty.val_dataloader() == empty.test_dataloader() == empty.predict_dataloader() == []


def test_a_dataset_called_as_a_modality_is_refused_at_once(config, tokenizer) -> None:
    config.validation_ds.datasets.audio = config.validation_ds.datasets.dev_speech
    with pytest.raises(ConfigError, match=r"data.validation_ds.datasets.audio: a dataset cannot be called 'audio'"):
        MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))


MODEL = {"sample_rate": 16000, "audio_locator_tag": "<|audio|>", "prompt_format": "emmett_t5"}


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("train_ds.sample_rate", 8000, "the speech encoder reads 16000 samples per second, not 8000; leave the key"),
        ("train_ds.spoken.sample_rate", 44100, "the speech encoder reads 16000 samples per second, not 44100; leave"),
        ("validation_ds.datasets.dev_speech.sample_rate", 8000, "the speech encoder reads 16000"),
        ("train_ds.audio_locator_tag", "<|speech|>", r"the model takes '<\|audio\|>' for speech, not '<\|speech\|>'; "),
        ("train_ds.written.input_cfg.0.audio_locator_tag", "<a>", "the model takes"),
        ("train_ds.prompt_format", "emmett_nllb", "the model translates with 'emmett_t5', but this data would train "),
        ("test_ds.prompt_format", "emmett_nllb", "the model translates with 'emmett_t5'"),
    ],
)
def test_data_that_differs_from_the_model_is_refused(config, tokenizer, place, value, sentence) -> None:
    OmegaConf.update(config, place, value, force_add=True)
    MultimodalDataModule(config.copy(), tokenizer, SpeechTextDataset(tokenizer))  # there is no model to differ from
    with pytest.raises(ConfigError, match=rf"^data\.{re.escape(place)}: {sentence}"):
        MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer), MODEL)


def test_what_the_model_says_holds_where_the_data_says_nothing(config, tokenizer) -> None:
    config.train_ds.sample_rate = 16000  # the same, said twice
    del config.train_ds.prompt_format
    datamodule = MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer), MODEL)
    assert {key: datamodule.cfg.train_ds[key] for key in MODEL} == MODEL


def test_errors_name_the_dataset(config, tokenizer) -> None:
    config.validation_ds.datasets.dev_speech.batch_szie = 3
    datamodule = MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))
    with pytest.raises(ConfigError, match=r"data.validation_ds.datasets.dev_speech.batch_szie: .* 'batch_size'"):
        datamodule.val_dataloader()


class Counter(LightningModule):
    """Counts what the trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch: dict) -> torch.Tensor:
        self.trained.append(sorted(batch))
        return self.weight * sum(part["context_ids"].numel() for part in batch.values())

    def validation_step(self, batch: dict) -> None:
        self.validated.append({name: part and sorted(part) for name, part in batch.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_and_validates_with_it(datamodule, tmp_path) -> None:
    model = Counter()
    trainer = Trainer(
        max_steps=6,
        limit_train_batches=3,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule)
    assert model.trained == [["audio", "text"]] * 6
    one_pass = [{"dev_text": ["text"], "dev_speech": ["audio"]}] * 2 + [{"dev_text": ["text"], "dev_speech": None}]
    assert model.validated == one_pass * 2


@pytest.fixture(params=["single", "zip"])
def shuffled(request, config, speech, pairs, tokenizer) -> MultimodalDataModule:
    """Training data that ends, in another order in each epoch."""
    train = config.train_ds
    train.update(force_finite=True, force_map_dataset=True, shuffle=True)
    train.spoken.manifest_filepath = str(speech(12))
    train.written.input_cfg[0].update(pairs(12))
    if request.param == "single":
        common = ("prompt_format", "audio_locator_tag", "seed", "shard_seed", "force_map_dataset", "shuffle")
        config.train_ds = {**{key: train[key] for key in common}, **train.spoken}
    return MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))


def ids_of_epoch(loader, epoch: int) -> list[str]:
    """What Lightning gets in an epoch, whose number it sets before."""
    _set_sampler_epoch(loader, epoch)
    return [example["id"] for batch in loader for part in batch.values() for example in part["examples"]]


def test_each_epoch_of_lightning_has_an_order_that_a_resumed_run_finds_again(shuffled) -> None:
    loader = shuffled.train_dataloader()
    epochs = [ids_of_epoch(loader, epoch) for epoch in range(3)]
    assert len(epochs[0]) in (12, 24)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    resumed = shuffled.train_dataloader()
    assert [ids_of_epoch(resumed, 1), ids_of_epoch(resumed, 2)] == epochs[1:]


class TestResolveBins:
    """`bucket_duration_bins: auto`, solved for before the loader is built."""

    @pytest.fixture
    def with_auto(self, config, tokenizer) -> MultimodalDataModule:
        for group in (config.train_ds.spoken, config.train_ds.written):
            del group.batch_size
            group.update(use_bucketing=True, bucket_duration_bins="auto", num_buckets=2, use_multimodal_sampling=True)
        config.train_ds.written.num_sub_buckets = 2
        config.train_ds.spoken.measure_total_length = False
        config.train_ds.token_equivalent_duration = 0.1
        OmegaConf.set_struct(config, True)
        return MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))

    def test_every_group_gets_bins_that_all_its_examples_fit_into(self, with_auto, tokenizer) -> None:
        with_auto.resolve_bins()
        train_ds = with_auto.cfg.train_ds
        spoken, written = (
            OmegaConf.to_container(group.bucket_duration_bins) for group in (train_ds.spoken, train_ds.written)
        )
        assert spoken == optimal_bins(self.lengths(with_auto, "spoken")[:, 0], 2)
        lengths = self.lengths(with_auto, "written")
        assert written == optimal_bins_2d(lengths[:, 0], lengths[:, 1], 2, 2)
        assert max(cap for cap, _ in written) == lengths[:, 0].max()

    def lengths(self, datamodule, group: str):
        groups = {found.name: found for found in parse_dataset(datamodule.cfg.train_ds, "data.train_ds").groups}
        measured = measure(groups[group], datamodule.tokenizer, ExampleKind.TRANSLATION, two_dimensional=True)
        return np.stack(measured.sides, axis=1)

    def test_bins_of_the_recipe_stay(self, datamodule) -> None:
        before = OmegaConf.to_container(datamodule.cfg)
        datamodule.resolve_bins()
        assert OmegaConf.to_container(datamodule.cfg) == before

    def test_no_random_number_is_drawn(self, with_auto) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        expected = torch.rand(1), random.random(), np.random.rand()
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        with_auto.resolve_bins()
        assert (torch.rand(1), random.random(), np.random.rand()) == expected
