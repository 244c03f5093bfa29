"""How many requests does ``nemo-emmett serve`` answer, and how long do clients wait?

Requests per second and percentiles of the latency with 16 clients, and with one that waits for each answer before it
asks again, on the same server in turn, so that a busy machine slows both alike. Server and clients share the cores. The
models are a SALM-T5 and a SALM-GPT of random weights, whose answers all have the same length, or an exported one. With
the interpreter of an environment that has vLLM (docs/how-to/serve_vllm.md), vLLM serves the same SALM-GPT.

    python benchmarks/serving.py [--vllm .venv-vllm/bin/python] [--clients 16] [--requests 64] [--rounds 2]
    python benchmarks/serving.py --model FOLDER --to fr
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from measuring import keep
from measuring.models import WORDS, build_salm_t5, model_section, write_llama
from rich.console import Console
from rich.table import Table

from nemo_emmett.prompts.languages import language_name

PACKAGES = ("nemo_emmett", "torch", "transformers", "fastapi", "uvicorn")
KINDS = ("text", "speech", "text and speech")
NEW_TOKENS = 24
SEED = 0
SERVED_NAME = "bench"

Send = Callable[[httpx.AsyncClient], Any]
"""Sends one request."""


@dataclass(frozen=True)
class Api:
    """How a server is asked.

    Args:
        text: text and target language -> a request.
        speech: a WAV file and target language -> a request.
    """

    text: Callable[[str, str], Send]
    speech: Callable[[bytes, str], Send]


def _ours() -> Api:
    return Api(
        lambda text, target: lambda c: c.post("/v1/translate", json={"text": text, "target": target}),
        lambda audio, target: (
            lambda c: c.post("/v1/audio/translations", data={"to_language": target}, files={"file": audio})
        ),
    )


def _vllms() -> Api:
    def text(text: str, target: str) -> Send:
        message = {"role": "user", "content": f"Translate from English to {language_name(target)}: {text}"}
        body = {"model": SERVED_NAME, "messages": [message], "max_tokens": NEW_TOKENS}
        return lambda client: client.post("/v1/chat/completions", json=body)

    def speech(audio: bytes, target: str) -> Send:
        languages = {"language": "en", "to_language": target}
        fields = {"model": SERVED_NAME, "max_completion_tokens": str(NEW_TOKENS), **languages}
        return lambda client: client.post("/v1/audio/translations", data=fields, files={"file": ("a.wav", audio)})

    return Api(text, speech)


def write_salm_t5(folder: Path) -> Path:
    """An exported SALM-T5 of random weights: width 256, three layers of encoder and decoder, four of FastConformer."""
    exported = folder / "salm_t5"
    build_salm_t5(folder / "t5", width=256, layers=3, encoder_layers=4).save_pretrained(str(exported))
    return exported


def write_salm_gpt(folder: Path) -> Path:
    """An exported SALM-GPT of random weights: width 256, six layers, and four of FastConformer."""
    from nemo_emmett.models import SALMGPT

    write_llama(folder / "llama", width=256, layers=6, vocab_size=512)
    section = model_section(folder / "llama", "emmett_llama2", width=256, encoder_layers=4)
    SALMGPT(section).save_pretrained(str(folder / "salm_gpt"))
    return folder / "salm_gpt"


@contextmanager
def serving_with_vllm(python: Path, model: Path) -> Iterator[str]:
    """The address of vLLM in a process of its own; its first start takes minutes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"model": model, "served-model-name": SERVED_NAME, "dtype": "float32", "max-model-len": 256}
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Requests are repeated: what vLLM remembers of a prompt or a recording would answer most of them.
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ})
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended with exit code {process.returncode}.")
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serving(model: Path, options: list[str]) -> Iterator[str]:
    """The address of ``nemo-emmett serve`` in a process of its own."""
    command = [sys.executable, "-c", "from nemo_emmett.cli import main; main()", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        yield next(found[1] for line in lines if (found := re.search(r"at (http://\S+)", line)))
    finally:
        process.terminate()
        process.wait()


def requests_of(api: Api, kind: str, number: int, target: str) -> list[Send]:
    """Requests for texts of 5 to 20 words, and for recordings of 1 to 5 seconds; the same at each call."""
    drawn, noise = random.Random(SEED), np.random.default_rng(SEED)

    def text() -> Send:
        return api.text(" ".join(drawn.choices(WORDS.split(), k=drawn.randint(5, 20))), target)

    def speech() -> Send:
        file = io.BytesIO()
        soundfile.write(file, 0.1 * noise.standard_normal(round(16000 * drawn.uniform(1, 5))), 16000, format="WAV")
        return api.speech(file.getvalue(), target)

    makers = {"text": [text], "speech": [speech], "text and speech": [text, speech]}[kind]
    return [makers[i % len(makers)]() for i in range(number)]


async def drive(url: str, requests: list[Send], clients: int) -> tuple[float, list[float]]:
    """Seconds until all requests are answered, and those of each."""
    waiting, latencies = list(requests), []

    async def client_of(client: httpx.AsyncClient) -> None:
        while waiting:
            send, started = waiting.pop(), time.perf_counter()
            (await send(client)).raise_for_status()
            latencies.append(time.perf_counter() - started)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        started = time.perf_counter()
        await asyncio.gather(*(client_of(client) for _ in range(clients)))
        return time.perf_counter() - started, latencies


def measure(server: str, url: str, api: Api, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each kind of request, with one client and with many in turn."""
    clients, number, rounds = arguments.clients, arguments.requests, arguments.rounds
    rows = []
    for kind in KINDS:
        sent = requests_of(api, kind, number, arguments.to)
        asyncio.run(drive(url, sent[: 2 * clients], clients))  # the first requests are slower
        runs: dict[int, list[tuple[float, list[float]]]] = {1: [], clients: []}
        for _ in range(rounds):
            for at_once, taken in runs.items():
                taken.append(asyncio.run(drive(url, sent, at_once)))
        for at_once, taken in runs.items():
            latencies = np.concatenate([of_run for _, of_run in taken]) * 1000
            rows.append(
                {
                    "server": server,
                    "requests": kind,
                    "clients": at_once,
                    "requests_per_second": round(number * rounds / sum(seconds for seconds, _ in taken), 2),
                    "latency_ms": {f"p{p}": round(float(np.percentile(latencies, p)), 1) for p in (50, 95, 99)},
                }
            )
        one, many = rows[-2:]
        many["times_one_at_a_time"] = round(many["requests_per_second"] / one["requests_per_second"], 2)
    return rows


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an exported model; by default two of random weights")
    parser.add_argument("--vllm", type=Path, help="interpreter of an environment with vLLM")
    parser.add_argument("--to", default="de", help="language to translate to")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of each kind and round")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model:
            servers = {"serve, exported model": (serving(arguments.model, []), _ours())}
        else:
            t5, gpt = write_salm_t5(Path(folder)), write_salm_gpt(Path(folder))
            length = ["--max-new-tokens", str(NEW_TOKENS)]
            servers = {
                "serve, SALM-T5": (serving(t5, length), _ours()),
                "serve, SALM-GPT": (serving(gpt, length), _ours()),
            }
            if arguments.vllm:
                servers["vLLM, SALM-GPT"] = serving_with_vllm(arguments.vllm, gpt), _vllms()
        rows = []
        for name, (starting, api) in servers.items():
            with starting as url:
                rows += measure(name, url, api, arguments)
    columns = ("clients", "requests / s", "p50 ms", "p95 ms", "p99 ms", "times one")
    table = Table("server", "requests", *columns, title="Serving")
    for row in rows:
        latencies = (f"{value:.0f}" for value in row["latency_ms"].values())
        times = str(row.get("times_one_at_a_time", ""))
        table.add_row(
            row["server"], row["requests"], str(row["clients"]), f"{row['requests_per_second']:.1f}", *latencies, times
        )
    Console().print(table)
    settings = {"model": "exported" if arguments.model else "random weights", "requests": arguments.requests}
    keep("serving", settings | {"rounds": arguments.rounds, "measurements": rows}, PACKAGES)


if __name__ == "__main__":
    main()
