"""``OOMptimizer`` puts a profile's batch sizes where the training data loader will read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.calibration import memory_budget
from nemo_emmett.oomptimizer.memory import shown
from nemo_emmett.oomptimizer.profile import Profile
from tests.models.batches import audio_batch
from tests.oomptimizer.fits import Data as BatchData
from tests.oomptimizer.fits import trainer_with
from tests.oomptimizer.injected import Bomb
from tests.oomptimizer.models import tiny_salm

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
            "the profile is for one dataset without groups, the recipe's data.train_ds has the groups 'audio', 'text'",
        ),
    ],
)
def test_a_recipe_that_the_profile_does_not_fit_is_refused(fit, tmp_path: Path, train_ds: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(AUDIO, Model(), Data(train_ds))
    assert sentence.format(path=tmp_path / "profile.yaml") in str(error.value)


def test_nowhere_to_put_batch_sizes_is_reported(fit) -> None:
    class PlainData(LightningDataModule):
        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(torch.ones(2, 1))

    with pytest.raises(ConfigError, match=r"neither the datamodule nor the model has a cfg\.train_ds"):
        fit(AUDIO, Model(), PlainData())


def test_a_loader_that_was_built_too_early_is_reported(fit) -> None:
    with pytest.raises(ConfigError, match="the batch sizes come too late"):
        fit(AUDIO, NeedsNumberOfSteps(), Data({}))


def test_the_profile_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"train_ds": AUDIO}))
    monkeypatch.setenv("NEMO_EMMETT_PROFILE", str(path))
    assert OOMptimizer().path == str(path)
    monkeypatch.delenv("NEMO_EMMETT_PROFILE")
    assert OOMptimizer().path is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "calibrat"}, "OOMptimizer.mode: 'calibrat' cannot be used; give 'calibrate' or 'plan' or 'guard'."),
        ({"mode": "plan"}, "OOMptimizer.memory_budget: is missing; a plan is for some memory"),
        ({"safety_margin": 1}, "OOMptimizer.safety_margin: 1 cannot be used; give a number from 0 to below 1."),
        ({"modality_share": 0}, "OOMptimizer.modality_share: 0 cannot be used; give a number from 0.01 to below 1"),
        (
            {"modality_share": "most"},
            "OOMptimizer.modality_share: 'most' cannot be used; give a number from 0.01 to below 1, or 'auto'.",
        ),
        ({"precision": -0.1}, "OOMptimizer.precision: -0.1 cannot be used; give a number from 0 to below 1."),
        ({"memory_fraction": 1.5}, "OOMptimizer.memory_fraction: 1.5 cannot be used; give a number above 0 to 1."),
        ({"memory_budget": "much"}, "OOMptimizer.memory_budget: "),
        ({"mode": "plan", "memory_budget": "8GiB", "modality_share": "auto"}, "OOMptimizer.modality_share: 'auto'"),
    ],
)
def test_an_argument_that_cannot_work_is_reported_at_once(arguments: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        OOMptimizer(**arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cpu_without_a_budget_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("nemo.utils.logging.info", lambda message, **_: lines.append(message))
    cpu = torch.device("cpu")
    budget = memory_budget(OOMptimizer().options, cpu)
    assert 0 < budget <= 8 * 2**30
    assert f"a step may take {shown(budget)} (a quarter of the memory that is available, at most 8.0 GiB)" in lines[0]
    assert memory_budget(OOMptimizer(memory_budget="40MiB").options, cpu) == 40 * 2**20
    assert len(lines) == 1


# Calibration in a training


BINS = {"bucket_duration_bins": [[1, 8], [2, 8], [2, 20]]}


class Losses(Callback):
    """The losses of the training's steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def losses_of(folder: Path, model: LightningModule, batches: list, callback: Callback, train_ds: dict) -> tuple:
    losses, data = Losses(), BatchData(train_ds, batches)
    torch.manual_seed(7)  # for dropout
    trainer_with(folder, callback, losses).fit(model, datamodule=data)
    return losses.values, data.seen


def built(config: dict) -> SALMT5:
    torch.manual_seed(1)
    return SALMT5(config)


def fifty_batches(config: dict) -> list[dict]:
    model = built(config)
    return [audio_batch(model, [(0.4 + 0.02 * i, "ein rotes haus"), (0.9, "zwei autos")], seed=i) for i in range(50)]


def test_a_run_that_is_calibrated_equals_one_that_is_given_the_profile(tmp_path: Path, salm_t5_config: dict) -> None:
    batches, path = fifty_batches(salm_t5_config), tmp_path / "profile.yaml"
    options = {"profile": path, "memory_budget": "40MiB"}
    first = losses_of(tmp_path, built(salm_t5_config), batches, OOMptimizer(**options), dict(BINS))
    assert path.exists()
    (tmp_path / "by_hand.yaml").write_text(Profile.read(path).block())
    by_hand = OOMptimizer(profile=tmp_path / "by_hand.yaml", guard=False)
    second = losses_of(tmp_path, built(salm_t5_config), batches, by_hand, dict(BINS))
    nothing = losses_of(tmp_path, built(salm_t5_config), batches, Callback(), dict(BINS))
    assert len(first[0]) == 50
    assert first[0] == second[0] == nothing[0]  # to the last bit
    assert first[1] == second[1]
    assert len(first[1]["bucket_batch_size"]) == 3


def test_a_profile_that_is_there_is_used_and_not_measured_again(tmp_path: Path, salm_t5_config: dict) -> None:
    path, results = tmp_path / "profile.yaml", []
    for _ in range(2):
        callback = OOMptimizer(profile=path, memory_budget="40MiB", listener=results.append)
        trainer_with(tmp_path, callback).fit(built(salm_t5_config), datamodule=BatchData(dict(BINS)))
    assert len(results) == 3


def test_without_a_path_runs_of_the_same_kind_share_a_profile(tmp_path: Path, salm_t5_config: dict) -> None:
    def fit(bins: list) -> None:
        callback = OOMptimizer(memory_budget="40MiB", guard=False)
        data = BatchData({"bucket_duration_bins": bins})
        trainer_with(tmp_path, callback).fit(built(salm_t5_config), datamodule=data)

    for bins in ([1, 2], [1, 2], [1, 3]):
        fit(bins)
    assert len(list(tmp_path.glob("oomptimizer-*.yaml"))) == 2


def test_a_profile_of_something_else_is_refused_with_what_differs(tmp_path: Path, salm_t5_config: dict) -> None:
    options = {"profile": tmp_path / "profile.yaml", "memory_budget": "40MiB"}
    trainer_with(tmp_path, OOMptimizer(**options)).fit(built(salm_t5_config), datamodule=BatchData(dict(BINS)))
    trainer = trainer_with(tmp_path, OOMptimizer(**options), precision="bf16-mixed", accumulate_grad_batches=2)
    with pytest.raises(ConfigError) as error:
        trainer.fit(built(salm_t5_config), datamodule=BatchData(dict(BINS)))
    assert "precision" in str(error.value)
    assert "accumulate_grad_batches" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_gives_the_batch_sizes_that_calibration_gives(tmp_path: Path, salm_t5_config: dict) -> None:
    train_ds = {"bucket_duration_bins": [[s, o] for s in (1, 3) for o in (6, 20)]}
    found = {}
    for mode in ("calibrate", "plan"):
        path = tmp_path / f"{mode}.yaml"
        model = built(salm_t5_config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        callback = OOMptimizer(mode=mode, profile=path, memory_budget="40MiB", guard=False)
        trainer_with(tmp_path, callback).fit(model, datamodule=BatchData(dict(train_ds)))
        found[mode] = Profile.read(path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["plan"].groups == found["calibrate"].groups
    for planned, measured in zip(found["plan"].measures[""], found["calibrate"].measures[""], strict=True):
        assert planned.confirmed_peak == pytest.approx(measured.confirmed_peak, rel=0.01)
        assert planned.seconds is None


def test_a_plan_made_elsewhere_is_used_where_its_training_runs(tmp_path: Path, salm_t5_config: dict) -> None:
    path = tmp_path / "plan.yaml"
    plan = OOMptimizer(mode="plan", profile=path, memory_budget="40MiB")
    trainer_with(tmp_path, plan).fit(built(salm_t5_config), datamodule=BatchData(dict(BINS)))
    data = BatchData(dict(BINS))
    trainer_with(tmp_path, OOMptimizer(profile=path)).fit(built(salm_t5_config), datamodule=data)
    assert tuple(data.seen["bucket_batch_size"]) == Profile.read(path).groups[""].bucket_batch_size


def test_guard_alone_takes_the_recipes_batch_sizes(tmp_path: Path, salm_t5_config: dict) -> None:
    data = BatchData(BINS | {"bucket_batch_size": [3, 2, 1]})
    callback = OOMptimizer(mode="guard", profile=tmp_path / "profile.yaml")
    trainer_with(tmp_path, callback).fit(built(salm_t5_config), datamodule=data)
    assert data.seen["bucket_batch_size"] == [3, 2, 1]
    assert not (tmp_path / "profile.yaml").exists()
    with pytest.raises(ConfigError, match=r"train_ds\.bucket_batch_size: one is needed for each of the 3 bins"):
        trainer_with(tmp_path, OOMptimizer(mode="guard")).fit(built(salm_t5_config), datamodule=BatchData(dict(BINS)))


@pytest.mark.parametrize(
    ("bins", "sentence"),
    [
        ([2, 1], "data.train_ds.bucket_duration_bins: bins must rise"),
        ([1, [2, 3]], "data.train_ds.bucket_duration_bins: bins are all numbers or all pairs"),
        (None, "data.train_ds.bucket_duration_bins: is missing"),
        ("auto", "data.train_ds.bucket_duration_bins: 'auto' is not solved for by this datamodule"),
    ],
)
def test_bins_that_cannot_be_used_are_reported(tmp_path: Path, salm_t5_config: dict, bins: Any, sentence: str) -> None:
    train_ds = {} if bins is None else {"bucket_duration_bins": bins}
    with pytest.raises(ConfigError) as error:
        trainer_with(tmp_path, OOMptimizer(memory_budget="40MiB")).fit(
            built(salm_t5_config), datamodule=BatchData(train_ds)
        )
    assert str(error.value).startswith(sentence)


def test_data_of_nemos_script_is_checked_before_anything_is_measured(tmp_path: Path, monkeypatch) -> None:
    from nemo.collections.speechlm2 import DataModule, SALMDataset

    model = tiny_salm(tmp_path)
    monkeypatch.setattr("nemo_emmett.callbacks.oomptimizer.calibrate", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "manifest.json").write_text("")
    source = {"type": "nemo", "manifest_filepath": str(tmp_path / "manifest.json"), "target_lang": "de"}
    audio = {"batch_size": 2, "max_duration": 5.0, "input_cfg": [source]}
    section = {"use_emmett": True, "multi_config": True, "prompt_format": "llama3", "audio": audio}

    def refused(**keys: Any) -> str:
        cfg = OmegaConf.create({"data": {"train_ds": section | keys}}).data
        data = DataModule(cfg, model.tokenizer, SALMDataset(model.tokenizer))
        with pytest.raises(ConfigError) as error:
            trainer_with(tmp_path, OOMptimizer(memory_budget="40MiB")).fit(model, datamodule=data)
        return str(error.value)

    assert refused().startswith("data.train_ds.audio.audio_locator_tag: missing")
    in_seconds = audio | {"bucket_duration_bins": [2.0, 5.0]}
    said = refused(audio_locator_tag=model.audio_locator_tag, audio=in_seconds)
    assert said.startswith("data.train_ds.audio.bucket_duration_bins: measures seconds of speech, but ")


def test_data_is_not_looked_for_where_nothing_is_trained(tmp_path: Path, monkeypatch) -> None:
    """As by ``nemo-emmett oomptimize``, which may run where the data is not."""
    from nemo.collections.speechlm2 import DataModule, SALMDataset

    class Measured(Exception):
        pass

    def measure(*_: Any, **__: Any) -> None:
        raise Measured

    model = tiny_salm(tmp_path)
    monkeypatch.setattr("nemo_emmett.callbacks.oomptimizer.calibrate", measure)
    source = {"type": "nemo", "manifest_filepath": "not_given", "target_lang": "de"}
    section = {"use_emmett": True, "input_cfg": [source], "audio_locator_tag": model.audio_locator_tag}
    section |= {"use_multimodal_sampling": True, "batch_size": 2, "max_tokens": 50, "prompt_format": "llama3"}
    section |= {"token_equivalent_duration": 0.08}

    def fit(**options: Any) -> None:
        cfg = OmegaConf.create({"data": {"train_ds": section}}).data
        data = DataModule(cfg, model.tokenizer, SALMDataset(model.tokenizer))
        trainer_with(tmp_path, OOMptimizer(memory_budget="40MiB"), **options).fit(model, datamodule=data)

    with pytest.raises(DataError, match="there is no file 'not_given'"):
        fit()
    with pytest.raises(Measured):
        fit(limit_train_batches=0)


def test_a_model_without_a_schema_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Model has no `oomptimizer_schema`"):
        trainer_with(tmp_path, OOMptimizer(memory_budget="40MiB")).fit(Model(), datamodule=BatchData(dict(BINS)))


def test_a_step_that_runs_out_of_memory_is_redone_and_the_profile_on_disk_lowered(
    tmp_path: Path, salm_t5_config: dict
) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("train_ds: {bucket_duration_bins: [[1.5, 8], [3, 8]], bucket_batch_size: [4, 2]}\n")
    model = built(salm_t5_config)
    batches = [audio_batch(model, [(0.5 + 0.1 * i, "ein rotes haus") for i in range(4)], seed=s) for s in range(6)]
    bomb = Bomb(model.perception)

    class Charged(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            bomb.phase = "backward" if batch_idx == 3 else None

    losses = Losses()
    trainer = trainer_with(tmp_path, OOMptimizer(profile=path), Charged(), losses)
    trainer.fit(model, datamodule=BatchData({}, batches))
    assert bomb.fired == 1
    assert trainer.global_step == 6
    assert len(losses.values) == 6
    after = Profile.read(path)
    assert after.groups[""].bucket_batch_size == (3, 2)
    (event,) = after.events
    assert (event.step, event.before, event.after, event.cause) == (3, 4, 3, "out of memory in backward")


# Groups without buckets


def test_a_profile_of_one_size_is_written_into_batch_size(fit) -> None:
    data = Data({"batch_size": 4, "max_duration": 20.0})
    fit({"batch_size": 32, "max_duration": 20.0}, Model(), data)
    assert data.seen == {"batch_size": 32, "max_duration": 20.0}
    with pytest.raises(
        ConfigError, match=r"train_ds\.max_duration: is 30, but the profile .* is for examples up to 20"
    ):
        fit({"batch_size": 32, "max_duration": 20.0}, Model(), Data({"batch_size": 4, "max_duration": 30.0}))
    with pytest.raises(ConfigError, match=r"train_ds\.bucket_duration_bins: the recipe has \[4, 8\], but the profile"):
        fit({"batch_size": 32, "max_duration": 20.0}, Model(), Data(dict(AUDIO)))


@pytest.mark.parametrize("given", [{}, {"max_duration": 3.0}, {"max_duration": float("inf")}])
def test_one_batch_size_comes_with_its_limit(fit, given: dict) -> None:
    data = Data({"batch_size": 1, **given})
    fit({"max_duration": 4.0, "batch_size": 7}, Model(), data)
    assert data.seen == {"batch_size": 7, "max_duration": 3.0 if given == {"max_duration": 3.0} else 4.0}


def test_a_profile_of_packed_rows_is_for_these_rows_alone(fit) -> None:
    packed, frame = {"packing": True, "row_tokens": [64, 32], "batch_size": 4}, {"token_equivalent_duration": 0.08}
    data = Data(packed | frame)
    fit({**packed, "batch_size": 9}, Model(), data)
    assert data.seen == {**packed, **frame, "batch_size": 9}
    with pytest.raises(ConfigError, match=r"train_ds.row_tokens: is \[64, 32\] in the recipe, and 64 in the profile"):
        fit({**packed, "row_tokens": 64}, Model(), Data(packed | frame))
    with pytest.raises(ConfigError, match=r"train_ds.row_tokens: is None in the recipe, and \[64, 32\] in the profile"):
        fit(packed, Model(), Data({"batch_size": 4, "max_duration": 30.0}))


@pytest.mark.parametrize("mode", ["calibrate", "plan"])
def test_rows_of_packed_batches_are_found_and_trained_on(recipe, tmp_path, mode) -> None:
    """From a recipe: the largest number of rows in the budget, and a training of that many."""
    from nemo_emmett import training

    data = recipe["data"]["train_ds"]
    data["audio"] |= {"batch_size": 1, "packing": True, "row_tokens": 60, "token_equivalent_duration": 0.08}
    text = {"input_cfg": data["text"]["input_cfg"], "batch_size": 1, "packing": True, "row_tokens": 40}
    data["text"] = text
    recipe["exp_manager"] = {"explicit_log_dir": str(tmp_path / "exp"), "create_checkpoint_callback": False}
    options = {"mode": mode, "memory_budget": "30MiB", "profile": str(tmp_path / "profile.yaml")}
    options |= {"then_train": True} if mode == "plan" else {}
    recipe["trainer"]["callbacks"] = [{"_target_": "nemo_emmett.callbacks.OOMptimizer", **options}]
    recipe["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    recipe["data"].pop("validation_ds")
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append({name: batch[name]["packed_sizes"] for name in ("audio", "text")})

    build = training.build_training
    with pytest.MonkeyPatch.context() as patch:

        def observed(cfg):
            made = build(cfg)
            made.trainer.callbacks.append(Seen())
            return made

        patch.setattr(training, "build_training", observed)
        training.train(OmegaConf.create(recipe))
    found = {name: group.bucket_batch_size[0] for name, group in Profile.read(tmp_path / "profile.yaml").groups.items()}
    assert min(found.values()) > 1
    assert all(sizes[name][0] <= found[name] for sizes in seen for name in found)
    assert all(sizes["audio"][1] == 60 and sizes["text"][1] == 40 for sizes in seen)
    assert len(seen) == 2


# A plan alone


def test_a_plan_ends_the_fit_unless_it_is_to_train(tmp_path: Path, salm_t5_config: dict) -> None:
    seen = {}
    for then_train in (False, True):
        data = BatchData(dict(BINS))
        options = {"mode": "plan", "memory_budget": "40MiB", "profile": tmp_path / f"{then_train}.yaml"}
        trainer = trainer_with(tmp_path, OOMptimizer(then_train=then_train, **options))
        trainer.fit(built(salm_t5_config), datamodule=data)
        seen[then_train] = (bool(data.seen), trainer.limit_train_batches)  # a loader was asked for
        assert (trainer.limit_test_batches == 0) is not then_train  # of a model that was not trained
    assert (seen[False][0], seen[True][0]) == (False, True)
    assert seen[False][1] == seen[True][1] != 0  # the trainer's own limit is back
    assert Profile.read(tmp_path / "False.yaml").groups == Profile.read(tmp_path / "True.yaml").groups
    with pytest.raises(ConfigError, match=r"OOMptimizer\.then_train: means nothing in mode 'calibrate'"):
        OOMptimizer(then_train=False)
