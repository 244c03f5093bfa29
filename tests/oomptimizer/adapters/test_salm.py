"""NeMo's SALM: where its locators are, how its rows are joined and split."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters import Extent, SALMAdapter, adapter_for
from nemo_emmett.oomptimizer.adapters.lengths import PROMPT_TOKENS
from nemo_emmett.oomptimizer.buckets import Shape

from ..models import tiny_salm, with_trainer
from .steps import CPU, assert_same, fake, is_trained, loss_of, peak_of_step, whole_and_pieces

SPEECH = Shape("audio", seconds=1.6, input_tokens=0, output_tokens=6)
TEXT = Shape("text", seconds=0.0, input_tokens=5, output_tokens=4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> SALMAdapter:
    return adapter_for(with_trainer(tiny_salm(tmp_path_factory.mktemp("salm"))))


def test_a_batch_of_speech_trains_the_real_model(adapter: SALMAdapter) -> None:
    batch = adapter.synthetic_batch(SPEECH, 3, CPU)
    assert batch["audios"].shape == (3, 25600)
    assert batch["audio_lens"].tolist() == [25600] * 3
    assert is_trained(adapter, batch)


def test_each_row_has_one_locator_an_answer_and_no_other_special_token(adapter: SALMAdapter) -> None:
    batch = adapter.synthetic_batch(SPEECH, 3, CPU)
    ids, is_answer = batch["input_ids"], batch["loss_mask"]
    locator, tokenizer = adapter.model.audio_locator_tag_id, adapter.model.tokenizer
    assert (ids == locator).sum(1).tolist() == [1, 1, 1]
    assert is_answer.dtype == torch.bool
    assert is_answer.sum(1).tolist() == [6, 6, 6]
    assert is_answer[:, -6:].all()
    assert not (is_answer & (ids == locator)).any()
    others = ids[(ids != locator)][1:]  # the first is the padding of the first row
    assert not torch.isin(others, torch.tensor([tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id])).any()
    assert others.max() < adapter.model.text_vocab_size
    # Padding, without which attention would need no mask: on the left, in one row of several.
    assert (ids == tokenizer.pad_id).sum().item() == 1
    assert ids[0, 0] == tokenizer.pad_id
    assert not (adapter.synthetic_batch(SPEECH, 1, CPU)["input_ids"] == tokenizer.pad_id).any()


def test_the_sequence_is_prompt_speech_and_answer(adapter: SALMAdapter) -> None:
    inputs = adapter.model.prepare_inputs(adapter.synthetic_batch(SPEECH, 2, CPU))
    # 1.6 s in frames of 0.08 s, and the last token is not an input.
    assert inputs["input_embeds"].shape[1] == PROMPT_TOKENS + 20 + 6 - 1
    assert (inputs["target_ids"] != -100).sum(1).tolist() == [6, 6]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a_bin_of_the_whole_sequence_bounds_the_whole_sequence(adapter: SALMAdapter, modality: str) -> None:
    seconds = 2.4 if modality == "audio" else 0.0
    shape = Shape(modality, seconds, input_tokens=30, output_tokens=30, total=True)
    others = [adapter.synthetic_batch(SPEECH, 1, CPU)] if modality == "text" else []
    batch = adapter.synthetic_batch(shape, 2, CPU)
    (found,) = [extent for extent in adapter.extents(adapter.join([*others, batch])) if extent.modality == modality]
    positions = found.seconds / 0.08 + found.input_tokens + found.output_tokens
    if modality == "text":
        assert positions == len(batch["input_ids"][0]) == 30
    else:
        assert positions == pytest.approx(30)
        assert adapter.model.prepare_inputs(batch)["input_embeds"].shape[1] == 30 - 1


def test_extents_give_the_shape_back(adapter: SALMAdapter) -> None:
    shape = Shape("audio", seconds=1.25, input_tokens=7, output_tokens=9)
    batch = adapter.synthetic_batch(shape, 4, CPU)
    assert adapter.extents(batch) == [Extent("audio", 4, 1.25, 7, 9)]
    joined = adapter.join([adapter.synthetic_batch(TEXT, 3, CPU), batch])
    assert adapter.extents(joined) == [Extent("audio", 4, 1.25, 7, 9), Extent("text", 3, 0.0, 5, 4)]


def test_join_pads_on_the_left_as_the_dataset_does_and_trains(adapter: SALMAdapter) -> None:
    from nemo.collections.speechlm2.data.salm_dataset import left_collate_vectors

    parts = [adapter.synthetic_batch(SPEECH, 2, CPU), adapter.synthetic_batch(TEXT, 2, CPU)]
    joined = adapter.join(parts)
    rows = [row for part in parts for row in part["input_ids"]]
    assert torch.equal(joined["input_ids"], left_collate_vectors(rows, adapter.model.text_pad_id))
    assert joined["loss_mask"].sum(1).tolist() == [6, 6, 4, 4]
    assert is_trained(adapter, joined)


def test_text_alone_is_refused(adapter: SALMAdapter) -> None:
    adapter.check_alone("audio")
    with pytest.raises(ConfigError, match="SALM cannot train on a batch of text alone; train nemo_emmett's SALMGPT"):
        adapter.check_alone("text")
    with pytest.raises(ConfigError, match="text alone"):
        adapter.join([adapter.synthetic_batch(TEXT, 2, CPU)])


def ragged(adapter: SALMAdapter) -> dict:
    """Rows of different lengths, of speech, of text, and one of two recordings."""
    shapes = [Shape("audio", 1.0, 4, 3), TEXT, Shape("audio", 1.6, 6, 8), Shape("text", 0.0, 2, 1)]
    batch = adapter.join([adapter.synthetic_batch(shape, 2, CPU) for shape in shapes])
    free = (batch["input_ids"][4] != adapter.model.audio_locator_tag_id).nonzero()[3]
    batch["input_ids"][4, free] = adapter.model.audio_locator_tag_id
    batch["audios"] = torch.cat([batch["audios"][:3], batch["audios"][:1], batch["audios"][3:]])
    batch["audio_lens"] = torch.cat([batch["audio_lens"][:3], batch["audio_lens"][:1], batch["audio_lens"][3:]])
    return batch | {"conversations": list("abcdefgh")}


@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_weigh_what_they_weigh_in_the_whole(adapter: SALMAdapter, pieces: int) -> None:
    expected, found, made = whole_and_pieces(adapter, ragged(adapter), pieces)
    assert made == pieces
    assert_same(expected, found)


def test_recordings_stay_with_their_rows_and_every_piece_has_one(adapter: SALMAdapter) -> None:
    batch = ragged(adapter)
    parts = adapter.split_batch(batch, 100)
    assert len(parts) == 4  # as many as rows with speech
    assert sorted(name for part in parts for name in part["conversations"]) == list("abcdefgh")
    for part in parts:
        locators = (part["input_ids"] == adapter.model.audio_locator_tag_id).sum()
        assert len(part["audios"]) == len(part["audio_lens"]) == locators >= 1
    (of_two,) = [part for part in parts if "e" in part["conversations"]]
    assert of_two["audio_lens"].tolist() == [25600, 16000]


def test_an_answer_of_padding_has_no_weight(adapter: SALMAdapter) -> None:
    batch = adapter.synthetic_batch(SPEECH, 2, CPU)
    batch["input_ids"][1, -6:] = adapter.model.text_pad_id
    first, second = adapter.split_batch(batch, 2)
    assert adapter.loss_weight(first, batch) == 1.0
    assert adapter.loss_weight(second, batch) == 0.0
    assert loss_of(adapter.model, second).isnan()  # which is why such a piece is to be left out


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("seconds", [1.23, 2.0])  # after 2.0 s the encoder's output is a frame longer than its length
def test_fake_tensors_take_as_many_bytes_as_real_ones(tmp_path, size: int, seconds: float) -> None:
    adapter = adapter_for(with_trainer(tiny_salm(tmp_path, width=32, layers=3)))
    speech = Shape("audio", seconds, input_tokens=0, output_tokens=9)

    def batches() -> list[dict]:
        alone = adapter.synthetic_batch(speech, size, CPU)
        return [alone, adapter.join([alone, adapter.synthetic_batch(TEXT, 2, CPU)])]

    real = [peak_of_step(adapter, batch) for batch in batches()]
    with fake(adapter):
        assert [peak_of_step(adapter, batch) for batch in batches()] == real
