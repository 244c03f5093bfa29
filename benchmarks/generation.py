"""What does generation take, compared with plain Hugging Face ``generate`` of the same language model?

Ours is `model.generate`: prompts, speech encoder, placement, search. Plain is `generate` of the language model inside,
on embeddings that are there already, after one pass of the speech encoder; of BESTOW-GPT without its cross-attention.
They take turns. Processor time of one thread, since other programs may run.

- same lengths: all answers of a batch have the same number of tokens, greedy and with 4 beams.
- greedy, lengths differ: answers of a batch of 16 end after different numbers of tokens. Plain computes all rows to the
  end, ours drops finished ones.
- ways to decode: a static cache, a compiled language model (time of compilation apart), and `torch.inference_mode`,
  none of which we use; compared with a growing cache.

    python benchmarks/generation.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import keep
from measuring.batches import Speech, speech_batch, text_batch
from measuring.models import model_section, without_chance, write_llama, write_t5
from nemo.utils import logging
from torch import Tensor
from transformers import CompileConfig, StoppingCriteria

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.greedy import greedy_search

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
SIZES = {
    "tiny": {"width": 64, "layers": 2, "vocabulary": 512, "encoder_layers": 2, "encoder_width": 64},
    "50 M": {"width": 512, "layers": 6, "vocabulary": 32_000, "encoder_layers": 4, "encoder_width": 256},
}
TOKENS = 8
SENTENCE_TOKENS = (10, 20)
RECORDING_SECONDS = (1.0, 2.0)
BATCHES, BEAMS = (1, 16), (1, 4)
LENGTHS = {
    "6 to 18, evenly": [6 + round(12 * row / 15) for row in range(16)],
    "15 of 8, one of 32": [8] * 15 + [32],
}


def build(size: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """The three models with random weights."""
    width, vocabulary = size["width"], size["vocabulary"]
    write_t5(
        folder / "t5", width, size["layers"] // 2, vocabulary, feed_forward_proj="gated-gelu", tie_word_embeddings=True
    )
    write_llama(folder / "llama", width, size["layers"], vocabulary, tie_word_embeddings=True)
    encoder = {name: size[name] for name in ("encoder_layers", "encoder_width")} | {"conv_channels": 64}
    llama = model_section(folder / "llama", "emmett_llama2", width, **encoder)
    sections = {
        SALMT5: model_section(folder / "t5", "emmett_t5", width, **encoder),
        SALMGPT: llama,
        BestowGPT: llama | {"cross_attention": {"num_layers": 2, "num_heads": width // 64 * 2}},
    }
    torch.manual_seed(0)
    return {kind.__name__: without_chance(kind(section).eval()) for kind, section in sections.items()}


def batch_of(model: Any, modality: str, size: int) -> dict[str, Tensor]:
    """A batch of sentences, or of recordings."""
    if modality == "text":
        return text_batch(size, SENTENCE_TOKENS)
    return speech_batch(model, Speech(size, RECORDING_SECONDS, (1, 1)))


def ours_of(model: Any, batch: Mapping, **options: Any) -> Callable[[], Tensor]:
    """Ours on a batch."""
    given = (batch["context_ids"], batch.get("audios"), batch.get("audio_lens"))
    return lambda: model.generate(*given, target_lang="de", **options)


def inputs_of(model: Any, ours: Callable[[], Tensor]) -> dict[str, Any]:
    """The arguments with which ours calls the language model's ``generate``."""
    captured: dict[str, Any] = {}
    original = model.llm.generate

    def spy(**arguments: Any) -> Tensor:
        captured.update(arguments)
        return original(**arguments)

    model.llm.generate = spy
    ours()
    del model.llm.generate
    captured.pop("custom_generate", None)
    return captured


@torch.no_grad()
def plain(model: Any, batch: Mapping, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """Hugging Face's on the same inputs."""
    if batch.get("audios") is not None:
        model.encode_speech(batch["audios"], batch["audio_lens"])
    with model.embeddings_inside() if hasattr(model, "embed_tokens") else nullcontext():
        return model.llm.generate(**inputs | options)


class Ends(StoppingCriteria):
    """Ends each row after a number of tokens of its own."""

    def __init__(self, lengths: list[int], begun: int) -> None:
        self.lengths_R = torch.tensor(lengths) + begun

    def select(self, kept_R: Tensor) -> None:
        """Keep some rows."""
        self.lengths_R = self.lengths_R[kept_R]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """(R,) bool."""
        return input_ids.shape[1] >= self.lengths_R


def same_lengths(models: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Ours and plain, a fixed number of tokens."""
    rows = []
    for name, model in models.items():
        for modality in ("text", "speech"):
            for size in BATCHES:
                for beams in BEAMS:
                    batch = batch_of(model, modality, size)
                    ours = ours_of(model, batch, num_beams=beams, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
                    inputs = inputs_of(model, ours)
                    ways = {"plain": lambda m=model, b=batch, i=inputs: plain(m, b, i), "ours": ours}
                    case = {"model": name, "modality": modality, "batch": size, "beams": beams}
                    rows.append(case | seconds_of(ways, repeats, "plain"))
                    show(rows[-1])
    return rows


def differing_lengths(models: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """The same language model and embeddings, greedy, with rows that end one after another."""
    rows = []
    for name, model in models.items():
        for what, lengths in LENGTHS.items():
            batch = batch_of(model, "text", len(lengths))
            inputs = inputs_of(model, ours_of(model, batch, max_new_tokens=max(lengths), min_new_tokens=1))
            inputs["eos_token_id"] = [0]  # random models end at random
            inputs["min_new_tokens"] = max(lengths)
            begun = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 0

            def search(is_ours: bool, model=model, batch=batch, inputs=inputs, lengths=lengths, begun=begun) -> Tensor:
                ends = Ends(lengths, begun)
                own = {"custom_generate": greedy_search(ends.select)} if is_ours else {}
                return plain(model, batch, inputs, stopping_criteria=[ends], **own)

            if not torch.equal(search(True), search(False)):
                raise RuntimeError(f"{name}, {what}: other ids")
            ways = {"plain": lambda s=search: s(False), "ours": lambda s=search: s(True)}
            rows.append({"model": name, "lengths": what} | seconds_of(ways, repeats, "plain"))
            show(rows[-1])
    return rows


def ways_to_decode(models: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """What we leave to users, for one sentence."""
    rows = []
    compiled = CompileConfig(fullgraph=False, mode="default", dynamic=False)
    compiled._compile_all_devices = True
    options = {
        "growing": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "compiled": {"cache_implementation": "static", "compile_config": compiled},
    }
    for name in ("SALMT5", "SALMGPT"):
        batch = batch_of(models[name], "text", 1)
        tokens = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        ways = {way: ours_of(models[name], batch, **tokens, **more) for way, more in options.items()}
        began = time.perf_counter()
        ways["compiled"]()
        taken = time.perf_counter() - began

        def inference_mode(way=ways["growing"]) -> Tensor:
            with torch.inference_mode():
                return way()

        ways["inference_mode"] = inference_mode
        rows.append({"model": name, "seconds_to_compile": round(taken)} | seconds_of(ways, repeats, "growing"))
        show(rows[-1])
    return rows


def seconds_of(ways: Mapping[str, Callable[[], Any]], repeats: int, base: str) -> dict[str, Any]:
    """Median seconds of processor time of each, in turns after a round that is not counted; and what part of the base's
    they are, the median over the rounds."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            rounds[name].append(time.process_time() - began)
    counted = {name: values[1:] for name, values in rounds.items()}
    ratios = {
        name: statistics.median(value / other for value, other in zip(values, counted[base], strict=True))
        for name, values in counted.items()
    }
    return {
        "seconds": {name: round(statistics.median(values), 4) for name, values in counted.items()},
        "ratio": {name: round(ratio, 2) for name, ratio in ratios.items() if name != base},
    }


def show(row: Mapping[str, Any]) -> None:
    """A line on the terminal."""
    print(*(f"{value}" for value in row.values()), sep="  ", flush=True)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    repeats = parser.parse_args().repeats
    logging.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for size, numbers in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            models = build(numbers, Path(folder))
        parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        results[size] = {"parameters": parameters, "differing_lengths": differing_lengths(models, repeats)}
        results[size]["same_lengths"] = same_lengths(models, repeats)
    results["ways_to_decode"] = ways_to_decode(models, repeats)
    setting = {"tokens": TOKENS, "sentence_tokens": SENTENCE_TOKENS, "recording_seconds": RECORDING_SECONDS}
    keep("generation", {"sizes": SIZES, **setting, "repeats": repeats, "results": results}, PACKAGES)


if __name__ == "__main__":
    main()
