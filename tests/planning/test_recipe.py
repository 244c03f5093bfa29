"""Recipes for planning: nothing of the training is left but its beginning."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.planning import recipe as recipes
from nemo_emmett.planning.needed import needed_for_planning, on_devices

RECIPE = """
model: {_target_: salm_t5, pretrained_llm: "???", lr_scheduler: {max_steps: "${trainer.max_steps}"}}
trainer: {max_steps: 7, devices: 8, strategy: ddp, logger: true, callbacks: [{_target_: some.Callback}]}
exp_manager: {explicit_log_dir: exp}
export_dir: out
data:
  train_ds:
    multi_config: true
    sampler_fusion: round_robin
    sampler_weights: {audio: 0.5, text: 0.5}
    audio: {bucket_duration_bins: [4.0, 8.0], bucket_batch_size: [1, 1], manifest_filepath: a.json}
    text:
      use_multimodal_sampling: true
      bucket_duration_bins: [[4, 4], [4, 8]]
      input_cfg: [{type: parallel_text, paths: x.tsv}]
  validation_ds: {datasets: {}}
"""


@pytest.fixture
def cfg():
    cfg = OmegaConf.create(RECIPE)
    cfg.model.pretrained_llm = "t5"
    OmegaConf.set_struct(cfg, True)
    return cfg


def test_what_trains_or_writes_is_left_out(cfg) -> None:
    before = OmegaConf.to_container(cfg)
    changed = recipes.without_training(cfg)
    assert not {"exp_manager", "export_dir"} & set(changed)
    assert list(changed.data) == ["train_ds"]
    assert "callbacks" not in changed.trainer
    assert (changed.trainer.limit_train_batches, changed.trainer.logger) == (0, False)
    assert (changed.trainer.devices, changed.trainer.strategy) == (8, "ddp")
    assert changed.model.lr_scheduler.max_steps == 7
    assert OmegaConf.to_container(cfg) == before


def test_a_recipe_without_data_or_with_a_misspelt_key_is_refused(cfg) -> None:
    cfg.data.train_ds.audio = {**cfg.data.train_ds.audio, "bucket_duration_bin": [1]}
    with pytest.raises(ConfigError, match="did you mean 'bucket_duration_bins'"):
        recipes.without_training(cfg)
    with pytest.raises(ConfigError, match=r"data\.train_ds: the recipe has none"):
        recipes.without_training(OmegaConf.create({"model": {}, "trainer": {}, "data": {}}))


def test_such_a_fit_runs_its_first_hooks_and_opens_no_data(tmp_path) -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was made")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(LightningDataModule):
        def train_dataloader(self):
            raise AssertionError("the data was opened")

        val_dataloader = train_dataloader

    class Started(Callback):
        seen = False

        def on_fit_start(self, trainer, module) -> None:
            assert trainer.optimizers
            self.seen = True

    started = Started()
    trainer = Trainer(
        accelerator="cpu", max_steps=3, default_root_dir=tmp_path, callbacks=[started], **recipes._NO_TRAINING
    )
    trainer.fit(Model(), datamodule=Data())
    assert started.seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", "deepspeed_stage_2", {"_target_": "lightning.pytorch.strategies.FSDPStrategy"}],
)
def test_sharding_of_other_kinds_cannot_be_planned(strategy) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.strategy: .* cannot be planned without them; run `nemo-emmett oom"
    ):
        recipes.sharding_of(OmegaConf.create({"strategy": strategy}))


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ({"strategy": {"data_parallel_size": 64, "tensor_parallel_size": 1}}, (64, 1)),
        ({"strategy": {"data_parallel_size": 4, "tensor_parallel_size": 1}, "devices": 8}, (4, 1)),
        (
            {"strategy": {"data_parallel_size": "auto", "tensor_parallel_size": 1}, "devices": 8, "num_nodes": 3},
            (24, 1),
        ),
        ({"strategy": {"tensor_parallel_size": 2}, "devices": [0, 1, 2, 3]}, (2, 2)),
        # Lightning's own: tensor parallelism within a node, the data over nodes.
        ({"strategy": {}, "devices": "8", "num_nodes": 2}, (2, 8)),
    ],
)
def test_fsdp2_shards_over_the_devices_of_all_nodes(trainer, ranks) -> None:
    trainer["strategy"]["_target_"] = "lightning.pytorch.strategies.ModelParallelStrategy"
    sharding = recipes.sharding_of(OmegaConf.create(trainer))
    assert (sharding.data_ranks, sharding.tensor_parallel, sharding.replicas) == (*ranks, 1)
    assert recipes.ddp_bucket_bytes(OmegaConf.create(trainer), torch.nn.Linear(2, 2)) == 0


def test_hybrid_sharding_takes_all_devices_for_data() -> None:
    strategy = {"_target_": "nemo_emmett.strategies.HybridShardedStrategy", "replicas": 4}
    cfg = OmegaConf.create({"devices": 8, "num_nodes": 4, "strategy": strategy})
    assert recipes.sharding_of(cfg) == recipes.Sharding(32, 1, 4)
    assert str(recipes.sharding_of(cfg)) == (
        "Weights, gradients and optimizer state are sharded over 8 devices, of which there are 4 groups."
    )
    cfg.strategy.pop("replicas")
    with pytest.raises(ConfigError, match=r"^trainer\.strategy\.replicas: is needed to plan"):
        recipes.sharding_of(cfg)


@pytest.mark.parametrize("strategy", ["auto", "ddp", {"_target_": "lightning.pytorch.strategies.DDPStrategy"}])
def test_replicas_can(strategy) -> None:
    assert recipes.sharding_of(OmegaConf.create({"strategy": strategy})) == recipes.Sharding()


@pytest.mark.parametrize(
    ("trainer", "has_buckets"),
    [
        ({}, False),
        ({"devices": 1, "strategy": "auto"}, False),
        ({"devices": 8}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": 1, "num_nodes": 2}, True),
        ({"devices": 1, "strategy": "ddp_find_unused_parameters_true"}, True),
        ({"devices": 8, "strategy": {"_target_": "x.DDPStrategy", "gradient_as_bucket_view": True}}, False),
        ({"devices": 8, "strategy": {"_target_": "x.DDPStrategy"}}, True),
    ],
)
def test_ddp_holds_a_copy_of_every_gradient(trainer: dict, has_buckets: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1).requires_grad_(False))
    expected = (3 * 5 + 5) * 4 if has_buckets else 0
    assert recipes.ddp_bucket_bytes(OmegaConf.create(trainer), model) == expected


def test_bins_are_replaced_and_their_sizes_go(cfg) -> None:
    changed = recipes.with_bins(cfg, {"audio": [3.0, 6.0, 9.0], "text": [(5.0, 6.0)]})
    assert changed.data.train_ds.audio.bucket_duration_bins == [3.0, 6.0, 9.0]
    assert changed.data.train_ds.text.bucket_duration_bins == [[5.0, 6.0]]
    assert "bucket_batch_size" not in changed.data.train_ds.audio
    assert cfg.data.train_ds.audio.bucket_batch_size == [1, 1]


def test_a_group_alone(cfg) -> None:
    alone = recipes.with_groups(recipes.without_training(cfg), ["text"]).data.train_ds
    assert set(alone) == {"multi_config", "sampler_fusion", "text"}


def test_a_recipe_is_planned_for_other_devices_and_another_strategy() -> None:
    fsdp2 = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy", "data_parallel_size": "???"}
    fsdp2["tensor_parallel_size"] = 1
    sharded = OmegaConf.create({"trainer": {"devices": 8, "num_nodes": 4, "strategy": fsdp2}})
    whole = OmegaConf.create({"trainer": {"devices": 8, "num_nodes": 4, "strategy": "auto"}})
    found = {
        (name, devices, strategy): recipes.sharding_of(on_devices(cfg, devices, strategy).trainer).data_ranks
        for name, cfg in (("sharded", sharded), ("whole", whole))
        for devices, strategy in ((64, None), (64, "ddp"), (64, "fsdp2"), (None, "fsdp2"))
    }
    assert found == {
        ("sharded", 64, None): 64,
        ("sharded", 64, "ddp"): 1,
        ("sharded", 64, "fsdp2"): 64,
        ("sharded", None, "fsdp2"): 32,
        ("whole", 64, None): 1,
        ("whole", 64, "ddp"): 1,
        ("whole", 64, "fsdp2"): 64,
        ("whole", None, "fsdp2"): 32,
    }
    sharded.trainer.strategy.tensor_parallel_size = 4
    assert recipes.sharding_of(on_devices(sharded, 64, "fsdp2").trainer) == recipes.Sharding(16, 4)
    # Before that, all values of the trainer are resolved: none may be mandatory any more.
    data = {"data": {"train_ds": {"input_cfg": []}}, "model": {}}
    needed = needed_for_planning(OmegaConf.merge(data, on_devices(sharded, 64, None)), reads_data=False)
    assert recipes.sharding_of(needed.trainer).devices == 64
    assert on_devices(whole, None, None) is whole
    assert (whole.trainer.devices, whole.trainer.strategy) == (8, "auto")
    assert recipes.ddp_bucket_bytes(on_devices(whole, 64, "ddp").trainer, torch.nn.Linear(2, 2)) == 0  # in the buckets
