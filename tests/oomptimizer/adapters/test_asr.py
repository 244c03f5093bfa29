"""NeMo's ASR models: CTC, transducer, Canary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import open_dict

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters import Adapter, Extent, MultiTaskAdapter, TranscriptAdapter, adapter_for
from nemo_emmett.oomptimizer.buckets import Shape

from ..models import tiny_ctc, tiny_multitask, tiny_rnnt, with_trainer
from .steps import CPU, assert_same, fake, is_trained, peak_of_step, whole_and_pieces

SPEECH = Shape("audio", seconds=1.6, input_tokens=0, output_tokens=6)
BUILDERS = {"ctc": tiny_ctc, "rnnt": tiny_rnnt, "multitask": tiny_multitask}


@pytest.fixture(scope="module", params=BUILDERS)
def adapter(request, tmp_path_factory) -> Adapter:
    return adapter_for(with_trainer(BUILDERS[request.param](tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def ctc(tmp_path_factory) -> TranscriptAdapter:
    return adapter_for(with_trainer(tiny_ctc(tmp_path_factory.mktemp("ctc"))))


@pytest.fixture(scope="module")
def multitask(tmp_path_factory) -> MultiTaskAdapter:
    return adapter_for(with_trainer(tiny_multitask(tmp_path_factory.mktemp("multitask"))))


def fields(batch: Any) -> list[torch.Tensor]:
    """Audio, its lengths, tokens, their lengths."""
    if isinstance(batch, tuple):
        return list(batch)
    return [batch.audio, batch.audio_lens, batch.prompted_transcript, batch.prompted_transcript_lens]


def test_a_batch_trains_the_real_model(adapter: Adapter) -> None:
    batch = adapter.synthetic_batch(SPEECH, 3, CPU)
    audio, audio_lens, tokens, token_lens = fields(batch)
    assert audio.shape == (3, 25600)
    assert audio_lens.tolist() == [25600] * 3
    assert tokens.shape == (3, 6)
    assert token_lens.tolist() == [6] * 3
    assert tokens.max() < adapter.model.tokenizer.vocab_size
    assert is_trained(adapter, batch)


def test_extents_give_the_shape_back(adapter: Adapter) -> None:
    batch = adapter.synthetic_batch(Shape("audio", 1.25, 0, 9), 4, CPU)
    assert adapter.extents(batch) == [Extent("audio", 4, 1.25, 0, 9)]


def test_two_groups_are_joined_as_one_batch(adapter: Adapter) -> None:
    parts = [adapter.synthetic_batch(Shape("audio", *lengths), 2, CPU) for lengths in ((1.0, 0, 3), (1.6, 0, 6))]
    joined = adapter.join(parts)
    audio, audio_lens, tokens, token_lens = fields(joined)
    assert audio.shape == (4, 25600)
    assert audio_lens.tolist() == [16000, 16000, 25600, 25600]
    assert not audio[:2, 16000:].any()
    assert tokens.shape == (4, 6)
    assert token_lens.tolist() == [3, 3, 6, 6]
    assert is_trained(adapter, joined)


def ragged(adapter: Adapter) -> Any:
    shapes = [(1.0, 0, 3), (1.6, 0, 9), (1.3, 0, 6)]
    return adapter.join([adapter.synthetic_batch(Shape("audio", *lengths), 2, CPU) for lengths in shapes])


@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_weigh_what_they_weigh_in_the_whole(adapter: Adapter, pieces: int) -> None:
    expected, found, made = whole_and_pieces(adapter, ragged(adapter), pieces)
    assert made == pieces
    assert_same(expected, found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_batch", "mean_volume"])
def test_the_weight_follows_the_reduction_of_ctc(tmp_path, reduction: str) -> None:
    adapter = adapter_for(with_trainer(tiny_ctc(tmp_path, ctc_reduction=reduction)))
    expected, found, _ = whole_and_pieces(adapter, ragged(adapter), 3)
    assert_same(expected, found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_volume"])
def test_the_weight_follows_the_reduction_of_a_transducer(tmp_path, reduction: str) -> None:
    adapter = adapter_for(with_trainer(tiny_rnnt(tmp_path, rnnt_reduction=reduction)))
    expected, found, _ = whole_and_pieces(adapter, ragged(adapter), 3)
    assert_same(expected, found)


def test_a_loss_that_is_left_unreduced_cannot_be_split(ctc: TranscriptAdapter, monkeypatch) -> None:
    assert ctc.can_split
    monkeypatch.setattr(ctc.model.loss, "config_reduction", "none")
    assert not ctc.can_split


def test_a_model_of_characters_needs_no_tokenizer(tmp_path) -> None:
    from nemo.collections.asr.models import EncDecCTCModel
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(tiny_ctc(tmp_path).cfg) | {"labels": list("abc")}
    config["decoder"] |= {"num_classes": 3, "vocabulary": list("abc")}
    del config["tokenizer"], config["target"]
    adapter = adapter_for(with_trainer(EncDecCTCModel(OmegaConf.create(config)).train()))
    batch = adapter.synthetic_batch(SPEECH, 2, CPU)
    assert set(batch[2].flatten().tolist()) <= {0, 1, 2}
    assert is_trained(adapter, batch)
    assert adapter.extents(batch) == [Extent("audio", 2, 1.6, 0, 6)]


def test_text_is_refused(adapter: Adapter) -> None:
    with pytest.raises(ConfigError, match="reads audio, by its oomptimizer_schema, but a group holds text"):
        adapter.synthetic_batch(Shape("text", 0.0, 5, 5), 2, CPU)


def test_the_loss_of_canary_may_leave_the_prompt_out(multitask: MultiTaskAdapter) -> None:
    with open_dict(multitask.model.cfg):
        multitask.model.cfg.use_loss_mask_for_prompt = True
    try:
        batch = ragged(multitask)
        batch.prompt_lens[:] = torch.tensor([1, 2, 3, 4, 5, 0])
        expected, found, _ = whole_and_pieces(multitask, batch, 3)
        # Of 3, 3, 9, 9, 6 and 6 tokens: without those of the prompt, of which the first is never predicted anyway.
        assert multitask._targets(batch) == 2 + 1 + 6 + 5 + 1 + 5
    finally:
        multitask.model.cfg.use_loss_mask_for_prompt = False
    assert_same(expected, found)


def test_canary_computes_its_metrics_on_the_batch(multitask: MultiTaskAdapter, monkeypatch) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr(multitask.model.trainer, "log_every_n_steps", 1)
    monkeypatch.setattr(multitask.model, "log_dict", lambda values, **_: logged.update(values))
    multitask.model.training_step(multitask.synthetic_batch(SPEECH, 2, CPU), 0)
    assert "training_batch_wer" in logged


@pytest.mark.parametrize("family", ["ctc", "multitask"])
@pytest.mark.parametrize("size", [1, 3])
def test_fake_tensors_take_as_many_bytes_as_real_ones(tmp_path, family: str, size: int) -> None:
    adapter = adapter_for(with_trainer(BUILDERS[family](tmp_path, width=32, layers=3)))
    shape = Shape("audio", seconds=2.0, input_tokens=0, output_tokens=11)
    real = peak_of_step(adapter, adapter.synthetic_batch(shape, size, CPU))
    with fake(adapter):
        assert peak_of_step(adapter, adapter.synthetic_batch(shape, size, CPU)) == real
