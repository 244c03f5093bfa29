"""Epochs of finite data have the steps, validations and checkpoints of stock NeMo's, and each is a pass of its own.

The recipe is NeMo's ``salm.yaml``: one ``cuts_path``, ``limit_train_batches`` as the size of an epoch, validation at
its end, checkpoints by ``exp_manager``. The model counts; stock NeMo's own ``DataModule`` is the reference.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import CutSet
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.data.datamodule import DataModule
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_emmett.callbacks import ResumableData
from nemo_emmett.data import MultimodalDataModule, get_multimodal_dataloader

from .corpora import Corpus
from .fitting import Run, complete, join_ranks

LOCATOR = "<|audio|>"
CUTS, BATCH_SIZE = 14, 2
PASS = 7
"""Batches of a pass: 14 cuts by twos."""

BELOW, AT, ABOVE = 4, 7, 9
LIMITS = {"below": BELOW, "at": AT, "above": ABOVE}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> str:
    return Corpus(tmp_path_factory.mktemp("cuts")).source("speech_de", CUTS)["manifest_filepath"]


@pytest.fixture(scope="module")
def cuts_path(manifest) -> str:
    path = Path(manifest).with_suffix(".jsonl")
    CutSet(LazyNeMoIterator([manifest])).to_file(path)
    return str(path)


@pytest.fixture
def config_of(manifest, cuts_path):
    """NeMo's recipe, whose data we read from its beginning, and one of a plain manifest, which we read by number."""

    def make(shape: str, **train_ds: Any) -> dict:
        if shape == "salm.yaml":
            return salm_yaml(cuts_path, **train_ds)
        keys = {"manifest_filepath": manifest, "pretokenize": False, "shard_seed": 0}
        training = {"sampling": "emmett", "shuffle": True, "batch_size": BATCH_SIZE}
        return {"train_ds": keys | training | train_ds, "validation_ds": keys | {"batch_size": 1}}

    return make


class Ids(torch.utils.data.Dataset):
    """A dataset for lhotse cuts."""

    def __getitem__(self, cuts: CutSet) -> dict:
        return {"ids": [cut.id for cut in cuts]}


def salm_yaml(cuts_path: str, **train_ds: Any) -> dict:
    """The data section of NeMo's recipe."""
    source = {"type": "lhotse_as_conversation", "cuts_path": cuts_path, "audio_locator_tag": LOCATOR}
    common = {"sample_rate": 16000, "prompt_format": "plain", "token_equivalent_duration": 0.08, "seed": 42}
    common |= {"shard_seed": "randomized"}
    training = {"input_cfg": [source], "shuffle": True, "num_workers": 1, "batch_size": BATCH_SIZE}
    validation = {"datasets": {"val_set_0": {"input_cfg": [source]}}, "batch_size": 1}
    return {"train_ds": common | training | train_ds, "validation_ds": common | validation}


class Interrupted(Exception):
    """Ends a training."""


class Model(LightningModule):
    """Keeps what happens to it.

    Args:
        fails_at: raise in this step (from 0).
    """

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.events: list[list] = []
        self.examples: list[list[str]] = []

    def training_step(self, batch: dict) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise Interrupted
        self.events.append(["train", self.current_epoch, self.global_step])
        self.examples.append(batch.get("ids") or [conversation.id for conversation in batch["conversations"]])
        return self.weight * 1.0

    def validation_step(self, batch: dict) -> None:
        self.log("val_acc", float(self.global_step), batch_size=1, sync_dist=True)

    def on_validation_end(self) -> None:
        self.events.append(["validate", self.current_epoch, self.global_step])

    def on_train_epoch_end(self) -> None:
        self.events.append(["end of epoch", self.current_epoch, self.global_step])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def steps_of_epochs(self) -> list[list[list[str]]]:
        """The examples of each step, by epochs."""
        epochs = [epoch for kind, epoch, _ in self.events if kind == "train"]
        steps = list(zip(epochs, self.examples, strict=True))
        return [[examples for of, examples in steps if of == epoch] for epoch in sorted(set(epochs))]


class SaveEverywhere(Callback):
    """Writes a checkpoint at each hook, behind all other callbacks, and notes how many events come before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int, int]] = []

    def save(self, hook: str, trainer: Trainer, model: Model, extra_events: int = 0) -> None:
        path = self.folder / f"{len(self.saved)}-{hook}-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(model.events) + extra_events, len(model.examples)))

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.save("train_batch_start", trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.save("train_batch_end", trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.save("validation_end", trainer, module, extra_events=1)

    def on_train_epoch_end(self, trainer, module) -> None:
        self.save("train_epoch_end", trainer, module, extra_events=1)

    def on_train_end(self, trainer, module) -> None:
        self.save("train_end", trainer, module)

    def around_an_epoch_end(self) -> list[tuple[Path, int, int]]:
        """Some of what was saved: within the first epoch, as its last step ends, at its end, and within the second."""
        end = next(number for number, (path, _, _) in enumerate(self.saved) if "epoch_end" in path.name)
        return [self.saved[number] for number in (2, end - 1, end, end + 3)]


def fit(
    data: DataModule,
    limit: int | None,
    folder: Path | None = None,
    saver: SaveEverywhere | None = None,
    resume: Path | None = None,
    sanity_check: bool = True,
    fails_at: int | None = None,
    extra: tuple[Callback, ...] = (),
    **options: Any,
) -> Model:
    """Train the counting model as ``salm_train.py`` trains SALM; with a folder, ``exp_manager`` writes into it."""
    options = {"limit_train_batches": limit, "val_check_interval": limit or 1.0, "limit_val_batches": 1} | options
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=int(sanity_check),
        callbacks=[*extra, saver] if saver is not None else [*extra],
        **options,
    )
    if folder is not None:
        checkpoints = {"filename": "{step}", "monitor": "val_acc", "mode": "max", "save_top_k": -1}
        checkpoints |= {"every_n_train_steps": None, "every_n_epochs": 1, "always_save_nemo": False}
        keys = {"explicit_log_dir": str(folder), "create_tensorboard_logger": False, "log_step_timing": False}
        keys |= {"create_checkpoint_callback": True, "checkpoint_callback_params": checkpoints}
        keys |= {"resume_if_exists": True, "resume_ignore_no_checkpoint": True, "seconds_to_sleep": 0.5}
        exp_manager(trainer, OmegaConf.create(keys))
    model = Model(fails_at)
    with suppress(Interrupted):
        trainer.fit(model, data, ckpt_path=resume)
    return model


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def stock(tokenizer):
    def make(config: dict) -> DataModule:
        dataset = Ids() if "manifest_filepath" in config["train_ds"] else SALMDataset(tokenizer)
        train_ds = {key: value for key, value in config["train_ds"].items() if key != "sampling"}  # ours alone
        return DataModule(OmegaConf.create({**config, "train_ds": train_ds}), tokenizer, dataset)

    return make


@pytest.fixture
def ours(tokenizer):
    def make(config: dict) -> DataModule:
        dataset = Ids() if "manifest_filepath" in config["train_ds"] else SALMDataset(tokenizer)
        return MultimodalDataModule(config, tokenizer, dataset)

    return make


def validations(model: Model) -> list[int]:
    """The steps after which it was validated, but for the check before training."""
    return [step for kind, _, step in model.events if kind == "validate"][1:]


# As stock NeMo


@pytest.mark.parametrize(
    ("limit", "steps", "validated"),
    [(BELOW, 16, [4, 8, 12, 16]), (AT, 28, [7, 14, 21, 28]), (ABOVE, 28, []), (None, 28, [7, 14, 21, 28])],
    ids=["below", "at", "above", "no-limit"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_nemos_recipe_by_hand(ours, cuts_path, limit, steps, validated, workers) -> None:
    """Four epochs of 4, 7, and (where the data ends before the limit) 7 batches."""
    model = fit(ours(salm_yaml(cuts_path, num_workers=workers)), limit, max_epochs=4)
    assert len(model.examples) == steps
    assert validations(model) == validated


OPTIONS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 17},
    "validation-within-epochs": {"max_epochs": 3, "val_check_interval": 3},
    "validation-across-epochs": {"max_steps": 17, "val_check_interval": 5, "check_val_every_n_epoch": None},
    "validation-of-every-second-epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "accumulation": {"max_epochs": 3, "accumulate_grad_batches": 3},
    "reloading": {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(
    ("shape", "options"), [("salm.yaml", "epochs"), ("salm.yaml", "steps"), *(("manifest", name) for name in OPTIONS)]
)
def test_steps_validations_and_checkpoints_are_stock_nemos(
    stock, ours, config_of, tmp_path, shape, options, limit
) -> None:
    config, options = config_of(shape, num_workers=0), OPTIONS[options]
    reference = fit(stock(config), limit, tmp_path / "stock", **options)
    model = fit(ours(config), limit, tmp_path / "ours", **options)
    assert list(map(len, model.examples)) == list(map(len, reference.examples))
    if (shape, limit) == ("manifest", ABOVE) and "accumulate_grad_batches" in options:
        # Our loader says how many batches a pass has: the last one of 7 is not lost, as in stock NeMo, by threes.
        assert [step for kind, _, step in reference.events if kind == "end of epoch"] == [2, 4, 6]
        assert [step for kind, _, step in model.events if kind == "end of epoch"] == [3, 6, 9]
        return
    assert model.events == reference.events
    assert checkpoints_in(tmp_path / "ours") == checkpoints_in(tmp_path / "stock")


@pytest.mark.parametrize("fusion", ["zip", "round_robin", "randomized_round_robin"])
@pytest.mark.parametrize("limit", [3, 30])
def test_groups_of_finite_data_end_as_in_stock_nemo(stock, ours, tmp_path, fusion, limit) -> None:
    """5 and 2 batches: zip ends with the shorter group, the others with the longer one."""
    corpus = Corpus(tmp_path)
    config = salm_yaml("", num_workers=0, multi_config=True, sampler_fusion=fusion, force_finite=True, shard_seed=0)
    for name, size in (("speech_de", 10), ("speech_fr", 4)):
        source = corpus.source(name, size) | {"type": "lhotse_as_conversation", "audio_locator_tag": LOCATOR}
        config["train_ds"][name] = {"input_cfg": [source], "batch_size": 2, "prompt_format": "plain"}
        config["validation_ds"]["datasets"]["val_set_0"]["input_cfg"] = [source]
    for key in ("input_cfg", "batch_size", "prompt_format"):
        del config["train_ds"][key]
    reference = fit(stock(config), limit, max_epochs=3)
    model = fit(ours(config), limit, max_epochs=3)
    assert model.events == reference.events
    assert len(model.examples) == 3 * min(limit, 2 if fusion == "zip" else 7)


@pytest.mark.parametrize("options", [{"limit_train_batches": 0.5}, {"val_check_interval": 0.5}])
def test_a_share_of_a_pass_is_refused_as_by_stock_nemo(stock, ours, cuts_path, options) -> None:
    config = salm_yaml(cuts_path, num_workers=0)
    for data in (stock(config), ours(config)):
        with pytest.raises(MisconfigurationException, match=r"must be `1\.0` or an int"):
            fit(data, None, max_epochs=1, **options)


# Passes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reload", [0, 1], ids=["one-loader", "a-new-loader-each-epoch"])
@pytest.mark.parametrize("shape", ["salm.yaml", "manifest"])
def test_each_epoch_is_a_pass_in_an_order_of_its_own(ours, config_of, shape, workers, reload) -> None:
    config = config_of(shape, num_workers=workers)
    options = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": reload}
    whole = fit(ours(config), ABOVE, **options).steps_of_epochs
    assert [len(epoch) for epoch in whole] == [PASS] * 4
    for epoch in whole:
        assert len({example for step in epoch for example in step}) == CUTS
    assert all(one != other for number, one in enumerate(whole) for other in whole[:number])
    limited = fit(ours(config), BELOW, **options).steps_of_epochs
    assert limited == [epoch[:BELOW] for epoch in whole], "an epoch below the pass is the head of that pass"


class LengthAtStart(Callback):
    """What a bar and a schedule of learning rates by epochs take from Lightning."""

    def on_train_start(self, trainer, module) -> None:
        self.found = (trainer.num_training_batches, trainer.estimated_stepping_batches)


@pytest.mark.parametrize(
    ("epochs", "most", "accumulate", "steps"), [(3, -1, 1, 3 * PASS), (2, -1, 2, 2 * 4), (-1, 2, 1, 2)]
)
def test_lightning_has_the_steps_of_all_epochs_before_the_first(
    ours, config_of, epochs, most, accumulate, steps
) -> None:
    at_start = LengthAtStart()
    options = {"max_epochs": epochs, "max_steps": most, "accumulate_grad_batches": accumulate}
    data = ours(config_of("manifest", num_workers=0, force_finite=True))
    model = fit(data, None, extra=(at_start,), **options)
    assert at_start.found == (PASS, steps)
    assert model.trainer.global_step == steps


def test_without_shuffling_each_epoch_is_the_same(ours, config_of) -> None:
    config = config_of("manifest", num_workers=0, shuffle=False)
    first, second = fit(ours(config), BELOW, max_epochs=2).steps_of_epochs
    assert first == second


@pytest.mark.parametrize("reload", [0, 1], ids=["one-loader", "a-new-loader-each-epoch"])
def test_data_without_end_continues_from_epoch_to_epoch(ours, cuts_path, reload) -> None:
    source = {"type": "lhotse_as_conversation", "cuts_path": cuts_path, "audio_locator_tag": LOCATOR, "weight": 0.5}
    config = salm_yaml(cuts_path, num_workers=0, input_cfg=[source, source])
    whole = fit(ours(config), 16, max_epochs=1).examples
    epochs = fit(ours(config), BELOW, max_epochs=4, reload_dataloaders_every_n_epochs=reload)
    assert epochs.examples == whole


# Interrupted and resumed


@pytest.mark.parametrize(
    ("shape", "limit", "length"),
    [
        ("manifest", BELOW, {"max_epochs": 3}),
        ("manifest", BELOW, {"max_steps": 10}),
        ("manifest", AT, {"max_epochs": 2}),
        ("manifest", ABOVE, {"max_epochs": 2}),
        ("manifest", ABOVE, {"max_steps": 10}),
        ("manifest", None, {"max_epochs": 2}),
        ("salm.yaml", BELOW, {"max_epochs": 2}),
        ("salm.yaml", ABOVE, {"max_steps": 8}),
    ],
)
def test_each_checkpoint_resumes_with_the_rest_of_its_pass(ours, config_of, tmp_path, shape, limit, length) -> None:
    config = config_of(shape, num_workers=0)
    saver = SaveEverywhere(tmp_path)
    whole = fit(ours(config), limit, saver=saver, **length)
    of_an_epoch = min(limit or PASS, PASS)
    for path, events, steps in saver.saved:
        if "batch_end" in path.name and steps not in (1, of_an_epoch, of_an_epoch + 1):
            continue
        resumed = fit(ours(config), limit, resume=path, sanity_check=False, **length)
        assert resumed.examples == whole.examples[steps:], path.name
        assert resumed.events == whole.events[events:], path.name


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_two_workers_resume_within_a_pass_and_at_the_end_of_an_epoch(ours, config_of, tmp_path, limit) -> None:
    config = config_of("manifest", num_workers=2)
    saver = SaveEverywhere(tmp_path)
    whole = fit(ours(config), limit, saver=saver, max_epochs=2)
    for path, _, steps in saver.around_an_epoch_end():
        resumed = fit(ours(config), limit, resume=path, max_epochs=2)
        assert resumed.examples == whole.examples[steps:], path.name


@pytest.mark.parametrize(
    ("limit", "fails_at", "options"),
    [(BELOW, 6, {}), (AT, 9, {}), (ABOVE, 11, {"val_check_interval": 3})],
    ids=LIMITS,
)
def test_an_interrupted_run_of_the_same_command_has_stock_nemos_checkpoints(
    stock, ours, config_of, tmp_path, limit, fails_at, options
) -> None:
    config, options = config_of("manifest", num_workers=0), {"max_epochs": 3} | options
    reference = fit(stock(config), limit, tmp_path / "stock", **options)
    whole = fit(ours(config), limit, **options)
    fit(ours(config), limit, tmp_path / "ours", fails_at=fails_at, **options)
    before = checkpoints_in(tmp_path / "ours")
    resumed = fit(ours(config), limit, tmp_path / "ours", sanity_check=False, **options)
    assert 0 < len(resumed.examples) < len(whole.examples)
    assert resumed.examples == whole.examples[-len(resumed.examples) :]
    assert resumed.events == reference.events[-len(resumed.events) :]
    assert before != checkpoints_in(tmp_path / "ours") == checkpoints_in(tmp_path / "stock")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fusion", ["zip", "round_robin", "randomized_round_robin"])
def test_fused_groups_resume_anywhere_in_a_pass(tmp_path, fusion, workers) -> None:
    """Also where one of the groups has ended, and where all have."""
    corpus = Corpus(tmp_path)
    config = {"multi_config": True, "sampler_fusion": fusion, "sampling": "emmett", "force_finite": True}
    config |= {"shuffle": True, "seed": 0, "shard_seed": 0, "num_workers": workers}
    for name, size in (("speech_de", 17), ("speech_fr", 4)):
        config[name] = {"input_cfg": [corpus.source(name, size)], "batch_size": 2, "pretokenize": False}
    loader = get_multimodal_dataloader(config, 0, 1, Ids(), None)
    passes = [list(loader), list(loader)]
    assert passes[0] != passes[1]
    for stop_after in {1, len(passes[0]) - 1, len(passes[0])}:
        interrupted, resumed = (get_multimodal_dataloader(config, 0, 1, Ids(), None) for _ in range(2))
        before = list(islice(interrupted, stop_after))
        resumed.load_state_dict(interrupted.state_dict())
        assert before + list(resumed) == passes[0]
        assert list(resumed) == passes[1]


def test_a_stock_recipe_with_our_loader_and_callback_resumes_in_its_pass(stock, cuts_path, tmp_path) -> None:
    config = salm_yaml(cuts_path, num_workers=0, use_emmett=True)
    saver = SaveEverywhere(tmp_path)
    whole = fit(stock(config), BELOW, saver=saver, extra=(ResumableData(),), max_epochs=2)
    for path, _, steps in saver.saved:
        resumed = fit(stock(config), BELOW, resume=path, extra=(ResumableData(),), max_epochs=2)
        assert resumed.examples == whole.examples[steps:], path.name


def test_a_longer_training_continues_the_epoch_that_max_steps_ended(ours, config_of, tmp_path) -> None:
    config = config_of("manifest", num_workers=0)
    saver = SaveEverywhere(tmp_path)
    short = fit(ours(config), BELOW, saver=saver, max_steps=6)
    resumed = fit(ours(config), BELOW, resume=saver.saved[-1][0], max_steps=12)
    assert short.examples + resumed.examples == fit(ours(config), BELOW, max_steps=12).examples


# Two ranks

LIMITS_OF_RANKS = {"below": 3, "at": 4, "above": 6}
"""Two ranks share the 7 batches of a pass: 3 steps of two, and one of the last two cuts, one for each."""


def fit_all(run: Run, rank: int, port: int) -> None:
    """On one of two ranks: stock NeMo and ours with each limit, and ours again from checkpoints around an epoch's end.

    Then ours on cuts of which one rank cannot read the whole second batch.
    """
    join_ranks(run, rank, port)
    tokenizer = AutoTokenizer(str(run.tokenizer))
    dataset = SALMDataset(tokenizer)
    ranks = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    config, damaged = run.train_ds["intact"], run.train_ds["damaged"]
    found = {}
    for number, (name, limit) in enumerate(LIMITS_OF_RANKS.items()):
        stock = fit(DataModule(OmegaConf.create(config), tokenizer, dataset), limit, **ranks)
        saver = SaveEverywhere(run.folder / name)
        whole = fit(MultimodalDataModule(config, tokenizer, dataset), limit, saver=saver, **ranks)
        resumed = {}
        for path, _, steps in saver.around_an_epoch_end()[number : number + 2]:
            again = fit(MultimodalDataModule(config, tokenizer, dataset), limit, resume=path, **ranks)
            resumed[path.name] = [again.examples, whole.examples[steps:]]
        found[name] = {"stock": stock.events, "ours": whole.events, "epochs": whole.steps_of_epochs}
        found[name]["resumed"] = resumed
    found["damaged"] = fit(MultimodalDataModule(damaged, tokenizer, dataset), 9, **ranks).steps_of_epochs
    (run.folder / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, tokenizer, cuts_path) -> list[dict]:
    """What :func:`fit_all` has found on either rank."""
    folder = tmp_path_factory.mktemp("ranks")
    corpus = Corpus(folder)
    manifest = corpus.source("speech_fr", CUTS)["manifest_filepath"]
    for number in (6, 7):  # after two batches for each rank
        corpus.audio_path("speech_fr", number).write_bytes(b"this is no sound")
    damaged = salm_yaml(cuts_path, num_workers=0, shuffle=False, max_bad_records=None)
    source = {"type": "lhotse_as_conversation", "manifest_filepath": manifest, "audio_locator_tag": LOCATOR}
    damaged["train_ds"]["input_cfg"] = [source]
    configs = {"intact": salm_yaml(cuts_path, num_workers=0, shard_seed=0), "damaged": damaged}
    complete(Run(folder, configs, Path(tokenizer.tokenizer.name_or_path), world_size=2), fit_all)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", LIMITS_OF_RANKS)
def test_two_ranks_have_stock_nemos_epochs_and_resume_in_their_pass(of_two_ranks, name) -> None:
    for found in (of_rank[name] for of_rank in of_two_ranks):
        assert found["ours"] == found["stock"]
        assert [len(epoch) for epoch in found["epochs"]] == [min(LIMITS_OF_RANKS[name], 4)] * 2
        assert len(found["resumed"]) == 2
        for checkpoint, (examples, expected) in found["resumed"].items():
            assert examples == expected, checkpoint
    first, second = (of_rank[name]["epochs"] for of_rank in of_two_ranks)
    for steps in (one + other for one, other in zip(first, second, strict=True)):
        seen = [example for step in steps for example in step]
        assert len(set(seen)) == len(seen)
        assert name == "below" or len(seen) == CUTS


def test_two_ranks_end_a_pass_in_step_where_one_cannot_read_a_batch(of_two_ranks) -> None:
    """Of 4 steps the second is left out on both ranks, the last one has a cut for each."""
    numbers = [[0, 1, 8, 9, 12], [2, 3, 10, 11, 13]]
    for of_rank, expected in zip(of_two_ranks, numbers, strict=True):
        for epoch in of_rank["damaged"]:
            assert [int(name[-9:-4]) for step in epoch for name in step] == expected
