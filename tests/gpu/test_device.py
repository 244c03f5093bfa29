"""What runs on a GPU gives what the CPU gives, and a step that runs out of its memory is redone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.head import answer_scores
from nemo_emmett.modules.linear_cross_entropy import KERNEL_PACKAGES, linear_cross_entropy
from nemo_emmett.oomptimizer.profile import Profile

from ..models.backbones import model_config, seeded
from ..models.batches import audio_batch, packed, prompted_batch, with_recordings
from ..oomptimizer.fits import Data, trainer_with

MODELS = {
    "SALMT5": (SALMT5, "t5"),
    "SALMT5 of M2M100": (SALMT5, "m2m100"),
    "SALMGPT": (SALMGPT, "llama"),
    "SALMGPT of Gemma 3": (SALMGPT, "gemma3"),
    "BestowGPT": (BestowGPT, "qwen2"),
}
MESSAGES = ["one red house", "two", "three green trees", "four old", "five new keys"]
ANSWERS = ["ein rotes haus", "zwei blaue autos", "drei", "vier alte türen", "fünf"]
SECONDS = [0.6, 1.1, 0.4, 0.9, 0.7]
ROWS = [0, 0, 0, 1, 1]


@pytest.fixture(params=MODELS)
def make(request, folder, tiny_asr, device):
    """Makes a model with further keys in its section; the same random weights each time."""
    kind, name = MODELS[request.param]

    def make(place: torch.device | None = None, **keys):
        model = seeded(kind, model_config(name, folder, tiny_asr, **keys)).to(place or device)
        model.perception.eval()  # without dither
        return model

    return make


def batch_for(model, pack: bool) -> dict:
    """Of both modalities, on the model's device."""
    locator = model.options.audio_locator_tag
    speech = with_recordings(model, prompted_batch(model, [locator] * len(ANSWERS), ANSWERS), SECONDS)
    parts = {"audio": speech, "text": prompted_batch(model, MESSAGES, ANSWERS)}
    if pack:
        parts = {modality: packed(part, ROWS) for modality, part in parts.items()}
    return on(parts, model.device)


def on(parts: dict, device: torch.device) -> dict:
    return {
        modality: {key: value.to(device) if torch.is_tensor(value) else value for key, value in part.items()}
        for modality, part in parts.items()
    }


def loss_and_gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    found = model.training_step(batch, 0)
    loss = found["loss"] if isinstance(found, dict) else found
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach().float().cpu(), **gradients}


def assert_close(found: dict, expected: dict, rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        atol = rtol * max(float(wanted.abs().max()), 1e-2)
        torch.testing.assert_close(found[name], wanted, rtol=rtol, atol=atol, msg=f"{name}")


def test_packed_rows_give_the_loss_and_gradient_of_padded_ones(make):
    model = make()
    assert_close(
        loss_and_gradients(model, batch_for(model, True)), loss_and_gradients(model, batch_for(model, False)), 1e-5
    )


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_loss_and_gradient_are_those_of_the_cpu(make, pack):
    there, here = make(), make(torch.device("cpu"))
    assert_close(
        loss_and_gradients(there, batch_for(there, pack)), loss_and_gradients(here, batch_for(here, pack)), 1e-4
    )


def test_packed_rows_in_bfloat16(make, device):
    model = make()
    with torch.autocast(device.type, torch.bfloat16):
        found, expected = (loss_and_gradients(model, batch_for(model, pack)) for pack in (True, False))
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-2, atol=0)


@pytest.mark.cuda_only
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_of_variable_length(folder, tiny_asr, device, implementation):
    if implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model = seeded(SALMGPT, model_config("llama", folder, tiny_asr, attn_implementation=implementation)).to(device)
    model.perception.eval()
    expecting = seeded(SALMGPT, model_config("llama", folder, tiny_asr)).to(device)
    expecting.load_state_dict(model.state_dict())
    expecting.perception.eval()
    with torch.autocast("cuda", torch.bfloat16):
        found = loss_and_gradients(model, batch_for(model, True))
        expected = loss_and_gradients(expecting, batch_for(expecting, False))
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-2, atol=0)


@torch.no_grad()
def test_an_example_that_is_replaced_changes_no_other_in_its_row(make):
    model = make()
    batch = batch_for(model, True)["text"]
    before = answer_scores(model.llm, model.llm_inputs(batch))[0]
    first = int(batch["answer_lens"][0])
    batch["answer_ids"][0, :first] = batch["answer_ids"][0, :first].flip(0)
    after = answer_scores(model.llm, model.llm_inputs(batch))[0]
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-6, atol=1e-6)


def test_outputs_of_a_frozen_encoder_from_the_disk_are_the_same_to_the_bit(make, tmp_path):
    model = make(freeze=["encoder"], cache_encoder=str(tmp_path))
    batch = {"audio": batch_for(model, False)["audio"]}
    first, again = loss_and_gradients(model, batch), loss_and_gradients(model, batch)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(SECONDS)
    assert torch.equal(first["loss"], again["loss"])


@pytest.mark.parametrize("name", ["chunked", *KERNEL_PACKAGES])
def test_implementations_of_the_loss(device, name):
    if name != "chunked" and (device.type != "cuda" or find_spec(KERNEL_PACKAGES[name]) is None):
        pytest.skip(f"{name} is not installed, or there is no GPU")
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device=device), torch.randn(1000, 64, device=device) / 8
    targets = torch.randint(1000, (300,), device=device)
    found = {}
    for implementation in (name, "naive"):
        of = [tensor.clone().to(torch.bfloat16).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*of, targets, implementation=implementation)
        loss.backward()
        found[implementation] = {"loss": loss.detach().float()} | {str(n): t.grad.float() for n, t in enumerate(of)}
    assert_close(found[name], found["naive"], 2e-2)


@pytest.mark.cuda_only
def test_a_step_that_runs_out_of_the_devices_memory_is_redone(tmp_path: Path, folder, tiny_asr, device):
    """The memory that torch may take is bounded between two steps, so that the second one's batch does not fit."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("train_ds: {bucket_duration_bins: [[20, 20]], bucket_batch_size: [64]}\n")
    section = model_config("t5", folder, tiny_asr, optimizer={"_target_": "torch.optim.SGD", "lr": 0.01})
    total = torch.cuda.get_device_properties(0).total_memory

    class Bound(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            torch.cuda.empty_cache()
            if batch_idx == 0:
                torch.cuda.reset_peak_memory_stats()
            else:
                resident, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
                torch.cuda.set_per_process_memory_fraction((resident + 0.7 * (peak - resident)) / total)

    def trained(*callbacks: Callback):
        model = seeded(SALMT5, section)
        del model.log
        model.perception.eval()
        batch = audio_batch(model, [(15.0 + 0.05 * n, "ein rotes haus") for n in range(64)])
        trainer = trainer_with(tmp_path, *callbacks, accelerator="gpu", gradient_clip_val=None)
        trainer.fit(model, datamodule=Data({}, [{"audio": batch}] * 2))
        return {name: p.detach().cpu() for name, p in model.named_parameters()}

    expected = trained()
    try:
        found = trained(OOMptimizer(profile=profile, mode="guard"), Bound())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event.cause.split(" in ")[0] for event in Profile.read(profile).events] == ["out of memory"]
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
