"""The addresses of the server, by FastAPI: OpenAI's for recordings, one of ours for texts, and the page's files."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from nemo_emmett import __version__
from nemo_emmett.config import nearest
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.serving.directions import Direction
from nemo_emmett.serving.gate import Gate, Traffic
from nemo_emmett.serving.metrics import Metrics
from nemo_emmett.serving.request_errors import MOST_SHOWN, RequestError, shown
from nemo_emmett.serving.service import Part, Service, Spoken

PAGE_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "recorder.js": "text/javascript"}
"""The files of the page, by their addresses, with their types."""

TEXTS = "/v1/translate"
"""The address that takes JSON; the others take forms."""

logger = logging.getLogger(__name__)

_UNREADABLE = "There was an error parsing the body"
"""FastAPI's words where a parser fails; the exception's cause is the parser's."""

_NOT_SUPPORTED = "is not supported; leave it out"

_SENTENCES = {
    "missing": "is missing",
    "json_invalid": "is not JSON",
    "unknown_field": "is no field of this request; {remedy}",
    "value_error": "is no file; send the recording as a file of the form",  # of starlette's upload
    "string_type": "must be a text",
    "string_unicode": "holds half of a surrogate pair, which is no character",
    "string_too_long": "is longer than the {max_length} characters that it may have",
    "too_short": "is an empty list; send one text at least",
    "model_attributes_type": "is no JSON object; send one, with the header Content-Type: application/json",
    "literal_error": "must be {expected}, not '{given}'",
}
"""Messages for what pydantic finds, by its name; others have pydantic's own."""


Name = Annotated[str, Field(max_length=MOST_SHOWN)]


class _Body(BaseModel):
    """Of all bodies: an unknown field ends the reading, of which pydantic would note every one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_no_unknown_field(cls, content: Any) -> Any:
        if isinstance(content, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in content:
                if key not in known:
                    suggestion = nearest(shown(key), known)
                    remedy = "leave it out" if suggestion is None else f"did you mean '{suggestion}'?"
                    what = f"'{shown(key)}'" if not str(key).strip() else shown(key)
                    raise PydanticCustomError("unknown_field", "unknown", {"field": what, "remedy": remedy})
        return content


class _AudioForm(_Body):
    """Fields that translations and transcriptions have in common."""

    file: UploadFile
    model: Name | None = None
    language: Name | None = None  # of the recording
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Literal["0", "0.0"] = "0"  # the search is greedy, or by beams
    stream: Literal["false", "False"] = "false"
    granularities: list[Literal["segment"]] = Field([], alias="timestamp_granularities[]")  # as verbose_json has them


class TranslationForm(_AudioForm):
    """The fields of ``/v1/audio/translations``: OpenAI's, and vLLM's for the languages."""

    to_language: Name | None = None


class TranscriptionForm(_AudioForm):
    """The fields of ``/v1/audio/transcriptions``."""


class TextRequest(_Body):
    """The JSON of ``/v1/translate``."""

    model_config = ConfigDict(strict=True)

    text: str | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    target: Name | None = None
    source: Name | None = None
    model: Name | None = None


def create_app(service: Service, metrics: Metrics, traffic: Traffic, api_key: str | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        service: translates.
        metrics: of the service's batches and of all requests.
        traffic: shared with the server that stops the application.
        api_key: that requests below ``/v1`` must have; None: none.
    """
    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="nemo_emmett", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, traffic=traffic, limits=service.limits, metrics=metrics, api_key=api_key)
    metrics.watch_queue(lambda: service.batcher.num_waiting)
    _add_error_handlers(app)
    _add_page(app)
    started = int(time.time())

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        """Whether the server takes requests."""
        if traffic.is_stopping or not service.batcher.is_alive:
            return JSONResponse({"status": "stopping" if traffic.is_stopping else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_entry() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": started,
            "owned_by": "nemo_emmett",
            "reads_speech": service.reads_speech,
            **service.directions.listing(),
            "limits": {
                "upload_bytes": service.limits.upload_bytes,
                "audio_seconds": service.limits.audio_seconds,
                "text_characters": service.limits.text_characters,
                "texts": service.limits.texts,
            },
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model, with the languages that it was trained on."""
        return {"object": "list", "data": [model_entry()]}

    @app.get("/v1/models/{name:path}")
    async def model_of(name: str) -> dict[str, Any]:
        """The model by its name."""
        _check_name(name or "/", service.name)
        return model_entry()

    @app.post("/v1/audio/translations", dependencies=[Depends(_each_field_once)])
    async def translations(form: Annotated[TranslationForm, Form(media_type="multipart/form-data")]) -> Response:
        """Translate a recording, to English by default."""
        direction = service.directions.translation("audio", form.language, form.to_language)
        return await answer(form, direction, "translate")

    @app.post("/v1/audio/transcriptions", dependencies=[Depends(_each_field_once)])
    async def transcriptions(form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")]) -> Response:
        """Transcribe a recording."""
        return await answer(form, service.directions.transcription(form.language), "transcribe")

    async def answer(form: _AudioForm, direction: Direction, task: str) -> Response:
        _check_name(form.model, service.name)
        spoken = await service.translate_recording(await form.file.read(), direction)
        metrics.audio_seconds.inc(spoken.seconds)
        if form.response_format == "text":
            return PlainTextResponse(spoken.text)
        if form.response_format == "json":
            return JSONResponse({"text": spoken.text})
        return JSONResponse(_verbose(spoken, direction, task))

    @app.post(TEXTS)
    async def translate(request: TextRequest) -> dict[str, Any]:
        """Translate a text, or a list of texts."""
        _check_name(request.model, service.name)
        texts = [request.text] if isinstance(request.text, str) else request.text
        if len(texts) > service.limits.texts:
            raise RequestError(
                f"text: has {len(texts)} texts, more than the {service.limits.texts} that are allowed; send them in "
                "several requests.",
                param="text",
                code="too_many_texts",
            )
        direction = service.directions.translation("text", request.source, request.target, "source", "target")
        found = await service.translate_texts(texts, direction)
        metrics.characters.inc(sum(map(len, texts)))
        return {
            "model": service.name,
            "source": direction.source,
            "target": direction.target,
            "translations": found,
        }

    return app


async def _each_field_once(request: Request) -> None:
    """Refuse a form of which a field would be taken, and another of the same name be lost."""
    names = [name for name, _ in (await request.form()).multi_items() if not name.endswith("[]")]
    for name, count in Counter(names).items():
        if count > 1:
            raise RequestError(f"{shown(name)}: is given {count} times; send it once.", param=shown(name))


def _check_name(name: str | None, served: str) -> None:
    if name not in (None, "", served):
        raise RequestError(
            f"model: '{shown(name)}' is not served here; name '{served}', or leave it out.",
            404,
            param="model",
            code="model_not_found",
        )


def _verbose(spoken: Spoken, direction: Direction, task: str) -> dict[str, Any]:
    """OpenAI's ``verbose_json``, with the transcript where there is one."""
    language = direction.source if direction.wants_transcript else direction.target
    result: dict[str, Any] = {
        "task": task,
        "language": language_name(language or "").lower(),
        "duration": round(spoken.seconds, 3),
        "text": spoken.text,
        "segments": [_segment(number, part) for number, part in enumerate(spoken.parts)],
    }
    if task == "translate":
        result |= {"source": direction.source, "target": direction.target, "transcript": spoken.transcript}
    return result


def _segment(number: int, part: Part) -> dict[str, Any]:
    segment = {"id": number, "start": round(part.start, 3), "end": round(part.end, 3), "text": part.text}
    return segment if part.transcript is None else segment | {"transcript": part.transcript}


def _add_page(app: FastAPI) -> None:
    folder = files("nemo_emmett.serving") / "page"

    def file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
        content = (folder / (name or "index.html")).read_bytes()

        async def send() -> Response:
            return Response(content, media_type=media_type)

        return send

    for name, media_type in PAGE_FILES.items():
        app.get(f"/{name}", include_in_schema=False)(file(name, media_type))


def _add_error_handlers(app: FastAPI) -> None:
    def response(error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        is_form = request.url.path != TEXTS
        if is_form and not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return response(RequestError("The body is no form; send multipart/form-data with the recording as `file`."))
        return response(_of_pydantic(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, OSError):  # as the body was read: no room for it
            logger.error("A request could not be kept while it came: %s", error.__cause__)
            return response(RequestError("The server has no room for the request; its log says why.", 507))
        path = shown(request.url.path)
        sentences = {
            404: f"There is no address {path} here; docs/how-to/serve.md lists them.",
            405: f"{path} does not take {request.method}; use {(error.headers or {}).get('Allow')}.",
        }
        if error.detail == _UNREADABLE or (error.status_code == 400 and "multipart" in str(error.detail)):
            what = "JSON in UTF-8" if path == TEXTS else "a form of the type multipart/form-data, with its boundary"
            sentences[400] = f"The body cannot be read; send {what}."
        sentence = sentences.get(error.status_code, f"{str(error.detail).rstrip('.')}.")
        code = "too_large" if error.status_code == 413 else None
        refusal = response(RequestError(sentence, error.status_code, code=code))
        refusal.headers.update(error.headers or {})
        return refusal

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return response(RequestError("The server failed at this request; its log says why.", 500, code="server_error"))


def _of_pydantic(errors: Sequence[Any]) -> RequestError:
    """The first fault of a body, as one sentence; of a list of texts, that of its first wrong text."""
    first = errors[0]
    if isinstance(first["input"], list):
        first = errors[-1]
    place = [str(part) for part in first["loc"] if part not in ("body", "str") and not str(part).startswith("list[")]
    context = {**first.get("ctx", {}), "given": shown(first["input"])}
    if first["type"] == "unknown_field":
        place = [context["field"]]
    if first["type"] == "json_invalid":
        place = []
    sentence = _SENTENCES.get(first["type"], first["msg"]).format(**context)
    if place and place[0] in ("temperature", "stream", "prompt"):
        sentence = _NOT_SUPPORTED
    key = ".".join(place)
    message = f"{key}: {sentence}" if key else f"The body {sentence}"
    return RequestError(message if message.endswith("?") else f"{message}.", param=key or None)
