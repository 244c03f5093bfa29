"""``OOMptimizer`` puts a profile's batch sizes where the training data loader will read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError

AUDIO = {"bucket_duration_bins": [4.0, 8.0], "bucket_batch_size": [32, 14]}
TEXT = {"bucket_duration_bins": [[16.0, 12.0], [48.0, 40.0]], "bucket_batch_size": [96, 24]}


class Data(LightningDataModule):
    """Keeps the config as it was when the loader was built, as NeMo's DataModule reads it then."""

    def __init__(self, train_ds: dict) -> None:
        super().__init__()
        self.cfg = OmegaConf.create({"train_ds": train_ds})
        OmegaConf.set_struct(self.cfg, True)
        self.seen: dict[str, Any] = {}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        self.seen = OmegaConf.to_container(self.cfg.train_ds)
        return torch.utils.data.DataLoader(torch.ones(2, 1))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ModelWithLoader(Model):
    """As NeMo's ASR models are: the loader is built from the model's config, before the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = OmegaConf.create({"train_ds": {"batch_size": 1}})
        self.built: list[dict] = []
        self.setup_training_data(self.cfg.train_ds)

    def setup_training_data(self, config: DictConfig) -> None:
        self.built.append(OmegaConf.to_container(config))
        self._train_dl = torch.utils.data.DataLoader(torch.ones(2, 1))

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._train_dl


class NeedsNumberOfSteps(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.fixture
def fit(tmp_path: Path):
    """One step of a model with the callback and the given profile."""

    def run(profile: dict, model: LightningModule, data: Data | None = None) -> None:
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({"train_ds": profile}))
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[OOMptimizer(profile=str(path))],
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)

    return run


def test_the_loader_is_built_with_the_profiles_bins_and_batch_sizes(fit) -> None:
    data = Data({"shuffle": True})
    fit(AUDIO, Model(), data)
    assert data.seen == {"shuffle": True, **AUDIO}


def test_a_recipes_own_equal_bins_stay_as_they_are(fit) -> None:
    data = Data({"bucket_duration_bins": [4, 8], "bucket_batch_size": [1, 1]})
    fit(AUDIO, Model(), data)
    assert data.seen == {"bucket_duration_bins": [4, 8], "bucket_batch_size": [32, 14]}


def test_every_group_of_a_multi_config_gets_its_own(fit) -> None:
    weights = {"audio": 0.5, "text": 0.5}
    data = Data({"multi_config": True, "sampler_weights": weights, "audio": {"seed": 1}, "text": {"seed": 2}})
    fit({"audio": AUDIO, "text": TEXT}, Model(), data)
    assert data.seen["audio"] == {"seed": 1, **AUDIO}
    assert data.seen["text"] == {"seed": 2, **TEXT}
    assert data.seen["sampler_weights"] == weights


def test_a_model_that_has_its_loader_already_builds_it_again(fit) -> None:
    model = ModelWithLoader()
    fit(AUDIO, model)
    assert model.built == [{"batch_size": 1}, {"batch_size": 1, **AUDIO}]


@pytest.mark.parametrize(
    ("train_ds", "sentence"),
    [
        (
            {"bucket_duration_bins": [4, 9]},
            "train_ds.bucket_duration_bins: the recipe has [4, 9], but the profile {path} is for [4, 8]",
        ),
        (
            {"multi_config": True, "audio": {}, "text": {}},
            "the profile is for one dataset without groups, the recipe's train_ds has the groups 'audio', 'text'",
        ),
    ],
)
def test_a_recipe_that_the_profile_does_not_fit_is_refused(fit, tmp_path: Path, train_ds: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(AUDIO, Model(), Data(train_ds))
    assert sentence.format(path=tmp_path / "profile.yaml") in str(error.value)


def test_nowhere_to_put_batch_sizes_is_told(fit) -> None:
    class PlainData(LightningDataModule):
        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(torch.ones(2, 1))

    with pytest.raises(ConfigError, match=r"neither the datamodule nor the model has a cfg\.train_ds"):
        fit(AUDIO, Model(), PlainData())


def test_a_loader_that_was_built_too_early_is_told(fit) -> None:
    with pytest.raises(ConfigError, match="the profile comes too late"):
        fit(AUDIO, NeedsNumberOfSteps(), Data({}))


def test_the_profile_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"train_ds": AUDIO}))
    monkeypatch.setenv("NEMO_EMMETT_PROFILE", str(path))
    assert OOMptimizer().path == str(path)
    monkeypatch.delenv("NEMO_EMMETT_PROFILE")
    with pytest.raises(ConfigError, match="no profile is given; name its file here or in the variable"):
        OOMptimizer()
