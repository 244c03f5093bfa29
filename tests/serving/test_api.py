"""What the API answers: OpenAI's formats, the languages, chunks of long recordings, metrics."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest

from nemo_emmett.prompts.answers import Answer

from .serving import RATE, TRAINED, StubModel, encoded, served, tone

TRANSLATIONS, TRANSCRIPTIONS = "/v1/audio/translations", "/v1/audio/transcriptions"


def answers_of(
    *requests: tuple[str, dict], model: StubModel | None = None, config: dict | None = None, **limits
) -> list:
    """The responses to POST requests, in turn."""

    async def main() -> list:
        with served(model or StubModel(), config, **limits) as server:
            async with server.client() as client:
                return [await client.post(path, **arguments) for path, arguments in requests]

    return asyncio.run(main())


def form(seconds: float = 0.5, **fields: str) -> dict:
    return {"files": {"file": ("a.wav", encoded(tone(seconds)))}, "data": fields}


def test_formats_of_a_translation() -> None:
    asked = {"language": "en", "to_language": "de", "model": "tiny", "temperature": "0"}
    plain, text, verbose = answers_of(
        *((TRANSLATIONS, form(**asked, response_format=kind)) for kind in ("json", "text", "verbose_json"))
    )
    assert plain.json() == {"text": "de:8000 samples"}
    assert text.text == "de:8000 samples"
    assert text.headers["content-type"].startswith("text/plain")
    assert verbose.json() == {
        "task": "translate",
        "language": "german",
        "duration": 0.5,
        "text": "de:8000 samples",
        "segments": [{"id": 0, "start": 0.0, "end": 0.5, "text": "de:8000 samples"}],
        "source": "en",
        "target": "de",
        "transcript": None,
    }


def test_a_translation_is_to_english_and_a_transcription_to_its_own_language() -> None:
    english, transcript = answers_of((TRANSLATIONS, form()), (TRANSCRIPTIONS, form(response_format="verbose_json")))
    assert english.json() == {"text": "en:8000 samples"}
    assert transcript.json() == {
        "task": "transcribe",
        "language": "english",
        "duration": 0.5,
        "text": "en:8000 samples",
        "segments": [{"id": 0, "start": 0.0, "end": 0.5, "text": "en:8000 samples"}],
    }


class TwoSteps(StubModel):
    def answer_inputs(self, inputs, sources, targets, **options) -> list[Answer]:
        return [
            Answer(f"{target} of {len(item.samples)}", f"{source} of {len(item.samples)}")
            for item, source, target in zip(inputs, sources, targets, strict=True)
        ]


TWO_STEPS = {"prompt_format": "emmett_t5_two_step", "training": {"directions": {"audio": [["en", "de"]]}}}


def test_a_model_of_two_steps_gives_transcript_and_translation() -> None:
    translated, transcribed = answers_of(
        (TRANSLATIONS, form(to_language="de", response_format="verbose_json")),
        (TRANSCRIPTIONS, form()),
        model=TwoSteps(),
        config=TWO_STEPS,
    )
    assert translated.json()["text"] == "de of 8000"
    assert translated.json()["transcript"] == "en of 8000"
    assert translated.json()["segments"] == [
        {"id": 0, "start": 0.0, "end": 0.5, "text": "de of 8000", "transcript": "en of 8000"}
    ]
    assert transcribed.json() == {"text": "en of 8000"}


def test_a_long_recording_is_translated_in_chunks_that_are_cut_where_it_is_quiet() -> None:
    quiet = np.zeros(RATE // 4)
    samples = np.concatenate([tone(1.5)[:, 0], quiet, tone(1.2)[:, 0], quiet, tone(1.0)[:, 0]])
    (response,) = answers_of(
        (
            TRANSLATIONS,
            {"files": {"file": encoded(samples)}, "data": {"to_language": "de", "response_format": "verbose_json"}},
        ),
        chunk_seconds=2.0,
    )
    body = response.json()
    assert body["duration"] == pytest.approx(4.2)
    first, second, third = body["segments"]
    assert (first["start"], third["end"]) == (0.0, 4.2)
    assert 1.5 <= first["end"] == second["start"] <= 1.75
    assert 2.95 <= second["end"] == third["start"] <= 3.2
    assert body["text"] == " ".join(segment["text"] for segment in body["segments"])
    assert first["text"] == f"de:{round(first['end'] * RATE)} samples"


def test_chunks_are_as_long_as_the_recordings_of_the_training() -> None:
    asked = form(3.0, to_language="de", response_format="verbose_json")
    config = {"training": TRAINED["training"] | {"max_duration": 2.0}}
    limited, whole = answers_of((TRANSLATIONS, asked), config=config) + answers_of((TRANSLATIONS, asked))
    assert max(part["end"] - part["start"] for part in limited.json()["segments"]) <= 2.0
    assert len(whole.json()["segments"]) == 1


def test_texts() -> None:
    one, several, empty = answers_of(
        ("/v1/translate", {"json": {"text": "six", "target": "de", "source": "en"}}),
        ("/v1/translate", {"json": {"text": ["six", " ", "two.wav"], "target": "de", "model": "tiny"}}),
        ("/v1/translate", {"json": {"text": ""}}),
    )
    assert one.json() == {"model": "tiny", "source": "en", "target": "de", "translations": ["de:SIX"]}
    assert several.json()["translations"] == ["de:SIX", "", "de:TWO.WAV"]  # a text, not the name of a file
    assert empty.json()["translations"] == [""]


def test_a_misspelt_field_is_told_which_was_meant() -> None:
    misspelt, foreign, form_field = answers_of(
        ("/v1/translate", {"json": {"text": "six", "targt": "de"}}),
        ("/v1/translate", {"json": {"text": "six", "seed": 1}}),
        (TRANSLATIONS, form(to_langage="de")),
    )
    messages = [response.json()["error"]["message"] for response in (misspelt, foreign, form_field)]
    assert messages == [
        "targt: is no field of this request; did you mean 'target'?",
        "seed: is no field of this request; leave it out.",
        "to_langage: is no field of this request; did you mean 'to_language'?",
    ]
    assert {response.status_code for response in (misspelt, foreign, form_field)} == {400}


def test_a_body_without_its_type_is_told_which_to_send() -> None:
    texts = json.dumps({"text": "six", "target": "de"})
    untyped, listed = answers_of(
        ("/v1/translate", {"content": texts, "headers": {"Content-Type": "text/plain"}}),
        ("/v1/translate", {"json": ["six"]}),
    )
    sentence = "The body is no JSON object; send one, with the header Content-Type: application/json."
    assert [response.json()["error"]["message"] for response in (untyped, listed)] == [sentence, sentence]
    assert (untyped.status_code, listed.status_code) == (400, 400)


def refusals(*requests: tuple[str, dict[str, Any]], status: int = 400) -> list[str]:
    """The messages of requests that are refused, each in less than a second."""
    messages = []
    for request in requests:
        started = time.monotonic()
        (response,) = answers_of(request)
        assert time.monotonic() - started < 1.0
        assert response.status_code == status, response.text
        messages.append(response.json()["error"]["message"])
    return messages


def test_a_large_body_with_many_faults_is_refused_as_fast_as_one_fault_is_found() -> None:
    numbers = b'{"text":[' + b",".join([b"1"] * 1_000_000) + b"]}"
    keys = b"{" + b",".join(b'"k%d":1' % n for n in range(300_000)) + b"}"
    kind = {"Content-Type": "application/json"}
    assert refusals(
        ("/v1/translate", {"content": numbers, "headers": kind}), ("/v1/translate", {"content": keys, "headers": kind})
    ) == ["text.0: must be a text.", "k0: is no field of this request; leave it out."]


def test_what_a_client_sends_is_shown_short_and_can_always_be_sent_back() -> None:
    surrogate = {"content": b'{"text":"a","target":"\\ud800"}', "headers": {"Content-Type": "application/json"}}
    long = "x" * 900_000
    assert refusals(
        ("/v1/translate", surrogate),
        ("/v1/translate", {"json": {"text": "a", "target": long}}),
        ("/v1/translate", {"json": {"text": "a", long: 1}}),
        (TRANSLATIONS, form(response_format=long)),
    ) == [
        "target: holds half of a surrogate pair, which is no character.",
        "target: is longer than the 100 characters that it may have.",
        f"{'x' * 100}...: is no field of this request; leave it out.",
        f"response_format: must be 'json', 'text' or 'verbose_json', not '{'x' * 100}...'.",
    ]
    (missing,) = refusals((f"/{'x' * 900}", {}), status=404)
    assert len(missing) < 200


def test_each_fault_has_its_own_sentence() -> None:
    whole = encoded(tone(0.1))
    assert refusals(
        ("/v1/translate", {"json": {"text": []}}),
        ("/v1/translate", {"json": {"text": ["a", None]}}),
        ("/v1/translate", {"json": {"text": 5}}),
        ("/v1/translate", {"content": "ü".encode("latin-1"), "headers": {"Content-Type": "application/json"}}),
        (TRANSLATIONS, {"json": {"file": "a.wav"}}),
        (TRANSLATIONS, {"data": {"file": "a.wav"}, "files": {"other": whole}}),
        (TRANSLATIONS, {"files": {"file": whole, "to_language": ("a", b"de")}}),
        (TRANSLATIONS, {"files": [("file", whole), ("file", whole)]}),
        (TRANSLATIONS, {"content": b"--x--", "headers": {"Content-Type": "multipart/form-data"}}),
        (TRANSLATIONS, form(**{"timestamp_granularities[]": "word"})),
    ) == [
        "text: is an empty list; send one text at least.",
        "text.1: must be a text.",
        "text: must be a text.",
        "The body cannot be read; send JSON in UTF-8.",
        "The body is no form; send multipart/form-data with the recording as `file`.",
        "other: is no field of this request; leave it out.",
        "to_language: must be a text.",
        "file: is given 2 times; send it once.",
        "The body cannot be read; send a form of the type multipart/form-data, with its boundary.",
        "timestamp_granularities[].0: must be 'segment', not 'word'.",
    ]


def test_what_openais_client_sends_beyond_need_is_taken() -> None:
    segments, of_region = answers_of(
        (TRANSLATIONS, form(response_format="verbose_json", **{"timestamp_granularities[]": "segment"})),
        (TRANSLATIONS, form(language="en-US", to_language="de-AT")),
    )
    assert segments.json()["segments"]
    assert of_region.json()["text"].startswith("de:")


def test_addresses_are_taken_as_they_are() -> None:
    async def main() -> list[int]:
        with served(StubModel()) as server:
            async with server.client() as client:
                head = await client.head("/health")
                others = [await client.get("/v1/models/"), await client.post("/v1/translate/", json={"text": "a"})]
                return [head.status_code, *(response.status_code for response in others)]

    assert asyncio.run(main()) == [200, 404, 404]


def test_a_full_disk_is_no_fault_of_the_client(monkeypatch, caplog) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.write", full)
    (response,) = answers_of((TRANSLATIONS, form(to_language="de")))
    assert response.status_code == 507
    assert response.json()["error"]["type"] == "server_error"
    assert "No space left on device" in caplog.text


def test_a_text_of_more_tokens_than_a_batch_is_refused() -> None:
    (response,) = answers_of(("/v1/translate", {"json": {"text": ["a", "b" * 4500], "target": "de"}}))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "a text has 4,500 tokens, more than the 4,096 of a batch; send its sentences."
    )


def test_one_bad_text_of_a_request_fails_it_and_no_other_request() -> None:
    async def main() -> None:
        with served(StubModel(), wait=0.1) as server:
            async with server.client() as client:
                good, bad = await asyncio.gather(
                    client.post("/v1/translate", json={"text": "good", "target": "de"}),
                    client.post("/v1/translate", json={"text": ["fine", "bad"], "target": "de"}),
                )
                assert good.json()["translations"] == ["de:GOOD"]
                assert bad.status_code == 400
                assert bad.json()["error"]["message"] == "'bad' cannot be translated."

    asyncio.run(main())


def test_a_model_that_reads_text_only_says_so() -> None:
    model = StubModel()
    model.perception = None
    (refused,) = answers_of((TRANSLATIONS, form(to_language="de")), model=model)
    assert refused.status_code == 400
    message = "file: this model reads text only; send texts to /v1/translate."
    assert refused.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": "file",
        "code": None,
    }


def test_the_model_is_listed_with_its_languages_and_limits() -> None:
    async def main() -> None:
        with served(StubModel(), texts=7) as server:
            async with server.client() as client:
                listed = (await client.get("/v1/models")).json()
                assert listed["object"] == "list"
                (entry,) = listed["data"]
                assert (entry["id"], entry["object"], entry["reads_speech"]) == ("tiny", "model", True)
                assert {"source": "de", "target": "en"} in entry["directions"]
                assert entry["languages"] == {"de": "German", "en": "English"}
                assert entry["limits"]["texts"] == 7
                assert (await client.get("/v1/models/tiny")).json() == entry
                assert "/v1/audio/translations" in (await client.get("/openapi.json")).json()["paths"]

    asyncio.run(main())


def test_metrics_count_requests_batches_and_what_was_translated() -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                await client.post("/v1/translate", json={"text": ["one", "two"], "target": "de"})
                await client.post(TRANSLATIONS, **form(to_language="de"))
                await client.post(TRANSLATIONS, **form(to_language="xx"))
                for path in ("/made/up/1", "/made/up/2"):
                    await client.get(path)
                response = await client.get("/metrics")
                assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
                lines = response.text.splitlines()
        for line in (
            'nemo_emmett_requests_total{path="/v1/translate",status="200"} 1.0',
            'nemo_emmett_requests_total{path="/v1/audio/translations",status="200"} 1.0',
            'nemo_emmett_requests_total{path="/v1/audio/translations",status="400"} 1.0',
            'nemo_emmett_requests_total{path="other",status="404"} 2.0',  # no series for each path that somebody tries
            'nemo_emmett_batch_inputs_sum{modality="text"} 2.0',
            'nemo_emmett_batch_inputs_count{modality="audio"} 1.0',
            "nemo_emmett_audio_seconds_total 0.5",
            "nemo_emmett_text_characters_total 6.0",
            "nemo_emmett_requests_in_flight 0.0",
            "nemo_emmett_inputs_waiting 0.0",
        ):
            assert line in lines

    asyncio.run(main())
