"""How much do batches pad with bins of least padding, and how much with those of NeMo's scripts?

Multi30k in six directions (en<->de, en<->fr, en<->cs), tokenized by one SentencePiece BPE of 8,000 pieces that is
trained here; as text, and as speech whose durations are those that eSpeak NG takes to say the source, at 80 ms a frame.
Lengths are those by which NeMo chooses a bucket. NeMo's scripts both give buckets equal mass: `estimate_token_bins.py`
is the one for tokens; `estimate_duration_bins_2d.py`, for seconds, has the better rule for sub-buckets, applied here to
the same lengths, without dropping outliers. Padded are examples

- to the caps of their buckets, which is what the bins are solved for, and what the memory must hold;
- to the longest: the longest input and output in their bucket, where that is less;
- in real batches: the tensors that the dataloader gives, 8,000 tokens (frames) a batch at the caps. Batches are
  counted as well: bins whose caps are rarely reached pad little and fill the memory little.

    python benchmarks/padding.py [--data ../shared/data/multi30k] [--cache /tmp/nemo_emmett_padding]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
from nemo.collections.common.tokenizers import SentencePieceTokenizer
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_emmett.corpora.phrasebook.espeak import Engine, Voice, espeak_version
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.bucketing.bins import optimal_bins_2d
from nemo_emmett.data.bucketing.length_stats import measure
from nemo_emmett.data.bucketing.padding import equal_mass_bins, equal_mass_bins_2d, padding_of
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.processes import available_cores

RESULTS = Path(__file__).parent / "results" / "padding.json"
DATA = Path(os.environ.get("NEMO_EMMETT_SHARED_DATA", "../shared/data")) / "multi30k"
PACKAGES = ("nemo_emmett", "nemo_toolkit", "lhotse", "numpy", "sentencepiece", "torch")

LANGUAGES = ("en", "de", "fr", "cs")
VOICES = {"en": "en-us", "de": "de", "fr": "fr", "cs": "cs"}
BUCKETS = ((10, 2), (15, 2), (10, 3))
VOCABULARY = 8_000
FRAME = 0.08  # seconds, of FastConformer
SAMPLE_RATE = 16_000
SPOKEN_LINES = 2_000
"""Of each language, from the first on: eSpeak NG says all four in a minute."""

BATCHED_LINES = {"text": 6_000, "speech": 1_000}
"""Lines that real batches are made of: enough to fill each bucket several times."""

TOKENS_IN_BATCH = 8_000
"""That the caps of a bucket allow in a batch; of speech, frames and tokens."""

LOCATOR = "<|audio|>"
TOKEN_SCRIPT, SECONDS_SCRIPT, LEAST = "estimate_token_bins", "estimate_duration_bins_2d", "least padding"


def train_tokenizer(data: Path, folder: Path) -> SentencePieceTokenizer:
    """One BPE of all four languages."""
    model = folder / "bpe.model"
    if not model.exists():
        lines = [line for language in LANGUAGES for line in read_lines(data, language)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / "bpe"),
            model_type="bpe",
            vocab_size=VOCABULARY,
            character_coverage=1.0,
            num_threads=1,
            user_defined_symbols=[LOCATOR, *(f"<{language}>" for language in LANGUAGES)],
            pad_id=3,
            minloglevel=2,
        )
    return SentencePieceTokenizer(str(model))


def read_lines(data: Path, language: str) -> list[str]:
    """The training sentences of one language."""
    return (data / f"train.{language}").read_text(encoding="utf-8").splitlines()


class Stopwatch(Engine):
    """eSpeak NG with an ear for nothing but how long it speaks."""

    def _receive(self, samples: ctypes.POINTER(ctypes.c_short), count: int, _events: int | None) -> int:
        self.samples += max(count, 0)
        return 0

    def seconds(self, text: str, language: str) -> float:
        """How long a sentence takes at the usual speed."""
        self.samples = 0
        self._chunks = [b""]  # the engine takes silence for a failure
        self.speak(text, Voice(VOICES[language], speed=175, pitch=50))
        return self.samples / self._native_rate


def durations(data: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of the first sentences in each language, spoken once and kept."""
    cache = folder / f"durations-{SPOKEN_LINES}.json"
    if not cache.exists():
        stopwatch = Stopwatch()
        spoken = {
            language: [
                round(stopwatch.seconds(line, language), 3)
                for line in track(read_lines(data, language)[:SPOKEN_LINES], description=f"Speaking {language}")
            ]
            for language in LANGUAGES
        }
        cache.write_text(json.dumps(spoken))
    return json.loads(cache.read_text())


def text_config(data: Path, folder: Path, lines: int | None = None) -> dict[str, Any]:
    """A dataset of text in all six directions."""
    paths = {language: data / f"train.{language}" for language in LANGUAGES}
    if lines is not None:
        for language in LANGUAGES:
            short = folder / f"{lines}.{language}"
            short.write_text("".join(f"{line}\n" for line in read_lines(data, language)[:lines]), encoding="utf-8")
            paths[language] = short
    directions = [f"{a}-{b}" for other in LANGUAGES[1:] for a, b in (("en", other), (other, "en"))]
    texts = {language: str(path) for language, path in paths.items()}
    return _config([{"type": "parallel_text", "paths": texts, "directions": directions}])


def speech_config(data: Path, folder: Path, lines: int, with_audio: bool) -> dict[str, Any]:
    """The same spoken: manifests of eSpeak NG's durations and, to be read in batches, as much silence."""
    seconds = durations(data, folder)
    texts = {language: read_lines(data, language) for language in LANGUAGES}
    sources = []
    for language in LANGUAGES:
        targets = LANGUAGES[1:] if language == "en" else LANGUAGES[:1]
        records = []
        for n, duration in enumerate(seconds[language][:lines]):
            path = folder / "audio" / f"{language}-{n}.flac"
            if with_audio and not path.exists():
                path.parent.mkdir(exist_ok=True)
                soundfile.write(path, np.zeros(round(duration * SAMPLE_RATE), dtype=np.int16), SAMPLE_RATE)
            record = {"audio_filepath": str(path), "duration": duration, "sampling_rate": SAMPLE_RATE, "lang": language}
            translations = {target: texts[target][n] for target in targets}
            records.append({**record, "text": texts[language][n], "translations": translations})
        manifest = folder / f"{language}-{lines}.jsonl"
        manifest.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        sources.append({"type": "nemo", "manifest_filepath": str(manifest)})
    return _config(sources)


def _config(sources: list[dict]) -> dict[str, Any]:
    return {
        "input_cfg": sources,
        "use_multimodal_sampling": True,
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "token_equivalent_duration": FRAME,
        "force_finite": True,
        "seed": 0,
        "shard_seed": 0,
        "shuffle": True,
        "num_workers": 0,
    }


def token_script_bins(inputs: np.ndarray, outputs: np.ndarray, buckets: int, sub_buckets: int) -> list[list[float]]:
    """The bins of NeMo's `estimate_token_bins.py`.

    Its sub-buckets share out the outputs of all examples shorter than the strip's cap, not only those of the strip, and
    the last takes the cap times the largest ratio in the data. Strips with the same cap, which lhotse would refuse, are
    merged here.
    """
    order = np.lexsort((outputs, inputs))
    inputs, outputs = inputs[order], outputs[order]
    largest_ratio = (outputs / inputs).max()
    bins = set()
    for cap in equal_mass_bins(inputs, buckets):
        shorter = outputs[: np.searchsorted(inputs, cap)] if cap < inputs[-1] else outputs[:-1]
        bins |= {(cap, sub_cap) for sub_cap in equal_mass_bins(shorter, sub_buckets)[:-1]}
        bins.add((cap, float(math.ceil(cap * largest_ratio))))
    return [list(pair) for pair in sorted(bins)]


def bins_for(inputs: np.ndarray, outputs: np.ndarray, buckets: int, sub_buckets: int) -> dict[str, list]:
    """All three."""
    solvers = {TOKEN_SCRIPT: token_script_bins, SECONDS_SCRIPT: equal_mass_bins_2d, LEAST: optimal_bins_2d}
    return {name: solve(inputs, outputs, buckets, sub_buckets) for name, solve in solvers.items()}


def compare_bins(inputs: np.ndarray, outputs: np.ndarray) -> list[dict]:
    """The padding that bins leave by themselves, at each number of buckets."""
    rows = []
    for to_longest in (False, True):
        for shape in BUCKETS:
            row = {"padded": "to the longest" if to_longest else "to the caps", "buckets": "x".join(map(str, shape))}
            for name, bins in bins_for(inputs, outputs, *shape).items():
                padding = padding_of(bins, inputs, outputs, to_longest=to_longest)
                assert padding.kept == len(inputs)
                row[name] = {"padding": padding.amount, "share": padding.share}
            rows.append(row)
    return rows


def compare_batches(config: Mapping, tokenizer: SentencePieceTokenizer) -> list[dict]:
    """The padding in the tensors of one pass over the data."""
    lengths = lengths_of(config, tokenizer)
    rows = []
    for shape in BUCKETS:
        row = {"padded": "real batches", "buckets": "x".join(map(str, shape))}
        for name, bins in bins_for(*lengths, *shape).items():
            sizes = [max(1, int(TOKENS_IN_BATCH / sum(pair))) for pair in bins]
            row[name] = pad_in_batches({**config, "bucket_duration_bins": bins, "bucket_batch_size": sizes}, tokenizer)
        rows.append(row)
    return rows


def lengths_of(config: Mapping, tokenizer: SentencePieceTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs as NeMo measures them."""
    (group,) = parse_dataset(config, "benchmark").groups
    lengths = measure(group, tokenizer, ExampleKind.TRANSLATION, two_dimensional=True)
    return lengths.inputs, lengths.outputs


def pad_in_batches(config: Mapping, tokenizer: SentencePieceTokenizer) -> dict[str, float]:
    """Padding, and its share in the batches: of tokens of text; of speech, of frames and the tokens of the answers."""
    loader = get_multimodal_dataloader(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer, place="benchmark")
    needed = held = batches = 0
    for batch in loader:
        batches += 1
        for of_modality in batch.values():
            sides = [(of_modality["answer_lens"], of_modality["answer_ids"].shape)]
            if "audios" in of_modality:
                frame = FRAME * SAMPLE_RATE
                frames = (of_modality["audio_lens"] / frame).ceil()
                sides.append((frames, (len(frames), math.ceil(of_modality["audios"].shape[1] / frame))))
            else:
                sides.append((of_modality["context_lens"], of_modality["context_ids"].shape))
            needed += sum(int(lens.sum()) for lens, _ in sides)
            held += sum(rows * columns for _, (rows, columns) in sides)
    return {"padding": held - needed, "share": (held - needed) / held, "batches": batches}


def show(kind: str, examples: int, rows: Sequence[dict]) -> Table:
    """One table for text or speech."""
    table = Table(title=f"{kind}: {examples:,} examples in six directions; % of padding", title_justify="left")
    ratios = {TOKEN_SCRIPT: "to 1st", SECONDS_SCRIPT: "to 2nd"}
    for title in ("padded", "buckets"):
        table.add_column(title, no_wrap=True)
    for title in (TOKEN_SCRIPT, SECONDS_SCRIPT, LEAST, *ratios.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shares = [_cell(row[name]) for name in (TOKEN_SCRIPT, SECONDS_SCRIPT, LEAST)]
        compared = [f"{row[LEAST]['padding'] / row[name]['padding']:.3f}" for name in ratios]
        table.add_row(row["padded"], row["buckets"], *shares, *compared)
    return table


def _cell(result: Mapping[str, float]) -> str:
    batches = f"({result['batches']:,} batches) " if "batches" in result else ""
    return f"{batches}{100 * result['share']:.2f}"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "nemo_emmett_padding")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"{options.data} is not there; name the folder of Multi30k by --data")
    logging.setLevel(logging.ERROR)
    options.cache.mkdir(parents=True, exist_ok=True)
    data, folder = options.data.resolve(), options.cache.resolve()
    tokenizer = train_tokenizer(data, folder)
    configs = {
        "text": (text_config(data, folder), text_config(data, folder, BATCHED_LINES["text"])),
        "speech": (
            speech_config(data, folder, SPOKEN_LINES, with_audio=False),
            speech_config(data, folder, BATCHED_LINES["speech"], with_audio=True),
        ),
    }
    console, results = Console(width=130), {}
    for kind, (config, batched) in configs.items():
        lengths = lengths_of(config, tokenizer)
        rows = [*compare_bins(*lengths), *compare_batches(batched, tokenizer)]
        results[kind] = {"examples": len(lengths[0]), "rows": rows}
        console.print(show(kind, len(lengths[0]), rows))
    result = {
        "multi30k": results,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES} | {"espeak-ng": espeak_version()},
        "machine": {"cores": available_cores(), "architecture": platform.machine(), "system": platform.system()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
