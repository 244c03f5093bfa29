"""``nemo-emmett serve``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nemo_emmett.cli.parameters import (
    COUNT,
    MODEL,
    available_device,
    check_device,
    chunk_seconds_option,
    device_option,
    loading,
    max_new_tokens_option,
    trust_argument,
    trust_option,
    warn,
)
from nemo_emmett.corpora.commands import NumberRange
from nemo_emmett.errors import ConfigError
from nemo_emmett.serving.limits import Limits

KEY_VARIABLE = "NEMO_EMMETT_API_KEY"
"""Environment variable with the key that requests must have; unset or empty: none."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DEFAULTS = Limits()
_POSITIVE = NumberRange(min=0, min_open=True)


def _limit(flag: str, field: str, kind: click.ParamType, text: str, unit: str | None = None) -> Callable:
    """The option of a limit."""
    return click.option(
        flag, field, type=kind, metavar=unit, default=getattr(_DEFAULTS, field), show_default=True, help=text
    )


@click.command(short_help="Serve an exported model over HTTP, with a page at /.")
@click.argument("model", type=MODEL)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; 0.0.0.0: reachable from other machines.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="NUMBER",
    default=8000,
    show_default=True,
    help="0: any that is free.",
)
@click.option(
    "--name",
    help="By which requests name the model.  [default: that of its folder or, if that is model, of the one above]",
)
@click.option("--num-beams", type=COUNT, default=1, show_default=True, help="Beams of the search; 1 is greedy.")
@max_new_tokens_option
@device_option
@_limit("--max-upload-bytes", "upload_bytes", COUNT, "Largest body of a request.")
@_limit("--max-audio-seconds", "audio_seconds", _POSITIVE, "Longest recording.", "SECONDS")
@chunk_seconds_option
@_limit("--max-text-characters", "text_characters", COUNT, "Longest text.")
@_limit("--max-texts", "texts", COUNT, "Most texts of a request.")
@_limit("--max-requests", "requests", COUNT, "Most requests in flight; more get 429.")
@_limit("--timeout", "timeout", _POSITIVE, "Longest time that a request may take.", "SECONDS")
@_limit(
    "--batch-wait-ms",
    "batch_wait_ms",
    NumberRange(min=0),
    "How long a request waits for others, to be translated in one batch.",
    "MILLISECONDS",
)
@_limit("--batch-tokens", "batch_tokens", COUNT, "Most tokens of a batch, padding included.")
@trust_option
def serve(
    model: Path,
    host: str,
    port: int,
    name: str | None,
    num_beams: int,
    max_new_tokens: int | None,
    device: str | None,
    trust_remote_code: bool,
    **limits: Any,
) -> None:
    """Serve an exported model over HTTP: an OpenAI-compatible API, and a page at / for people.

    MODEL is the folder of an exported model. Recordings go to /v1/audio/translations and /v1/audio/transcriptions,
    texts to /v1/translate; /health and /metrics are for operators. The environment variable NEMO_EMMETT_API_KEY, if it
    is set, is the key that requests must have. Ctrl-C or SIGTERM stops the server when the requests in flight are
    answered.
    """
    from nemo_emmett.models.exported import check_exported, model_name

    check_device(device)
    config = check_exported(model)
    _require_extra()
    from nemo_emmett.serving.server import bind

    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"{KEY_VARIABLE}: the key has a space, a line's end or a character that is not ASCII, which clients cannot "
            "send; give another."
        )
    listener = bind(host, port)
    if host not in _LOOPBACK and key is None:
        warn(f"--host: everyone who reaches {host} can use the server; set {KEY_VARIABLE} to a key.")
    with loading("the model"):
        from nemo_emmett.models import load
        from nemo_emmett.serving.app import create_app
        from nemo_emmett.serving.batching import Batcher
        from nemo_emmett.serving.gate import Traffic
        from nemo_emmett.serving.metrics import Metrics
        from nemo_emmett.serving.server import run
        from nemo_emmett.serving.service import Service

        chosen = Limits(**limits)
        loaded = load(model, **trust_argument(trust_remote_code)).to(available_device(device))
    metrics, traffic = Metrics(), Traffic()
    batcher = Batcher(
        loaded,
        wait=chosen.batch_wait_ms / 1000,
        batch_tokens=chosen.batch_tokens,
        options={"num_beams": num_beams, "max_new_tokens": max_new_tokens},
        observe=metrics.batch,
    )
    service = Service(loaded, name or model_name(model), batcher, config, chosen)
    address = f"[{host}]" if ":" in host else host
    place = f"http://{address}:{listener.getsockname()[1]}"
    try:
        app = create_app(service, metrics, traffic, key)
        run(app, traffic, listener, lambda: click.echo(f"Serving {service.name} at {place} (stop with Ctrl-C)"))
    finally:
        service.close(wait=not traffic.is_ending.is_set())
    if not traffic.is_ending.is_set():
        click.echo("Stopped; all requests were answered.")
        return
    click.echo(f"Stopped; {traffic.ended} request(s) in flight were ended.")
    sys.stdout.flush()
    os._exit(1)  # the thread of the model may be at a long batch, which the interpreter would wait for


def _require_extra() -> None:
    from importlib.util import find_spec

    from nemo_emmett.errors import EmmettError, Help

    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        if find_spec(module) is None:
            raise EmmettError(
                f"serve needs '{module}', which is not installed; run: pip install 'nemo_emmett[serve]'",
                page=Help.MISSING_PACKAGE,
            )
