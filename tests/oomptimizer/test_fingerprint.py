"""Fingerprints: the same for what takes the same memory, different for what does not."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import read_groups
from nemo_emmett.oomptimizer.fingerprint import check_fingerprint, config_hash, fingerprint_of, short_hash

CONFIG = {
    "pretrained_llm": "/data/models/t5-large",
    "perception": {"encoder": {"d_model": 32, "n_layers": 2}},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "amsgrad": False},
    "tokenizer": {"dir": "/tmp/a"},
    "train_ds": {"batch_size": 4},
}


class Model(LightningModule):
    def __init__(self, width: int = 3, cfg: dict | None = None) -> None:
        super().__init__()
        self.cfg = OmegaConf.create(cfg or CONFIG)
        self.first, self.second = torch.nn.Linear(2, width), torch.nn.Linear(width, 1, bias=False)


def fingerprint(model: Model | None = None, optimizer=None, bins=(4, 8), planned=False, **trainer_options) -> dict:
    model = model or Model()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**options, **trainer_options)
    trainer.strategy._optimizers = [optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)]
    groups = read_groups(OmegaConf.create({"bucket_duration_bins": list(bins)}))
    return fingerprint_of(trainer, model, groups, planned=planned)


def fields_that_differ(stored: dict, actual: dict) -> set[str]:
    try:
        check_fingerprint(stored, actual, "p.yaml")
    except ConfigError as error:
        inside = str(error).partition("something else (")[2].rpartition("); delete")[0]
        return {part.partition(" was ")[0] for part in inside.split("; ")}
    return set()


def test_it_counts_parameters_and_says_what_was_measured() -> None:
    model = Model()
    model.second.requires_grad_(False)
    found = fingerprint(model)
    assert found["parameters"]["total"] == 2 * 3 + 3 + 3
    assert found["parameters"]["trainable"] == 2 * 3 + 3
    assert found["optimizers"][0]["class"].endswith("AdamW")
    assert found["bins"] == "[4, 8]"
    assert found["device"] == {"name": "cpu"}
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_same_training_has_the_same_fingerprint() -> None:
    assert fields_that_differ(fingerprint(), fingerprint()) == set()
    assert short_hash(fingerprint()) == short_hash(dict(reversed(fingerprint().items())))


def test_the_learning_rate_the_data_and_the_folders_do_not_matter() -> None:
    other = copy.deepcopy(CONFIG)
    other["pretrained_llm"] = "/elsewhere/t5-large/"
    other["optimizer"]["lr"] = 0.5
    other["tokenizer"]["dir"] = "/tmp/b"
    other["train_ds"]["batch_size"] = 9
    assert config_hash(OmegaConf.create(dict(reversed(other.items())))) == config_hash(OmegaConf.create(CONFIG))
    other["perception"]["encoder"]["n_layers"] = 3
    assert config_hash(other) != config_hash(CONFIG)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (lambda: fingerprint(Model(width=4)), {"parameters.total", "parameters.trainable", "parameters.hash"}),
        (lambda: fingerprint(Model().requires_grad_(False)), {"parameters.trainable", "parameters.hash"}),
        (lambda: fingerprint(Model().bfloat16()), {"parameters.hash"}),
        (lambda: fingerprint(Model(cfg=CONFIG | {"lora": {"r": 8}})), {"model.config"}),
        (
            lambda: fingerprint(optimizer=torch.optim.AdamW(Model().parameters(), amsgrad=True)),
            {"optimizers[0].amsgrad"},
        ),
        (lambda: fingerprint(precision="bf16-mixed"), {"precision"}),
        (lambda: fingerprint(accumulate_grad_batches=4), {"accumulate_grad_batches"}),
        (lambda: fingerprint(bins=(4, 9)), {"bins", "longest_example.seconds", "longest_example.output_tokens"}),
    ],
)
def test_what_changes_the_memory_changes_the_fingerprint(other, differing: set[str]) -> None:
    assert fields_that_differ(fingerprint(), other()) == differing


def test_momentum_counts_but_not_how_much() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1))]
    with_, more, without = (
        fingerprint(optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=m)) for m in (0.9, 0.5, 0.0)
    )
    assert fields_that_differ(with_, more) == set()
    assert fields_that_differ(with_, without) == {"optimizers[0].momentum"}


def test_a_plan_says_nothing_of_the_machine_it_was_made_on() -> None:
    plan, training = fingerprint(planned=True), fingerprint()
    assert training.keys() - plan.keys() == {"strategy", "world_size", "device"}
    assert fields_that_differ(plan, training) == set()


def test_the_refusal_names_both_values_and_the_remedy() -> None:
    stored = {"device": {"name": "NVIDIA A100", "memory": 3}, "world_size": 2}
    with pytest.raises(ConfigError) as error:
        check_fingerprint(stored, {"device": {"name": "NVIDIA H100", "memory": 3}}, "p.yaml")
    assert str(error.value) == (
        "p.yaml: the profile was made for something else (device.name was NVIDIA A100 and is NVIDIA H100; world_size "
        "was 2 and is nothing); delete the file to measure again, or name another profile."
    )


def test_a_profile_written_by_hand_is_taken() -> None:
    check_fingerprint({}, fingerprint(), "p.yaml")


def test_the_name_of_the_class_in_the_config_does_not_matter() -> None:
    hashes = {config_hash({**named, **CONFIG}) for named in ({}, {"_target_": "salm"}, {"_target_": "a.b.SALM"})}
    assert len(hashes) == 1
    other = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "_target_": "torch.optim.SGD"}}
    assert config_hash(other) != config_hash(CONFIG)
