"""Our own models: a batch for each modality."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import ModelError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.adapters import Extent, SpeechTextAdapter, adapter_for
from nemo_emmett.oomptimizer.adapters.lengths import PROMPT_TOKENS
from nemo_emmett.oomptimizer.buckets import Contents, Shape

from ..models import with_trainer
from .steps import CPU, assert_same, fake, is_trained, peak_of_step, whole_and_pieces

SPEECH = Shape("audio", seconds=1.6, input_tokens=0, output_tokens=6)
TEXT = Shape("text", seconds=0.0, input_tokens=9, output_tokens=4)


@pytest.fixture
def adapter(salm_t5_config) -> SpeechTextAdapter:
    torch.manual_seed(0)
    # Without dropout and with fixed batch norm: an example's loss does not depend on what it is batched with.
    return adapter_for(with_trainer(SALMT5(salm_t5_config).eval()))


@pytest.mark.parametrize("shapes", [[SPEECH], [TEXT], [SPEECH, TEXT]])
def test_batches_train_the_real_model(adapter: SpeechTextAdapter, shapes: list[Shape]) -> None:
    batch = adapter.join([adapter.synthetic_batch(shape, 3, CPU) for shape in shapes])
    assert list(batch) == [shape.modality for shape in shapes]
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad = shapes != [TEXT] or not name.startswith("perception")
    assert is_trained(adapter, batch)


def test_each_context_of_speech_is_the_prompt_and_one_locator(adapter: SpeechTextAdapter) -> None:
    batch = adapter.synthetic_batch(SPEECH, 3, CPU)["audio"]
    model, ids = adapter.model, batch["context_ids"]
    assert ids.shape == (3, PROMPT_TOKENS + 1)
    assert (ids == model.audio_locator_id).sum(1).tolist() == [1, 1, 1]
    assert batch["audios"].shape == (3, 25600)
    assert batch["audio_lens"].tolist() == [25600] * 3
    # Padding, without which attention would need no mask: on the right, in one row of several.
    assert batch["context_lens"].tolist() == [PROMPT_TOKENS, PROMPT_TOKENS + 1, PROMPT_TOKENS + 1]
    assert ids[0, -1] == model.pad_id
    assert batch["answer_lens"].tolist() == [6, 6, 6]
    for tokens in (ids[:, :-1], batch["answer_ids"]):
        assert not torch.isin(tokens, torch.tensor([model.pad_id, model.tokenizer.eos_id])).any()


def test_extents_give_the_shape_back(adapter: SpeechTextAdapter) -> None:
    speech = Shape("audio", seconds=1.25, input_tokens=7, output_tokens=9)
    batch = adapter.join([adapter.synthetic_batch(TEXT, 2, CPU), adapter.synthetic_batch(speech, 3, CPU)])
    assert adapter.extents(batch) == [Extent("audio", 3, 1.25, 7, 9), Extent("text", 2, 0.0, 9, 4)]
    assert adapter.extents(batch["text"]) == [Extent("text", 2, 0.0, 9, 4)]
    assert adapter.extents({}) == []


def test_a_bin_of_the_whole_is_filled_by_either_side(adapter: SpeechTextAdapter) -> None:
    """A batch is padded to its longest context and to its longest answer, which may be those of different examples."""
    text = adapter.synthetic_batch(Shape("text", 0.0, 20, 20, total=True), 3, CPU)["text"]
    lens = text["context_lens"], text["answer_lens"]
    assert (lens[0] + lens[1]).tolist() == [20, 20, 20]
    shortest = adapter._prompts.of_texts(Contents())
    assert lens[0].tolist() == [20 - shortest.answer, *[shortest.context] * 2]
    speech = adapter.synthetic_batch(Shape("audio", 2.4, 30, 30, total=True), 3, CPU)["audio"]
    assert (speech["audio_lens"] // 1280 + speech["context_lens"] + speech["answer_lens"]).tolist() == [30, 30, 30]
    shortest = adapter._prompts.of_cuts(Contents())
    assert speech["audio_lens"].tolist() == [(30 - shortest.total) * 1280, 1280, 1280]
    assert adapter.extents(adapter.synthetic_batch(Shape("audio", 2.4, 30, 30, total=True), 1, CPU)) == [
        Extent("audio", 1, (30 - shortest.total) * 0.08, shortest.context - 1, 30 - shortest.context - 1)
    ]


@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_weigh_what_they_weigh_in_the_whole(adapter: SpeechTextAdapter, pieces: int) -> None:
    assert adapter.can_split
    batch = adapter.join([adapter.synthetic_batch(SPEECH, 3, CPU), adapter.synthetic_batch(TEXT, 4, CPU)])
    batch["text"]["answer_lens"][1] = 2
    expected, found, made = whole_and_pieces(adapter, batch, pieces)
    assert made == pieces
    assert_same(expected, found)


def test_speech_is_refused_by_a_model_that_reads_text(salm_t5_config) -> None:
    del salm_t5_config["perception"], salm_t5_config["pretrained_asr"]
    adapter = adapter_for(SALMT5(salm_t5_config))
    with pytest.raises(ModelError, match="reads text only"):
        adapter.synthetic_batch(SPEECH, 2, CPU)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("seconds", [1.23, 2.0])  # after 2.0 s the encoder's output is a frame longer than its length
def test_fake_tensors_take_as_many_bytes_as_real_ones(adapter: SpeechTextAdapter, size: int, seconds: float) -> None:
    def batch() -> dict:
        speech = adapter.synthetic_batch(Shape("audio", seconds, 0, 40), size, CPU)
        return adapter.join([speech, adapter.synthetic_batch(TEXT, size, CPU)])

    real = peak_of_step(adapter, batch())
    with fake(adapter):
        assert peak_of_step(adapter, batch()) == real
