"""Parts of a model with learning rates of their own: plain gradient descent by hand, schedules, logs, resuming."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.learning_rates import in_proportion, learning_rates, part_of

from .backbones import model_config
from .memorising import MODES, items

SGD = {"_target_": "torch.optim.SGD", "lr": 0.5}
GROUPS = {"encoder": {"lr": 0.0625}, "llm": {"lr": 2.0, "weight_decay": 0.25}}
WARMUP = {"_target_": "nemo.core.optim.lr_scheduler.WarmupPolicy", "max_steps": 10, "warmup_steps": 3}
"""A quarter of the rate in the first step, half of it in the second, and so on."""

COSINE = {"_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing", "max_steps": 10, "warmup_steps": 3, "min_lr": 0.1}


def made(folder, asr, model_class=BestowGPT, backbone="qwen2", **section):
    config = model_config(backbone, folder, asr, **{"optimizer": SGD} | section)
    torch.manual_seed(0)
    return model_class(config).eval()


def test_each_part_takes_steps_of_its_own_rate(folder, tiny_asr):
    """By hand: gradients of one, so w becomes w - rate, and the language model's (1 - rate * decay) w - rate."""
    model = made(folder, tiny_asr, optim_param_groups=GROUPS, lr_scheduler=WARMUP)
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for rates in (
        {"encoder": 0.015625, "adapter": 0.125, "llm": 0.5},
        {"encoder": 0.03125, "adapter": 0.25, "llm": 1.0},
    ):
        assert learning_rates(optimizer) == {
            "learning_rate": rates["adapter"],
            **{f"learning_rate_{part}": rate for part, rate in rates.items()},
        }
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        seen = set()
        for name, parameter in model.named_parameters():
            part = (
                "llm"
                if name.startswith(("llm.", "embed_tokens."))
                else "encoder"
                if name.startswith("perception.encoder.")
                else "adapter"
            )
            seen.add(part)
            decay = 0.25 if part == "llm" else 0.0
            before[name] = (1 - rates[part] * decay) * before[name] - rates[part]
            torch.testing.assert_close(parameter.double(), before[name], rtol=1e-5, atol=1e-5, msg=name)
        assert seen == set(rates)


@pytest.mark.parametrize("schedule", [COSINE, WARMUP, None])
def test_a_schedule_scales_all_rates_in_proportion(folder, tiny_asr, schedule):
    """Also below the schedule's minimum, which is that of ``model.optimizer.lr``; the rest is as without the key."""
    sections = [{"optim_param_groups": GROUPS}, {}]
    grouped, plain = (
        made(folder, tiny_asr, lr_scheduler=schedule, **section).configure_optimizers() for section in sections
    )
    for _ in range(12):
        (base,) = {group["lr"] for group in plain["optimizer"].param_groups}
        rates = {group["part"]: group["lr"] for group in grouped["optimizer"].param_groups}
        assert rates == pytest.approx({"encoder": base / 8, "adapter": base, "llm": base * 4}, rel=1e-12)
        assert rates["adapter"] == base
        for configured in (grouped, plain):
            configured["optimizer"].step()
            if schedule is not None:
                configured["lr_scheduler"]["scheduler"].step()
    if schedule is not None:
        assert grouped["lr_scheduler"]["scheduler"].get_last_lr() == [
            group["lr"] for group in grouped["optimizer"].param_groups
        ]


@pytest.mark.parametrize(("model_class", "backbone"), [(SALMT5, "t5"), (SALMGPT, "llama"), (BestowGPT, "qwen2")])
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_every_trained_parameter_is_in_one_group(folder, tiny_asr, model_class, backbone, lora):
    model = made(folder, tiny_asr, model_class, backbone, lora=lora, optim_param_groups={"adapter": {"lr": 0.1}})
    optimizer = model.configure_optimizers()["optimizer"]
    members = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["part"] for group in optimizer.param_groups] == ["encoder", "adapter", "llm"]


def test_rates_are_logged_apart_and_survive_a_checkpoint(folder, tiny_asr, tmp_path):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def train(steps: int, groups: dict | None = GROUPS, **options: object) -> tuple[SALMGPT, Trainer]:
        model = made(folder, tiny_asr, SALMGPT, "llama", optim_param_groups=groups, lr_scheduler=WARMUP)
        trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, **quiet)
        batches = [items(model, MODES["text"])] * 3
        trainer.fit(model, DataLoader(batches, batch_size=None), **options)
        return model, trainer

    whole, trainer = train(3)
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("learning_rate")}
    assert logged == {
        "learning_rate": 0.375,
        "learning_rate_encoder": 0.046875,
        "learning_rate_adapter": 0.375,
        "learning_rate_llm": 1.5,
    }
    _, first = train(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, trainer = train(3, ckpt_path=tmp_path / "two.ckpt")
    assert trainer.callback_metrics["learning_rate_llm"] == 1.5
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    with pytest.raises(
        ConfigError, match=r"optim_param_groups: the checkpoint's optimizer has groups of this key, and"
    ):
        train(3, None, ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"speech": {"lr": 1}}, "model.optim_param_groups.speech: there is no such part; use encoder, adapter, llm."),
        ({"encodr": {"lr": 1}}, "model.optim_param_groups.encodr: there is no such key; did you mean 'encoder'?"),
        ({"encoder": {"lr": -1}}, "model.optim_param_groups.encoder.lr: torch.optim.SGD cannot be built with -1"),
        ({"encoder": {"lr": 0}}, "model.optim_param_groups.encoder.lr: 0 trains nothing"),
        ({"encoder": {"lr": "x"}}, "model.optim_param_groups.encoder.lr: 'x' cannot be used"),
        ({"encoder": {"betas": [0.9, 0.9]}}, "model.optim_param_groups.encoder.betas: no setting of a group of SGD"),
        ({"encoder": {}}, "model.optim_param_groups.encoder: {} cannot be used"),
        ({"encoder": 0.1}, "model.optim_param_groups.encoder: 0.1 cannot be used"),
    ],
)
def test_mistakes_get_one_sentence(folder, groups, sentence):
    with pytest.raises(ConfigError) as refused:
        SALMGPT(model_config("llama", folder, optimizer=SGD, optim_param_groups=groups))
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_a_part_without_anything_to_train_and_a_parameter_of_no_part_are_refused(folder, tiny_asr):
    with pytest.raises(ConfigError, match=r"optim_param_groups\.encoder: nothing of this part is trained"):
        made(folder, tiny_asr, freeze=["encoder"], optim_param_groups=GROUPS).configure_optimizers()
    model = made(folder, tiny_asr, optim_param_groups=GROUPS)
    model.own_head = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"trained parameter 'own_head\.weight' belongs to none of the parts"):
        model.configure_optimizers()
    with pytest.raises(ConfigError, match=r"needs model\.optimizer"):
        SALMGPT(model_config("llama", folder, optimizer=None, optim_param_groups=GROUPS))


def test_the_parts_do_not_overlap():
    names = ["perception.encoder.layers.0.w", "perception.proj.weight", "perception.modality_adapter.0.w", "llm.x.w"]
    assert [part_of(name) for name in [*names, "cross_attention.norm.weight"]] == [
        "encoder", "adapter", "adapter", "llm", "adapter",
    ]  # fmt: skip


def test_a_schedule_that_goes_on_from_the_last_rate_stays_in_proportion():
    """PyTorch's multiply what they find in a group; by hand: halved in each step."""
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "part": part, "part_lr": lr, "base_lr": 0.5}
        for part, lr in (("encoder", 0.3), ("llm", 0.5))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    schedule = in_proportion(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    for step in range(4):
        assert schedule.get_last_lr() == [0.3 / 2**step, 0.5 / 2**step]
        optimizer.step()
        schedule.step()
