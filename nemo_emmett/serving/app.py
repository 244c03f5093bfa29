"""The addresses of the server, by FastAPI: OpenAI's for recordings, one of ours for texts, and the page's files."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from nemo_emmett import __version__
from nemo_emmett.config import nearest
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.serving.directions import Direction
from nemo_emmett.serving.gate import Gate, Traffic
from nemo_emmett.serving.metrics import Metrics
from nemo_emmett.serving.request_errors import RequestError
from nemo_emmett.serving.service import Part, Service, Spoken

PAGE_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "recorder.js": "text/javascript"}
"""The files of the page, by their addresses, with their types."""

_NOT_SUPPORTED = "is not supported; leave it out"

_SENTENCES = {
    "missing": "is missing",
    "json_invalid": "is not JSON",
    "model_attributes_type": "is no JSON object; send one, with the header Content-Type: application/json",
    "literal_error": "must be {expected}",
}
"""Messages for what pydantic finds, by its name; others have pydantic's own."""


class _AudioForm(BaseModel):
    """Fields that translations and transcriptions have in common."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    model: str | None = None
    language: str | None = None  # of the recording
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Literal["0", "0.0"] = "0"  # the search is greedy, or by beams
    stream: Literal["false", "False"] = "false"


class TranslationForm(_AudioForm):
    """The fields of ``/v1/audio/translations``: OpenAI's, and vLLM's for the languages."""

    to_language: str | None = None


class TranscriptionForm(_AudioForm):
    """The fields of ``/v1/audio/transcriptions``."""


class TextRequest(BaseModel):
    """The JSON of ``/v1/translate``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | Annotated[list[str], Field(min_length=1)]
    target: str | None = None
    source: str | None = None
    model: str | None = None


BODIES: dict[str, type[BaseModel]] = {
    "/v1/audio/translations": TranslationForm,
    "/v1/audio/transcriptions": TranscriptionForm,
    "/v1/translate": TextRequest,
}
"""What is sent to the addresses that take a body."""


def create_app(service: Service, metrics: Metrics, traffic: Traffic, api_key: str | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        service: translates.
        metrics: of the service's batches and of all requests.
        traffic: shared with the server that stops the application.
        api_key: that requests below ``/v1`` must have; None: none.
    """
    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="nemo_emmett", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, traffic=traffic, limits=service.limits, metrics=metrics, api_key=api_key)
    metrics.watch_queue(lambda: service.batcher.num_waiting)
    _add_error_handlers(app)
    _add_page(app)
    started = int(time.time())

    @app.get("/health")
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
        _check_name(name, service.name)
        return model_entry()

    @app.post("/v1/audio/translations")
    async def translations(form: Annotated[TranslationForm, Form(media_type="multipart/form-data")]) -> Response:
        """Translate a recording, to English by default."""
        direction = service.directions.translation("audio", form.language, form.to_language)
        return await answer(form, direction, "translate")

    @app.post("/v1/audio/transcriptions")
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

    @app.post("/v1/translate")
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


def _check_name(name: str | None, served: str) -> None:
    if name not in (None, "", served):
        raise RequestError(
            f"model: '{name}' is not served here; name '{served}', or leave it out.",
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
        return response(_of_pydantic(error.errors(), BODIES[request.url.path].model_fields))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        sentences = {
            404: f"There is no address {request.url.path} here; docs/how-to/serve.md lists them.",
            405: f"{request.url.path} does not take {request.method}; use {(error.headers or {}).get('Allow')}.",
        }
        sentence = sentences.get(error.status_code, f"{str(error.detail).rstrip('.')}.")
        refusal = response(RequestError(sentence, error.status_code))
        refusal.headers.update(error.headers or {})
        return refusal

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return response(RequestError("The server failed at this request; its log says why.", 500, code="server_error"))


def _of_pydantic(errors: Any, fields: Iterable[str]) -> RequestError:
    """The first fault of a body, as one sentence; ``fields``: those that it may have."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "str") and not str(part).startswith("list[")]
    if first["type"] == "json_invalid":
        place = []
    sentence = _SENTENCES.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    if first["type"] == "extra_forbidden":
        suggestion = nearest(place[-1], fields)
        remedy = "leave it out" if suggestion is None else f"did you mean '{suggestion}'?"
        sentence = f"is no field of this request; {remedy}"
    if place and place[0] in ("temperature", "stream", "prompt"):
        sentence = _NOT_SUPPORTED
    key = ".".join(place)
    message = f"{key}: {sentence}" if key else f"The body {sentence}"
    return RequestError(message if message.endswith("?") else f"{message}.", param=key or None)
