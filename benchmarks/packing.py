"""What do packed rows save of a pass over the same examples, in time and memory?

Lengths are drawn as unequal as those of captions. The examples of a pass are put into batches in several ways: at
random, padded to the longest; by length in four buckets, padded to the longest; and packed into rows. All have about
as many positions to a batch. The passes take turns, in one thread and in float32; ratios are those of medians of CPU
seconds, a step is what Lightning makes of it, AdamW included, and the peak is that of the pass's largest batch,
weights, gradients and optimizer state included. Losses are those of the untrained model, so that they can be compared.

With a corpus of captions (`examples/speechlm/experiment.py` makes it in `data/scarce/all`), the share of positions that
a pass of the loader uses comes first.

    python benchmarks/packing.py [--repeats 3] [--examples 128] [--captions data/scarce/all --tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import keep
from measuring.batches import PROMPT_TOKENS, SAMPLING_RATE, text_and_speech
from measuring.models import model_section, without_chance, write_llama, write_t5
from measuring.steps import Steps
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.sampling.source_order import EXAMPLE
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.modules.packing import ENCODER_PADDING

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
WIDTH, LAYERS, VOCABULARY = 256, 4, 8_192
ENCODER = {"encoder_layers": 3, "encoder_width": 128, "conv_channels": 32}
FRAME = 0.08
"""Seconds of a position of the language model."""

PADDED, BUCKETED = "padded", "bucketed"
EXAMPLES_PER_BATCH, BUCKETS = 32, 4
ROWS = {"text": (128, 256), "audio": (256,)}
"""Positions of a row."""


@dataclass(frozen=True)
class Lengths:
    """Of N examples.

    Args:
        contexts: (N,) tokens, a recording's locator included.
        answers: (N,) tokens.
        seconds: (N,) of the recordings; NaN for text.
    """

    contexts: np.ndarray
    answers: np.ndarray
    seconds: np.ndarray

    def __getitem__(self, numbers: np.ndarray) -> Lengths:
        return Lengths(self.contexts[numbers], self.answers[numbers], self.seconds[numbers])

    def positions(self, packing: Packing) -> np.ndarray:
        """(N,) of a row."""
        return packing.positions_and_answers(self.measures())[0]

    def measures(self) -> Measures:
        """As a length index has them."""
        is_cut = ~np.isnan(self.seconds)
        totals = self.contexts + self.answers
        return Measures(self.seconds, self.contexts, np.where(is_cut, totals, self.answers), totals, is_cut)


def drawn(modality: str, number: int) -> Lengths:
    """Sentences of 5 to 40 words, 13 on average, and recordings of them."""
    rng = np.random.default_rng(0)
    words = np.clip(rng.lognormal(np.log(13), 0.35, number), 5, 40).round().astype(int)
    answers = np.clip(words + rng.normal(0, 2, number), 3, 45).round().astype(int)
    if modality == "text":
        return Lengths(words + PROMPT_TOKENS, answers, np.full(number, np.nan))
    return Lengths(np.full(number, PROMPT_TOKENS + 1), answers, words / rng.uniform(2.4, 3.2, number))


def packing_of(name: str, modality: str, size: int, positions: float) -> Packing:
    """Rows of a size that together have about so many positions."""
    is_joint, frame = name != "salm_t5", FRAME if modality == "audio" else None
    seconds = ENCODER_PADDING * size * FRAME if modality == "audio" else np.inf
    if name == "bestow_gpt":  # its rows hold text alone
        frame = None
    return Packing(max(1, round(positions / size)), size, size, is_joint, frame, seconds)


Pass = list[tuple[np.ndarray, dict[str, Any]]]
"""Of each batch, the examples, and what it has more if it is packed."""


def padded_passes(lengths: Lengths, packing: Packing) -> dict[str, Pass]:
    """Batches of as many examples, at random and by length."""
    number = len(lengths.contexts)
    order = np.random.default_rng(1).permutation(number)
    by_length = order[np.argsort(lengths.positions(packing)[order], kind="stable")]
    size = number // BUCKETS
    buckets = [by_length[first : first + size] for first in range(0, number, size)]
    ways = {PADDED: [order], BUCKETED: [np.random.default_rng(2).permutation(bucket) for bucket in buckets]}
    return {
        way: [
            (bucket[first : first + EXAMPLES_PER_BATCH], {})
            for bucket in of_way
            for first in range(0, len(bucket), EXAMPLES_PER_BATCH)
        ]
        for way, of_way in ways.items()
    }


def packed_pass(lengths: Lengths, packing: Packing) -> Pass:
    """Batches of as many rows."""
    number = len(lengths.contexts)
    order, found = np.random.default_rng(1).permutation(number), []
    waiting = np.zeros(number, EXAMPLE)
    waiting["entry"], waiting["length"] = order, np.nan_to_num(lengths.seconds[order])
    waiting["positions"], waiting["answers"] = packing.positions_and_answers(lengths[order].measures())
    while (step := packing.next_step(waiting, 1, at_end=True)) is not None:
        numbers, rows = step
        answers = np.bincount(rows, waiting["answers"][numbers]).max()
        more = {"packed_rows": torch.tensor(rows), "packed_sizes": (int(rows[-1]) + 1, packing.size, int(answers))}
        found.append((waiting["entry"][numbers], more))
        waiting = np.delete(waiting, numbers)
    return found


def tensors_of_batch(lengths: Lengths, locator: int | None) -> dict[str, torch.Tensor]:
    """Random tokens, and noise as speech."""
    samples = None if locator is None else (lengths.seconds * SAMPLING_RATE).astype(int).tolist()
    return text_and_speech(lengths.contexts.tolist(), lengths.answers.tolist(), samples, locator)


def passes_of(name: str, model: Any, modality: str, number: int) -> dict[str, list[dict]]:
    """The batches of a pass for each way."""
    lengths, locator = drawn(modality, number), model.audio_locator_id if modality == "audio" else None
    one = packing_of(name, modality, ROWS[modality][0], 1.0)
    positions = float(lengths.positions(one).mean()) * EXAMPLES_PER_BATCH
    passes = padded_passes(lengths, one)
    for size in ROWS[modality]:
        passes[f"rows of {size}"] = packed_pass(lengths, packing_of(name, modality, size, positions))
    return {
        way: [{modality: tensors_of_batch(lengths[numbers], locator) | more} for numbers, more in batches]
        for way, batches in passes.items()
    }


def measured(model: Any, passes: dict[str, list[dict]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, peak and mean loss of the ways, in turns after one pass that is not counted."""
    steps = Steps(model, {}, learning_rate=0.0)  # so that losses can be compared
    seconds: dict[str, list[float]] = {way: [] for way in passes}
    sums = dict.fromkeys(passes, 0.0)
    for repeat in range(repeats + 1):
        for way, batches in passes.items():
            sums[way], begun = 0.0, time.process_time()
            for steps.batch in batches:
                sums[way] += float(steps.run()) * tokens_of([steps.batch])
            if repeat:
                seconds[way].append(time.process_time() - begun)
    result = {}
    for way, batches in passes.items():
        steps.batch = max(batches, key=_elements)
        tokens, median = tokens_of(batches), statistics.median(seconds[way])
        result[way] = {"steps": len(batches), "seconds": median, "tokens_per_second": tokens / median}
        result[way] |= {"peak": steps.peak(), "loss": sums[way] / tokens}
    return result


def _elements(batch: dict[str, dict]) -> int:
    """What a batch holds; of packed ones those with most recordings and tokens, all of them having full rows."""
    return sum(value.numel() for part in batch.values() for value in part.values() if isinstance(value, torch.Tensor))


def tokens_of(batches: Sequence[dict]) -> int:
    """Target tokens."""
    return sum(int(part["answer_lens"].sum()) for batch in batches for part in batch.values())


def build(name: str, folder: Path) -> Any:
    """A model of random weights."""
    torch.manual_seed(0)
    if name == "salm_t5":
        write_t5(folder, WIDTH, LAYERS, VOCABULARY)
        return without_chance(SALMT5(model_section(folder, "emmett_t5", WIDTH, **ENCODER)))
    write_llama(folder, WIDTH, LAYERS, VOCABULARY)
    kind = {"salm_gpt": SALMGPT, "bestow_gpt": BestowGPT}[name]
    return without_chance(kind(model_section(folder, "emmett_llama2", WIDTH, **ENCODER)))


LOADERS = {
    "text": [([128, 160], 16), ([256, 320], 8)],
    "audio": [([256, 256], 16), ([512, 512], 8)],
}
"""``row_tokens`` and ``batch_size``."""


class _Lengths(SpeechTextDataset):
    """Batches without audio."""

    def _collate_speech(self, examples: Sequence) -> dict:
        samples = [round(example.duration * SAMPLING_RATE) for example in examples]
        return {**self._collate_tokens(examples), "audio_lens": torch.tensor(samples)}


def shares_used(corpus: Path, tokenizer: Any, index_dir: Path) -> list[dict[str, Any]]:
    """The share of positions that a pass over the captions uses, of rows, and of the speech encoder's input."""
    text = {"type": "parallel_text", "directions": ["en-fr"]}
    text["paths"] = {lang: str(corpus / "text" / f"train.{lang}") for lang in ("en", "fr")}
    speech = {"type": "nemo", "manifest_filepath": str(corpus / "speech" / "train.en.jsonl"), "target_lang": "fr"}
    common = {"prompt_format": "emmett_t5", "audio_locator_tag": "<|audio|>", "seed": 0, "shard_seed": 0}
    common |= {"shuffle": True, "force_finite": True, "index_dir": str(index_dir), "packing": True}
    found = []
    for modality, source in (("text", text), ("audio", speech)):
        for row_tokens, rows in LOADERS[modality]:
            config = {**common, "input_cfg": [source], "row_tokens": row_tokens, "batch_size": rows}
            config |= {"token_equivalent_duration": FRAME} if modality == "audio" else {}
            loader = get_multimodal_dataloader(config, 0, 1, _Lengths(tokenizer), tokenizer)
            parts = [batch[modality] for batch in loader]
            found.append({"modality": modality, "row_tokens": row_tokens, "rows": rows, **_used(parts)})
    return found


def _used(parts: Sequence[dict]) -> dict[str, float]:
    used = most = seconds = padded = examples = 0
    for part in parts:
        positions_B = part["context_lens"].clone()
        if (samples_R := part.get("audio_lens")) is not None:
            positions_B += torch.ceil((samples_R // 160 + 1) / 8).long() - 1
            seconds, padded = seconds + int(samples_R.sum()), padded + int(samples_R.max()) * len(samples_R)
        rows, size, _ = part["packed_sizes"]
        assert torch.bincount(part["packed_rows"], positions_B).max() <= size
        used, most, examples = used + int(positions_B.sum()), most + rows * size, examples + len(positions_B)
    return {"examples": examples, "positions_used": used / most} | ({"audio_used": seconds / padded} if padded else {})


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Table:
    """What was measured."""
    columns = ("model", "examples", "batches", "steps", "CPU seconds", "throughput", "over buckets", "peak", "loss")
    shown = Table(*columns, title="A pass over the same examples")
    for name, of_model in results.items():
        for modality, ways in of_model.items():
            for way, found in ways.items():
                ratios = [f"{ways[other]['seconds'] / found['seconds']:.2f}" for other in (PADDED, BUCKETED)]
                values = [str(found["steps"]), f"{found['seconds']:.2f}", *ratios]
                shown.add_row(name, modality, way, *values, f"{found['peak'] / 2**20:.0f} MiB", f"{found['loss']:.4f}")
    return shown


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="passes of each way that are counted")
    parser.add_argument("--examples", type=int, default=128, help="of a pass, a multiple of 4")
    parser.add_argument("--captions", type=Path, help="corpus whose rows are looked at")
    parser.add_argument("--tokenizer", help="of the corpus: a folder of the experiment's language model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    cases = [(name, modality) for name in ("salm_t5", "salm_gpt", "bestow_gpt") for modality in ("text", "audio")]
    console, used = Console(), None
    with tempfile.TemporaryDirectory() as folder:
        if options.captions is not None:
            tokenizer = AutoTokenizer(options.tokenizer)
            tokenizer.tokenizer.add_special_tokens({"additional_special_tokens": ["<|audio|>"]})
            used = shares_used(options.captions, tokenizer, Path(folder))
            console.print(*used, sep="\n")
        for name, modality in track(cases, "Measuring", console=console):
            model = build(name, Path(folder) / name)
            passes = passes_of(name, model, modality, options.examples)
            results.setdefault(name, {})[modality] = measured(model, passes, options.repeats)
    console.print(table(results))
    settings = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, "examples": options.examples}
    path = keep("packing", {"settings": settings, "captions": used, "passes": results}, PACKAGES)
    console.print(f"Written to {path}.")


if __name__ == "__main__":
    main()
