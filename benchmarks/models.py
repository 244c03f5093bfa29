"""What does each of the three architectures take for the same speech, and for the same text?

SALM-T5, SALM-GPT and BESTOW-GPT with the same FastConformer and language models of the same width and vocabulary: a
Llama of 6 layers, a T5 of 3 + 3, embeddings tied to the output layer. Of a training step (AdamW, float32) its time, the
bytes of tensors at its worst moment (weights, gradients and optimizer state included), and the positions that the
language model reads. Of greedy generation the time for one utterance, in a batch and alone. The models take turns.

    python benchmarks/models.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import keep
from measuring.batches import PROMPT_TOKENS, Speech, speech_batch, text_batch
from measuring.models import model_section, without_chance, write_llama, write_t5
from measuring.steps import Steps
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
WIDTH, LAYERS, VOCABULARY = 512, 6, 32_000
ENCODER = {"encoder_layers": 4, "encoder_width": 256, "conv_channels": 64}
CROSS_ATTENTION = {"num_layers": 2, "num_heads": 8}

SPEECH = Speech(examples=8, seconds=(6.0, 12.0), answer_tokens=(20, 40))
SENTENCES = {"examples": 32, "tokens": (20, 40)}
UTTERANCES = {"seconds": 10.0, "tokens": 30, "batch": 8}
BASE = "SALMT5"


def build(folder: Path) -> dict[str, Any]:
    """The three of them."""
    write_t5(folder / "t5", WIDTH, LAYERS // 2, VOCABULARY, feed_forward_proj="gated-gelu", tie_word_embeddings=True)
    write_llama(folder / "llama", WIDTH, LAYERS, VOCABULARY, tie_word_embeddings=True)
    sections = {
        SALMT5: model_section(folder / "t5", "emmett_t5", WIDTH, **ENCODER),
        SALMGPT: (llama := model_section(folder / "llama", "emmett_llama2", WIDTH, **ENCODER)),
        BestowGPT: llama | {"cross_attention": CROSS_ATTENTION},
    }
    torch.manual_seed(0)
    return {kind.__name__: without_chance(kind(section).train()) for kind, section in sections.items()}


def measure_training(models: Mapping[str, Any], make_batch: Callable[[Any], dict], repeats: int) -> dict[str, Any]:
    """A training step of each on one batch."""
    batches = {name: make_batch(model) for name, model in models.items()}
    steps = {name: Steps(model, batches[name]) for name, model in models.items()}
    seconds = seconds_of({name: of_model.run for name, of_model in steps.items()}, repeats)
    peaks = {name: of_model.peak() for name, of_model in steps.items()}
    for model in models.values():
        model.zero_grad()
    return {
        **seconds,
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "ratio_of_peaks": ratios(peaks),
        "positions": {name: positions(model, batches[name]) for name, model in models.items()},
    }


@torch.no_grad()
def positions(model: Any, batch: Mapping) -> dict[str, int]:
    """Positions per example, padding included, of each sequence that the language model reads."""
    read = model.llm_inputs(batch).kwargs
    names = {"inputs_embeds": "sequence", "decoder_input_ids": "decoder"}
    return {names[key]: value.shape[1] for key, value in read.items() if key in names}


def measure_generation(models: Mapping[str, Any], batch_size: int, repeats: int) -> dict[str, Any]:
    """Greedy generation of a fixed number of tokens; seconds per utterance."""
    recordings = Speech(batch_size, (UTTERANCES["seconds"],) * 2, (1, 1))
    tokens = UTTERANCES["tokens"]

    def generate(model: Any, batch: Mapping) -> None:
        asked = (batch["context_ids"], batch["audios"], batch["audio_lens"])
        said = model.generate(*asked, target_lang="de", max_new_tokens=tokens, min_new_tokens=tokens)
        if said.shape != (batch_size, tokens):
            raise RuntimeError(f"{type(model).__name__} said {tuple(said.shape)}")

    batches = {name: speech_batch(model, recordings) for name, model in models.items()}
    ways = {name: lambda n=name: generate(models[n], batches[n]) for name in models}
    return seconds_of(ways, repeats, per=batch_size)


def seconds_of(ways: Mapping[str, Callable[[], Any]], repeats: int, per: int = 1) -> dict[str, Any]:
    """Median seconds of each, measured in turns after a round that is not counted; and what part of the base's they
    are, the median over the rounds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append((time.perf_counter() - began) / per)
    rounds = {name: values[1:] for name, values in taken.items()}
    shares = {
        name: statistics.median(value / base for value, base in zip(values, rounds[BASE], strict=True))
        for name, values in rounds.items()
    }
    return {
        "seconds": {name: round(statistics.median(values), 3) for name, values in rounds.items()},
        "ratio_of_seconds": {name: round(share, 2) for name, share in shares.items()},
        "seconds_of_rounds": {name: [round(value, 3) for value in values] for name, values in rounds.items()},
    }


def ratios(values: Mapping[str, float]) -> dict[str, float]:
    """What part of the base's each is."""
    return {name: round(value / values[BASE], 2) for name, value in values.items()}


def parameters(model: Any) -> dict[str, int]:
    """All trainable parameters, and those of the language model."""
    return {
        "all": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "language_model": sum(p.numel() for p in {*model.llm.parameters(), *model.token_embedding.parameters()}),
    }


def show(results: Mapping[str, Mapping[str, Any]], parameters_of: Mapping[str, Mapping[str, int]]) -> None:
    """A table on the terminal."""
    table = Table("", *parameters_of)
    table.add_row("parameters, millions", *(f"{counts['all'] / 1e6:.1f}" for counts in parameters_of.values()))
    for what, result in results.items():
        for key, unit in (("seconds", "s"), ("ratio_of_seconds", "ratio"), ("peak_gib", "GiB"), ("positions", "read")):
            if key in result:
                table.add_row(f"{what}, {unit}", *map(str, result[key].values()))
    Console(width=150).print(table)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are counted")
    repeats = parser.parse_args().repeats
    logging.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        models = build(Path(folder))
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "training on speech": lambda: measure_training(models, lambda model: speech_batch(model, SPEECH), repeats),
        "training on text": lambda: measure_training(models, lambda _: text_batch(**SENTENCES), repeats),
        "generation, batched": lambda: measure_generation(models, UTTERANCES["batch"], repeats),
        "generation, one by one": lambda: measure_generation(models, 1, repeats),
    }
    results = {what: measurement() for what, measurement in track(measurements.items())}
    parameters_of = {name: parameters(model) for name, model in models.items()}
    show(results, parameters_of)
    sizes = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, **ENCODER, "cross_attention": CROSS_ATTENTION}
    batches = {"prompt_tokens": PROMPT_TOKENS, "speech": vars(SPEECH), "text": SENTENCES, "utterances": UTTERANCES}
    setting = {**sizes, **batches, "threads": torch.get_num_threads()}
    keep("models", {**setting, "parameters": parameters_of, "results": results}, PACKAGES)


if __name__ == "__main__":
    main()
