"""From records to examples: languages, targets, conversations."""

from __future__ import annotations

import pytest
from lhotse import MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind, Examples, SourceDefaults


def cut(text: str | None = "one two", lang: str | None = None, **custom) -> MonoCut:
    supervision = SupervisionSegment("c", "r", 0, 1.0, text=text, language=lang)
    recording = dummy_recording(0)
    return MonoCut("c", 0, 1.0, 0, supervisions=[supervision], recording=recording, custom={"lang": lang, **custom})


def made(records, kind: ExampleKind = ExampleKind.TRANSLATION, **defaults) -> tuple[list, SkippedRecords]:
    skipped = SkippedRecords()
    examples = Examples(records, kind, SourceDefaults(name="m.json", **defaults), skipped)
    return list(examples), skipped


def summary(examples) -> list[tuple]:
    return [(e.custom["source_lang"], e.custom["target_lang"], e.supervisions[0].text) for e in examples]


TRANSLATIONS = {"de": "eins zwei", "fr": "un deux"}


@pytest.mark.parametrize(
    ("defaults", "custom", "expected"),
    [
        ({}, {}, [("en", "de", "eins zwei"), ("en", "fr", "un deux")]),
        ({"target_lang": "fr"}, {}, [("en", "fr", "un deux")]),
        ({"target_lang": ["fr", "en"]}, {}, [("en", "fr", "un deux"), ("en", "en", "one two")]),
        ({"target_lang": "fr"}, {"target_lang": "de"}, [("en", "de", "eins zwei")]),
    ],
)
def test_a_transcript_with_translations(defaults, custom, expected) -> None:
    record = cut(lang="en", translations=TRANSLATIONS, **custom)
    examples, skipped = made([record], **defaults)
    assert summary(examples) == expected
    assert len({e.id for e in examples}) == len(examples)
    assert all(e.source_text == "one two" for e in examples)
    assert skipped.count() == 0
    assert record.supervisions[0].text == "one two", "the record itself must not change: it is read again"


def test_canary_convention() -> None:
    examples, _ = made([cut("eins zwei", source_lang="en", target_lang="de")])
    assert summary(examples) == [("en", "de", "eins zwei")]
    assert examples[0].supervisions[0].language == "de"
    assert summary(made([cut("eins zwei")], source_lang="en", target_lang="de")[0]) == [("en", "de", "eins zwei")]


def test_the_locator_tag_goes_with_the_cut() -> None:
    (example,), _ = made([cut(target_lang="de")], audio_locator_tag="<|audio|>")
    assert example.audio_locator_tag == "<|audio|>"


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (cut(), "no target language"),
        (cut(target_lang="xx"), "unknown language 'xx'"),
        (cut("  ", target_lang="de"), "empty text"),
        (cut(None, target_lang="de"), "empty text"),
        (cut(target_lang=["de", "fr"]), "several target languages, but no translations"),
        (cut(translations=TRANSLATIONS, target_lang="es"), "no translation to 'es'"),
        (cut(translations="eins"), "translations is not a mapping"),
        (cut(translations={"de": 1}), "text is not a string"),
    ],
)
def test_records_that_make_no_example(record, cause) -> None:
    record.manifest_origin, record.manifest_place = "speech.json", "line 3"
    examples, skipped = made([record])
    assert examples == []
    assert [str(r) for r in skipped.first] == [f"speech.json, line 3: {cause}"]


def test_a_mixed_cut_carries_the_languages_on_its_first_recording() -> None:
    mixed = cut("eins", target_lang="de").pad(2.0)
    (example,), _ = made([mixed], source_lang="en", audio_locator_tag="<|audio|>")
    assert (example.source_lang, example.target_lang, example.audio_locator_tag) == ("en", "de", "<|audio|>")
    assert example.supervisions[0].text == "eins"
    assert example.duration == 2.0


def turns(conversation) -> list[tuple]:
    return [(t.role, getattr(t, "value", None) or t.audio_locator_tag) for t in conversation.turns]


def test_conversations_for_salm() -> None:
    pair = SourceTargetTextExample(TextExample("one", "en"), TextExample("eins", "de"), custom={"id": "a:1"})
    speech = cut("eins", source_lang="en", target_lang="de")
    options = {"kind": ExampleKind.CONVERSATION, "audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.08}
    (text, audio), _ = made([pair, speech], **options)
    assert turns(text) == [("user", "Translate from English to German:"), ("user", "one"), ("assistant", "eins")]
    assert turns(audio) == [("user", "Translate from English to German:"), ("user", "<|audio|>"), ("assistant", "eins")]
    assert (text.id, audio.id, audio.token_equivalent_duration) == ("a:1", "c", 0.08)


def test_the_instruction_of_a_source_is_kept_and_needs_no_language() -> None:
    options = {"kind": ExampleKind.CONVERSATION, "audio_locator_tag": "<|audio|>", "context": "Answer:"}
    (audio,), _ = made([cut("eins")], system_prompt="Be brief.", **options)
    expected = [("system", "Be brief."), ("user", "Answer:"), ("user", "<|audio|>"), ("assistant", "eins")]
    assert turns(audio) == expected


def test_transcription_is_not_called_translation() -> None:
    options = {"kind": ExampleKind.CONVERSATION, "audio_locator_tag": "<|audio|>"}
    (audio,), _ = made([cut("one", source_lang="en", target_lang="en")], **options)
    assert turns(audio)[0] == ("user", "Transcribe in English:")


@pytest.mark.parametrize(
    ("record", "defaults", "expected"),
    [
        # A manifest's codes and a recipe's are of different standards.
        (cut(lang="eng", translations={"deu": "eins zwei"}), {"target_lang": "de"}, [("en", "de", "eins zwei")]),
        (cut(lang="en", translations={"fra": "un deux"}), {"target_lang": "fr"}, [("en", "fr", "un deux")]),
        (cut(lang="mdw", translations={"fr": "un deux"}), {"target_lang": "fra_Latn"}, [("mdw", "fr", "un deux")]),
        (cut(lang="deu_Latn", translations={"en": "x"}), {"target_lang": ["ger"]}, [("de", "de", "one two")]),
        (cut("eins zwei", source_lang="eng_Latn", target_lang="deu"), {}, [("en", "de", "eins zwei")]),
        (cut("eins zwei"), {"source_lang": "eng", "target_lang": "ger"}, [("en", "de", "eins zwei")]),
        (cut(lang="eng", translations={"deu": "eins", "fre": "un"}), {}, [("en", "de", "eins"), ("en", "fr", "un")]),
        (cut(lang="en", translations={"deu": "eins", "de": "eins"}), {}, [("en", "de", "eins")]),
    ],
)
def test_a_language_is_the_same_by_any_of_its_codes(record, defaults, expected) -> None:
    examples, skipped = made([record], **defaults)
    assert summary(examples) == expected
    assert [e.supervisions[0].language for e in examples] == [target for _, target, _ in expected]
    assert skipped.count() == 0


def test_translations_that_differ_under_two_codes_of_a_language_are_no_example() -> None:
    examples, skipped = made([cut(lang="en", translations={"de": "eins", "deu": "zwei"})], target_lang="de")
    assert (examples, skipped.causes()) == ([], {"two translations to 'de'": 1})


def test_a_pair_and_a_conversation_have_languages_in_one_form() -> None:
    pair = SourceTargetTextExample(
        TextExample("one", "eng"), TextExample("eins", "deu_Latn"), custom={"id": "1", "target_lang": "ger"}
    )
    (example,), _ = made([pair], source_lang="fr")
    assert (example.source.language, example.target.language) == ("en", "de")
    assert (example.custom["source_lang"], example.custom["target_lang"]) == ("en", "de")
    speech, _ = made([cut("eins", target_lang="deu")], ExampleKind.CONVERSATION)
    assert speech[0].turns[0].value == "Translate to German:"
    text, _ = made([TextExample("one", custom={"target_lang": "deu"})], source_lang="en")
    assert text[0].custom == {"source_lang": "en", "target_lang": "de"}
