"""The infinite schedule: values by hand, resuming, refused values, and how NeMo builds it."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from nemo.collections.speechlm2.parts.optim_setup import configure_optimizers
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.optimization import parse_optimization
from nemo_emmett.schedulers import InfiniteLR

PHASES = {"warmup_steps": 4, "cooldown_steps": 4, "constant_lr": 2e-4}
ANNEALED = PHASES | {"annealing_steps": 4, "max_steps": 20, "min_lr": 2e-6}


def made(lrs: tuple[float, ...] = (1e-3,), **arguments) -> tuple[torch.optim.Optimizer, InfiniteLR]:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=lrs[0])
    return optimizer, InfiniteLR(optimizer, **arguments)


def run(optimizer: torch.optim.Optimizer, schedule: InfiniteLR, steps: int) -> list[list[float]]:
    """The learning rates of each group that the optimizer's next steps have."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def lrs_of(steps: int, **arguments) -> list[float]:
    return [lr for (lr,) in run(*made(**arguments), steps)]


def test_each_phase_has_the_values_of_its_formula() -> None:
    found = lrs_of(24, **ANNEALED)
    assert found[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    # 2e-4 + 8e-4 (1 + cos(pi k / 4)) / 2 for k = 1, 2, 3
    half = math.sqrt(2) / 2
    assert found[5:8] == pytest.approx([2e-4 + 4e-4 * (1 + half), 6e-4, 2e-4 + 4e-4 * (1 - half)])
    assert found[8:17] == pytest.approx([2e-4] * 9)
    # From 2e-4 to 2e-6 in four steps, each by 100 ** (1 / 4)
    assert found[17:21] == pytest.approx([2e-4 / 10**0.5, 2e-5, 2e-5 / 10**0.5, 2e-6])
    assert found[21:] == pytest.approx([2e-6] * 3)


def test_without_an_end_the_learning_rate_stays_constant() -> None:
    assert lrs_of(500, **PHASES)[8:] == pytest.approx([2e-4] * 492)
    assert lrs_of(60, **PHASES, max_steps=50, min_lr=1e-6) == lrs_of(60, **PHASES), "keys of NeMo's cosine schedule"


def test_phases_may_be_left_out() -> None:
    assert lrs_of(3, warmup_steps=0, cooldown_steps=0, constant_lr=2e-4) == pytest.approx([2e-4] * 3)
    found = lrs_of(6, warmup_steps=2, cooldown_steps=0, constant_lr=1e-3, annealing_steps=4, max_steps=6, min_lr=1e-7)
    assert found == pytest.approx([0, 5e-4, 1e-3, 1e-4, 1e-5, 1e-6])


def test_parameter_groups_keep_the_proportion_of_their_own_learning_rates() -> None:
    found = run(*made((1e-3, 1e-4, 3e-3), **ANNEALED), 24)
    for one, tenth, triple in found:
        assert tenth == pytest.approx(one / 10)
        assert triple == pytest.approx(one * 3)
    assert [one for one, _, _ in found] == lrs_of(24, **ANNEALED)


@pytest.mark.parametrize("after", [2, 6, 12, 18])
def test_a_resumed_run_continues_exactly(after) -> None:
    whole = run(*made((1e-3, 5e-4), **ANNEALED), 24)
    optimizer, schedule = made((1e-3, 5e-4), **ANNEALED)
    run(optimizer, schedule, after)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    optimizer, schedule = made((1e-3, 5e-4), **ANNEALED)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert run(optimizer, schedule, 24 - after) == whole[after:]


def test_the_annealing_may_be_decided_on_at_a_checkpoint() -> None:
    """The position is in the state, the phases are the recipe's."""
    optimizer, schedule = made(**PHASES)
    run(optimizer, schedule, 16)
    state = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = made(**ANNEALED)
    optimizer.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    assert run(optimizer, schedule, 5) == [[lr] for lr in lrs_of(21, **ANNEALED)[16:]]
    optimizer, schedule = made(**PHASES)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(made(**PHASES)[0], 10).state_dict()
    schedule.load_state_dict(cosine | {"last_epoch": 5})
    assert schedule.last_epoch == 5, "of another class, the position alone"


def test_pytorch_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*made(**ANNEALED), 3)


def test_nemo_builds_it_as_it_builds_its_own() -> None:
    section = {"_target_": "nemo_emmett.schedulers.InfiniteLR", **ANNEALED}
    model = torch.nn.Linear(2, 2)
    model.cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3}, "lr_scheduler": section})
    made_by_nemo = configure_optimizers(model)["lr_scheduler"]
    assert isinstance(made_by_nemo["scheduler"], InfiniteLR)
    assert made_by_nemo["interval"] == "step"


REFUSED = [
    ({"warmup_steps": -1}, "warmup_steps: -1 cannot be used; give a whole number from 0."),
    ({"warmup_steps": 1.5}, "warmup_steps: 1.5 cannot be used; give a whole number from 0."),
    ({"cooldown_steps": True}, "cooldown_steps: True cannot be used; give a whole number from 0."),
    ({"constant_lr": 0}, "constant_lr: 0 cannot be used; give a number above 0."),
    ({"constant_lr": "fast"}, "constant_lr: 'fast' cannot be used; give a number above 0."),
    ({"constant_lr": float("nan")}, "constant_lr: nan cannot be used; give a number above 0."),
    ({"constant_lr": 2e-3}, "constant_lr: 0.002 is above the optimizer's learning rate, 0.001; give at most this one."),
    ({"annealing_steps": 0}, "annealing_steps: 0 cannot be used; give a whole number from 1, or null."),
    ({"max_steps": None}, "max_steps is missing: annealing_steps, 4, are the last ones of it; give max_steps: ${trai"),
    (
        {"min_lr": 0.0},
        "min_lr: 0.0 is no end of an exponential annealing; give a value above 0 and at most constant_lr",
    ),
    (
        {"min_lr": 3e-4},
        "min_lr: 0.0003 is no end of an exponential annealing; give a value above 0 and at most constan",
    ),
    ({"min_lr": -1}, "min_lr: -1 cannot be used; give a number from 0"),
    (
        {"max_steps": 11},
        "annealing_steps: 4, with 4 steps of warm-up and 4 of cool-down, are more than max_steps, 11; ",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_wrong_values(change, sentence) -> None:
    for build in (lambda: made(**ANNEALED | change), lambda: of_recipe(ANNEALED | change)):
        with pytest.raises(ConfigError) as refused:
            build()
        assert str(refused.value).startswith(f"model.lr_scheduler.{sentence}")


def of_recipe(section: dict) -> dict:
    section = {"_target_": "nemo_emmett.schedulers.InfiniteLR", **section}
    config = SimpleNamespace(
        optim_param_groups=None, optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-3}, lr_scheduler=section
    )
    return parse_optimization(config)  # these two sections are all that it reads of a ModelConfig


def test_a_recipe() -> None:
    assert {"optimizer", "lr_scheduler"} <= ModelConfig.__dataclass_fields__.keys()
    assert of_recipe(ANNEALED | {"constant_lr": "2e-4"})["lr_scheduler"]["constant_lr"] == 2e-4
    with pytest.raises(ConfigError, match=r"model\.lr_scheduler\.constant_lr is missing: InfiniteLR needs it"):
        of_recipe({"warmup_steps": 1, "cooldown_steps": 1})
    with pytest.raises(ConfigError, match=r"model\.lr_scheduler\.cooldown_step: .*did you mean 'cooldown_steps'"):
        of_recipe(PHASES | {"cooldown_step": 3})
