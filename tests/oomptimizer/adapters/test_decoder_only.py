"""SALM-GPT and BESTOW-GPT: context and answer in one sequence; NeMo's flat batches too."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.models import SALMGPT, BestowGPT
from nemo_emmett.oomptimizer.adapters import Extent, SpeechTextAdapter, adapter_for
from nemo_emmett.oomptimizer.adapters.lengths import PROMPT_TOKENS
from nemo_emmett.oomptimizer.adapters.prompts import ShortestPrompts
from nemo_emmett.oomptimizer.buckets import Contents, Shape
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_turns

from ...models.backbones import model_config
from ...models.batches import prompted_batch, with_recordings
from ..models import with_trainer
from .steps import CPU, assert_same, is_trained, whole_and_pieces

SPEECH = Shape("audio", seconds=1.6, input_tokens=0, output_tokens=6)
SPEECH_AND_PROMPT = Shape("audio", seconds=1.25, input_tokens=7, output_tokens=9)
TEXT = Shape("text", seconds=0.0, input_tokens=9, output_tokens=4)
# NeMo's token-per-example bins: context, speech and answer together take so many positions of 80 ms.
WHOLE_SPEECH = Shape("audio", seconds=4.8, input_tokens=60, output_tokens=60, total=True)
WHOLE_TEXT = Shape("text", seconds=0.0, input_tokens=40, output_tokens=40, total=True)


@pytest.fixture(scope="module", params=[SALMGPT, BestowGPT], ids=lambda kind: kind.__name__)
def adapter(request, tiny_asr, tmp_path_factory) -> SpeechTextAdapter:
    torch.manual_seed(0)
    config = model_config("qwen3", tmp_path_factory.getbasetemp() / "backbones", tiny_asr)
    # Without dropout and with fixed batch norm: an example's loss does not depend on what it is batched with.
    return adapter_for(with_trainer(request.param(config).eval()))


@pytest.mark.parametrize(
    "shapes", [[SPEECH], [SPEECH_AND_PROMPT], [TEXT], [WHOLE_SPEECH], [WHOLE_TEXT], [SPEECH, TEXT]], ids=str
)
def test_batches_train_the_real_model(adapter: SpeechTextAdapter, shapes: list[Shape]) -> None:
    batch = adapter.join([adapter.synthetic_batch(shape, 3, CPU) for shape in shapes])
    assert list(batch) == [shape.modality for shape in shapes]
    of_speech = {
        name for name, _ in adapter.model.named_parameters() if name.startswith(("perception", "cross_attention"))
    }
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad = any(shape.modality == "audio" for shape in shapes) or name not in of_speech
    assert is_trained(adapter, batch)
    adapter.model.requires_grad_(True)


@pytest.mark.parametrize("shape", [SPEECH, TEXT, WHOLE_SPEECH, WHOLE_TEXT], ids=str)
def test_ids_are_those_of_plain_tokens_in_the_embedding_table(adapter: SpeechTextAdapter, shape: Shape) -> None:
    model = adapter.model
    (batch,) = adapter.synthetic_batch(shape, 50, CPU).values()
    is_locator = batch["context_ids"] == model.audio_locator_id
    assert is_locator.sum(1).tolist() == [int(shape.modality == "audio")] * 50
    is_padding = torch.arange(batch["context_ids"].shape[1]) >= batch["context_lens"][:, None]
    assert is_padding.sum() <= 1
    is_answer = torch.arange(batch["answer_ids"].shape[1]) < batch["answer_lens"][:, None]
    ids = torch.cat([batch["context_ids"][~is_locator & ~is_padding], batch["answer_ids"][is_answer]])
    assert not torch.isin(ids, torch.tensor([model.pad_id, model.tokenizer.eos_id, model.audio_locator_id])).any()
    assert ids.max() < model.token_embedding.num_embeddings


def test_the_prompt_with_speech_is_as_long_as_the_format_s_own(adapter: SpeechTextAdapter) -> None:
    model = adapter.model
    formatter = prompt_formatter("emmett_qwen3", model.tokenizer)
    asked = formatter.encode_dialog(translation_turns(formatter, "", "de", "en"))["context_ids"]
    made = adapter.synthetic_batch(SPEECH, 2, CPU)["audio"]
    assert PROMPT_TOKENS < len(asked) <= made["context_ids"].shape[1]


def test_a_bin_of_the_whole_is_filled(adapter: SpeechTextAdapter) -> None:
    prompts = ShortestPrompts(
        prompt_formatter("emmett_qwen3", adapter.model.tokenizer), adapter.model.audio_locator_tag
    )
    text, speech = prompts.of_texts(Contents()), prompts.of_cuts(Contents())
    (found,) = adapter.extents(adapter.synthetic_batch(WHOLE_TEXT, 2, CPU))
    assert found == Extent("text", 2, 0.0, text.context, 40 - text.context)
    # The first example is speech for the most part, the others are answer for the most part.
    batch = adapter.synthetic_batch(WHOLE_SPEECH, 3, CPU)["audio"]
    frames = 60 - speech.total
    assert batch["audio_lens"].tolist() == [frames * 1280, 1280, 1280]
    assert batch["context_lens"].tolist() == [speech.context] * 3
    assert batch["answer_lens"].tolist() == [speech.answer, *[speech.answer + frames - 1] * 2]
    # Where speech is not in the language model's sequence, one example costs what it costs in a batch padded to both.
    (alone,) = adapter.synthetic_batch(WHOLE_SPEECH, 1, CPU).values()
    longest_answer = speech.answer + (frames - 1 if isinstance(adapter.model, BestowGPT) else 0)
    assert (alone["audio_lens"].tolist(), alone["answer_lens"].tolist()) == ([frames * 1280], [longest_answer])


def several_recordings(model) -> dict:
    """Two recordings, one, none and three; answers of different lengths."""
    locator = model.audio_locator_tag
    messages = [f"{locator} {locator}", locator, "one red house", f"{locator} two {locator} {locator}"]
    batch = prompted_batch(model, messages, ["ein rotes haus", "zwei", "drei", "vier alte türen"])
    return with_recordings(model, batch, [0.5, 0.7, 0.6, 0.4, 0.9, 0.5])


def flat(model) -> dict[str, torch.Tensor]:
    """NeMo's batch, padded on the left: two turns with two recordings, text alone, one recording."""
    turns = several_recordings(model)
    rows = [ids[:length].tolist() for ids, length in zip(turns["context_ids"], turns["context_lens"], strict=True)]
    said = [ids[:length].tolist() for ids, length in zip(turns["answer_ids"], turns["answer_lens"], strict=True)]
    # The second row: a turn with an answer that is trained on, then another.
    dialogues = [
        [(rows[0], False), (said[0], True)],
        [(rows[1], False), (said[1], True), (rows[1], False), (said[3], True)],
        [(rows[2], False), (said[2], True)],
        [(rows[1], False), (said[0], True)],
    ]
    width = max(sum(len(ids) for ids, _ in dialogue) for dialogue in dialogues)
    ids_BT = torch.full((len(dialogues), width), model.pad_id)
    mask_BT = torch.zeros(len(dialogues), width, dtype=torch.bool)
    for row, dialogue in enumerate(dialogues):
        ids = [number for part, _ in dialogue for number in part]
        ids_BT[row, -len(ids) :] = torch.tensor(ids)
        mask_BT[row, -len(ids) :] = torch.tensor([is_answer for part, is_answer in dialogue for _ in part])
    audio = with_recordings(model, {}, [0.5, 0.7, 0.6, 0.4, 0.9])
    return {"input_ids": ids_BT, "loss_mask": mask_BT, **audio}


@pytest.mark.parametrize("make", [several_recordings, flat])
@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_weigh_what_they_weigh_in_the_whole(adapter: SpeechTextAdapter, make, pieces: int) -> None:
    assert adapter.can_split
    expected, found, made = whole_and_pieces(adapter, make(adapter.model), pieces)
    assert made == pieces
    assert_same(expected, found)


def test_extents_of_nemo_s_flat_batch_separate_speech_and_text(adapter: SpeechTextAdapter) -> None:
    model = adapter.model
    batch, parts = flat(model), several_recordings(model)
    contexts, answers = parts["context_lens"].tolist(), parts["answer_lens"].tolist()
    # Of speech the longest context is the second row's: two prompts and the answer between them.
    longest = 2 * (contexts[1] - 1) + answers[1]
    assert adapter.extents(batch) == [
        Extent("audio", 3, 1.2, longest, max(answers[0], answers[3])),
        Extent("text", 1, 0.0, contexts[2], answers[2]),
    ]
    pieces = adapter.split_batch(batch, 4)
    assert [extent.modality for piece in pieces for extent in adapter.extents(piece)] == ["audio"] * 2 + [
        "text",
        "audio",
    ]


def test_text_in_nemo_s_flat_form_is_text(adapter: SpeechTextAdapter) -> None:
    batch = {**flat(adapter.model), "audios": torch.empty(0, 0), "audio_lens": torch.empty(0, dtype=torch.long)}
    batch["input_ids"], batch["loss_mask"] = batch["input_ids"][2:3], batch["loss_mask"][2:3]
    (extent,) = adapter.extents(batch)
    assert (extent.modality, extent.examples, extent.seconds) == ("text", 1, 0.0)
