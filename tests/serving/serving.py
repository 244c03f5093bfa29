"""What tests of the server share: models that can be held, applications in this process, and recordings as bytes."""

from __future__ import annotations

import io
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import soundfile
from fastapi import FastAPI

from nemo_emmett.errors import DataError
from nemo_emmett.models.inputs import is_recording
from nemo_emmett.prompts.answers import Answer
from nemo_emmett.serving.app import create_app
from nemo_emmett.serving.batching import Batcher
from nemo_emmett.serving.gate import Traffic
from nemo_emmett.serving.limits import Limits
from nemo_emmett.serving.metrics import Metrics
from nemo_emmett.serving.service import Service

RATE = 16000
TRAINED = {"training": {"directions": {"text": [["de", "en"], ["en", "de"]], "audio": [["en", "de"], ["en", "en"]]}}}
"""The config of a model that translates both ways and transcribes English."""


class StubModel:
    """Answers texts in upper case and recordings with their number of samples; text with ``bad`` is at fault.

    While ``go`` is cleared it waits, as a model that computes.
    """

    perception = "some"
    sampling_rate = RATE

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.busy = threading.Event()
        self.batches: list[list[Any]] = []

    def input_lengths(self, inputs, sources, targets) -> list[int]:
        return [len(one.samples) // 100 if is_recording(one) else len(one) for one in inputs]

    def answer_inputs(self, inputs, sources, targets, **options) -> list[Answer]:
        self.batches.append([item if isinstance(item, str) else len(item.samples) for item in inputs])
        self.busy.set()
        self.go.wait()
        if bad := [one for one in inputs if isinstance(one, str) and "bad" in one]:
            raise DataError(f"'{bad[0]}' cannot be translated.")
        if any(one == "crash" for one in inputs):
            raise RuntimeError("a bug")
        return [
            Answer(f"{target}:{item.upper()}" if isinstance(item, str) else f"{target}:{len(item.samples)} samples")
            for item, target in zip(inputs, targets, strict=True)
        ]


class Served(SimpleNamespace):
    """An application with its parts: ``app``, ``model``, ``service``, ``traffic``, ``metrics``."""

    app: FastAPI
    model: Any
    service: Service
    traffic: Traffic
    metrics: Metrics

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60, **options) as client:
            yield client


@contextmanager
def served(
    model: Any, config: dict | None = None, api_key: str | None = None, wait: float = 0.005, **limits: Any
) -> Iterator[Served]:
    """An application on a model, for the length of a block."""
    metrics, traffic, chosen = Metrics(), Traffic(), Limits(**limits)
    batcher = Batcher(model, wait=wait, batch_tokens=chosen.batch_tokens, observe=metrics.batch)
    service = Service(model, "tiny", batcher, TRAINED if config is None else config, chosen)
    app = create_app(service, metrics, traffic, api_key)
    try:
        yield Served(app=app, model=model, service=service, traffic=traffic, metrics=metrics)
    finally:
        if isinstance(model, StubModel):
            model.go.set()
        service.close()


def tone(seconds: float, frequency: float = 440.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A sine tone, (N, C)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat(0.3 * np.sin(2 * np.pi * frequency * time)[:, None], channels, axis=1)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """A file of samples, as bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()
