"""Planning equals measuring: a step on fake tensors reads what the real step reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.modules import linear_cross_entropy
from nemo_emmett.oomptimizer import fake
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Contents, Shape
from nemo_emmett.oomptimizer.fake import fake_construction, fake_model
from nemo_emmett.oomptimizer.meter import TensorMeter
from nemo_emmett.oomptimizer.steps import TrainingSteps
from tests.conftest import ENCODER_DIM
from tests.models.backbones import model_config
from tests.oomptimizer.fits import AtFitStart, Data, trainer_with
from tests.oomptimizer.models import tiny_ctc, tiny_salm

CPU = torch.device("cpu")
SPEECH = Shape("audio", seconds=2.0, input_tokens=4, output_tokens=9)
TEXT = Shape("text", seconds=0.0, input_tokens=17, output_tokens=12)
BATCHES = [{SPEECH: 1}, {SPEECH: 5}, {TEXT: 7}, {SPEECH: 3, TEXT: 4}]
WHOLE_SPEECH = Shape("audio", seconds=3.2, input_tokens=40, output_tokens=40, total=True)
WHOLE_TEXT = Shape("text", seconds=0.0, input_tokens=30, output_tokens=30, total=True)
Q_FORMER = {
    "_target_": "nemo_emmett.modules.modality_adapters.QFormer",
    "prompt_size": 5,
    "target_layer_ids": [0],
    "qformer_num_hidden_layers": 1,
    "encoder_config": {"d_model": ENCODER_DIM, "encoder_attention_heads": 4},
    "output_dim": None,
}


def read_steps(folder, model, batches, on_fakes: bool, **trainer_options) -> list:
    """The readings of the optimizer's step and of a step of each batch, in `on_fit_start` of a real `fit`."""
    readings = []

    def measure(trainer, module):
        adapter, meter = adapter_for(module), TensorMeter(CPU)
        with ExitStack() as stack:
            if on_fakes:
                stack.enter_context(fake_model(module, trainer.optimizers))
                stack.enter_context(adapter.planning())
            steps = stack.enter_context(TrainingSteps(trainer, module, meter))
            made = [[adapter.synthetic_batch(shape, n, CPU) for shape, n in sizes.items()] for sizes in batches]
            made = [parts[0] if len(parts) == 1 else adapter.join(parts) for parts in made]
            readings.append(steps.warm_up(made[0]))
            readings.extend(steps.run(batch) for batch in made)
        raise _Measured

    trainer = trainer_with(folder, AtFitStart(measure), **trainer_options)
    with pytest.raises(_Measured):
        trainer.fit(model, Data({"bucket_duration_bins": [1.0]}))
    return [(reading.peak, reading.resident, reading.held) for reading in readings]


class _Measured(Exception):
    """Ends a `fit` before it trains."""


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    model.llm = get_peft_model(model.llm, LoraConfig(r=4, target_modules=["q", "v"], lora_dropout=0.1))


def with_checkpointing(model):
    model.llm.gradient_checkpointing_enable()


@pytest.mark.parametrize(
    ("changes", "change", "trainer_options"),
    [
        pytest.param({}, None, {}, id="dropout, float32"),
        pytest.param({}, None, {"precision": "bf16-mixed"}, id="autocast bf16"),
        pytest.param({}, None, {"precision": "bf16-true"}, id="weights bf16"),
        pytest.param({}, with_lora, {"precision": "bf16-mixed"}, id="LoRA"),
        pytest.param({"freeze_params": [r"^perception\.encoder\..+$"]}, None, {}, id="frozen encoder"),
        pytest.param({}, with_checkpointing, {"precision": "bf16-mixed"}, id="activation checkpointing"),
        pytest.param({}, None, {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}, id="accumulated, clipped"),
        pytest.param({"optimizer": {"_target_": "torch.optim.Adafactor", "lr": 1e-3}}, None, {}, id="Adafactor"),
        pytest.param(
            {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}}, None, {}, id="fused AdamW"
        ),
        pytest.param(
            {"optimizer": {"_target_": "nemo_emmett.optimizers.MasterWeightAdamW", "lr": 1e-3}},
            None,
            {"precision": "bf16-true"},
            id="float32 copies",
        ),
        *(
            pytest.param(
                {"optimizer": {"_target_": target, "lr": 1e-3}},
                None,
                {},
                id=target,
                marks=pytest.mark.skipif(find_spec(target.split(".")[0]) is None, reason="is not installed"),
            )
            for target in ("torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit", "bitsandbytes.optim.AdamW8bit")
        ),
        pytest.param(
            {"gradient_conflict": "monitor"}, None, {"accumulate_grad_batches": 2}, id="gradients of modalities apart"
        ),
    ],
)
def test_planned_peaks_of_salm_t5_are_the_measured_ones(tmp_path, salm_t5_config, changes, change, trainer_options):
    model = SALMT5(salm_t5_config | changes)
    if change is not None:
        change(model)
    is_plain = not changes and change is None and not trainer_options
    batches = BATCHES if is_plain else BATCHES[-1:]
    planned = read_steps(tmp_path, model, batches, on_fakes=True, **trainer_options)
    assert planned == read_steps(tmp_path, model, batches, on_fakes=False, **trainer_options)
    assert not is_plain or planned[2][0] > planned[1][0]


@pytest.mark.parametrize(
    ("kind", "backbone", "changes", "trainer_options"),
    [
        pytest.param(SALMGPT, "llama", {}, {}, id="SALMGPT"),  # these two with each batch, the others with one
        pytest.param(BestowGPT, "llama", {}, {}, id="BestowGPT"),
        pytest.param(SALMGPT, "gemma2", {"label_smoothing": 0.1}, {"precision": "bf16-true"}, id="capped logits"),
        pytest.param(
            SALMGPT,
            "qwen3",
            {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}},
            {"precision": "bf16-mixed"},
            id="LoRA",
        ),
        pytest.param(
            BestowGPT,
            "qwen3",
            {"lora": {"r": 4, "target_modules": ["q_proj"]}, "lora_modality": "audio"},
            {},
            id="LoRA on speech alone",
        ),
        pytest.param(BestowGPT, "qwen3", {"freeze": ["llm"]}, {}, id="frozen LLM, which text cannot train"),
        pytest.param(
            BestowGPT,
            "llama",
            {"activation_checkpointing": True},
            {"precision": "bf16-mixed"},
            id="activation checkpointing",
        ),
        pytest.param(SALMGPT, "llama", {"perception": {"modality_adapter": Q_FORMER}}, {}, id="Q-Former"),
        pytest.param(SALMGPT, "llama", {"encoder_chunk_size_seconds": 0.9}, {}, id="long audio in chunks"),
    ],
)
def test_planned_peaks_of_decoder_only_models_are_the_measured_ones(
    tmp_path, tmp_path_factory, tiny_asr, monkeypatch, kind, backbone, changes, trainer_options
):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", 8)
    model = kind(model_config(backbone, tmp_path_factory.getbasetemp() / "backbones", tiny_asr, **changes))
    batches = [{SPEECH: 3}, {TEXT: 7}, {WHOLE_SPEECH: 2, WHOLE_TEXT: 3}]
    if changes:
        batches = batches[1:2] if "freeze" in changes else batches[2:]
    planned = read_steps(tmp_path, model, batches, on_fakes=True, **trainer_options)
    assert planned == read_steps(tmp_path, model, batches, on_fakes=False, **trainer_options)


def packed_shape(modality: str, row: int, answers: int, **contents) -> Shape:
    frame = 0.08 if modality == "audio" else 0.0
    of_row = Contents(packed=True, **{"seconds_per_token": frame, **contents})
    return Shape(modality, row * frame, row, answers, contents=of_row)


PACKED_TEXT, PACKED_SPEECH = packed_shape("text", 24, 16), packed_shape("audio", 30, 16)
PACKED_MODELS = {"t5": SALMT5, "m2m100": SALMT5, "llama": SALMGPT, "gemma3": SALMGPT, "qwen3": BestowGPT}


@pytest.fixture(params=PACKED_MODELS)
def packing_model(request, tmp_path_factory, tiny_asr):
    folder = tmp_path_factory.getbasetemp() / "backbones"
    return PACKED_MODELS[request.param](model_config(request.param, folder, tiny_asr))


def test_planned_peaks_of_packed_rows_are_the_measured_ones(tmp_path, packing_model):
    batches = [{PACKED_SPEECH: 3}, {PACKED_TEXT: 7}, {PACKED_SPEECH: 2, PACKED_TEXT: 3}]
    planned = read_steps(tmp_path, packing_model, batches, on_fakes=True)
    measured = read_steps(tmp_path, packing_model, batches, on_fakes=False)
    if packing_model.is_encoder_decoder:
        assert planned == measured
    # Fake tensors do not know by which kernel a CPU computes attention with the mask of several examples.
    np.testing.assert_allclose(planned, measured, rtol=0.02)


def test_no_packed_batch_takes_more_than_the_one_that_is_measured(tmp_path, packing_model):
    """Of many short examples, few long ones, and recordings that are padded as much as packing allows."""
    model = packing_model
    adapter, is_joint = adapter_for(model), not model.is_encoder_decoder
    speech = packed_shape("audio", 30, 16, **({"batch_seconds": 4 * 3.0} if model.has_cross_attention else {}))

    def batch(shape: Shape, rows: list[int], context: int, answer: int, seconds: Sequence[float] = ()) -> dict:
        made = {"packed_rows": torch.tensor(rows), "packed_sizes": (4, shape.input_tokens, answer * rows.count(0))}
        for name, length in (("context", context), ("answer", answer)):
            made[f"{name}_ids"] = torch.full((len(rows), length), 7)
            made[f"{name}_lens"] = torch.tensor([length] * len(rows))
        if shape.modality == "audio":
            made["context_ids"][:, 0] = model.audio_locator_id
            made["audio_lens"] = torch.tensor([round(16000 * s) for s in seconds])
            made["audios"] = torch.zeros(len(rows), int(made["audio_lens"].max()))
        return {shape.modality: made}

    rows, thrice, twice = [0, 1, 2, 3], sorted([0, 1, 2, 3] * 3), sorted([0, 1, 2, 3] * 2)
    worst = {shape: partial(adapter.synthetic_batch, shape, 4, CPU) for shape in (PACKED_TEXT, speech)}
    of_text = {
        "many": partial(batch, PACKED_TEXT, thrice, *((5, 3) if is_joint else (8, 5))),
        "few": partial(batch, PACKED_TEXT, rows, 8 if is_joint else 24, 16),
    }
    of_speech = {
        "short": partial(batch, speech, thrice, 2, 3, [0.4] * 12),
        "long": partial(batch, speech, rows, 2, 6, [1.7] * 4),
        "padded": partial(batch, speech, twice, 2, 3, [1.4, 0.2] * 4),
    }
    peaks = {}

    def measure(trainer, module):
        with TrainingSteps(trainer, module, TensorMeter(CPU)) as steps:
            steps.warm_up(worst[speech]())
            for name, make in {**worst, **of_text, **of_speech}.items():  # each batch is gone when the next one is made
                peaks[name] = steps.run(make()).peak
        raise _Measured

    with pytest.raises(_Measured):
        trainer_with(tmp_path, AtFitStart(measure)).fit(model, Data({"bucket_duration_bins": [1.0]}))
    # Indexes are larger where examples are many, against embeddings of 32 numbers.
    assert max(peaks[name] for name in of_text) <= 1.01 * peaks[PACKED_TEXT]
    assert max(peaks[name] for name in of_speech) <= 1.01 * peaks[speech]


def test_a_lent_model_is_what_it_was(tmp_path, salm_t5_config):
    model = SALMT5(salm_t5_config)
    optimizer = torch.optim.AdamW(model.parameters())
    model.perception.preprocessor.featurizer.extra = torch.ones(3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    objects = dict([*model.named_parameters(), *model.named_buffers()])
    values = {name: tensor.clone() for name, tensor in objects.items()}
    state = {p: dict(s) for p, s in optimizer.state.items()}
    attributes = {name: dict(vars(part)) for name, part in model.named_modules()}
    with fake_model(model, [optimizer]):
        assert all(type(p).__name__ == "FakeTensor" for p in model.parameters())
        assert model.llm.shared.weight is model.llm.encoder.embed_tokens.weight
        assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
        assert not optimizer.state
        adapter = adapter_for(model)
        with adapter.planning():
            model.training_step(adapter.synthetic_batch(SPEECH, 2, CPU), 0).backward()
        optimizer.step()
        model.extra = 1
    found = dict([*model.named_parameters(), *model.named_buffers()])
    assert found.keys() == objects.keys()
    assert all(found[name] is objects[name] for name in objects)
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert {p: dict(s) for p, s in optimizer.state.items()} == state
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    for name, part in model.named_modules():
        assert vars(part).keys() == attributes[name].keys()
        assert all(vars(part)[key] is value for key, value in attributes[name].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_built_of_fake_tensors_has_the_peaks_of_the_real_one(tmp_path, salm_t5_config, precision):
    model = SALMT5(salm_t5_config)
    config = dict(model.cfg) | {"pretrained_weights": False}
    measured = read_steps(tmp_path, model, BATCHES, on_fakes=False, precision=precision)
    with fake_construction():
        planned = read_steps(tmp_path, SALMT5(config), BATCHES, on_fakes=True, precision=precision)
    assert planned == measured


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("build", "batches"),
    [
        pytest.param(tiny_salm, [{SPEECH: 1}, {SPEECH: 4}, {SPEECH: 2, TEXT: 3}], id="SALM"),
        pytest.param(tiny_ctc, [{SPEECH: 1}, {SPEECH: 4}], id="CTC"),
    ],
)
def test_planned_peaks_of_nemo_s_models_are_the_measured_ones(tmp_path, build, batches, precision):
    planned = read_steps(tmp_path, build(tmp_path), batches, on_fakes=True, precision=precision)
    assert planned == read_steps(tmp_path, build(tmp_path), batches, on_fakes=False, precision=precision)


class Reads(LightningModule):
    """Its step asks for a value."""

    def __init__(self, read):
        super().__init__()
        self.read, self.layer = read, torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.read(self.layer(x))


@pytest.mark.parametrize(
    ("read", "operation"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "aten.(index.Tensor|nonzero)"),
        (lambda x: x.detach().numpy(), "a kernel that is none of PyTorch's own"),
        (lambda x: torch.unique(x), "unique"),
    ],
)
def test_what_needs_values_is_refused_by_name(read, operation):
    with pytest.raises(ConfigError, match=rf"{operation}.*calibrate") as refusal, fake_model(Reads(read)) as _:
        Reads(read)(torch.ones(1, 2))
    assert "Reads.forward (" in str(refusal.value)


def test_recalled_outcomes_are_those_of_fake_tensor_mode(tmp_path, salm_t5_config, monkeypatch):
    model = SALMT5(salm_t5_config)
    recalled = read_steps(tmp_path, model, BATCHES[-1:], on_fakes=True)

    def ask(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(fake._ResultCache, "__torch_dispatch__", ask)
    assert recalled == read_steps(tmp_path, model, BATCHES[-1:], on_fakes=True)


def test_recall_keeps_numbers_of_different_types_and_aliases_apart():
    with fake_construction():
        x = torch.ones(2, 3, dtype=torch.int64)
        for _ in range(2):
            assert [(x + one).dtype for one in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
            assert x.add_(1) is x
            view, copied = x.view(3, 2), x.clone()
            assert view.untyped_storage() is x.untyped_storage() is not copied.untyped_storage()
        assert x.t_().shape == (3, 2)
        assert x.t_().shape == (2, 3)


def test_tied_weights_and_recurrent_layers_stay_what_they_are():
    lstm = torch.nn.LSTM(3, 3)
    lists = lstm._flat_weights, list(lstm._flat_weights)
    with fake_model(lstm):
        assert all(type(weight).__name__ == "FakeTensor" for weight in lstm._flat_weights)
        assert lstm(torch.ones(4, 2, 3))[0].shape == (4, 2, 3)
    assert lstm._flat_weights is lists[0]
    assert all(a is b for a, b in zip(*lists, strict=True))
