"""Many clients at once: no answer is lost, and each is the one that the same input gets offline."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from .serving import encoded, served, tone

WORDS = (
    "one",
    "two",
    "three",
    "four",
    "six",
    "red",
    "blue",
    "green",
    "old",
    "new",
    "big",
    "house",
    "cars",
    "keys",
    "dogs",
)


def texts(generator: random.Random, number: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(number)]


def recordings(generator: random.Random, number: int) -> list[bytes]:
    kinds = ({"kind": "WAV"}, {"kind": "FLAC"}, {"kind": "WAV", "subtype": "FLOAT"})
    made = []
    for _ in range(number):
        rate, channels = generator.choice([8000, 16000, 48000]), generator.choice([1, 2])
        samples = tone(generator.uniform(0.2, 1.2), generator.uniform(80, 3000), rate, channels)
        made.append(encoded(samples * generator.uniform(0.05, 1), rate, **generator.choice(kinds)))
    return made


@pytest.mark.parametrize(("kind", "number"), [("SALMT5", 500), ("SALMGPT", 60), ("BestowGPT", 60)])
def test_each_answer_is_that_of_the_same_input_offline(tiny_model, tmp_path: Path, kind: str, number: int) -> None:
    model, generator = tiny_model(kind), random.Random(0)
    asked: list[tuple[str | bytes, str]] = [
        (item, generator.choice(["de", "en"]))
        for item in [*texts(generator, number - number // 4), *recordings(generator, number // 4)]
    ]
    generator.shuffle(asked)
    inputs = []
    for i, (item, _) in enumerate(asked):
        if isinstance(item, bytes):
            (tmp_path / f"{i}.wav").write_bytes(item)
        inputs.append(item if isinstance(item, str) else tmp_path / f"{i}.wav")
    expected = model.translate(inputs, None, [target for _, target in asked])
    assert len(set(expected)) > number // 5, "answers that are all alike would not show a mix-up"

    async def main() -> dict[int, str]:
        answers: dict[int, str] = {}
        waiting = list(range(number))
        with served(model, config={}) as server:

            async def client_of(client) -> None:
                while waiting:
                    i = waiting.pop()
                    item, target = asked[i]
                    if isinstance(item, str):
                        response = await client.post("/v1/translate", json={"text": item, "target": target})
                        (answers[i],) = response.json()["translations"]
                    else:
                        fields = {"to_language": target}
                        response = await client.post("/v1/audio/translations", data=fields, files={"file": item})
                        answers[i] = response.json()["text"]

            async with server.client() as client:
                await asyncio.gather(*(client_of(client) for _ in range(16)))
            text = server.metrics.text().decode()
            batches = sum(
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("nemo_emmett_batch_inputs_count")
            )
            assert batches < number / 2, "requests that wait are translated together"
        return answers

    answers = asyncio.run(main())
    assert sorted(answers) == list(range(number))
    differing = {inputs[i]: (answers[i], expected[i]) for i in answers if answers[i] != expected[i]}
    assert not differing
