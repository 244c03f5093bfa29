"""What do packed rows save of a step, in time and memory?

Lengths are drawn as unequal as those of captions. Batches are made in several ways: of examples at random, padded to
the longest; of examples of one of four buckets, padded to the longest; and of packed rows. All have about as many
positions. NeMo's SALM takes the padded ones of speech, too: it has no packed rows, and does not train on text. Ways
take turns, in one thread and in float32: target tokens per CPU second, by the median of the turns. A step is what
Lightning makes of it, AdamW included; the peak is that of a way's largest batch, weights, gradients and
optimizer state included. That losses and gradients are the same is tested (tests/models/test_packing.py).

With a corpus of captions (`examples/speechlm/experiment.py` makes it in `data/scarce/all`), the share of positions that
a pass of the loader uses comes first.

    python benchmarks/packing.py [--repeats 3] [--batches 8] [--captions data/scarce/all --tokenizer FOLDER]
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
from measuring.batches import PROMPT_TOKENS, SAMPLING_RATE, as_nemo, tensors_of, text_and_speech
from measuring.models import model_section, without_chance, write_llama, write_t5
from measuring.steps import Steps
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.models import SALM
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
EXAMPLES_PER_BATCH, BUCKETS, POOL = 32, 4, 4096
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


Batches = list[tuple[np.ndarray, dict[str, Any]]]
"""Of each batch, the examples, and what it has more if it is packed."""


def padded_batches(lengths: Lengths, packing: Packing, number: int) -> dict[str, Batches]:
    """Batches of as many examples, at random and by length, the same number of each bucket."""
    order = np.random.default_rng(1).permutation(len(lengths.contexts))
    by_length = order[np.argsort(lengths.positions(packing)[order], kind="stable")]
    buckets = np.split(by_length, BUCKETS)
    firsts = [np.random.default_rng(2).permutation(bucket) for bucket in buckets]
    size = EXAMPLES_PER_BATCH
    return {
        PADDED: [(order[n * size : (n + 1) * size], {}) for n in range(number)],
        BUCKETED: [(firsts[n % BUCKETS][n // BUCKETS * size :][:size], {}) for n in range(number)],
    }


def packed_batches(lengths: Lengths, packing: Packing, number: int) -> Batches:
    """Batches of as many rows, in the middle of endless data."""
    order, found = np.random.default_rng(1).permutation(len(lengths.contexts)), []
    waiting = np.zeros(len(order), EXAMPLE)
    waiting["entry"], waiting["length"] = order, np.nan_to_num(lengths.seconds[order])
    waiting["positions"], waiting["answers"] = packing.positions_and_answers(lengths[order].measures())
    for _ in range(number):
        numbers, rows = packing.next_step(waiting, 1)
        answers = np.bincount(rows, waiting["answers"][numbers]).max()
        more = {"packed_rows": torch.tensor(rows), "packed_sizes": (int(rows[-1]) + 1, packing.size, int(answers))}
        found.append((waiting["entry"][numbers], more))
        waiting = np.delete(waiting, numbers)
    return found


def tensors_of_batch(lengths: Lengths, locator: int | None) -> dict[str, torch.Tensor]:
    """Random tokens, and noise as speech."""
    samples = None if locator is None else (lengths.seconds * SAMPLING_RATE).astype(int).tolist()
    return text_and_speech(lengths.contexts.tolist(), lengths.answers.tolist(), samples, locator)


def batches_of(name: str, model: Any, modality: str, number: int) -> dict[str, list[dict]]:
    """The batches of each way."""
    is_nemo = name == "nemo_salm"
    locator = None if modality == "text" else model.audio_locator_tag_id if is_nemo else model.audio_locator_id
    lengths = drawn(modality, POOL)
    one = packing_of(name, modality, ROWS[modality][0], 1.0)
    positions = float(lengths.positions(one).mean()) * EXAMPLES_PER_BATCH
    found = padded_batches(lengths, one, number)
    if is_nemo:
        return {
            way: [as_nemo(tensors_of_batch(lengths[numbers], locator), model) for numbers, _ in batches]
            for way, batches in found.items()
        }
    for size in ROWS[modality]:
        found[f"rows of {size}"] = packed_batches(lengths, packing_of(name, modality, size, positions), number)
    return {
        way: [{modality: tensors_of_batch(lengths[numbers], locator) | more} for numbers, more in batches]
        for way, batches in found.items()
    }


def measured(model: Any, ways: dict[str, list[dict]], repeats: int) -> dict[str, dict[str, float]]:
    """Target tokens per CPU second, and the peak, of each way, in turns after a turn that is not counted."""
    steps = Steps(model, {})
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, batches in ways.items():
            begun = time.process_time()
            for steps.batch in batches:
                steps.run()
            if repeat:
                seconds[way].append(time.process_time() - begun)
    result = {}
    for way, batches in ways.items():
        tokens = sum(map(_target_tokens, batches))
        steps.batch = max(batches, key=_elements)
        per_second = tokens / statistics.median(seconds[way])
        result[way] = {"tokens": tokens, "tokens_per_second": per_second, "peak": steps.peak()}
    return result


def _target_tokens(batch: dict[str, Any]) -> int:
    if "loss_mask" in batch:  # NeMo's form
        return int(batch["loss_mask"].sum())
    return sum(int(part["answer_lens"].sum()) for part in batch.values())


def _elements(batch: dict[str, Any]) -> int:
    """What a batch holds; packed ones have as many rows, but not as many recordings and tokens of padding."""
    return sum(tensor.numel() for tensor in tensors_of(batch))


def build(name: str, folder: Path) -> Any:
    """A model of random weights."""
    torch.manual_seed(0)
    if name == "salm_t5":
        write_t5(folder, WIDTH, LAYERS, VOCABULARY)
        return without_chance(SALMT5(model_section(folder, "emmett_t5", WIDTH, **ENCODER)))
    write_llama(folder, WIDTH, LAYERS, VOCABULARY)
    kind = {"salm_gpt": SALMGPT, "bestow_gpt": BestowGPT, "nemo_salm": SALM}[name]
    prompt_format = "llama2" if kind is SALM else "emmett_llama2"
    return without_chance(kind(model_section(folder, prompt_format, WIDTH, **ENCODER)))


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
    columns = ("model", "batches of", "", "tokens/s", "over padded", "over bucketed", "over NeMo's", "peak, MiB")
    shown = Table(*columns, title="Steps of about as many positions")
    nemo = results["nemo_salm"]["audio"][BUCKETED]["tokens_per_second"]
    for name, of_model in results.items():
        for modality, ways in of_model.items():
            for way, found in ways.items():
                rate = found["tokens_per_second"]
                ratios = [f"{rate / ways[other]['tokens_per_second']:.2f}" for other in (PADDED, BUCKETED)]
                ratios.append(f"{rate / nemo:.2f}" if modality == "audio" else "")
                shown.add_row(name, modality, way, f"{rate:.0f}", *ratios, f"{found['peak'] / 2**20:.0f}")
    return shown


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns that are counted")
    parser.add_argument("--batches", type=int, default=8, help="of each way in a turn, a multiple of 4")
    parser.add_argument("--captions", type=Path, help="corpus whose rows are looked at")
    parser.add_argument("--tokenizer", help="of the corpus: a folder of the experiment's language model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    cases = [("nemo_salm", "audio")]
    cases += [(name, modality) for name in ("salm_t5", "salm_gpt", "bestow_gpt") for modality in ("text", "audio")]
    console, used = Console(), None
    with tempfile.TemporaryDirectory() as folder:
        if options.captions is not None:
            tokenizer = AutoTokenizer(options.tokenizer)
            tokenizer.tokenizer.add_special_tokens({"additional_special_tokens": ["<|audio|>"]})
            used = shares_used(options.captions, tokenizer, Path(folder))
            console.print(*used, sep="\n")
        for name, modality in track(cases, "Measuring", console=console):
            model = build(name, Path(folder) / name)
            ways = batches_of(name, model, modality, options.batches)
            results.setdefault(name, {})[modality] = measured(model, ways, options.repeats)
    console.print(table(results))
    settings = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, "batches": options.batches}
    path = keep("packing", {"settings": settings, "captions": used, "steps": results}, PACKAGES)
    console.print(f"Written to {path}.")


if __name__ == "__main__":
    main()
