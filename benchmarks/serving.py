"""How many requests does ``nemo-emmett serve`` answer, and how long do clients wait?

Requests per second and percentiles of the latency with 16 clients, and with one that waits for each answer before it
asks again, on the same server in turn, so that a busy machine slows both alike. Server and clients share the cores. The
model is a SALM-T5 of random weights, whose answers all have the same length, or an exported one.

    python benchmarks/serving.py [--model FOLDER --to fr] [--clients 16] [--requests 64] [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from measuring import keep
from measuring.models import WORDS, build_salm_t5
from rich.console import Console
from rich.table import Table

PACKAGES = ("nemo_emmett", "torch", "transformers", "fastapi", "uvicorn")
KINDS = ("text", "speech", "text and speech")
NEW_TOKENS = 24
SEED = 0

Send = Callable[[httpx.AsyncClient], Any]
"""Sends one request."""


def write_model(folder: Path) -> Path:
    """An exported SALM-T5 of random weights: width 256, three layers of encoder and decoder, four of FastConformer."""
    exported = folder / "exported"
    build_salm_t5(folder / "t5", width=256, layers=3, encoder_layers=4).save_pretrained(str(exported))
    return exported


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


def requests_of(kind: str, number: int, target: str) -> list[Send]:
    """Requests for texts of 5 to 20 words, and for recordings of 1 to 5 seconds; the same at each call."""
    drawn, noise = random.Random(SEED), np.random.default_rng(SEED)

    def text() -> Send:
        body = {"text": " ".join(drawn.choices(WORDS.split(), k=drawn.randint(5, 20))), "target": target}
        return lambda client: client.post("/v1/translate", json=body)

    def speech() -> Send:
        file = io.BytesIO()
        soundfile.write(file, 0.1 * noise.standard_normal(round(16000 * drawn.uniform(1, 5))), 16000, format="WAV")
        audio, fields = file.getvalue(), {"to_language": target}
        return lambda client: client.post("/v1/audio/translations", data=fields, files={"file": audio})

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


def measure(url: str, target: str, clients: int, number: int, rounds: int) -> list[dict[str, Any]]:
    """Each kind of request, with one client and with many in turn."""
    rows = []
    for kind in KINDS:
        sent = requests_of(kind, number, target)
        asyncio.run(drive(url, sent[: 2 * clients], clients))  # the first requests are slower
        runs: dict[int, list[tuple[float, list[float]]]] = {1: [], clients: []}
        for _ in range(rounds):
            for at_once, taken in runs.items():
                taken.append(asyncio.run(drive(url, sent, at_once)))
        for at_once, taken in runs.items():
            latencies = np.concatenate([of_run for _, of_run in taken]) * 1000
            rows.append(
                {
                    "server": "nemo-emmett serve",
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
    parser.add_argument("--model", type=Path, help="an exported model; by default one of random weights")
    parser.add_argument("--to", default="de", help="language to translate to")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of each kind and round")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or write_model(Path(folder))
        with serving(model, [] if arguments.model else ["--max-new-tokens", str(NEW_TOKENS)]) as url:
            rows = measure(url, arguments.to, arguments.clients, arguments.requests, arguments.rounds)
    table = Table("", "clients", "requests / s", "p50 ms", "p95 ms", "p99 ms", "times one", title="Serving")
    for row in rows:
        latencies = (f"{value:.0f}" for value in row["latency_ms"].values())
        times = str(row.get("times_one_at_a_time", ""))
        table.add_row(row["requests"], str(row["clients"]), f"{row['requests_per_second']:.1f}", *latencies, times)
    Console().print(table)
    settings = {"model": "exported" if arguments.model else "random weights", "requests": arguments.requests}
    keep("serving", settings | {"rounds": arguments.rounds, "measurements": rows}, PACKAGES)


if __name__ == "__main__":
    main()
