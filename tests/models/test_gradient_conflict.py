"""Gradients of speech and text, compared and projected in training, against two models that train on one each."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.gradient_conflict import parameter_blocks
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.training import check_gradient_conflict

from ..modules.test_gradient_projection import pcgrad
from ..oomptimizer.probing import Probing
from .backbones import backbone, model_config
from .memorising import MODES, built, items
from .two_ranks import SGD, gradients

MODELS = {"t5": SALMT5, "llama": SALMGPT, "qwen2": BestowGPT}
SHARED = re.compile(r"^(?:llm|embed_tokens)\.")


def block_of(name: str, names) -> str:
    """The block of a parameter by its name alone, and whether the names have embeddings apart from the output layer."""
    if not SHARED.match(name):
        return "speech"
    found = re.match(r"llm\.((?:encoder|decoder)\.block\.\d+|model\.layers\.\d+)\.", name)
    if found:
        return found[1]
    if name in ("llm.shared.weight", "embed_tokens.weight"):
        return "embeddings"
    if "lm_head" in name:
        return "output_layer" if "embed_tokens.weight" in names else "embeddings"
    return "other"


def apart(make, steps: list[list[dict]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Gradients of each modality in each step, by models that see that modality alone. SGD steps are not taken."""
    found = {}
    for modality in ("audio", "text"):
        found[modality] = []
        for step in steps:
            model = make()
            model.configure_optimizers()
            for batch in step:
                if modality in batch:
                    output = model.training_step({modality: batch[modality]}, 0)
                    ((output["loss"] if isinstance(output, dict) else output) / len(step)).backward()
            found[modality].append(gradients(model))
    return found


def by_block(names, audio: dict, text: dict) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(name, names), []).append(name)
    return {
        block: (*(np.concatenate([of[n].double().flatten().numpy() for n in members]) for of in (audio, text)), members)
        for block, members in blocks.items()
    }


def expected_gradients(audio: dict, text: dict) -> dict[str, torch.Tensor]:
    """By PCGrad in NumPy, block by block."""
    found = {}
    for a, t, members in by_block(audio, audio, text).values():
        whole = torch.from_numpy(sum(pcgrad(a, t)) if t.any() and a.any() else a + t)
        for name, part in zip(members, whole.split([audio[n].numel() for n in members]), strict=True):
            found[name] = part.view_as(audio[name]).float()
    return found


class Seen(Callback):
    """What the optimizer gets, and what is logged."""

    def __init__(self) -> None:
        self.gradients, self.values = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.gradients.append(gradients(module))

    def on_train_batch_end(self, trainer, module, *_) -> None:
        named = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient_")}
        self.values.append(named)
        for name in named:
            del trainer.callback_metrics[name]


QUIET = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)


def fit(model, batches: list[dict], *callbacks: Callback, **options) -> Seen:
    del model.log
    seen = Seen()
    options = QUIET | {"max_epochs": 1, "callbacks": [seen, *callbacks]} | options
    Trainer(accelerator="cpu", devices=1, **options).fit(model, DataLoader(batches, batch_size=None))
    return seen


@pytest.fixture(params=MODELS)
def make(request, folder, tiny_asr):
    def make_with(**section):
        return built(MODELS[request.param], request.param, folder, tiny_asr, **SGD | section)

    return make_with


def assert_close(found: dict, expected: dict) -> None:
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * max(largest, 1), msg=name)


def test_cosines_norms_and_projected_gradients_are_those_of_two_models_apart(make):
    plain = make()
    batch = items(plain, MODES["zip"])
    of_each = apart(make, [[batch]])
    audio, text = of_each["audio"][0], of_each["text"][0]
    monitored = fit(make(gradient_conflict={"mode": "monitor", "every_n_steps": 1}), [batch])
    harmonised = fit(make(gradient_conflict={"mode": "harmonise", "every_n_steps": 1}), [batch])
    assert_close(monitored.gradients[0], {name: audio[name] + text[name] for name in audio})
    assert_close(harmonised.gradients[0], expected_gradients(audio, text))

    for seen in (monitored, harmonised):
        assert seen.values[0] == pytest.approx(expected_values(audio, text), rel=1e-4, abs=1e-5)


def expected_values(audio: dict, text: dict) -> dict[str, float]:
    """Cosines and norms of the blocks of the language model, and of all of them; none without one of the modalities."""
    blocks = by_block([name for name in audio if SHARED.match(name)], audio, text)
    expected = {}
    for block, (a, t, _) in [*blocks.items(), ("", _joined(blocks))]:
        suffix = f"/{block}" if block else ""
        norms = np.linalg.norm(a), np.linalg.norm(t)
        if 0.0 in norms:
            return {}
        expected |= {f"gradient_cosine{suffix}": a @ t / norms[0] / norms[1]}
        expected |= {f"gradient_norm_{m}{suffix}": norm for m, norm in zip(("audio", "text"), norms, strict=True)}
    return expected


def _joined(blocks) -> tuple[np.ndarray, np.ndarray, list]:
    return *(np.concatenate([block[i] for block in blocks.values()]) for i in (0, 1)), []


def test_conflicts_exist_in_what_these_tests_compare(folder, tiny_asr):
    """Otherwise nothing would be projected in them."""
    make = lambda: built(SALMT5, "t5", folder, tiny_asr, **SGD)  # noqa: E731
    audio, text = (found[0] for found in apart(make, [[items(make(), MODES["zip"])]]).values())
    products = [a @ t for a, t, _ in by_block([n for n in audio if SHARED.match(n)], audio, text).values()]
    assert min(products) < 0 < max(products)


def test_accumulated_batches_are_compared_as_one(make):
    """Also where a batch of the step holds one modality only."""
    model = make()
    batch = items(model, MODES["zip"])
    halves = [batch, {"text": batch["text"]}, {"audio": batch["audio"]}, batch]
    of_each = apart(make, [halves])
    audio, text = of_each["audio"][0], of_each["text"][0]
    for mode, expected in (
        ("monitor", {name: audio[name] + text[name] for name in audio}),
        ("harmonise", expected_gradients(audio, text)),
    ):
        model = make(gradient_conflict={"mode": mode, "every_n_steps": 1})
        assert_close(fit(model, halves, accumulate_grad_batches=4).gradients[0], expected)


def test_objectives_belong_to_the_gradient_of_their_modality(folder, tiny_asr):
    """Retention to text's: with a teacher that is not the model, since there the divergence has no gradient."""
    teacher = str(backbone("llama", folder))
    section = {"objectives": {"retention": {"weight": 3.0, "teacher": teacher}}}
    make = lambda **keys: disturbed(built(SALMGPT, "llama", folder, tiny_asr, **SGD | section | keys))  # noqa: E731
    batch = items(make(), MODES["zip"])
    of_each = apart(make, [[batch]])
    audio, text = of_each["audio"][0], of_each["text"][0]
    seen = fit(make(gradient_conflict={"mode": "harmonise", "every_n_steps": 1}), [batch])
    assert_close(seen.gradients[0], expected_gradients(audio, text))
    assert seen.values[0] == pytest.approx(expected_values(audio, text), rel=1e-4, abs=1e-5)


def disturbed(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_between_the_intervals_steps_are_lightnings_own(folder, tiny_asr, monkeypatch):
    make = lambda **section: built(SALMGPT, "llama", folder, tiny_asr, **SGD | section)  # noqa: E731
    batch = items(make(), MODES["zip"])
    plain = fit(make(), [batch] * 5)
    model = make(gradient_conflict={"mode": "monitor", "every_n_steps": 3})
    passes = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kw: (passes.append(1), backward(*args, **kw))[1])
    seen = fit(model, [batch] * 5)
    assert [bool(values) for values in seen.values] == [False, False, True, False, False]
    assert len(passes) == 4 + 2
    for found, expected in zip(seen.gradients, plain.gradients, strict=True):
        assert_close(found, expected)
    assert all(torch.equal(seen.gradients[0][name], plain.gradients[0][name]) for name in seen.gradients[0])


def test_steps_of_one_modality_have_nothing_to_compare(folder, tiny_asr):
    make = lambda **section: built(SALMT5, "t5", folder, tiny_asr, **SGD | section)  # noqa: E731
    batch = items(make(), MODES["zip"])
    batches = [{"audio": batch["audio"]}, {"text": batch["text"]}]
    plain = fit(make(), batches)
    seen = fit(make(gradient_conflict={"mode": "harmonise", "every_n_steps": 1}), batches)
    assert seen.values == [{}, {}]
    for found, expected in zip(seen.gradients, plain.gradients, strict=True):
        assert_close(found, expected)


def test_scaled_losses_are_unscaled_and_steps_that_overflow_are_skipped(folder, tiny_asr):
    """16-mixed: norms are those of the gradient, and the scaler sees the projected one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = scaler
    make = lambda **section: built(SALMGPT, "llama", folder, tiny_asr, **SGD | section)  # noqa: E731
    batch = items(make(), MODES["zip"])
    section = {"gradient_conflict": {"mode": "harmonise", "every_n_steps": 1}}
    plain = fit(make(**section), [batch], precision="bf16-mixed", gradient_clip_val=0.1)
    scaled = fit(make(**section), [batch], plugins=[precision], gradient_clip_val=0.1)
    assert scaled.values[0] == pytest.approx(plain.values[0], rel=1e-2, abs=1e-2)
    assert_close(scaled.gradients[0], plain.gradients[0])

    class Overflow(Callback):
        def on_before_backward(self, trainer, module, loss) -> None:
            module.lm_weight = module.embed_tokens.weight.detach().clone()
            module.modality_terms["text"].register_hook(lambda gradient: gradient * float("inf"))

    model = make(**section)
    before = scaler.get_scale()
    fit(model, [batch], Overflow(), plugins=[precision])
    assert torch.equal(model.lm_weight, model.embed_tokens.weight)
    assert scaler.get_scale() < before


def test_a_step_that_is_not_finite_is_skipped(folder, tiny_asr):
    make = lambda **section: built(SALMT5, "t5", folder, tiny_asr, **SGD | section)  # noqa: E731
    model = make(gradient_conflict="harmonise")
    batch = items(model, MODES["zip"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    class Spoil(Callback):
        def on_before_backward(self, trainer, module, loss) -> None:
            if trainer.global_step == 0:
                module.modality_terms["audio"].register_hook(lambda gradient: gradient * float("nan"))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx == 0:
                assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())

    fit(model, [batch] * 2, Spoil())
    assert not torch.equal(model.llm.shared.weight, before["llm.shared.weight"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_values_are_written_by_loggers_in_the_steps_of_the_interval(folder, tiny_asr, tmp_path):
    model = built(SALMT5, "t5", folder, tiny_asr, **SGD, gradient_conflict={"mode": "monitor", "every_n_steps": 2})
    batch = items(model, MODES["zip"])
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(model, [batch] * 5, logger=logger, log_every_n_steps=3)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    written = [int(row["step"]) for row in rows if row["gradient_cosine/decoder.block.0"]]
    assert written == [1, 3]


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_every_trained_parameter_is_in_one_block(make, lora):
    model = make(lora=lora)
    model.configure_optimizers()
    members = [id(parameter) for block in parameter_blocks(model).values() for parameter in block]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    if lora is None:
        for block, parameters in parameter_blocks(model).items():
            names = [name for name, p in model.named_parameters() if any(p is member for member in parameters)]
            of_all = [name for name, _ in model.named_parameters()]
            expected = "speech" if block in ("encoder", "adapter") else block
            assert {block_of(name, of_all) for name in names} == {expected}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradient_conflict": "watch"}, "model.gradient_conflict.mode: 'watch' cannot be used"),
        ({"gradient_conflict": {"mode": "monitor", "every_n_steps": 0}}, "model.gradient_conflict.every_n_steps: 0"),
        ({"gradient_conflict": {"mode": "monitor", "every": 3}}, "model.gradient_conflict.every: there is no such key"),
        ({"gradient_conflict": {}}, "model.gradient_conflict.mode is missing: write monitor or harmonise."),
        ({"gradient_conflict": 3}, "model.gradient_conflict: 3 cannot be used"),
        ({"perception": None, "pretrained_asr": None}, "model.gradient_conflict: a model that reads text only"),
        ({"lora": {"r": 2}, "lora_modality": "audio"}, "model.gradient_conflict: with model.lora_modality: audio"),
    ],
)
def test_mistakes_get_one_sentence(folder, tiny_asr, change, sentence):
    with pytest.raises(ConfigError) as refused:
        SALMGPT(model_config("llama", folder, tiny_asr, **{"gradient_conflict": "monitor"} | change))
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.train_ds.text=null", "model.gradient_conflict: data.train_ds holds speech alone"),
        ("data.train_ds.audio=null", "model.gradient_conflict: data.train_ds holds text alone"),
        (
            "data.train_ds.sampler_fusion=round_robin",
            "model.gradient_conflict: under data.train_ds.sampler_fusion: round_",
        ),
    ],
)
def test_data_of_which_no_step_has_both_modalities_is_refused(recipe, change, sentence):
    recipe["model"]["gradient_conflict"] = "monitor"
    cfg = OmegaConf.create(recipe)
    check_gradient_conflict(cfg)
    key, value = change.split("=")
    if value == "null":
        del cfg.data.train_ds[key.rpartition(".")[2]]
    else:
        OmegaConf.update(cfg, key, value)
    with pytest.raises(ConfigError) as refused:
        check_gradient_conflict(cfg)
    assert str(refused.value).startswith(sentence)
    cfg.model.gradient_conflict = None
    check_gradient_conflict(cfg)


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (ModelParallelStrategy(), "model.gradient_conflict: ModelParallelStrategy has no whole gradients to compare"),
        (SingleDeviceStrategy(), "model.gradient_conflict: SALMGPT optimizes by itself"),
    ],
)
def test_trainings_whose_gradients_cannot_be_compared_are_refused(folder, tiny_asr, strategy, sentence):
    model = built(SALMGPT, "llama", folder, tiny_asr, gradient_conflict="monitor")
    model.trainer = SimpleNamespace(strategy=strategy)
    model.automatic_optimization = not isinstance(strategy, SingleDeviceStrategy)
    with pytest.raises(ConfigError) as refused:
        model.on_fit_start()
    assert str(refused.value).startswith(sentence)


def test_a_language_model_that_is_not_trained_is_refused(folder, tiny_asr):
    model = built(SALMGPT, "llama", folder, tiny_asr, **SGD, gradient_conflict="monitor", freeze=["llm"])
    with pytest.raises(ConfigError, match="nothing of the language model is trained"):
        fit(model, [items(model, MODES["zip"])])


@pytest.mark.parametrize("mode", ["monitor", "harmonise"])
def test_oomptimizers_probes_hold_the_gradients_of_both_modalities(folder, tiny_asr, mode):
    """In every mode, since the largest step counts; nothing of it is left afterwards."""

    def probed(accumulate: int, **section) -> tuple[int, list[int], list[int]]:
        """Floor, the peaks of two steps, and the bytes that are kept apart after each."""
        model = built(SALMT5, "t5", folder, tiny_asr, **SGD | section)
        peaks, kept = [], []

        def probe(steps: TrainingSteps) -> None:
            batch = items(model, MODES["zip"])
            steps.warm_up({"text": batch["text"]})
            for _ in range(2):
                peaks.append(steps.run(batch).peak)
                if model.gradient_conflict is not None:
                    kept.append(sum(gradient.nbytes for gradient in model.gradient_conflict.kept_gradients()))
            peaks.insert(0, steps.floor.peak)

        options = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "callbacks": [Probing(probe)]}
        trainer = Trainer(accumulate_grad_batches=accumulate, **options, **QUIET)
        trainer.fit(model, DataLoader([items(model, MODES["zip"])] * accumulate, batch_size=None))
        conflict = model.gradient_conflict
        assert conflict is None or (conflict.always is False and not conflict.kept_gradients())
        return peaks[0], peaks[1:], kept

    model = built(SALMT5, "t5", folder, tiny_asr)
    shared = sum(p.nbytes for name, p in model.named_parameters() if SHARED.match(name))
    everything = sum(p.nbytes for p in model.parameters())
    alone = probed(1)[0]
    floor, _, kept = probed(1, gradient_conflict=mode)
    assert floor == alone, "the optimizer steps when there is one gradient again"
    assert kept == [everything + shared] * 2
    (_, before, _), (_, after, kept) = probed(2), probed(2, gradient_conflict=mode)
    assert kept == [everything + shared] * 2
    # Where this model's peak is, gradients of earlier micro-steps are there: the language model's twice.
    assert after == [pytest.approx(peak + shared, abs=16) for peak in before]
