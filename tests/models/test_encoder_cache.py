"""`model.cache_encoder`: outputs of a frozen speech encoder are kept on disk, and losses stay the same to the bit."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.modules.encoder_cache import CachedPerception, default_folder
from nemo_emmett.oomptimizer.snapshot import Snapshot

from .backbones import model_config, seeded
from .batches import audio_batch, text_batch
from .two_ranks import assert_equal_gradients

FROZEN = [r"^perception\.(preprocessor|encoder|encoder_multilayer)\..+$"]
NEMO, OURS = "nemo.collections.speechlm2.modules.perception", "nemo_emmett.modules.modality_adapters"
ADAPTERS = {
    "identity": {"_target_": f"{NEMO}.IdentityConnector", "d_model": 32},
    "mlp": {"_target_": f"{OURS}.MLPConnector", "input_dim": 32, "output_dim": 32, "subsampling_factor": 2},
    "layers": {
        "_target_": f"{NEMO}.MultiLayerProjectionConnector",
        "input_dim": 32,
        "output_dim": 32,
        "target_layer_ids": [0],
    },
    "qformer": {
        "_target_": f"{OURS}.QFormer",
        "prompt_size": 3,
        "target_layer_ids": [0],
        "qformer_num_hidden_layers": 1,
        "encoder_config": {"d_model": 32, "encoder_attention_heads": 2},
        "output_dim": 32,
    },
}
"""Of each kind: one that reads the encoder's output, and those that read several of its layers."""

RECORDINGS = [(1.3, "eins"), (0.4, "zwei drei"), (2.1, "vier")]


@pytest.fixture
def config(folder, tiny_asr, tmp_path):
    def of(backbone: str = "t5", adapter: str | None = None, **overrides) -> dict:
        section = model_config(backbone, folder, tiny_asr, freeze_params=FROZEN)
        if adapter is not None:
            section["perception"] = {**section["perception"], "modality_adapter": ADAPTERS[adapter]}
        return {**section, "cache_encoder": str(tmp_path / "cache"), **overrides}

    return of


def loss_and_gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model.training_step({"audio": batch}, 0)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def frozen(kind, section: dict):
    """A model without dropout in what is trained."""
    model = seeded(kind, section)
    model.llm.eval()
    return model


def files(section: dict) -> list[Path]:
    return sorted(Path(section["cache_encoder"]).rglob("*.safetensors"))


def count_encoded(model) -> list[int]:
    """A list that gets the number of recordings whenever the encoder runs."""
    encoded: list[int] = []
    model.perception.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(kwargs["audio_signal"])), with_kwargs=True
    )
    return encoded


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_losses_and_gradients_are_the_same_to_the_bit_from_the_disk(config, adapter) -> None:
    section = config(adapter=adapter)
    model = frozen(SALMT5, section)
    encoded = count_encoded(model)
    first = loss_and_gradients(model, audio_batch(model, RECORDINGS))
    assert encoded == [1, 1, 1]
    assert len(files(section)) == 3
    again = loss_and_gradients(model, audio_batch(model, RECORDINGS))
    assert encoded == [1, 1, 1]
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize(("kind", "backbone"), [(SALMT5, "t5"), (SALMGPT, "llama"), (BestowGPT, "llama")])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_losses_and_gradients_are_those_without_a_cache(config, kind, backbone, adapter) -> None:
    plain = frozen(kind, config(backbone, adapter, cache_encoder=False))
    cached = frozen(kind, config(backbone, adapter))
    assert plain.state_dict().keys() == cached.state_dict().keys()
    cached.load_state_dict(plain.state_dict())
    expected = loss_and_gradients(plain, audio_batch(plain, RECORDINGS))
    found = loss_and_gradients(cached, audio_batch(cached, RECORDINGS))
    assert len(found) > 5
    assert_equal_gradients(found, expected)


def test_an_output_does_not_depend_on_the_batch(config) -> None:
    model = frozen(SALMT5, config())
    encoded = count_encoded(model)
    whole = audio_batch(model, RECORDINGS)
    loss_and_gradients(model, whole)
    loss_and_gradients(model, {key: value[1:2] for key, value in whole.items()})
    loss_and_gradients(model, {key: value.flip(0) if torch.is_tensor(value) else value for key, value in whole.items()})
    assert encoded == [1, 1, 1]
    with torch.no_grad():
        alone, _ = model.encode_speech(whole["audios"][1:2, : whole["audio_lens"][1]], whole["audio_lens"][1:2])
        among, lens = model.encode_speech(whole["audios"], whole["audio_lens"])
    assert torch.equal(alone[0], among[1, : lens[1]])


def test_validation_and_translation_read_the_same_files(config) -> None:
    model = frozen(SALMT5, config(max_new_tokens=3))
    encoded = count_encoded(model)
    batch = audio_batch(model, RECORDINGS)
    loss_and_gradients(model, batch)
    model.eval()
    with torch.no_grad():
        model(batch)
        model.generate_answers(batch)
    assert len(encoded) == 3


def test_other_weights_settings_precision_or_samples_are_other_outputs(config) -> None:
    section = config()
    model = frozen(SALMT5, section)
    encoded = count_encoded(model)
    batch = audio_batch(model, RECORDINGS)

    def computed(change=None, within=None) -> int:
        if change is not None:
            change()
        del encoded[:]
        with torch.no_grad(), within or torch.autocast("cpu", enabled=False):
            model(batch)
        return len(encoded)

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    others = {name: value + 0.01 if "encoder.layers" in name else value for name, value in weights.items()}
    assert computed() == 3
    assert computed(lambda: model.load_state_dict(others)) == 3
    assert computed(lambda: model.load_state_dict(weights)) == 0
    assert computed(within=torch.autocast("cpu", torch.bfloat16)) == 3
    assert computed(lambda: model.to(torch.float64).to(torch.float32)) == 0
    assert computed(lambda: batch["audios"][0].mul_(0.9)) == 1
    assert len(files(section)) == 10
    model.perception.encoder.set_max_audio_length(6000)  # as a long recording does: more positions are kept
    assert computed(lambda: model.load_state_dict(weights)) == 0

    model.perception.cfg.preprocessor.normalize = "all_features"
    model.perception._apply(lambda tensor: tensor)
    assert computed() == 3


def test_the_padding_of_a_batch_is_no_part_of_a_recording(config) -> None:
    model = frozen(SALMT5, config())
    encoded = count_encoded(model)
    batch = audio_batch(model, RECORDINGS)
    loss_and_gradients(model, batch)
    batch["audios"][1, batch["audio_lens"][1] :] = 0.5
    loss_and_gradients(model, batch)
    assert len(encoded) == 3


def test_a_recording_of_a_single_frame_is_encoded(config) -> None:
    plain, cached = frozen(SALMT5, config(cache_encoder=False)), frozen(SALMT5, config())
    cached.load_state_dict(plain.state_dict())
    audios, lens = torch.randn(2, 16000), torch.tensor([16000, 60])
    with torch.no_grad():
        plain.eval()
        expected, expected_lens = plain.encode_speech(audios, lens)
        found, found_lens = cached.encode_speech(audios, lens)
    assert torch.equal(expected_lens, found_lens)
    for row, length in enumerate(found_lens.tolist()):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", [lambda data: data[:20], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_damaged_file_is_written_again(config, caplog, damage) -> None:
    section = config()
    model = frozen(SALMT5, section)
    batch = audio_batch(model, RECORDINGS)
    first = loss_and_gradients(model, batch)
    path = files(section)[1]
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        again = loss_and_gradients(model, batch)
    assert torch.equal(first["loss"], again["loss"])
    assert path.read_bytes() == content
    assert [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]


def test_a_full_disk_costs_the_cache_alone(config, caplog, monkeypatch) -> None:
    section = config()
    model = frozen(SALMT5, section)
    batch = audio_batch(model, RECORDINGS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_emmett.modules.encoder_cache.atomic_file", full)
    with caplog.at_level(logging.WARNING):
        first, again = loss_and_gradients(model, batch), loss_and_gradients(model, batch)
    assert torch.equal(first["loss"], again["loss"])
    messages = [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("model.cache_encoder: ")


def test_the_share_that_was_found_is_logged(config) -> None:
    model = frozen(SALMT5, config())
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.__setitem__(name, float(value))
    whole = audio_batch(model, RECORDINGS)
    loss_and_gradients(model, {key: value[:1] for key, value in whole.items()})
    assert logged["encoder_cache_found"] == 0.0
    loss_and_gradients(model, whole)
    assert logged["encoder_cache_found"] == pytest.approx(1 / 3)
    del logged["encoder_cache_found"]
    model.training_step({"text": text_batch(model, [("one", "eins")])}, 0)
    assert "encoder_cache_found" not in logged


def test_oomptimizer_leaves_no_made_up_recordings(config) -> None:
    section = config()
    model = frozen(SALMT5, section)
    before = Snapshot([model])
    model.perception.is_measured = True
    loss_and_gradients(model, audio_batch(model, RECORDINGS))
    assert files(section) == []
    before.restore()
    assert not model.perception.is_measured


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"freeze_params": []}, "freeze the speech encoder"),
        ({"prevent_freeze_params": [r"^perception\.encoder\.layers\.0\..+$"]}, "perception.encoder.layers.0."),
        ({"perception": None, "freeze_params": []}, "reads text only"),
        ({"cache_encoder": ""}, "cache_encoder"),
        ({"cache_encoder": 3}, "cache_encoder"),
        ({"cache_encoder": "false"}, "is a text"),
        ({"cache_encoder": "/proc/nowhere"}, "cannot be written to"),
    ],
)
def test_what_cannot_be_cached_is_refused(config, overrides, words) -> None:
    with pytest.raises(ConfigError, match=r"^model\.cache_encoder") as error:
        SALMT5(config(**overrides))
    assert words in str(error.value)


def test_masked_spectrograms_are_refused(config) -> None:
    section = config()
    masks = {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 1}
    section["perception"] = {**section["perception"], "spec_augment": masks}
    with pytest.raises(ConfigError, match=r"^model\.cache_encoder: model\.perception\.spec_augment"):
        SALMT5(section)


def test_true_is_the_folder_of_the_users_cache(config, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = SALMT5(config(cache_encoder=True))
    assert model.perception.cache.folder == default_folder() == tmp_path / "nemo_emmett" / "encoder"


def test_an_exported_model_has_no_cache(config, tmp_path) -> None:
    section = config()
    model = SALMT5(section)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "exported")
    shutil.rmtree(section["cache_encoder"], ignore_errors=True)
    loaded = SALMT5.from_pretrained(tmp_path / "exported")
    assert not isinstance(loaded.perception, CachedPerception)
    with torch.no_grad():
        batch = audio_batch(model, RECORDINGS)
        torch.testing.assert_close(loaded.eval()(batch)[0], model.eval()(batch)[0], rtol=1e-4, atol=1e-5)
    assert "cache" not in (tmp_path / "exported" / "config.json").read_text()
