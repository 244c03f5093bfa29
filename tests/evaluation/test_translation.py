"""Batches become translations in order, with the speed of the model alone."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import ModelError
from nemo_emmett.evaluation import translation as module
from nemo_emmett.evaluation.translation import merge_ranks, translate


class Words:
    """A tokenizer of which every use takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def text_to_ids(self, text: str) -> list[int]:
        self.clock.now += 1.0
        return [0 for _ in text.split()]


class Shouter:
    """Translates by shouting, one second per batch on the clock of the tests."""

    device = torch.device("cpu")
    pad_id = 0
    sampling_rate = 100

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokenizer = Words(clock)
        self.calls = []

    def translate_batch(self, batch, num_beams=1, max_new_tokens=None):
        assert torch.is_inference_mode_enabled()
        self.clock.now += 1.0
        self.calls.append((num_beams, max_new_tokens))
        return [example["source_text"].upper() for example in batch["examples"]]


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def example(text: str, modality: str = "text") -> dict:
    return {
        "id": f"id-{text}",
        "modality": modality,
        "source_lang": "en",
        "target_lang": "de",
        "source_text": text,
        "target_text": text.upper(),
        "audio_path": f"{text}.wav" if modality == "audio" else None,
        "audio_start": 0.0 if modality == "audio" else None,
    }


def text_batch(*texts: str) -> dict:
    ids = torch.ones(len(texts), 4, dtype=torch.int64)
    return {"context_ids": ids, "context_lens": ids.sum(1), "examples": [example(text) for text in texts]}


def speech_batch(*texts: str, samples: list[int]) -> dict:
    return {
        **text_batch(*texts),
        "audios": torch.zeros(len(samples), max(samples)),
        "audio_lens": torch.tensor(samples),
        "examples": [example(text, "audio") for text in texts],
    }


def test_every_example_of_every_test_set_is_translated_in_order(clock):
    test_sets = {
        "news": [{"text": text_batch("a", "b")}, {}, {"text": text_batch("c")}],
        "talks": [{"audio": speech_batch("d", "e", samples=[100, 250]), "text": text_batch("f")}],
    }
    translated = translate(Shouter(clock), test_sets, progress=False)

    translations, throughput = translated.translations, translated.throughput
    assert [(one.test_set, one.id, one.modality, one.hypothesis) for one in translations] == [
        ("news", "id-a", "text", "A"),
        ("news", "id-b", "text", "B"),
        ("news", "id-c", "text", "C"),
        ("talks", "id-d", "audio", "D"),
        ("talks", "id-e", "audio", "E"),
        ("talks", "id-f", "text", "F"),
    ]
    assert [one.duration for one in translations] == [None, None, None, 1.0, 2.5, None]
    assert [one.audio_path for one in translations[3:]] == ["d.wav", "e.wav", None]
    assert translations[0].reference == "A"
    text, speech = throughput["text"], throughput["audio"]
    assert (text.seconds, text.sentences, text.audio_seconds) == (3.0, 4, None)
    assert (speech.seconds, speech.sentences, speech.audio_seconds) == (1.0, 2, 3.5)
    assert [len(batch) for batch in translated.batches["news"]] == [2, 0, 1]


def test_the_time_of_loading_is_not_the_models(clock):
    def slow_loader():
        for text in "ab":
            clock.now += 100.0
            yield {"text": text_batch(text)}

    throughput = translate(Shouter(clock), {"news": slow_loader()}, progress=False).throughput
    assert throughput["text"].seconds == 2.0


def test_tokens_of_the_translations_are_counted_outside_the_clock(clock):
    throughput = translate(Shouter(clock), {"news": [{"text": text_batch("a b c", "d")}]}, progress=False).throughput
    assert (throughput["text"].tokens, throughput["text"].seconds) == (4, 1.0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_batches_dealt_out_come_together_in_order(clock, ranks):
    batches = {
        "news": [{"text": text_batch(*texts)} if texts else {} for texts in ("ab", "", "c", "de")],
        "talks": [{"audio": speech_batch("f", samples=[100])}],
    }
    parts = [
        translate(Shouter(clock), {name: of_set[rank::ranks] for name, of_set in batches.items()}, progress=False)
        for rank in range(ranks)
    ]
    together = merge_ranks(parts)
    alone = translate(Shouter(clock), batches, progress=False)
    assert together.batches == alone.batches
    assert together.throughput["audio"] == alone.throughput["audio"]
    text = together.throughput["text"]
    assert (text.sentences, text.tokens) == (5, 5)
    assert text.seconds == max(part.throughput["text"].seconds for part in parts if "text" in part.throughput)


def test_examples_with_several_recordings_count_in_full_but_have_no_duration_of_their_own(clock):
    batch = speech_batch("a", samples=[100, 300])
    translated = translate(Shouter(clock), {"talks": [{"audio": batch}]}, progress=False)
    assert translated.translations[0].duration is None
    assert translated.throughput["audio"].audio_seconds == 4.0


def test_decoding_options_reach_the_model(clock):
    model = Shouter(clock)
    translate(model, {"news": [{"text": text_batch("a")}]}, num_beams=4, max_new_tokens=7, progress=False)
    assert model.calls == [(4, 7)]


def test_a_model_that_loses_translations_is_refused(clock):
    model = Shouter(clock)
    model.translate_batch = lambda batch, **options: ["one"]
    with pytest.raises(ModelError, match="returned 1 translations for a batch of 2 examples"):
        translate(model, {"news": [{"text": text_batch("a", "b")}]}, progress=False)
