"""Models with two-step answers give translations; transcripts come with them on request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_emmett.errors import ConfigError
from nemo_emmett.evaluation.translation import translate
from nemo_emmett.models import SALMGPT
from nemo_emmett.models.generation import Generation
from nemo_emmett.prompts.answers import Answer

from .batches import padded
from .memorising import built, items

SAID = ["one red house\nein haus", "two blue cars"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_asr) -> SALMGPT:
    return built(SALMGPT, "qwen2", tmp_path_factory.mktemp("qwen2"), tiny_asr, prompt_format="emmett_qwen_two_step")


@pytest.fixture
def says(model, monkeypatch):
    """Have the model generate these texts."""

    def say(*texts: str) -> None:
        end = model.tokenizer.token_to_id("<|im_end|>")
        ids, _ = padded([[*model.tokenizer.text_to_ids(text), end] for text in texts], model.pad_id)
        monkeypatch.setattr(Generation, "_generate_answers", lambda *_: ids)

    return say


def test_speech_is_read_in_two_steps_and_text_in_one(model, says) -> None:
    says(*SAID)
    batch = items(model, ("audio", "text"))
    whole = " ".join(SAID[0].split())
    assert model.answer_batch(batch["audio"]) == [Answer("ein haus", "one red house"), Answer(SAID[1], None, True)]
    assert model.translate_batch(batch["audio"]) == ["ein haus", SAID[1]]
    assert [" ".join(answer.translation.split()) for answer in model.answer_batch(batch["text"])] == [whole, SAID[1]]
    batch["audio"]["examples"] = [{"source_lang": "de", "target_lang": "de"}] * 2
    assert not any(answer.is_malformed or answer.transcript for answer in model.answer_batch(batch["audio"]))


def test_translate_gives_translations_alone_and_says_how_many_are_not(model, says, tmp_path, monkeypatch) -> None:
    from ..conftest import write_tone

    paths: list[Path] = [write_tone(tmp_path / f"{name}.wav", 0.5) for name in "ab"]
    warned = []
    monkeypatch.setattr("nemo_emmett.models.generation.logging.warning", warned.append)
    says(*SAID)
    assert model.translate(paths, "en", "de") == ["ein haus", SAID[1]]
    said = "1 of 2 answers to recordings are not a transcript and a translation: they are returned whole."
    assert warned[-1] == said
    says("one red house\nein haus", "two\nzwei")
    warned.clear()
    assert model.translate(paths, "en", "de") == ["ein haus", "zwei"]
    assert said not in warned


def test_an_evaluation_keeps_both_steps(model, says) -> None:
    says(*SAID)
    batch = items(model, ("audio",))
    for example in batch["audio"]["examples"]:
        example |= {"id": "1", "source_text": "one red house", "audio_path": None, "audio_start": None}
    found = translate(model, {"test": [batch]}, progress=False).translations
    assert [(one.hypothesis, one.transcript, one.is_malformed) for one in found] == [
        ("ein haus", "one red house", False),
        (SAID[1], None, True),
    ]


def test_distillation_from_transcripts_is_refused(tmp_path, tiny_asr) -> None:
    options = {"prompt_format": "emmett_qwen_two_step", "objectives": {"distillation": {}}}
    with pytest.raises(ConfigError, match=r"^model.objectives.distillation: its teacher .*; use emmett_qwen,"):
        built(SALMGPT, "qwen2", tmp_path, tiny_asr, **options)


def test_the_format_is_a_part_of_an_exported_model(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "export")
    assert SALMGPT.from_pretrained(tmp_path / "export").data_defaults["prompt_format"] == "emmett_qwen_two_step"
    assert torch.isfinite(model.training_step(items(model, ("audio",)), 0)["loss"])
