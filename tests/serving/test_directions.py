"""Which languages a request may name."""

from __future__ import annotations

import pytest

from nemo_emmett.serving.directions import Direction, Directions
from nemo_emmett.serving.request_errors import RequestError


def directions(prompt_format: str = "emmett_t5", **trained: list[list[str | None]]) -> Directions:
    return Directions({"prompt_format": prompt_format, "training": {"directions": trained}} if trained else {})


BOTH = {"text": [["en", "de"], ["de", "en"]], "audio": [["en", "de"], ["fr", "en"]]}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("de", None, ("de", "en")),
        ("de", "", ("de", "en")),
        ("deu", "eng", ("de", "en")),
        ("fr", "de", ("fr", "de")),  # both were trained, though not together
        (None, "de", ("en", "de")),  # the only source of German
        (None, "en", (None, "en")),  # one of two
    ],
)
def test_translation(source: str | None, target: str | None, expected: tuple) -> None:
    assert directions(**BOTH).translation("audio", source, target) == Direction(*expected)


@pytest.mark.parametrize(
    ("source", "target", "param", "sentence"),
    [
        (
            "en",
            "es",
            "to_language",
            "to_language: the model does not translate to es (Spanish), but to de (German), en",
        ),
        ("es", "en", "language", "language: the model does not translate from es (Spanish), but from de (German), en"),
        ("en", "en", "to_language", "to_language: en (English) is the language of the input"),
        ("xx", "en", "language", "language: 'xx' is not a known language"),
        ("en", "German", "to_language", "to_language: 'German' is not a known language; did you mean 'de'"),
    ],
)
def test_languages_that_were_not_trained_are_refused(source, target, param: str, sentence: str) -> None:
    with pytest.raises(RequestError) as refused:
        directions(**BOTH).translation("audio", source, target)
    assert str(refused.value).startswith(sentence)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_text_is_not_translated_to_its_own_language_though_speech_may_be_transcribed() -> None:
    trained = directions(audio=[["en", "en"]], text=[["de", "en"]])
    assert trained.translation("audio", "en", "en") == Direction("en", "en")
    with pytest.raises(RequestError, match=r"to_language: en \(English\) is the language of the input; name another"):
        trained.translation("text", "en", "en")


def test_english_is_the_default_but_never_replaced() -> None:
    with pytest.raises(
        RequestError, match=r"does not translate to en \(English\) \(the default\), but to fr \(French\)"
    ):
        directions(text=[["en", "fr"]]).translation("audio", "en", None)


def test_a_source_that_was_not_named_in_training_may_be_any() -> None:
    assert directions(text=[[None, "de"]]).translation("audio", "es", "de") == Direction("es", "de")


def test_a_model_that_does_not_say_what_it_was_trained_on_takes_all() -> None:
    assert directions().translation("audio", "mdw", "es") == Direction("mdw", "es")
    assert directions().transcription("es") == Direction("es", "es")
    with pytest.raises(RequestError, match="language: is missing; name the language that is spoken"):
        directions().transcription(None)


def test_transcription() -> None:
    trained = directions(audio=[["en", "en"], ["en", "de"], ["de", "en"]])
    assert trained.transcription(None) == trained.transcription("en") == Direction("en", "en")
    with pytest.raises(RequestError, match=r"does not transcribe de \(German\); it transcribes en \(English\)"):
        trained.transcription("de")
    with pytest.raises(RequestError, match=r"does not transcribe en \(English\); it was not trained to transcribe"):
        directions(**BOTH).transcription("en")


def test_a_model_of_two_steps_transcribes_on_its_way_to_a_translation() -> None:
    trained = directions("emmett_t5_two_step", audio=[["en", "de"], ["en", "fr"], ["fr", "en"]], text=[["es", "en"]])
    assert trained.transcription("en") == Direction("en", "de", wants_transcript=True)
    with pytest.raises(RequestError, match=r"does not transcribe es \(Spanish\); it transcribes en \(English\), fr"):
        trained.transcription("es")
    assert trained.listing() == {
        "directions": [
            {"source": source, "target": target}
            for source, target in [("en", "de"), ("en", "fr"), ("es", "en"), ("fr", "en")]
        ],
        "languages": {"de": "German", "en": "English", "es": "Spanish", "fr": "French"},
        "gives_transcripts": True,
    }
